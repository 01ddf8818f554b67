"""The watch over ranks that torchrun started: who is at fault is known within seconds, and all ranks end with it.

Every rank has a thread that publishes a `Beat` to torchrun's store a few times a second and looks for a verdict. One
rank, as a rule rank 0, reads all beats and judges; any other may, where that one is silent or something happened to
itself. The first verdict counts. A rank whose main thread does not come out of a collective is ended by its thread.

torchrun's agent polls its processes every 0.1 s; when one has failed it sends SIGTERM to the others, and SIGKILL after
30 s. A Python signal handler waits for a main thread that is in a collective, so the thread reads the wake-up
descriptor, and finds out whether a rank failed or somebody wants the run to end. Document: signal.set_wakeup_fd.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import threading
import time
from dataclasses import replace
from types import FrameType
from typing import Any

import psutil
from torch.distributed import Store  # type: ignore[attr-defined]

from crossdock.launch.console import INTERRUPTED, complain_on_stderr, exit_now
from crossdock.launch.gangs.rank_messages import Lead, MessageStore, Reporter
from crossdock.launch.gangs.ranks.process_state import process_state
from crossdock.launch.gangs.run_secret import VARIABLE
from crossdock.launch.gangs.torchrun_judge import Beat, FaultVerdict, Judge
from crossdock.runtime.errors import CrossdockError, RankError
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.watch.watch import EXPLAIN_S, SUSPECT_S

REPORTED = "reported"
"""Who says what went wrong: the first one that wanted to."""

_TICK_S = 0.25
_HURRIED_TICK_S = 0.05
_INTERRUPT_S = 0.5
"""How long after a signal a failed rank may take to show."""
_LEAVE_S = 1.5
"""How long a main thread may take to end by itself after a verdict; `_CLOSE_S`: after an interruption."""
_CLOSE_S = 5.0
_MISSED = 4
"""So many rounds without an answer of the store, one after the other, and it is given up."""

_LATEST = 16
"""So many of a group's collectives are published: ranks of a group are hardly ever further apart than one."""

_VERDICT, _LEAD = "verdict", "lead"
_ENDING = (signal.SIGTERM, signal.SIGINT)


