"""A transformer in one file, under its publisher's or ComfyUI's names, read as if diffusers had saved it.

diffusers' own converter is run on tensors that hold the numbers of their rows in place of weights: where a row comes
out shows where to read it. Nothing is converted in memory or on disk, and every rank reads only its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from crossdock.runtime.config.bounded_files import printable
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import Rows, StoredTensor, out_of_gguf, tensors_in
from crossdock.runtime.models.diffusers_api import single_file_converter

_SUFFIX = ".safetensors"
_WHOLE = ("model.diffusion_model.", "diffusion_model.")
"""What the names of the transformer's tensors begin with, in files of ComfyUI's that may have text encoders as well."""
_SCALED = ("scaled_fp8", "scale_weight", "scale_input", "weight_scale", "input_scale", "comfy_quant")
_MOVES_ROWS = frozenset(
    f"torch.{name}" for name in ("cat", "concat", "chunk", "split", "narrow", "functional.split")
) | frozenset(
    f"torch.Tensor.{name}" for name in ("__getitem__", "chunk", "split", "narrow", "contiguous", "clone", "detach")
)
_LOOKS = frozenset(("torch.Tensor.shape.__get__", "torch.Tensor.size", "torch.Tensor.dim", "torch.Tensor.ndim.__get__"))


def single_file(
    file: Path, class_name: str, config: Mapping[str, Any], wanted: Sequence[str]
) -> dict[str, StoredTensor]:
    """fqn -> where it is stored in `file`.

    Args:
        class_name: diffusers' transformer, of this `config`.
        wanted: the fqns of its tensors.

    Raises:
        CheckpointError: the file cannot be read, or is no such transformer in a form that only names differently.
    """
    if file.suffix != _SUFFIX:
        raise CheckpointError(f"{file}: is no {_SUFFIX} file; {_way_out(file, class_name)}")
    stored = tensors_in(file)
    if scaled := next((name for name in stored if name.endswith(_SCALED)), None):
        raise CheckpointError(
            f"{file}: {printable(scaled[:100])}: its weights are scaled FP8, which is not read yet; "
            "use the bf16 file of the same model"
        )
    if prefix := next((prefix for prefix in _WHOLE if any(name.startswith(prefix) for name in stored)), None):
        stored = {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
        plain = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        stored = plain if set(wanted) <= plain.keys() else stored
    if set(wanted) <= stored.keys():
        return stored
    converter = single_file_converter(class_name)
    if converter is None:
        raise CheckpointError(
            f"{file}: has no {wanted[0]}, and diffusers converts no file of a {class_name}; give one in its own names"
        )
    return _moved(file, stored, _converted(file, class_name, converter, config, stored))


def _way_out(file: Path, class_name: str) -> str:
    if file.suffix == ".gguf":
        return out_of_gguf(str(file), class_name)
    return (
        f"where you trust its publisher (pickles run code), convert it with diffusers' {class_name}.from_single_file"
        f"('{printable(str(file))}').save_pretrained('DIR'), and give the file that is in DIR"
    )


class _RowsOnly(TorchFunctionMode):
    """Whatever does more than move rows would turn their numbers into other rows' unseen: it is refused."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if name not in _MOVES_ROWS | _LOOKS:
            raise _ComputesError(name)
        return func(*args, **(kwargs or {}))


class _ComputesError(Exception):
    """A converter does this with weights."""


def _converted(
    file: Path,
    class_name: str,
    converter: Callable[..., Mapping[str, Tensor]],
    config: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
) -> Mapping[str, Tensor]:
    """fqn -> the numbers of its rows, counted through all of `stored`."""
    counts = _row_counts(stored)
    parts = zip(stored.items(), torch.split(torch.arange(sum(counts)), counts), strict=True)
    numbers = {name: part.reshape(-1, *[1] * (len(tensor.shape) - 1)) for (name, tensor), part in parts}
    try:
        with _RowsOnly():
            return converter(checkpoint=numbers, config=dict(config))
    except _ComputesError as error:
        what = f"diffusers computes with its weights ({error}) and does not only rename them"
    except Exception as error:  # whatever a converter may raise where names are others
        what = f"it has other tensors ({type(error).__name__}: {printable(str(error)[:200])})"
    raise CheckpointError(
        f"{file}: cannot be read as a {class_name}: {what}; convert it once with "
        f"{class_name}.from_single_file(...).save_pretrained('DIR') of diffusers, and give the file that is in DIR"
    )


def _row_counts(stored: Mapping[str, StoredTensor]) -> list[int]:
    return [tensor.shape[0] if tensor.shape else 1 for tensor in stored.values()]


def _moved(file: Path, stored: Mapping[str, StoredTensor], converted: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Where each tensor's rows come from."""
    names, counts = list(stored), _row_counts(stored)
    ends = torch.tensor(counts).cumsum(0)
    found = {}
    for fqn, numbers in converted.items():
        flat = numbers.reshape(-1)
        owners = torch.searchsorted(ends, flat, right=True).tolist()
        rows = []
        for owner, (first, last) in _runs(flat.tolist(), owners):
            begin = int(ends[owner]) - counts[owner]
            rows.append(Rows(names[owner], first - begin, last - begin, counts[owner]))
        parts = [stored[each.name] for each in rows]
        if len({(part.dtype, part.shape[1:]) for part in parts}) != 1:
            raise CheckpointError(f"{file}: {fqn} would be put together of tensors of unlike rows")
        found[fqn] = parts[0]
        if len(rows) > 1 or rows[0].last - rows[0].first < rows[0].of:
            shape = (len(flat), *parts[0].shape[1:])
            found[fqn] = replace(parts[0], shape=shape, rows=tuple(rows))
    return found


def _runs(numbers: list[int], owners: list[int]) -> list[tuple[int, tuple[int, int]]]:
    """Owner, and first and last (exclusive) number, of what stands together."""
    groups = groupby(range(len(numbers)), key=lambda place: (owners[place], numbers[place] - place))
    runs = [(owner, list(places)) for (owner, _), places in groups]
    return [(owner, (numbers[places[0]], numbers[places[-1]] + 1)) for owner, places in runs]
