"""Which stack a model's source names first, as it would be evaluated, and what the source leaves open."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from crossdock.offload.live.discovery import infer_stacks
from crossdock.offload.live.source_order import SourceOrder, source_order

STACKS = ("a", "b", "c")


class Block(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)


class Model(nn.Module):
    """Three stacks, declared as a, b, c; a subclass says how they run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.ModuleList(Block() for _ in range(2)) for _ in range(3))

    def run(self, stack: nn.ModuleList, x: Tensor) -> Tensor:
        for block in stack:
            x = block(x)
        return x


class InLoops(Model):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.c:
            x = block(x)
        for _, block in enumerate(self.a):
            x = block(x)
        return self.run(self.b, x)


class ArgumentsBeforeTheCall(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.a[0](self.b[0](self.c[0](x)))


class ThroughMethods(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))

    def first(self, x: Tensor) -> Tensor:
        return self.run(self.c, x) if self.deep(x) is None else x

    def deep(self, x: Tensor) -> Tensor:
        return self.run(self.b, x)

    def last(self, x: Tensor) -> Tensor:
        return self.run(self.a, self.first(x))


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


class ThroughPropertiesAndDecorators(Model):
    @property
    def ordered(self) -> list[nn.Module]:
        return [*self.c, *self.b, *self.a]

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        for block in self.ordered:
            x = block(x)
        return x


class ThroughSuper(InLoops):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.b, super().forward(x))


class OnlyAsksFirst(Model):
    def forward(self, x: Tensor) -> Tensor:
        if len(self.a) and isinstance(self.a, nn.ModuleList) and self.b is not None:
            x = x * self.a[0].weight.sum()
        blocks = [block(x) for stack in (self.c,) for block in stack]
        return self.run(self.b, self.run(self.a, blocks[0]))


class Comprehended(Model):
    def forward(self, x: Tensor) -> list[Any]:
        return [self.b[0](self.a[0](block(x))) for block in self.c]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (InLoops, "cab"),
        (ArgumentsBeforeTheCall, "cba"),
        (ThroughMethods, "bca"),
        (ThroughPropertiesAndDecorators, "cba"),
        (ThroughSuper, "cab"),
        (OnlyAsksFirst, "cab"),
        (Comprehended, "cab"),
    ],
)
def test_stacks_stand_as_they_are_first_named(kind: type[Model], expected: str) -> None:
    assert source_order(kind(), STACKS) == SourceOrder(tuple(expected))
    assert infer_stacks(kind()) == tuple(expected)


def test_modules_in_between_are_read_where_they_are_called() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early = Model(), InLoops()
            self.stages = nn.ModuleDict({"one": nn.ModuleList([Block()]), "two": nn.ModuleList([Block()])})

        def forward(self, x: Tensor) -> Tensor:
            for block in self.stages["two"]:
                x = block(x)
            return self.late.run(self.late.b, self.early(self.stages["one"][0](x)))

    stacks = ("late.b", "early.a", "early.b", "early.c", "stages.one", "stages.two")
    expected = ("stages.two", "stages.one", "early.c", "early.a", "early.b", "late.b")
    assert source_order(Outer(), stacks) == SourceOrder(expected)


def test_loops_over_two_stacks_are_told_apart() -> None:
    class Zipped(Model):
        def forward(self, x: Tensor) -> Tensor:
            for one, other in zip(self.b, self.a, strict=True):
                x = other(one(x))
            return self.run(self.c, x)

    class Inside(Model):
        def forward(self, x: Tensor) -> Tensor:
            for index, block in enumerate(self.b):
                x = block(x)
                if index % 2:
                    x = self.c[index // 2](x)
            return self.run(self.a, x)

    assert source_order(Zipped(), STACKS) == SourceOrder(("b", "a", "c"), interleaved=(("b", "a"),))
    assert source_order(Inside(), STACKS) == SourceOrder(("b", "c", "a"), interleaved=(("b", "c"),))


def test_what_the_source_does_not_tell_stands_as_declared() -> None:
    class Dynamic(Model):
        def forward(self, x: Tensor) -> Tensor:
            for name in ("c", "a"):
                x = self.run(getattr(self, name), x)
            return self.run(self.b, x)

    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(nn.ModuleList([Block()]) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for index in (1, 0):
                x = self.stages[index][0](x)
            return x

    assert source_order(Dynamic(), STACKS) == SourceOrder(("b", "a", "c"), unnamed=("a", "c"))
    stages = ("stages.0", "stages.1")
    assert source_order(Indexed(), stages) == SourceOrder(stages, together=(stages,))


def test_source_that_cannot_be_read_names_nothing() -> None:
    space: dict[str, Any] = {"Model": Model}
    exec("class Typed(Model):\n    def forward(self, x):\n        return self.c[0](x)\n", space)
    assert source_order(space["Typed"](), STACKS) == SourceOrder(STACKS, unnamed=STACKS)
    assert source_order(Model(), STACKS) == SourceOrder(STACKS, unnamed=STACKS), "no forward at all"


def test_a_method_that_calls_itself_ends() -> None:
    class Recursive(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.forward(self.run(self.c, x))

    assert source_order(Recursive(), STACKS).stacks == ("c", "a", "b")
