"""The diffusers pipeline around sharded transformers: encode, denoise, decode."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
import transformers
from torch import Tensor, nn

from crossdock.offload.memory.arena import Arena
from crossdock.offload.memory.copy_engine import CopyEngine
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.parallel.guidance import GuidanceParallelism
from crossdock.parallel.mesh import Mesh
from crossdock.runtime.errors import CheckpointError, LaunchError
from crossdock.runtime.models.checkpoint import index_file
from crossdock.runtime.models.diffusers_api import Pipeline, working_on
from crossdock.runtime.models.foreign_code import component_to_blame, unasked
from crossdock.runtime.models.inferred.spec import InferredSpec
from crossdock.runtime.models.latents import number_of_chunks
from crossdock.runtime.models.spec import ModelSpec
from crossdock.runtime.models.transformers import transformers_in
from crossdock.runtime.pipeline.components import Component, place_component
from crossdock.runtime.pipeline.denoise_loop import DenoiseLoop, Observer, StepEnd, drawing_from, own_randomness
from crossdock.runtime.pipeline.modular import as_pipeline, share_block
from crossdock.runtime.pipeline.presence import ActiveComponent
from crossdock.runtime.pipeline.refusal import check_steps, other_size, refusal
from crossdock.runtime.pipeline.replicate import replicated
from crossdock.runtime.pipeline.snapshot import Snapshot, beginning_at
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.reports.media import Media, media_of
from crossdock.runtime.reports.records import Span
from crossdock.runtime.request import GenerateRequest, RequestItem

_MAX_REASON = 1000


@dataclass
class Denoised:
    """What a run of the pipeline gave.

    Attributes:
        latents: as the loop's last step left them, in fp32 on the CPU, `[batch, ...]`; the rest is the pipeline's own.
        media: the pictures or videos; None where another rank decodes, or nobody does.
        end_s: when the loop was done, seconds of `time.perf_counter`.
        refused: why there are no media, where this rank decodes.
        returned: the latents as the pipeline returns them if asked to with `output_type`; likewise, where it decodes.
    """

    latents: Tensor
    media: list[Media] | None
    encodes: tuple[Span, ...]
    encode_s: float
    denoise_s: float
    end_s: float
    step_ms: list[float] = field(default_factory=list)
    refused: str | None = None
    returned: Tensor | None = None

    @classmethod
    def nothing(cls, now_s: float) -> Self:
        """Of a run that was broken off."""
        return cls(torch.empty(0), None, (), 0.0, 0.0, now_s)


class _NotDecodedHereError(BaseException):
    """Leaves a pipeline where it begins to decode. No error, as which modular pipelines would tell it."""


class RankPipeline:
    """One rank's pipeline. The loop runs on every rank; what encodes and what decodes, on the first of each replica."""

    def __init__(
        self,
        plan: RunPlan,
        mesh: Mesh,
        model: nn.Module,
        device: torch.device,
        engine: CopyEngine,
        arena: Arena | None,
    ) -> None:
        self._layout = layout = plan.layout
        self._turn_bytes = plan.memory.turn_bytes
        self._device = device
        self._arena = arena
        first = mesh.rank == mesh.ranks["replica"][0]
        absent = () if first else layout.encoders
        streamed = dict(zip(layout.transformers, transformers_in(model).values(), strict=True))
        self.pipe = _load_pipeline(layout, device, streamed | dict.fromkeys(absent))
        self._modules = {name: getattr(self.pipe, name) for name in (*layout.encoders, *layout.decoders) if first}
        where, encodes = (device, engine, arena, plan.config.offload.depths[0]), plan.memory.encodes_text
        self._components = {
            name: place_component(name, module, *where, decodes=name in layout.decoders, encodes=encodes)
            for name, module in self._modules.items()
        }
        for name, component in self._components.items():
            _check_turn(layout.model_dir / name, component, self._turn_bytes.get(name, 0))
        self._active = ActiveComponent(self._components, device)
        self._observer = Observer()
        self._returned: Tensor | None = None  # by `spec.latents`
        self._encodes: list[tuple[float, float]] = []  # begin and end, seconds of time.perf_counter
        self._on_decode: Callable[[], bool] = lambda: False
        self._between_chunks: Callable[[], bool] = lambda: False
        self._hook(mesh, first)
        if (group := mesh.groups["cfg"]) is not None and layout.spec.branches is not None:
            guidance = GuidanceParallelism(group)
            for name, transformer in streamed.items():
                setattr(self.pipe, name, guidance.over(transformer, layout.spec.branches))
        self.pipe.set_progress_bar_config(disable=True)

    def _hook(self, mesh: Mesh, first: bool) -> None:
        """Encode on one rank for all of its replica, and decode on one."""
        for name in self._layout.encoders if first else ():
            self._active.watch(name, self._modules[name])
        share = partial(replicated, device=self._device, mesh=mesh, turn=self._encoding)
        for name in self._layout.spec.encode:
            if isinstance(self.pipe, diffusers.ModularPipeline):
                share_block(self.pipe, name, partial(self._told, name, share))
                continue
            method = self._told(name, share, getattr(self.pipe, name))
            object.__setattr__(self.pipe, name, method)  # the pipeline's own way takes no call for a component
        if (maker := self._layout.spec.latents) is not None:
            object.__setattr__(self.pipe, maker, self._keeping(getattr(self.pipe, maker)))
        for name in self._layout.decoders:
            module = getattr(self.pipe, name)
            if hasattr(module, "decode"):
                module.decode = self._decoding(self._active.wrap(name, module.decode), mesh)
            elif first:
                self._active.watch(name, module)

    @property
    def on_device(self) -> tuple[nn.Module, ...]:
        """The modules beside the transformers that this rank runs."""
        return tuple(self._modules.values())

    @property
    def transformers(self) -> tuple[nn.Module, ...]:
        """What the pipeline calls for each transformer."""
        return tuple(getattr(self.pipe, name) for name in self._layout.transformers)

    @property
    def components(self) -> dict[str, tuple[nn.Module, BlockStream | None]]:
        """Of each component that this rank runs, its module, and what streams it."""
        return {name: (self._modules[name], component.stream) for name, component in self._components.items()}

    def observe_uses(self, callback: Callable[[str], None]) -> None:
        """`callback` gets the name of every component that was used, while it is still where it computes."""
        self._active.on_use = callback

    def discard(self) -> None:
        """Give the components up."""
        for component in self._components.values():
            component.discard()

    @contextmanager
    def turn(self, names: tuple[str, ...]) -> Iterator[None]:
        """The turn of these components on the device. On every rank, also where another one runs them.

        What the transformer loses must be the same everywhere: a block that one rank gathers, all have to gather.
        """
        if self._arena is not None:
            self._arena.evict(max((self._turn_bytes[name] for name in names), default=0))
        with self._active:
            yield

    def run(
        self,
        items: Sequence[RequestItem],
        request: GenerateRequest,
        on_step: Callable[[StepEnd], None],
        resume: Snapshot | None = None,
        on_decode: Callable[[], bool] = lambda: False,
        observer: Observer | None = None,
        before_steps: Callable[[], None] = lambda: None,
    ) -> Denoised:
        """Run the pipeline on a batch: denoise, from the beginning or where `resume` was taken, and decode.

        The initial noise is drawn on the CPU, and what a stochastic scheduler draws as well, of each picture from its
        own seed, so that it is the same on all ranks, in every run, and however many are computed at once. An error
        that `on_step` raises leaves the pipeline usable.

        Args:
            items: of `request`, for one batch.
            on_decode: called when the loop is done; whether this rank decodes. On the first rank of a replica only.
            before_steps: called on all ranks, when all is ready for the first step.

        Raises:
            RequestError: `resume` is of another request.
            ValueError: the pipeline does not take the request; `refusal` knows. What it cannot decode is no error.
        """
        self._encodes.clear()
        self._observer = observer or Observer()
        began = time.perf_counter()
        drawn = [torch.Generator("cpu").manual_seed(item.seed) for item in items]
        self._observer.given("seeds", [generator.initial_seed() for generator in drawn])
        self._observer.given("guidance scale", request.guidance_scale)
        late = nullcontext() if resume is None else beginning_at(self.pipe.scheduler, resume.step)
        ended: list[float] = []

        def decodes() -> bool:
            if not ended:
                check_steps(loop.finished, request.steps * chunks)
                ended.append(time.perf_counter())
            return on_decode()

        self._on_decode = decodes
        output, refused = None, None
        chunks = number_of_chunks(self._layout.spec, request.frames)
        with own_randomness(self._device, items[0].seed) as generators, late, self._active:
            of_request = (*drawn, *generators), on_step, resume, chunks
            loop = DenoiseLoop(self._device, *of_request, self._observer, before_steps)
            self._between_chunks = lambda: loop.between_chunks
            arguments = self._arguments(items, drawn, request)
            with (
                loop.watching(*self.transformers),
                drawing_from(self.pipe.scheduler, arguments["generator"]),
                loop.told_by(self.pipe) as tells,
                self._guided(request),
                suppress(_NotDecodedHereError),
            ):
                try:
                    output = self.pipe(**arguments, **tells)
                except ValueError as error:
                    refused = refusal(error) if ended else None  # the other ranks are done
                    if refused is None:
                        raise
        check_steps(loop.finished, request.steps * chunks)
        assert loop.latents is not None
        media = None if output is None else self._media(output)
        if media is not None and isinstance(self._layout.spec, InferredSpec):
            refused = other_size(media, request)
        encodes = tuple(Span("encode", *call) for call in self._encodes)
        encode_s = sum(span.end_s - span.begin_s for span in encodes)
        end_s = ended[0] if ended else time.perf_counter()
        return Denoised(
            _on_cpu(loop.latents, len(items)),
            None if refused else media,
            encodes,
            encode_s,
            end_s - began - encode_s,
            end_s,
            loop.step_ms(),
            refused,
            None if output is None else _on_cpu(self._returned_latents(loop), len(items)),
        )

    def _arguments(
        self, items: Sequence[RequestItem], generators: list[torch.Generator], request: GenerateRequest
    ) -> dict[str, object]:
        """What the pipeline is called with."""
        several = len(items) > 1
        return {
            "prompt": [item.prompt for item in items] if several else items[0].prompt,
            "num_inference_steps": request.steps + self._layout.spec.more_steps,
            "height": request.height,
            "width": request.width,
            "generator": generators if several else generators[0],
            "output_type": "pil" if self._layout.spec.fps is None else "np",
            "return_dict": False,
            **self._wishes(items, request),
        }

    def _wishes(self, items: Sequence[RequestItem], request: GenerateRequest) -> dict[str, object]:
        """What else was asked for; for all else, the pipeline has its own defaults."""
        negatives = [item.negative_prompt for item in items]
        wishes = {
            self._layout.spec.guidance: request.guidance_scale,
            "negative_prompt": negatives[0] if len(items) == 1 or negatives[0] is None else negatives,
            "num_frames": request.frames,
        }
        return {name: value for name, value in wishes.items() if name and value is not None and "." not in name}

    @contextmanager
    def _guided(self, request: GenerateRequest) -> Iterator[None]:
        """A component that sets the guidance, in place of an argument, as the request wants it."""
        component, _, setting = (self._layout.spec.guidance or "").rpartition(".")
        if not component or request.guidance_scale is None:
            yield
            return
        own = getattr(self.pipe, component)
        setattr(self.pipe, component, own.new(**{setting: request.guidance_scale}))
        try:
            yield
        finally:
            setattr(self.pipe, component, own)

    def _media(self, output: Sequence[object]) -> list[Media]:
        spec, path = self._layout.spec, self._layout.spec.sampling_rate
        fps = spec.fps_of(self.pipe.config)
        return media_of(output, fps, None if path is None else attrgetter(path)(self.pipe))

    def _returned_latents(self, loop: DenoiseLoop) -> Tensor:
        if isinstance(self.pipe, diffusers.ModularPipeline):
            self._returned = self.pipe.returned_latents
        returned, self._returned = self._returned, None
        if returned is None:
            return loop.chunks[0] if len(loop.chunks) == 1 else torch.cat(loop.chunks, dim=2)
        return returned

    def _keeping(self, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            self._returned = method(*args, **kwargs)
            return self._returned

        return call

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        began = time.perf_counter()
        with self.turn(self._layout.encoders):
            yield
        self._encodes.append((began, time.perf_counter()))

    def _told(
        self, name: str, share: Callable[..., Callable[..., Any]], method: Callable[..., Any]
    ) -> Callable[..., Any]:
        """`method` as it is shared; of what it returns on this rank the observer is told."""
        encode = share(method)

        @functools.wraps(encode, updated=())  # pipelines may look at the signature
        def call(*args: object, **kwargs: object) -> Any:
            value = encode(*args, **kwargs)
            self._observer.given(f"what {name} returned", value)
            return value

        return call

    def _decoding(self, decode: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
        """`decode` of a component, where it is this rank's to do. The others go on if another chunk follows."""
        turn = partial(self.turn, self._layout.decoders)
        shapes_only = replicated(decode, self._device, mesh, turn, shapes_only=True)

        def call(*args: object, **kwargs: object) -> Any:
            if self._between_chunks():
                return shapes_only(*args, **kwargs)
            with turn():
                if not self._on_decode():
                    raise _NotDecodedHereError
                return decode(*args, **kwargs)

        return call


def _on_cpu(latents: Tensor, batch: int) -> Tensor:
    """In fp32, `[batch, ...]`; a loop for one prompt may know no batch."""
    found = latents.to("cpu", torch.float32)
    return found if len(found) == batch else found[None]


def _check_turn(where: Path, component: Component, planned: int) -> None:
    """The plan went by the component's config; what was loaded may be of another dtype."""
    if component.turn_bytes > planned:
        raise CheckpointError(
            f"{where}: needs {component.turn_bytes} bytes on the device, but its config makes for "
            f"{planned}; are its weights stored in another dtype than the transformer's? Set dtype in the YAML file"
        )


def _load_pipeline(layout: ModelLayout, device: torch.device, given: dict[str, nn.Module | None]) -> Pipeline:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, object] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    if layout.variant is not None:
        options["variant"] = layout.variant
    try:
        with unasked():
            kind: Any = working_on(_pipeline_class(layout.spec), device)
            found: Pipeline = kind.from_pretrained(layout.model_dir, dtype=layout.pipeline_dtype, **options, **given)
            return found
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
        where = component_to_blame(layout.model_dir, without=given) or index_file(layout.model_dir)
        if isinstance(error, ImportError):  # a processor of images, which is loaded also where only texts are given
            raise LaunchError(f"{where}: {layout.spec.pipeline} lacks a package: {what}") from error
        raise CheckpointError(f"{where}: {layout.spec.pipeline} cannot be loaded: {what}") from error


def _pipeline_class(spec: ModelSpec) -> type:
    found: type = getattr(diffusers, spec.pipeline)
    return as_pipeline(found, spec.outputs, spec.workflow) if issubclass(found, diffusers.ModularPipeline) else found
