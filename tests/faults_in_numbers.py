"""Faults of what a sharded block computes, to be planted in a rank that has a model; see `test_same_as_one`.

A plant patches the product while the block in question runs, so that all others are right. Ranks
cannot import this module: its functions are pickled by value.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from crossdock.parallel import attention as attention_module
from crossdock.parallel.attention import Ulysses, _Ring
from crossdock.parallel.guidance import GuidanceParallelism
from crossdock.parallel.regions import SequenceParallelism
from crossdock.parallel.tensor import ParallelRMSNorm, RowParallelLinear
from crossdock.runtime.contract.numbers import SHARED_OUT
from crossdock.runtime.rank.worker import RankWorker


@dataclass
class Place:
    """A block of a rank's model. `hooks` are taken off when the fault is to be gone."""

    worker: RankWorker
    block: str
    hooks: ExitStack
    runs: bool = False
    """From before its arguments are cut until it has returned."""

    def watch(self) -> Self:
        def note(runs: bool, *_: Any) -> None:
            self.runs = runs

        if self.block == SHARED_OUT:
            return self
        module = self.worker.loaded.model.get_submodule(self.block)
        self.hooks.callback(module.register_forward_pre_hook(partial(note, True), prepend=True).remove)
        self.hooks.callback(module.register_forward_hook(partial(note, False)).remove)
        return self


Plant = Callable[[pytest.MonkeyPatch, Place], None]


def _wrapped(patch: pytest.MonkeyPatch, owner: Any, name: str, place: Place, faulty: Callable[..., Any]) -> None:
    """While the block runs, `faulty(original, *args)` instead of `owner.name`."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return faulty(original, *args, **kwargs) if place.runs else original(*args, **kwargs)

    patch.setattr(owner, name, call)


# -- sequence parallelism --------------------------------------------------------------------------------------------


def rotary_table_of_the_neighbour(patch: pytest.MonkeyPatch, place: Place) -> None:
    def cut(original: Any, sequence: Any, *args: Any) -> Any:
        index, sequence._index = sequence._index, (sequence._index + 1) % sequence._parts
        try:
            return original(sequence, *args)
        finally:
            sequence._index = index

    _wrapped(patch, SequenceParallelism, "_cut_like", place, cut)


def mask_shifted_by_one(patch: pytest.MonkeyPatch, place: Place) -> None:
    def shifted(original: Any, mask: Tensor, *args: Any) -> Any:
        return original(mask.roll(1, -1), *args)

    _wrapped(patch, attention_module, "score_bias", place, shifted)


def padding_attended(patch: pytest.MonkeyPatch, place: Place) -> None:
    _wrapped(patch, attention_module, "score_bias", place, lambda *_: None)


def keys_and_values_swapped_in_a_hop(patch: pytest.MonkeyPatch, place: Place) -> None:
    def swapped(original: Any, ring: Any, pair: Tensor, *args: Any) -> Any:
        return original(ring, pair.flip(0).contiguous(), *args)

    _wrapped(patch, _Ring, "_pass_on", place, swapped)


def merged_without_weights(patch: pytest.MonkeyPatch, place: Place) -> None:
    """The parts of the ring count alike, whatever their log-sum-exp."""

    def mean(original: Any, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Any:
        return (out + other.float()) / 2, lse

    _wrapped(patch, attention_module, "merge", place, mean)


def heads_in_another_order(patch: pytest.MonkeyPatch, place: Place) -> None:
    _wrapped(patch, Ulysses, "to_tokens", place, lambda original, *args: original(*args).roll(1, 2))


def own_tokens_in_another_order(patch: pytest.MonkeyPatch, place: Place) -> None:
    """Behind the attention: nobody else's are touched."""
    _wrapped(patch, Ulysses, "to_tokens", place, lambda original, *args: original(*args).flip(1))


def text_counted_twice(patch: pytest.MonkeyPatch, place: Place) -> None:
    """Of FLUX; from the first block on."""

    def doubled(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        text = {"encoder_hidden_states": 1, "txt_ids": -2}
        return args, kwargs | {name: torch.cat([kwargs[name]] * 2, dim) for name, dim in text.items()}

    model = place.worker.loaded.model
    place.hooks.callback(model.register_forward_pre_hook(doubled, with_kwargs=True, prepend=True).remove)


# -- guidance parallelism --------------------------------------------------------------------------------------------


def branches_confused(patch: pytest.MonkeyPatch, place: Place) -> None:
    """The pipeline takes each branch's numbers for the other's."""
    settle = GuidanceParallelism.settle

    def settled(guidance: Any) -> None:
        calls = list(guidance._open)
        settle(guidance)
        for call, arrived in zip(calls, [call.arrived for call in calls][::-1], strict=True):
            call.arrived = arrived

    patch.setattr(GuidanceParallelism, "settle", settled)


# -- tensor parallelism ----------------------------------------------------------------------------------------------


def bias_on_every_rank(patch: pytest.MonkeyPatch, place: Place) -> None:
    def forward(original: Any, linear: Any, input: Tensor) -> Tensor:
        output = nn.functional.linear(input, linear.weight, linear.bias)
        linear.group.all_reduce(output)
        return output

    _wrapped(patch, RowParallelLinear, "forward", place, forward)


def reduce_left_out(patch: pytest.MonkeyPatch, place: Place) -> None:
    def forward(original: Any, linear: Any, input: Tensor) -> Tensor:
        return nn.functional.linear(input, linear.weight, linear.bias)

    _wrapped(patch, RowParallelLinear, "forward", place, forward)


def norm_over_the_shard(patch: pytest.MonkeyPatch, place: Place) -> None:
    """The mean of the squares of this rank's heads alone."""
    _wrapped(patch, ParallelRMSNorm, "forward", place, lambda original, norm, x: nn.RMSNorm.forward(norm, x))
