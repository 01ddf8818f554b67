"""Copy engines: asynchronous work with stream and event semantics, on CUDA and on the CPU.

An engine has two lanes, `copy` (host to device) and `gather` (collectives). Work on a lane runs in the order of
submission, each piece after the events it names. The compute stream waits for an event, or records one.

On the CPU a lane is a thread. An ordering bug therefore shows up without a GPU: a copy that does not wait for the
slot's last reader really overwrites weights that are in use.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

Lane = Literal["copy", "gather"]
LANES: tuple[Lane, ...] = ("copy", "gather")
_EPOCH_S = 8.0
"""So often there is another CUDA event from which times are counted."""


class Event(Protocol):
    """Set when the work before it has run; made by an engine, and only understood by it."""


Mark = Any
"""A point in time on a lane or on the compute stream; made by an engine, and only understood by it."""


class CopyEngine(Protocol):
    def submit(
        self, lane: Lane, work: Callable[[], None], after: Sequence[Event], needs: Sequence[Event] = ()
    ) -> Event:
        """Queue `work` on `lane`; returns the event of its completion.

        Args:
            after: what has to have ended before, however it ended.
            needs: what has to have succeeded before; else `work` is not run, and its event has the same error.
        """

    def move(self, target: Tensor, source: Tensor) -> None:
        """Inside a piece of work: copy `source` (uint8, host or device) to `target` (uint8, device)."""

    def wait(self, event: Event) -> None:
        """Make the compute stream wait for `event`. Raises what the work raised, or TimeoutError."""

    def synchronize(self, event: Event) -> None:
        """Return when `event` has happened, on the device too. Raises as `wait`."""

    def record(self) -> Event:
        """An event for everything that the compute stream was given so far."""

    def mark(self, lane: Lane | Literal["compute"]) -> Mark:
        """The time at which the device gets here; inside a piece of work on its lane, else on the compute stream."""

    def seconds(self, mark: Mark) -> float:
        """`mark` on this node's monotonic clock (`time.perf_counter`); waits until the device got there."""

    def reset_clock(self) -> None:
        """The two clocks drift apart: call it now and then, while the device has nothing to do. The order of what was
        before it and after it does not show in times that are closer than it is exact (a millisecond).
        """

    def drain(self) -> None:
        """Return when all work submitted so far has been given to the device (CUDA: it is at once; CPU: has run)."""

    def close(self) -> None:
        """Run what is queued, then end the lanes."""


class _CpuEvent:
    def __init__(self, is_set: bool = False) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        if is_set:
            self.done.set()


class CpuCopyEngine:
    """One worker thread per lane.

    Args:
        timeout_s: how long `wait` and a lane wait for one event.
        delay: called before every piece of work; tests make it sleep at random.
    """

    def __init__(self, timeout_s: float = 300.0, delay: Callable[[], None] | None = None) -> None:
        self._timeout_s = timeout_s
        self._delay = delay
        self._queues: dict[Lane, queue.SimpleQueue[_Job | None]] = {lane: queue.SimpleQueue() for lane in LANES}
        self._threads = [
            threading.Thread(target=self._run, args=(self._queues[lane],), name=f"crossdock-{lane}", daemon=True)
            for lane in LANES
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, lane: Lane, work: Callable[[], None], after: Sequence[Event], needs: Sequence[Event] = ()
    ) -> Event:
        done = _CpuEvent()
        self._queues[lane].put((work, after, needs, done))
        return done

    def move(self, target: Tensor, source: Tensor) -> None:
        # numpy copies on this thread alone and lets go of the GIL; torch would start a team of compute threads
        np.copyto(target.numpy(), source.numpy())

    def wait(self, event: Event) -> None:
        self._await_end(event)
        if (error := getattr(event, "error", None)) is not None:
            raise error

    synchronize = wait

    def _await_end(self, event: Event) -> None:
        assert isinstance(event, _CpuEvent)
        if not event.done.wait(self._timeout_s):
            raise TimeoutError(f"a copy did not finish within {self._timeout_s:g} s")

    def record(self) -> Event:
        return _CpuEvent(is_set=True)  # compute on the CPU is synchronous: it has run when this is called

    def mark(self, lane: Lane | Literal["compute"]) -> Mark:
        return time.perf_counter()

    def seconds(self, mark: Mark) -> float:
        return float(mark)

    def reset_clock(self) -> None:
        pass

    def drain(self) -> None:
        for event in [self.submit(lane, nothing, ()) for lane in LANES]:
            self.wait(event)

    def close(self) -> None:
        for lane_queue in self._queues.values():
            lane_queue.put(None)
        for thread in self._threads:
            thread.join(self._timeout_s)

    def _run(self, lane_queue: queue.SimpleQueue[_Job | None]) -> None:
        while (job := lane_queue.get()) is not None:
            work, after, needs, done = job
            try:
                for event in after:
                    self._await_end(event)
                for event in needs:
                    self.wait(event)
                if self._delay is not None:
                    self._delay()
                work()
            except BaseException as error:  # handed to whoever waits for it
                done.error = error
            done.done.set()


