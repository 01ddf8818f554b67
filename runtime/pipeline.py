"""The diffusers pipeline around a sharded transformer: encode, denoise, decode."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from crossdock.offload.arena import Arena
from crossdock.offload.copy_engine import CopyEngine
from crossdock.parallel.mesh import Mesh
from crossdock.runtime.components import TEXT_ENCODER, VAE, Component, place_component
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.plan import RunPlan
from crossdock.runtime.reports import Span
from crossdock.runtime.request import GenerateRequest
from crossdock.runtime.resume import Snapshot, beginning_at
from crossdock.runtime.text_encoder import ReplicatedTextEncoder


@dataclass
class Denoised:
    """`latents` is what the diffusers pipeline returns with `output_type="latent"`, in fp32 on the CPU."""

    latents: Tensor
    encodes: tuple[Span, ...]
    encode_s: float
    denoise_s: float
    step_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class StepEnd:
    """A step of the denoise loop has ended.

    Attributes:
        finished: how many steps of the request are done.
        total: how many there are.
        repeated: a resumed loop only ran this step to get to where it goes on; it was done before.
        snapshot: takes one; to be called before the next step begins.
    """

    finished: int
    total: int
    repeated: bool
    snapshot: Callable[[], Snapshot]


class RankPipeline:
    """One rank's pipeline. The loop runs on every rank; the text encoder and the VAE on the first of each replica."""

    def __init__(
        self,
        plan: RunPlan,
        mesh: Mesh,
        transformer: nn.Module,
        device: torch.device,
        engine: CopyEngine,
        arena: Arena | None,
    ) -> None:
        self._plan = plan
        self._device = device
        self._arena = arena
        first = mesh.rank == mesh.ranks["replica"][0]
        given = {"transformer": transformer} | ({} if first else {"text_encoder": None})
        self.pipe = _load_pipeline(plan, given)
        self._modules = {name: getattr(self.pipe, name) for name in (TEXT_ENCODER, VAE) if first}
        depth = plan.config.offload.depths[0]
        self._components = {
            name: place_component(name, module, device, engine, arena, depth) for name, module in self._modules.items()
        }
        for name, component in self._components.items():
            _check_turn(name, component, plan)
        self._encoder = ReplicatedTextEncoder(
            self.pipe.text_encoder, plan.pipeline_dtype, device, mesh, lambda: self.turn(TEXT_ENCODER)
        )
        self.pipe.text_encoder = self._encoder
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def on_device(self) -> tuple[nn.Module, ...]:
        """The modules beside the transformer that this rank runs."""
        return tuple(self._modules.values())

    def discard(self) -> None:
        """Give the components up."""
        for component in self._components.values():
            component.discard()

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """A component's turn on the device. On every rank, also where another one runs it.

        What the transformer loses must be the same everywhere: a block that one rank gathers, all have to gather.
        """
        if self._arena is not None:
            self._arena.evict(self._plan.turn_bytes[name])
        with self._components[name].present() if name in self._components else nullcontext():
            yield

    def denoise(
        self,
        prompt: str,
        seed: int,
        request: GenerateRequest,
        on_step: Callable[[StepEnd], None],
        resume: Snapshot | None = None,
    ) -> Denoised:
        """Run the denoise loop, from its beginning or from where `resume` was taken.

        The initial noise is drawn on the CPU; what a stochastic scheduler draws follows from the seed as well, so that
        it is the same on all ranks and in every run. An error that `on_step` raises leaves the pipeline usable.

        Raises:
            RequestError: `resume` is of another request.
        """
        guidance = {} if request.guidance_scale is None else {"guidance_scale": request.guidance_scale}
        self._encoder.calls.clear()
        began = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(seed)
        late = nullcontext() if resume is None else beginning_at(self.pipe.scheduler, resume.step)
        with _own_randomness(self._device, seed) as generators, late:
            loop = _Loop(self._device, (generator, *generators), on_step, resume)
            with loop.watching(self.pipe.transformer):
                output = self.pipe(
                    prompt=prompt,
                    num_inference_steps=request.steps,
                    height=request.height,
                    width=request.width,
                    generator=generator,
                    output_type="latent",
                    return_dict=False,
                    callback_on_step_end=loop.tick,
                    **guidance,
                )
        latents = output[0].to("cpu", torch.float32)
        encodes = tuple(Span("encode", *call) for call in self._encoder.calls)
        encode_s = sum(span.end_s - span.begin_s for span in encodes)
        return Denoised(latents, encodes, encode_s, time.perf_counter() - began - encode_s, loop.step_ms())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Image.Image:
        """latents: `[1, channels, height, width]`, as `denoise` returned them. In the VAE's turn."""
        vae = self.pipe.vae
        latents = latents.to(self._device, vae.dtype)
        if self._plan.spec.vae_input == "scale_and_shift":
            latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(latents, return_dict=False)[0]
        image: Image.Image = self.pipe.image_processor.postprocess(pixels, output_type="pil")[0]
        return image