class RankWatch:
    """One rank's thread. `start`, `settle` and `stop` are for the main thread.

    Args:
        store: a connection of its own, for this try of the run; all its waits are short.
        secret: what the ranks sign with; None: they share none.
        try_name: which try of which run this is.
    """

    def __init__(self, worker: RankWorker, store: Store, secret: bytes | None, try_name: str) -> None:
        self._worker = worker
        self._rank = worker.rank
        self._messages = MessageStore(store, secret, try_name, self._tell_refused)
        self._refused = False  # a message, and that was said
        self._agent = (socket.gethostname(), os.environ.get("GROUP_RANK", "0"))
        self._parent = os.getppid()
        self._judge = Judge(self._rank, worker.world_size, self._agent, process_state)
        self._judges = False  # has judged, so all keys exist
        self._status = worker.status()
        self._beats = 0
        self._call = 0
        self._ended = False
        self._error: CrossdockError | None = None
        self._closing = False
        self._signalled_s: float | None = None
        self._interrupts = False  # the main thread was told
        self._settled = threading.Event()
        self._verdict: FaultVerdict | None = None
        self._exit_at_s: float | None = None
        self._lead: Lead | None = None  # of a rank with a smaller number
        self._lead_s = self._now_s = 0.0
        self._looked_at_s = time.monotonic()
        self._missed = 0
        self._bell, self._ringer = socket.socketpair()
        self._before: tuple[int, dict[int, Any]] | None = None
        self._thread = threading.Thread(target=self._run, name="crossdock-watch", daemon=True)

    # -- for the main thread -------------------------------------------------------------------------------------

    def start(self) -> None:
        for end in (self._bell, self._ringer):
            end.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            handlers: dict[int, Any] = {number: signal.signal(number, self._on_signal) for number in _ENDING}
            self._before = signal.set_wakeup_fd(self._ringer.fileno(), warn_on_full_buffer=False), handlers
        self._messages.clear([_VERDICT, _LEAD])
        self._thread.start()

    def begin(self) -> None:
        """A call begins."""
        self._call, self._ended = self._call + 1, False

    def end_part(self) -> None:
        """The rank's own part of the call is done; it waits for the others' results."""
        self._ended = True

    @property
    def interrupted(self) -> bool:
        """A signal has come: torchrun's, because another rank failed, or because somebody wants the run to end."""
        return self._interrupts or self._signalled_s is not None

    def settle(self, error: CrossdockError | None = None) -> CrossdockError | None:
        """Why the run ends: the verdict, or `error`, what this rank raised, where nobody has an explanation in time.

        Raises:
            KeyboardInterrupt: somebody wants it to end.
        """
        if error is not None:
            self._error = error
            self._ring()
        self._settled.wait(EXPLAIN_S + _CLOSE_S)
        if self._verdict is not None:
            return self._verdict.error
        if self.interrupted:
            raise KeyboardInterrupt
        return error

    def stop(self) -> None:
        """The main thread goes on without a watch. After a verdict, signals no longer count: it is on its way out."""
        self._closing = True
        self._ring()
        self._thread.join(_LEAVE_S)
        if self._before is not None:
            wakeup, handlers = self._before
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                if not self._settled.is_set():
                    signal.signal(number, handler)
        if not self._thread.is_alive():
            self._bell.close()
            self._ringer.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._settled.is_set() or self._interrupts:
            return
        self._interrupts = True
        raise KeyboardInterrupt

    def _ring(self) -> None:
        with contextlib.suppress(OSError):
            self._ringer.send(b"\0")

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            self._listen(_TICK_S if self._signalled_s is None and self._error is None else _HURRIED_TICK_S)
            try:
                self._round()
                self._missed = 0
            except RuntimeError:  # the store is away
                self._missed += 1
                if self._missed >= _MISSED:
                    self._settled.set()
            self._leave_in_time()
        with contextlib.suppress(RuntimeError):
            self._publish()

    def _listen(self, patience_s: float) -> None:
        select.select([self._bell], [], [], patience_s)
        now_s = time.monotonic()
        self._now_s += min(now_s - self._looked_at_s, 1.0)  # not more: this process may have been stopped itself
        self._looked_at_s = now_s
        with contextlib.suppress(BlockingIOError):
            if set(self._bell.recv(64)) & set(_ENDING) and self._signalled_s is None:
                self._signalled_s = self._now_s

    def _round(self) -> None:
        self._publish()
        if self._verdict is not None:
            return
        (verdict,), (lead,) = self._messages.get([_VERDICT], FaultVerdict), self._messages.get([_LEAD], Lead)
        suspects = self._follow(lead)
        silent_s = self._now_s - self._lead_s
        if verdict is not None:
            self._act(verdict)
        elif self._rank == 0 or suspects or self.interrupted or silent_s > SUSPECT_S + 0.3 * self._rank:
            self._judge_all()
        over = self._signalled_s is not None and self._now_s - self._signalled_s > _INTERRUPT_S
        if over and self._verdict is None and not self._judge.certain and not self._settled.is_set():
            self._exit_at_s = time.monotonic() + _CLOSE_S
            if self._rank == 0:
                self._say("interrupted")
            self._settled.set()

    def _publish(self) -> None:
        self._beats += 1
        ended = self._ended or self._closing  # asked first: what the status then says was issued is all
        with contextlib.suppress(AttributeError):  # the model is given up meanwhile
            self._status = _brief(self._worker.status())
        left = self._closing or self.interrupted
        beat = Beat(self._beats, self._status, self._agent, self._call, ended, self._error, left)
        self._messages.put(_beat_key(self._rank), beat)

    def _follow(self, lead: Lead | None) -> tuple[int, ...]:
        """Note that a rank with a smaller number judges; the ranks it cannot hear."""
        if lead is None:
            return ()
        known = None if self._lead is None else (self._lead.rank, self._lead.beat)
        if lead.rank < self._rank and (lead.rank, lead.beat) != known:
            self._lead, self._lead_s = lead, self._now_s
        return lead.suspects

    def _judge_all(self) -> None:
        keys = [_beat_key(rank) for rank in range(self._worker.world_size)]
        if not self._judges:
            self._messages.clear(keys)
            self._judges = True
        for rank, beat in enumerate(self._messages.get(keys, Beat)):
            if beat is not None and beat.status.rank == rank:
                self._judge.hear(beat, self._now_s)
        verdict = self._judge.verdict(self._now_s, self.interrupted)
        if verdict is not None:
            self._act(self._messages.put_first(_VERDICT, verdict))
        suspects = self._judge.suspects(self._now_s)
        self._messages.put(_LEAD, Lead(self._rank, self._beats, tuple(suspects)))

    def _act(self, verdict: FaultVerdict) -> None:
        """Say it, if nobody did; where the user has to act, the main thread knows more, and has time to say it."""
        self._exit_at_s = time.monotonic() + _LEAVE_S
        self._verdict = verdict
        error = verdict.error
        if verdict.judge == self._rank and isinstance(error, RankError) and error.kind != "memory":
            self._say(f"error: {error}")
        self._settled.set()
        if verdict.stopped is not None:
            agent, pid = verdict.stopped
            if agent == self._agent and self._is_sibling(pid) and process_state(pid) == "stopped":
                with contextlib.suppress(OSError):  # torchrun's SIGTERM does not reach it
                    os.kill(pid, signal.SIGKILL)

    def _is_sibling(self, pid: int) -> bool:
        """Only a rank of the same torchrun is ended, whatever pid was read."""
        with contextlib.suppress(psutil.Error, ValueError, OverflowError):
            return psutil.Process(pid).ppid() == self._parent
        return False

    def _say(self, message: str) -> None:
        with contextlib.suppress(RuntimeError):
            if not is_reporter(self._messages, self._rank):
                return
        complain_on_stderr(message)

    def _tell_refused(self, key: str, reason: str) -> None:
        """A rank that has another secret would be taken for silent; a stranger may write as often as he likes."""
        if not self._refused:
            self._refused = True
            complain_on_stderr(
                f"rank {self._rank}: a message in torchrun's store ({key}) is not taken: {reason}. If no stranger "
                f"reaches {os.environ.get('MASTER_ADDR', 'it')}, is {VARIABLE} the same on all nodes?"
            )

    def _leave_in_time(self) -> None:
        if os.getppid() != self._parent:
            if os.environ["LOCAL_RANK"] == "0":
                complain_on_stderr(f"error: torchrun (process {self._parent}) is gone")
            exit_now(CrossdockError.exit_code)
        if self._exit_at_s is None or time.monotonic() < self._exit_at_s:
            return
        if self._verdict is not None:
            self._say(f"error: {self._verdict.error}")
            exit_now(self._verdict.error.exit_code)
        exit_now(INTERRUPTED)


def is_reporter(messages: MessageStore, rank: int) -> bool:
    """Whether this rank, now, is the one that says what went wrong."""
    own = Reporter(rank, secrets.token_hex(8))
    return messages.put_first(REPORTED, own) == own


def _brief(status: RankStatus) -> RankStatus:
    """Without collectives of long ago: the judge reads this from all ranks, all the time."""
    return replace(status, groups=tuple(replace(group, last=group.last[-_LATEST:]) for group in status.groups))


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"
