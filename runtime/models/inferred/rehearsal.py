"""The first call of a transformer by its pipeline, with nothing computed: encoders and transformers are on meta.

Tokenizers, masks and latents are real, and of a small picture; what an encoder returns are zeros of the right shape.
The pipeline runs as on a rank that has no encoders: they are there while its own method encodes, and at no other time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from crossdock.runtime.models.diffusers_api import working_on
from crossdock.runtime.models.foreign_code import unasked
from crossdock.runtime.models.inferred.spec import InferredSpec

_PROMPT, _NEGATIVE_PROMPT = "a lighthouse on a cliff above a stormy sea", "blurred"
_TOKENS = 5, 7  # along the sides: their product is hardly the number of tokens of a text
_MOST_PIXELS = 256
_PIXELS = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
_FRAMES = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
"""How pipelines call what their VAE makes of a latent."""
_MAX_REASON = 300


class RehearsalError(Exception):
    """Why the pipeline did not get to its first step; one line."""


@dataclass(frozen=True)
class FirstCall:
    """
    Attributes:
        inputs: the arguments of the transformer's forward; tensors on meta.
        pixel_multiple: of this, the pipeline takes the sides of a picture, or does not say that it would not.
        frame_multiple: frames of a latent.
    """

    inputs: Mapping[str, object]
    pixel_multiple: int
    frame_multiple: int


class _CalledError(BaseException):
    """Leaves the pipeline with what its transformer was called with. No error, so that nobody in it catches it."""


def rehearse(
    spec: InferredSpec, model_dir: Path, transformers: Mapping[str, nn.Module], others: Mapping[str, nn.Module]
) -> FirstCall:
    """
    Args:
        transformers, others: the components with weights, on meta.

    Raises:
        RehearsalError: it cannot run so.
    """
    encoders = {name: module for name, module in others.items() if name in spec.encoders}
    given = {**transformers, **others, **dict.fromkeys(encoders)}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _quiet(), unasked():
            kind: Any = working_on(getattr(diffusers, spec.pipeline), torch.device("cpu"))
            pipe = kind.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False, **given)
            pipe.set_progress_bar_config(disable=True)
            for name in spec.encode:
                object.__setattr__(pipe, name, _with_encoders(pipe, getattr(pipe, name), encoders))
            first = next(iter(transformers.values()))
            multiple = (_number(pipe, _PIXELS) or 1) * _patch(first)
            while True:
                try:
                    inputs = _call(pipe, spec, multiple, transformers)
                    return FirstCall(inputs, multiple, _number(pipe, _FRAMES) or 1)
                except ValueError:  # such as a side that it cannot cut into patches
                    if 2 * multiple > _MOST_PIXELS:
                        raise
                    multiple *= 2
    except Exception as error:  # whatever a pipeline may raise
        what = " ".join(str(error).split())[:_MAX_REASON]
        raise RehearsalError(f"{spec.pipeline} without its encoders: {type(error).__name__}: {what}") from None


def _call(pipe: Any, spec: InferredSpec, multiple: int, transformers: Mapping[str, nn.Module]) -> Mapping[str, object]:
    height, width = (count * multiple for count in _TOKENS)
    wishes: dict[str, object] = {"negative_prompt": _NEGATIVE_PROMPT} if spec.negative_prompt else {}
    if spec.fps is not None:
        wishes["num_frames"] = 2 * (_number(pipe, _FRAMES) or 1) + 1
    hooks = [each.register_forward_pre_hook(_leave, prepend=True, with_kwargs=True) for each in transformers.values()]
    try:
        pipe(
            prompt=_PROMPT,
            height=height,
            width=width,
            num_inference_steps=2,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="latent",
            return_dict=False,
            **wishes,
        )
    except _CalledError as call:
        inputs: Mapping[str, object] = call.args[0]
        return inputs
    finally:
        for hook in hooks:
            hook.remove()
    raise RuntimeError("it ended without a step")


def _leave(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    raise _CalledError(pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), dict(given)))


def _with_encoders(pipe: Any, method: Callable[..., Any], encoders: Mapping[str, nn.Module]) -> Callable[..., Any]:
    def call(*args: object, **kwargs: object) -> Any:
        hooks = [hook for module in encoders.values() for hook in _bridge(module)]
        try:
            for name, module in encoders.items():
                setattr(pipe, name, module)
            with _Unknown():
                return method(*args, **kwargs)
        finally:
            for name in encoders:
                setattr(pipe, name, None)
            for hook in hooks:
                hook.remove()

    return call


class _Unknown(TorchFunctionMode):
    """What is asked of numbers that are not there, such as whether a mask lets everything pass, is answered with no."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


def _bridge(module: nn.Module) -> Iterator[Any]:
    """What the module on meta is given goes there, and what it returns comes back as zeros; also of a part of it."""
    inside: list[nn.Module] = []

    def enter(part: nn.Module, args: Any, kwargs: Any) -> Any:
        inside.append(part)
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))

    def leave(part: nn.Module, args: Any, output: Any) -> Any:
        inside.pop()
        back = partial(torch.zeros_like, device="cpu")
        return output if inside else pytree.tree_map_only(Tensor, back, output)

    for part in (module, *module.children()):
        yield part.register_forward_pre_hook(enter, with_kwargs=True)
        yield part.register_forward_hook(leave)


def _number(pipe: object, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if type(value := getattr(pipe, name, None)) is int and value > 0), None)


def _patch(transformer: nn.Module) -> int:
    """Latents along each side of a token, where its config says so."""
    config: Any = transformer.config
    size = config.get("patch_size")
    size = size[-1] if isinstance(size, list | tuple) and size else size
    return size if type(size) is int and size > 0 else 1


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, and no warnings about a picture that nobody will see."""
    log: Any = diffusers.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
