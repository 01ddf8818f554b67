"""A `SequenceRegion` from diffusers' `_cp_plan`, where that says enough.

A `_cp_plan` names tensors and the dim that is cut; a region also needs the order in which attention joins them and
which of them comes out at the end. Both are watched in one pass over inputs whose segments differ in length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crossdock.parallel.regions import SHARD_LIKE_DIM, TOKEN_DIM, SequenceRegion
from crossdock.runtime.models.diffusers_api import declared_cuts

_WHAT = "Sequence parallelism"


class _NoRegionError(Exception):
    """Why a plan does not become a region."""


def infer_regions(
    model: nn.Module, inputs: Mapping[str, object] | None
) -> tuple[tuple[SequenceRegion, ...], tuple[str, ...]]:
    """The regions of `model`, and what is missing of them.

    Args:
        inputs: arguments of forward, for one pass; None: nothing is run.
    """
    declared = declared_cuts(model)
    if declared is None:
        return (), (
            f"{_WHAT}: {type(model).__name__} has no _cp_plan, so that the places to cut tokens are not known.",
        )
    try:
        enter, cuts, leave = _one_region(*declared)
        if inputs is None:
            raise _NoRegionError(f"in which order attention joins {_listed(cuts)} is seen in a run only; give inputs")
        return (_watched(model, enter, cuts, leave, inputs),), ()
    except _NoRegionError as unclear:
        return (), (f"{_WHAT}: {type(model).__name__}._cp_plan is no region: {unclear}.",)


def _one_region(starts: Mapping[str, Any], ends: Sequence[str]) -> tuple[str, tuple[str, ...], str]:
    """Where tokens are cut, the arguments that are cut, and where they are put together."""
    for path, what in starts.items():
        if not isinstance(what, Mapping) or any(
            not isinstance(name, str) or cut.split_output for name, cut in what.items()
        ):
            raise _NoRegionError(f"it cuts what {path} returns")
    if len(starts) != 1 or len(ends) != 1:
        raise _NoRegionError(f"it cuts tokens in {len(starts)} places and puts them together in {len(ends)}")
    ((enter, arguments),) = starts.items()
    for name, cut in arguments.items():
        if cut.expected_dims is None or cut.split_dim - cut.expected_dims != SHARD_LIKE_DIM:
            raise _NoRegionError(f"it cuts {name}, whose tokens are not its last dim but one")
    return enter, tuple(arguments), ends[0]


def _watched(
    model: nn.Module, enter: str, cuts: Sequence[str], leave: str, inputs: Mapping[str, Any]
) -> SequenceRegion:
    given: dict[str, Any] = {}
    put_out: dict[str, int] = {}
    spy = _JoinSpy()

    def note_arguments(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given.update(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)

    def note_output(_module: nn.Module, _args: Any, output: Any) -> None:
        put_out["tokens"] = output.shape[TOKEN_DIM]

    handles = [
        model.get_submodule(enter).register_forward_pre_hook(note_arguments, with_kwargs=True),
        model.get_submodule(leave).register_forward_hook(note_output),
    ]
    try:
        with torch.no_grad(), spy:
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if absent := [name for name in cuts if not isinstance(given.get(name), Tensor)]:
        raise _NoRegionError(f"the inputs leave {_listed(absent)} out")
    return _region(enter, leave, {name: given[name].shape[SHARD_LIKE_DIM] for name in cuts}, put_out.get("tokens"), spy)


def _region(enter: str, leave: str, lengths: Mapping[str, int], out: int | None, spy: _JoinSpy) -> SequenceRegion:
    segments = {name: length for name, length in lengths.items() if not name.endswith("_ids")}
    if len(set(segments.values())) < len(segments):
        raise _NoRegionError(f"{_listed(segments)} are of equal length in the inputs; give them different ones")
    by_length = {length: name for name, length in segments.items()}
    order = next((join for join in spy.joins if sorted(join) == sorted(by_length)), None)
    if order is None and len(segments) > 1:
        raise _NoRegionError(f"nothing joined {_listed(segments)} in the run")
    shard_like = {name: by_length.get(length) for name, length in lengths.items() if name not in segments}
    if out not in by_length or None in shard_like.values():
        raise _NoRegionError(
            f"the numbers of tokens do not tell what follows {_listed(segments)}, or what comes out at {leave}"
        )
    return SequenceRegion(
        enter=enter,
        segments=tuple(by_length[length] for length in order or by_length),
        leave=leave,
        gathers=by_length[out],
        shard_like={name: segment for name, segment in shard_like.items() if segment is not None},
        within=enter,
    )


class _JoinSpy(TorchFunctionMode):
    """The lengths of what `torch.cat` puts together along the dim of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.joins: list[tuple[int, ...]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.cat, torch.concat) and args and (kwargs or {}).get("dim", [*args, None][1]) == TOKEN_DIM:
            self.joins.append(tuple(part.shape[TOKEN_DIM] for part in args[0]))
        return func(*args, **(kwargs or {}))


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    return " and ".join(names)