_Job = tuple[Callable[[], None], Sequence[Event], Sequence[Event], _CpuEvent]


class CudaCopyEngine:
    """One CUDA stream per lane; waiting is done by the device, never by the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {lane: torch.cuda.Stream(device) for lane in LANES}  # type: ignore[no-untyped-call]
        self._epoch, self._epoch_began = self._now()

    def submit(
        self, lane: Lane, work: Callable[[], None], after: Sequence[Event], needs: Sequence[Event] = ()
    ) -> Event:
        stream = self._streams[lane]
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for event in (*after, *needs):
                stream.wait_event(event)  # type: ignore[arg-type]
            work()
            done.record(stream)
        return done

    def move(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)  # type: ignore[arg-type]

    def synchronize(self, event: Event) -> None:
        event.synchronize()  # type: ignore[attr-defined]

    def record(self) -> Event:
        event: Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def mark(self, lane: Lane | Literal["compute"]) -> Mark:
        if torch.cuda.is_current_stream_capturing():
            return None  # a captured event has no time of its own
        event = _timing_event()
        event.record(torch.cuda.current_stream(self._device) if lane == "compute" else self._streams[lane])
        mark = self._epoch, event
        if (now := time.perf_counter()) - self._epoch_began > _EPOCH_S:
            self._epoch, self._epoch_began = _Epoch(event, self._epoch), now
        return mark

    def seconds(self, mark: Mark) -> float:
        if mark is None:
            return 0.0
        epoch: _Epoch = mark[0]
        return epoch.seconds(mark[1])

    def reset_clock(self) -> None:
        self._epoch, self._epoch_began = self._now()

    def _now(self) -> tuple[_Epoch, float]:
        event = _timing_event()
        event.record(torch.cuda.current_stream(self._device))
        event.synchronize()
        now = time.perf_counter()
        return _Epoch(event, now), now

    def drain(self) -> None:
        pass

    def close(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


class _Epoch:
    """A CUDA event from which times are counted, and when it was on the host's clock, or from which epoch that is told.

    `elapsed_time` is ms in fp32: 0.5 us exact after `_EPOCH_S`, but 0.25 ms after an hour.
    """

    def __init__(self, event: Any, since: float | _Epoch) -> None:
        self.event = event
        self._since = since

    def seconds(self, event: Any) -> float:
        """When it happened; waits until it has. Of events of one epoch and of its followers, the order is kept."""
        untold = [self]
        while isinstance(epoch := untold[-1]._since, _Epoch):
            untold.append(epoch)
        for later, earlier in reversed(list(pairwise(untold))):
            later._since = earlier.seconds(later.event)
        assert isinstance(self._since, float)
        event.synchronize()
        self.event.synchronize()  # of another stream, maybe
        return self._since + float(self.event.elapsed_time(event)) / 1e3


def nothing() -> None:
    """For its event."""


def _timing_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def make_copy_engine(device: torch.device, timeout_s: float = 300.0) -> CopyEngine:
    return CudaCopyEngine(device) if device.type == "cuda" else CpuCopyEngine(timeout_s)
