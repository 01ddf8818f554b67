"""What the benchmarks say of their figures: a median, how sure it is, and whether an aim is met."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

DOUBT = 0.05
LEAST_ROUNDS = 5
"""Fewer say nothing of an aim."""


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and least to greatest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of all rounds that could have been run lies, with 95%: two of the sorted values (sign test).

    It takes no shape of the noise for granted. Fewer than six values cannot make so sure: then the least and greatest.
    """
    ordered = sorted(values)
    count = len(ordered)
    cut, below = 0, 0.0
    for number in range(count // 2):
        below += math.comb(count, number) / 2**count  # that no more than `number` values lie below the median
        if 2 * below > DOUBT:
            break
        cut = number
    return ordered[cut], ordered[-1 - cut]


def verdict(values: Sequence[float], most: float) -> str:
    """Whether the median is at most that, as far as the values can tell."""
    if len(values) < LEAST_ROUNDS:
        return "too few rounds"
    low, high = median_interval(values)
    if high <= most:
        return "met"
    return "not met" if low > most else "not resolvable (noise larger than the aim)"
