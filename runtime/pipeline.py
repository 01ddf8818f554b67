"""The diffusers pipeline around a sharded transformer: encode, denoise, decode."""

from __future__ import annotations

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
from crossdock.runtime.text_encoder import ReplicatedTextEncoder


@dataclass
class Denoised:
    """`latents` is what the diffusers pipeline returns with `output_type="latent"`, in fp32 on the CPU."""

    latents: Tensor
    encodes: tuple[Span, ...]
    encode_s: float
    denoise_s: float
    step_ms: list[float] = field(default_factory=list)


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

    def denoise(self, prompt: str, seed: int, request: GenerateRequest, on_step: Callable[[int], None]) -> Denoised:
        """Run the denoise loop; `on_step` gets the number of finished steps. The noise is drawn on the CPU."""
        clock = _StepClock(self._device, on_step)
        guidance = {} if request.guidance_scale is None else {"guidance_scale": request.guidance_scale}
        self._encoder.calls.clear()
        began = time.perf_counter()
        with clock.watching(self.pipe.transformer):
            output = self.pipe(
                prompt=prompt,
                num_inference_steps=request.steps,
                height=request.height,
                width=request.width,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                return_dict=False,
                callback_on_step_end=clock.tick,
                **guidance,
            )
        latents = output[0].to("cpu", torch.float32)
        encodes = tuple(Span("encode", *call) for call in self._encoder.calls)
        encode_s = sum(span.end_s - span.begin_s for span in encodes)
        return Denoised(latents, encodes, encode_s, time.perf_counter() - began - encode_s, clock.step_ms())

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


class _StepClock:
    """Time of each denoise step; on CUDA by device events, so that no step is made to wait for the device."""

    def __init__(self, device: torch.device, on_step: Callable[[int], None]) -> None:
        self._cuda = device.type == "cuda"
        self._on_step = on_step
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
        self._marks.append(self._now())
        self._on_step(step + 1)
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
