"""How much of the suite runs: `make quick`, `make test`, `make test-all`, by the variable CROSSDOCK_TESTS.

Quick is what needs no ranks in processes of their own, and one gang. The test command adds every layout, every family,
and a planted fault for every row of the contract. All is every family in every layout, and every planted fault.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import pytest

TIERS = ("quick", "test", "all")
TIER = os.environ.get("CROSSDOCK_TESTS", "test")
if TIER not in TIERS:
    raise pytest.UsageError(f"CROSSDOCK_TESTS: found {TIER}; allowed: {', '.join(TIERS)}")
QUICK = TIER == "quick"
ALL = TIER == "all"

quick = pytest.mark.quick
"""A test with ranks that `make quick` has."""
not_quick = pytest.mark.not_quick
"""A long test without ranks of its own that `make quick` leaves out."""
thorough = pytest.mark.thorough
"""A test that only `make test-all` has."""

S, T = TypeVar("S"), TypeVar("T")


def how_many(few: int, usual: int, most: int) -> int:
    """In `make quick`, in `make test`, in `make test-all`."""
    return {"quick": few, "test": usual, "all": most}[TIER]


def some(cases: Sequence[T], count: int) -> Sequence[T]:
    """The first `count` of them; in `make test-all` all."""
    return cases if ALL else cases[:count]


def every(cases: Iterable[T], nth: int) -> list[T]:
    """Each nth of them; in `make test-all` all. Of a product, `nth` has to share no factor with the last axis."""
    return list(cases)[:: 1 if ALL else nth]


def pairs(firsts: Iterable[S], seconds: Iterable[T]) -> list[tuple[S, T]]:
    """Each of `firsts` with one of `seconds`, which take turns; in `make test-all` with each of them."""
    return list(itertools.product(firsts, seconds) if ALL else zip(firsts, itertools.cycle(seconds), strict=False))


def one_each(cases: Iterable[T], of: Callable[[T], object]) -> list[T]:
    """The first case of each kind; in `make test-all` all."""
    cases = list(cases)
    return cases if ALL else list({of(case): case for case in reversed(cases)}.values())[::-1]