def _check_turn(name: str, component: Component, plan: RunPlan) -> None:
    """The plan went by the component's config; what was loaded may be of another dtype."""
    planned = plan.turn_bytes.get(name, 0)
    if component.turn_bytes > planned:
        raise CheckpointError(
            f"{plan.model_dir / name}: needs {component.turn_bytes} bytes on the device, but its config makes for "
            f"{planned}; are its weights stored in another dtype than the transformer's? Set dtype in the YAML file"
        )


def _load_pipeline(plan: RunPlan, given: dict[str, nn.Module | None]) -> Any:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(diffusers, plan.spec.pipeline).from_pretrained(
            plan.model_dir, dtype=plan.pipeline_dtype, local_files_only=True, **given
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{plan.model_dir}: {plan.spec.pipeline} cannot be loaded: {error}") from error


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[tuple[torch.Generator, ...]]:
    """The generators that a scheduler draws from, which pipelines do not tell of the request's own: the process's.

    They are seeded inside, with a number that has nothing to do with the initial noise, and put back afterwards.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        generators = (torch.default_generator, *(torch.cuda.default_generators[d.index or 0] for d in cuda))
        for generator in generators:
            generator.manual_seed(random.Random(seed).getrandbits(63))
        yield generators


class _Loop:
    """The denoise loop as its callback sees it: resumes, counts, and takes the time of each step.

    On CUDA the time is taken by device events, so that no step is made to wait for the device.
    """

    def __init__(
        self,
        device: torch.device,
        generators: tuple[torch.Generator, ...],
        on_step: Callable[[StepEnd], None],
        resume: Snapshot | None,
    ) -> None:
        self._cuda = device.type == "cuda"
        self._generators = generators
        self._on_step = on_step
        self._resume = resume
        self._marks: list[Any] = []

    @contextmanager
    def watching(self, transformer: nn.Module) -> Iterator[None]:
        """The first step begins with the transformer's first call."""
        handle = transformer.register_forward_pre_hook(self._begin, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def tick(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        repeated = self._resume is not None and step == 0
        if self._resume is not None and repeated:
            latents = self._resume.restore(timestep, tensors["latents"], pipe.scheduler, self._generators)
            tensors = {**tensors, "latents": latents}
            self._marks.clear()
        self._marks.append(self._now())
        finished = step + (1 if self._resume is None else self._resume.step)

        def snapshot() -> Snapshot:
            return Snapshot.take(finished, timestep, tensors["latents"], pipe.scheduler, self._generators)

        self._on_step(StepEnd(finished, len(pipe.scheduler.timesteps), repeated, snapshot))
        return tensors

    def step_ms(self) -> list[float]:
        if self._cuda:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) for before, after in pairwise(self._marks)]
        return [(after - before) * 1e3 for before, after in pairwise(self._marks)]

    def _begin(self, *_: Any) -> None:
        if not self._marks:
            self._marks.append(self._now())

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
