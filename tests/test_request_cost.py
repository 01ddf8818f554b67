"""A request costs what it does itself: nothing grows with the requests before it. Counted, not timed."""

from __future__ import annotations

import builtins
import gc
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from one_rank import admitted, rank_request
from test_recovery import InProcessGang

from crossdock.launch.engine.engine import Engine
from crossdock.offload.memory.copy_engine import CpuCopyEngine
from crossdock.offload.memory.host_store import mapped_share_bytes
from crossdock.offload.stream.loader import EventLog
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.plan.make_plan import make_plan
from reference import ODD_SIZE, PROMPT
from tiers import not_quick

pytestmark = not_quick
Checkpoints = dict[str, Path]
STREAMED = {"offload": {"layerwise": True}}
STEPS = 2


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are opened, by whomever."""
    paths: list[str] = []
    original = builtins.open

    def noted(file: Any, *args: Any, **kwargs: Any) -> Any:
        paths.append(str(file))
        return original(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", noted)
    monkeypatch.setattr(io, "open", noted)
    return paths


@contextmanager
def _calls() -> Iterator[Counter[str]]:
    """How often each of our functions is called meanwhile, by this thread; a generator, how often it goes on."""
    counts: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        module = str(frame.f_globals.get("__name__"))
        if event == "call" and module.startswith("crossdock."):
            counts[f"{module}: {frame.f_code.co_qualname}"] += 1

    sys.setprofile(count)
    try:
        yield counts
    finally:
        sys.setprofile(None)


def test_a_later_request_does_no_more(checkpoints: Checkpoints, opened: list[str]) -> None:
    """On the rank, and in the engine that judges it: every function is called as often as in an earlier request."""
    work: list[Counter[str]] = []
    files: list[list[str]] = []
    config = RunConfig.parse(STREAMED)
    with Engine.start(config, checkpoints["z-image"], make_gang=lambda *_: InProcessGang()) as engine:
        for _ in range(6):
            opened.clear()
            with _calls() as counts:
                engine.generate(PROMPT, steps=STEPS, height=ODD_SIZE[0], width=ODD_SIZE[1])
            work.append(counts)
            files.append([path for path in opened if "smaps" in path])
    assert work[2]["crossdock.offload.stream.loader: EventLog.note"] > 0, "what is counted is not what runs"
    grown = {name: (work[2][name], often) for name, often in work[-1].items() if often > work[2][name]}
    assert grown == {}
    assert files[0] == ["/proc/self/smaps"], "the share is looked up when all ranks have read their blocks"
    assert files[1:] == [[]] * 5, "it goes with the size of the model, and does not change"


class _CountingEngine(CpuCopyEngine):
    """Counts the events whose time is asked for."""

    asked = 0

    def seconds(self, mark: Any) -> float:
        self.asked += 1
        return super().seconds(mark)


@pytest.fixture
def engine() -> Iterator[_CountingEngine]:
    engine = _CountingEngine(60)
    yield engine
    engine.close()


def _note(log: EventLog, count: int) -> None:
    for _ in range(count):
        log.note("compute_begin", "block", 0, "compute")


def test_a_rank_that_is_torn_down_keeps_no_store(checkpoints: Checkpoints) -> None:
    """Pitfall 19: what its next model costs. The rank itself lives on."""
    plan = make_plan(RunConfig.parse({"offload": {"layerwise": True}}), checkpoints["z-image"], "cpu")
    gc.collect()
    others = mapped_share_bytes()
    with admitted(plan) as worker:
        assert mapped_share_bytes() > others
    gc.collect()
    assert not worker.ready
    assert mapped_share_bytes() == others


def test_only_what_is_asked_for_is_looked_at(engine: _CountingEngine) -> None:
    log = EventLog(engine, 1000)
    _note(log, 500)
    reads: list[tuple[Callable[[], Any], list[int]]] = [
        (lambda: log.read(since=490), list(range(490, 500))),
        (lambda: log.read(7), list(range(493, 500))),
        (lambda: log.read(7, since=497), [497, 498, 499]),
        (lambda: log.read(0), []),
        (lambda: log.read(since=500), []),
        (log.read, list(range(500))),
    ]
    for read, expected in reads:
        engine.asked = 0
        assert [event.sequence for event in read()] == expected
        assert engine.asked == len(expected)
    log.drop(495)
    _note(log, 1)
    assert [event.sequence for event in log.read(since=493)] == [493, 494, 500], "numbers are not given again"


def test_the_limit_is_for_what_was_before(engine: _CountingEngine) -> None:
    log = EventLog(engine, 10)
    _note(log, 25)
    assert [event.sequence for event in log.read()] == list(range(15, 25))
    log.keep()
    _note(log, 3)
    assert [event.sequence for event in log.read()] == list(range(18, 28)), "the end of what was before"
    _note(log, 20)
    assert [event.sequence for event in log.read()] == list(range(25, 48)), "all since"
    log.keep()
    _note(log, 4)
    assert [event.sequence for event in log.read()] == list(range(42, 52)), "and not for ever"


def test_all_of_a_long_request_is_judged(checkpoints: Checkpoints) -> None:
    """More events than the log has room for: none of this request's may be missing when its order is judged."""
    request = rank_request(PROMPT, height=ODD_SIZE[0], width=ODD_SIZE[1], steps=STEPS, number=1)
    plan = make_plan(RunConfig.parse(STREAMED), checkpoints["flux2-klein"], "cpu")
    with admitted(plan) as worker:
        coordinator = Coordinator(plan)
        coordinator.admit([worker.report()], rehearsed=False)
        worker.loaded.stream._log._limit = 20
        for _ in range(3):
            result = worker.generate(request)
            coordinator.review([result])
            computed = Counter(event.block for event in result.timeline.events if event.kind == "compute_begin")
            assert len(result.timeline.events) > worker.loaded.stream._log._limit
            assert set(computed.values()) == {2 * STEPS}, "guidance makes two passes of a step"
            assert computed.keys() == {block.name for block in plan.memory.blocks}
