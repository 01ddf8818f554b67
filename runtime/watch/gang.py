"""The gang protocol: what starts ranks and reaches all of them. `launch/gangs` implements it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from crossdock.runtime.reports.status import RankStatus

T = TypeVar("T")

Notice = Callable[[Mapping[int, RankStatus]], None]
"""Gets what is known of the ranks' states, a few times a second."""


class Gang(Protocol):
    """A gang of ranks, each with a `RankWorker`."""

    world_size: int

    @property
    def can_restart(self) -> bool:
        """Whether lost ranks can be replaced from here."""

    @property
    def own_rank(self) -> int | None:
        """The rank that this process is, where every rank runs the program that calls: all have to make the same calls
        in the same order. None: the ranks are elsewhere, and any thread may call, one at a time, but for `rpc` and
        `close`, which may come while a collective call is under way.
        """

    def begin(self, classes: Sequence[tuple[str, str]] = ()) -> None:
        """Let the ranks come up and import while the caller does something else. `start` waits for them, and says what
        is wrong; it does not need this, and `close` is owed after either.

        Args:
            classes: library and name of what the ranks are going to need.
        """

    def start(self) -> None:
        """Bring every rank up and let them meet.

        Raises:
            LaunchError: the machine lacks something.
            RankError: a rank did not come up; `restart` may be tried, and `close` is still owed.
        """

    def restart(self) -> None:
        """New ranks in place of these, whatever state they are in. Raises what `start` raises."""

    def collective_rpc(
        self, work: Callable[..., T], *args: Any, timeout_s: float, notice: Notice | None = None
    ) -> list[T]:
        """`work(worker, *args)` on every rank at once; the results by rank.

        Raises:
            RequestCancelled: all ranks stopped, as asked.
            CrossdockError: what a rank raised.
            RankError: a rank died, hangs, raised something else, issued other collectives than its group, or did not
                finish in time. It says where, and what the others waited for. The gang has to be restarted.
        """

    def rpc(self, rank: int, work: Callable[..., T], *args: Any, timeout_s: float) -> T:
        """`work(worker, *args)` on one rank, on another thread than the collective call under way.

        Raises:
            RankError: no answer in time.
        """

    def close(self) -> None:
        """End every rank. Leaves nothing behind; may be called twice."""
