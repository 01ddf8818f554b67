"""The independent reference: a plain single-process diffusers run of the same checkpoint."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import Tensor

from crossdock.runtime.models.families import spec_for

PROMPT = (
    "a lighthouse on a cliff above a stormy sea at dusk, seen from a small boat, with gulls, long waves, a red roof "
    "and one lit window"
)
"""Long enough that its padded length differs from the empty prompt's: under guidance, Z-Image then needs a mask."""
OTHER_PROMPT = "two tin robots playing chess under a lamp"
EVEN_SIZE = (256, 256)
"""256 image tokens."""
ODD_SIZE = (208, 176)
"""13 x 11 = 143 image tokens: does not divide by 2 or 4."""
TOLERANCE = 1e-4


@cache
def pipeline_of(directory: Path) -> Any:
    """As diffusers loads it."""
    if (directory / "modular_model_index.json").exists():
        pipe = ModularReference(directory)
    else:
        pipe = DiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class ModularReference:
    """A pipeline that diffusers has as blocks only, with the arguments and the return values of the others."""

    def __init__(self, directory: Path) -> None:
        spec = spec_for(directory)
        self.modular = ModularPipeline.from_pretrained(str(directory), workflow=spec.workflow)
        self.modular._blocks.sub_blocks.pop("prompt_upsampler", None)  # its model is another repository's
        here = [name for name in self.modular.pretrained_component_names if (directory / name).is_dir()]
        self.modular.load_components(here, local_files_only=True)
        self.outputs = spec.outputs

    def __call__(self, *, return_dict: bool, output_type: str, **wishes: Any) -> tuple[Any, ...]:
        outputs = ("latents",) if output_type == "latent" else self.outputs
        kind = "np" if output_type == "latent" else output_type  # they decode in any case
        found = self.modular(output=list(outputs), output_type=kind, **wishes)
        return tuple(found[name] for name in outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["modular"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("modular", "outputs"):
            self.__dict__[name] = value
        else:  # a guider
            setattr(self.modular, name, value)


@dataclass(frozen=True)
class Reference:
    """`latents` as the last step left them, fp32; `media` as diffusers returns it: PIL pictures or float frames.

    `audio`: of each video, `[channels, samples]`; empty where there is none.
    """

    latents: Tensor
    media: list[Any]
    audio: list[Tensor]


@cache
def reference(
    directory: Path,
    prompt: str | tuple[str, ...] = PROMPT,
    size: tuple[int, int] = EVEN_SIZE,
    seed: int = 0,
    steps: int = 4,
    frames: int | None = None,
    guided: tuple[float, str] | None = None,
    device: str = "cpu",
) -> Reference:
    """Of several prompts, one batch; number i is drawn with `seed + i`. Computed on `device`, returned on the CPU."""
    several = isinstance(prompt, tuple)
    generators = [torch.Generator("cpu").manual_seed(seed + n) for n in range(len(prompt) if several else 1)]
    found: list[Tensor] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        found.append(tensors["latents"])
        return tensors

    pipe, at_step_end = pipeline_of(directory), {}
    pipe.to(device)
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        at_step_end = {"callback_on_step_end": keep}
    else:
        pipe.scheduler.step = _keeping(type(pipe.scheduler).step.__get__(pipe.scheduler), found)
    wishes: dict[str, Any] = {} if frames is None else {"num_frames": frames}
    own = getattr(pipe, "guider", None)
    if guided is not None:
        wishes["negative_prompt"] = [guided[1]] * len(prompt) if several else guided[1]
        if own is None:
            wishes[spec_for(directory).guidance] = guided[0]
        else:
            pipe.guider = type(own)(guidance_scale=guided[0])
    output = pipe(
        prompt=list(prompt) if several else prompt,
        height=size[0],
        width=size[1],
        num_inference_steps=steps + spec_for(directory).more_steps,
        generator=generators if several else generators[0],
        output_type="pil" if frames is None else "np",
        return_dict=False,
        **at_step_end,
        **wishes,
    )
    if own is not None:
        pipe.guider = own
    latents = found[-1] if len(found[-1]) == len(generators) else found[-1][None]
    return Reference(latents.cpu(), list(output[0]), [audio.cpu() for audio in output[1]] if len(output) > 1 else [])


def _keeping(step: Any, found: list[Tensor]) -> Any:
    """A scheduler's `step` whose results are kept, for pipelines that call nobody at a step's end."""

    def kept(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        found.append(result[0])
        return result

    return kept


def reference_latents(
    directory: Path, prompt: str = PROMPT, size: tuple[int, int] = EVEN_SIZE, seed: int = 0, steps: int = 4
) -> Tensor:
    """As the last step left them, fp32."""
    return reference(directory, prompt, size, seed, steps).latents


def max_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, f"{found.shape} instead of {expected.shape}"
    assert found.isfinite().all()
    return float((found - expected).abs().max())


def max_levels(found: Any, expected: Any) -> int:
    """How many of 256 levels two pictures or videos differ by, at most, in any pixel."""
    ours, theirs = _levels(found), _levels(expected)
    assert ours.shape == theirs.shape, f"{ours.shape} instead of {theirs.shape}"
    return int(np.abs(ours - theirs).max())


def audio_error(found: Any, expected: list[Tensor]) -> float:
    """How much the audio of a video differs from what is expected of the first one, in any sample."""
    if not expected:
        assert getattr(found, "audio", None) is None
        return 0.0
    return max_error(torch.from_numpy(found.audio.samples), expected[0])


def _levels(media: Any) -> Any:
    """A picture, or the frames of a video, as integers from 0 to 255."""
    if isinstance(media, np.ndarray):  # as diffusers returns videos: float, 0..1
        media = (media * 255).round()
    return np.asarray(getattr(media, "frames", media)).astype(np.int16)
