"""Guidance parallelism on two threads: who computes what, when the ranks meet, and what the pipeline then sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from thread_ranks import ThreadGroup, groups_of, run_threads
from torch import Tensor, nn

from crossdock.parallel.group import Group
from crossdock.parallel.guidance import BranchedModel, Branches, GuidanceParallelism

Run = Callable[[BranchedModel], Any]


class Model(nn.Module):
    """Doubles what it is given, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.config = "its config"
        self.keep = "all"
        self.passes: list[tuple[int, ...]] = []

    def forward(self, hidden: Any, scale: Tensor | None = None, keep: str = "", return_dict: bool = True) -> Any:
        if isinstance(hidden, list):
            self.passes.append((len(hidden),))
            return ([2 * item for item in hidden],)
        self.passes.append(tuple(hidden.shape))
        doubled = 2 * (hidden if (keep or self.keep) == "all" else hidden[:1])
        return (doubled if scale is None else doubled * scale.view(-1, 1),)


def broadcasts(group: ThreadGroup) -> list[Any]:
    """The ranks that tensors came from."""
    return [source for what, source, *_ in group.issued if what == "broadcast"]


def run(program: Run, branches: Branches, size: int = 2) -> tuple[list[Any], list[list[tuple[int, ...]]], list[Any]]:
    """What `program` returned on every rank, the shapes of each rank's passes, and `broadcasts` of the first rank."""
    meeting, groups = groups_of(size)
    models = [Model() for _ in range(size)]

    def rank(index: int) -> Any:
        return program(GuidanceParallelism(cast(Group, groups[index])).over(models[index], branches))

    found = run_threads([meeting], rank, size)
    return found, [model.passes for model in models], broadcasts(groups[0])


X, Y = torch.arange(6.0).view(2, 3), torch.full((2, 3), 5.0)


def test_two_calls_go_to_two_ranks() -> None:
    """Guidance as pipelines write it, slices included; both ranks end with the same bits."""

    def program(model: BranchedModel) -> Tensor:
        cond = model(X, return_dict=False)[0]
        cond = cond[:, :2].to(torch.float64)
        uncond = model(Y, return_dict=False)[0][:, :2]
        return cast(Tensor, uncond + 4.0 * (cond - uncond))

    found, passes, sources = run(program, "calls")
    expected = 2 * Y[:, :2] + 4.0 * ((2 * X[:, :2]).double() - 2 * Y[:, :2])
    assert all(torch.equal(each, expected) for each in found)
    assert passes == [[(2, 3)], [(2, 3)]], "each rank computes one branch"
    assert sources == [0, 1]


def test_ranks_meet_when_a_result_is_used_not_before() -> None:
    """A slice or a cast of the first call does not make the second wait for it."""
    met: list[int] = []

    def program(model: BranchedModel) -> Tensor:
        group = cast(Any, model)._guidance._group
        first = model(X, return_dict=False)[0][:, 1:].float()
        met.append(len(broadcasts(group)))
        second = model(Y, return_dict=False)[0][:, 1:]
        met.append(len(broadcasts(group)))
        return torch.cat([first, second])

    found, _, sources = run(program, "calls")
    assert met == [0] * 4
    assert len(sources) == 2
    assert all(torch.equal(each, torch.cat([2 * X[:, 1:], 2 * Y[:, 1:]])) for each in found)


