"""The verdict on ranks that torchrun started: from what they publish to the error that ends them all.

Other than on a gang of actors nobody stands outside: every rank can judge, and what it is told may be a while old.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crossdock.launch.gangs.rank_messages import CarriedError
from crossdock.launch.gangs.ranks.process_state import ProcessState
from crossdock.runtime.errors import CrossdockError, RankError
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.watch.faults import first_cause, is_conclusive
from crossdock.runtime.watch.watch import EXPLAIN_S, SILENT_S, SUSPECT_S, Watch, different_collective

_QUIET_S = 0.6
"""A rank that was not heard for so long is looked at: is its process gone?"""
_FRESH_S = 0.3
"""How long after a fault the others may take to publish that they wait."""


@dataclass(frozen=True)
class Beat:
    """What a rank publishes.

    Attributes:
        number: different in every beat of a rank.
        agent: which of torchrun's agents started the process; processes of one agent see each other.
        call: how many calls of the gang the rank has begun; `ended`: its own part of the latest is done.
        error: what the rank raised.
        left: it closes, or was told to end; that its process ends is no fault.
    """

    number: int
    status: RankStatus
    agent: tuple[str, str]
    call: int = 0
    ended: bool = False
    error: CarriedError | None = None
    left: bool = False


@dataclass(frozen=True)
class FaultVerdict:
    """The error that ends all ranks, found by rank `judge`.

    `stopped`: agent and pid of a process that does not hear that it has to end.
    """

    judge: int
    error: CarriedError
    stopped: tuple[tuple[str, str], int] | None = None


class Judge:
    """From the beats to a verdict. Pure but for `look`, which tells the state of a process of the same agent.

    Times are seconds on any clock that does not go back.
    """

    def __init__(self, rank: int, world_size: int, agent: tuple[str, str], look: Callable[[int], ProcessState]) -> None:
        self._rank = rank
        self._world_size = world_size
        self._agent = agent
        self._look = look
        self._beats: dict[int, Beat] = {}
        self._heard_s: dict[int, float] = {}
        self._since_s: float | None = None  # the first fault was seen
        self.certain = False  # a fault was seen that explains itself

    def hear(self, beat: Beat, now_s: float) -> None:
        known = self._beats.get(beat.status.rank)
        if known is None or known.number != beat.number:
            self._beats[beat.status.rank] = beat
            self._heard_s[beat.status.rank] = now_s

    def suspects(self, now_s: float) -> list[int]:
        """Ranks that are silent and did not leave: whoever can see their processes should look."""
        return [rank for rank, beat in self._beats.items() if not beat.left and self._quiet_s(rank, now_s) > SUSPECT_S]

    def verdict(self, now_s: float, hurried: bool = False) -> FaultVerdict | None:
        """`hurried`: look at all processes, not only at those of silent ranks."""
        watch = self._watch()
        if (odd := different_collective(watch.statuses)) is not None:
            return self._say(RankError(odd.rank, odd.what, "collectives"), watch)
        errors = {rank: beat.error for rank, beat in self._beats.items() if beat.error is not None}
        errors |= self._lost(now_s, hurried or bool(errors))
        self.certain = any(map(is_conclusive, errors.values()))
        if not errors:
            self._since_s = None
            stuck = None if hurried else watch.fault()
            return None if stuck is None else self._say(RankError(stuck.rank, stuck.what, "collectives"), watch)
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s < (_FRESH_S if self.certain else EXPLAIN_S):
            return None
        if not self.certain:
            errors = self._absent(now_s) | errors
        return self._say(first_cause(errors), watch)

    def _watch(self) -> Watch:
        watch = Watch()
        latest = max((beat.call for beat in self._beats.values()), default=0)
        for rank, beat in self._beats.items():
            watch.hear(beat.status)
            if beat.ended and beat.call == latest:
                watch.end(rank)
        return watch

    def _lost(self, now_s: float, hurried: bool) -> dict[int, CrossdockError]:
        """Ranks whose processes are gone, stopped or silent."""
        lost: dict[int, CrossdockError] = {}
        for rank, beat in self._beats.items():
            quiet_s, status = self._quiet_s(rank, now_s), beat.status
            if beat.left or beat.error is not None or rank == self._rank:
                continue
            near = beat.agent == self._agent and (hurried or quiet_s > _QUIET_S)
            state = self._look(status.pid) if near else "runs"
            if state == "gone":
                what = f"its process {status.pid} on {status.host} is gone: killed, or crashed"
                lost[rank] = RankError(rank, what, "died")
            elif state == "stopped" and quiet_s > SUSPECT_S:
                what = f"its process {status.pid} on {status.host} is stopped; it is ended with SIGKILL"
                lost[rank] = RankError(rank, what, "stopped")
            elif quiet_s > SILENT_S:
                lost[rank] = RankError(rank, f"has not been heard of for {quiet_s:.0f} s", "silent")
        return lost

    def _absent(self, now_s: float) -> dict[int, CrossdockError]:
        """Whom to blame when ranks were only cut off: one that is not there."""
        absent: dict[int, CrossdockError] = {}
        for rank in range(self._world_size):
            beat = self._beats.get(rank)
            if beat is None:
                absent[rank] = RankError(rank, "has not come up", "silent")
            elif beat.left:
                absent[rank] = RankError(rank, "was told to end", "silent")
            elif (quiet_s := self._quiet_s(rank, now_s)) > SUSPECT_S:
                absent[rank] = RankError(rank, f"has not been heard of for {quiet_s:.1f} s", "silent")
        return absent

    def _say(self, error: CrossdockError, watch: Watch) -> FaultVerdict:
        """With where the rank was, and what the others wait for."""
        stopped = None
        if isinstance(error, RankError) and error.kind == "stopped" and (beat := self._beats.get(error.rank)):
            stopped = beat.agent, beat.status.pid
        return FaultVerdict(self._rank, watch.explain(error), stopped)

    def _quiet_s(self, rank: int, now_s: float) -> float:
        return now_s - self._heard_s[rank]
