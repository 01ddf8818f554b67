"""The gang protocol: what starts ranks and reaches all of them. `launch/` implements it for Ray and for torchrun."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Gang(Protocol):
    """A gang of ranks, each with a `RankWorker`."""

    world_size: int

    def start(self) -> None:
        """Bring every rank up and let them meet.

        Raises:
            LaunchError: the machine lacks something.
            RankError: a rank did not come up in time.
        """

    def call(
        self,
        work: Callable[..., T],
        *args: Any,
        timeout_s: float,
        watch: Callable[[int], None] | None = None,
    ) -> list[T]:
        """`work(worker, *args)` on every rank at once; the results by rank.

        `watch` gets the number of denoise steps that rank 0 has finished, whenever it changes.

        Raises:
            CrossdockError: what a rank raised.
            RankError: a rank died, raised something else, or did not finish in time. The gang is unusable then.
        """

    def close(self) -> None:
        """End every rank. Leaves nothing behind; may be called twice."""