@pytest.mark.parametrize("calls", [1, 2, 3, 5])
def test_every_rank_makes_as_many_passes(calls: int) -> None:
    """HSDP gathers of a pass need every rank: a call without a counterpart is computed by all who have none."""

    def program(model: BranchedModel) -> list[Tensor]:
        made = [model(X + number, return_dict=False)[0] for number in range(calls)]
        return [each * 1 for each in made]

    found, passes, _ = run(program, "calls")
    assert all(torch.equal(each[number], 2 * (X + number)) for each in found for number in range(calls))
    assert len(passes[0]) == len(passes[1]) == -(-calls // 2)


def test_calls_that_are_used_at_once_are_right() -> None:
    """A pipeline that uses the first branch before it makes the second call gains nothing and loses nothing."""

    def program(model: BranchedModel) -> Tensor:
        first = model(X, return_dict=False)[0] + 1
        return cast(Tensor, model(first, return_dict=False)[0] + 0)

    found, _, _ = run(program, "calls")
    assert all(torch.equal(each, 2 * (2 * X + 1)) for each in found)


def test_a_deferred_tensor_is_what_torch_and_pipelines_take_for_a_tensor() -> None:
    def program(model: BranchedModel) -> list[Any]:
        deferred = model(X, return_dict=False)[0]
        dt = torch.tensor(0.5)
        return [deferred.shape, -deferred, 1 - deferred, X + dt * deferred, deferred.chunk(2)[1], torch.norm(deferred)]

    for shape, *tensors in run(program, "calls")[0]:
        assert shape == X.shape
        expected = [-2 * X, 1 - 2 * X, X + 0.5 * 2 * X, 2 * X[1:], torch.norm(2 * X)]
        assert all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))


def test_a_batch_is_cut() -> None:
    """Tensors whose first dim is the batch, and lists of one item per picture; anything else stays whole."""

    def program(model: BranchedModel) -> list[Any]:
        batch, scale = torch.arange(12.0).view(4, 3), torch.tensor([1.0, 2.0, 3.0, 4.0])
        return [model(batch, scale=scale, return_dict=False)[0], model(list(batch), return_dict=False)[0]]

    found, passes, _ = run(program, "batch")
    whole = torch.arange(12.0).view(4, 3)
    for batch, items in found:
        assert torch.equal(batch, 2 * whole * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(-1, 1))
        assert torch.equal(torch.stack(items), 2 * whole)
    assert passes == [[(2, 3), (2,)], [(2, 3), (2,)]]


def test_a_batch_that_does_not_divide_is_computed_by_all() -> None:
    """As without guidance: one picture, one branch."""
    found, passes, sources = run(lambda model: model(X[:1], return_dict=False)[0], "batch")
    assert all(torch.equal(each, 2 * X[:1]) for each in found)
    assert passes == [[(1, 3)], [(1, 3)]]
    assert sources == []


def test_other_shapes_in_the_next_request() -> None:
    """What was learnt of one size is not taken for another."""

    def program(model: BranchedModel) -> list[Tensor]:
        return [model(x, return_dict=False)[0] + 0 for x in (X, X[:, :1], X)]

    found, _, _ = run(program, "calls")
    assert all(torch.equal(each[1], 2 * X[:, :1]) and torch.equal(each[2], 2 * X) for each in found)


def test_other_shapes_in_another_mode() -> None:
    """A cache of text is filled in the first step and used in the others: the same tensors go in, fewer come out."""

    def program(model: BranchedModel) -> list[Tensor]:
        return [model(X, keep=keep, return_dict=False)[0] + 0 for keep in ("all", "half", "all", "half")]

    found, _, _ = run(program, "calls")
    for each in found:
        assert [tuple(tensor.shape) for tensor in each] == [(2, 3), (1, 3), (2, 3), (1, 3)]
        assert torch.equal(each[1], 2 * X[:1])


def test_shapes_that_nobody_could_know_are_refused() -> None:
    """Else the others would receive into memory of another size, and compute with what happened to be there."""

    def program(model: BranchedModel) -> Tensor:
        model(X, return_dict=False)[0] + 0
        held = cast(Any, model)._held[0]
        held.keep = "half"
        return model(X, return_dict=False)[0] + 0

    with pytest.raises(RuntimeError, match="for the same arguments before"):
        run(program, "calls")


def test_it_passes_for_the_transformer() -> None:
    def program(model: BranchedModel) -> Any:
        with pytest.raises(ValueError, match="return_dict=False"):
            model(X)
        with pytest.raises(AttributeError):
            _ = model.nothing_of_the_kind
        return model.config

    assert run(program, "calls")[0] == ["its config"] * 2
