"""What the engine does about a failed request, with a gang of one rank in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from crossdock.launch.commands.generate import summary, survived
from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.errors import ConfigError, CrossdockError, RankError, RequestCancelled, RequestTimeout
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.watch.faults import rank_error
from crossdock.runtime.watch.gang import Notice
from reference import PROMPT
from tiers import not_quick, some, thorough

pytestmark = not_quick
SIZE = 64


class InProcessGang:
    """One rank, in this process."""

    world_size = 1
    can_restart = True
    own_rank = None

    def __init__(self) -> None:
        self.starts = 0
        self.closed = False
        self.worker = RankWorker(0, 1, torch.device("cpu"))

    def begin(self, classes: object = ()) -> None:
        pass

    def start(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.worker.teardown()
        self.starts += 1
        self.closed = False
        self.worker = RankWorker(0, 1, torch.device("cpu"))

    def collective_rpc(
        self, work: Callable[..., Any], *args: Any, timeout_s: float, notice: Notice | None = None
    ) -> list[Any]:
        self.worker.on_progress = (lambda _: notice({0: self.worker.status()})) if notice else None
        try:
            return [work(self.worker, *args)]
        except Exception as error:
            raise rank_error(self.worker.status(), error) from None

    def rpc(self, rank: int, work: Callable[..., Any], *args: Any, timeout_s: float) -> Any:
        return work(self.worker, *args)

    def close(self) -> None:
        self.closed = True
        self.worker.teardown()


@contextmanager
def _engine(directory: Path, budget: str | None = None, **recovery: int) -> Iterator[tuple[Engine, InProcessGang]]:
    offload = {"layerwise": True, "device_budget": budget}
    config = RunConfig.parse({"offload": offload, "launch": {"recovery": {"keep_every": 1} | recovery}})
    gang = InProcessGang()
    with Engine.start(config, directory, make_gang=lambda *_: gang) as engine:
        yield engine, gang


def _fail(gang: InProcessGang, error: BaseException, at: int = 3) -> None:
    """The rank that is there now raises in step `at`."""
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1
        if passes[0] == at:
            raise error

    gang.worker.loaded.model.layers[1].register_forward_pre_hook(count)


def _generate(engine: Engine, **options: Any) -> Any:
    return engine.generate(PROMPT, steps=4, height=SIZE, width=SIZE, **options)


def test_it_goes_on_where_it_was(z_image_dir: Path) -> None:
    """Steps that are done are not computed again, and every step is shown once."""
    with _engine(z_image_dir) as (engine, gang):
        expected = _generate(engine)
        _fail(gang, ValueError("planted"))
        shown: list[int] = []
        found = _generate(engine, progress=lambda step, _: shown.append(step))
        assert gang.starts == 2
        assert shown == [1, 2, 3, 4]
        assert torch.equal(found.latents[0], expected.latents[0])
        (fault,) = found.report["faults"]
        assert (fault["resumed_after"], fault["kind"], fault["rank"]) == (2, "raised", 0)
        assert "ValueError: planted (in step 3, block layers.1" in fault["error"]
        assert len(found.report["ranks"][0]["step_ms"]) == 2
        assert _generate(engine).report["faults"] == []


def test_a_fault_after_the_last_step(z_image_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the decoding is done again, and the command line can tell of a request without a step of its own."""
    with _engine(z_image_dir) as (engine, gang):
        expected = _generate(engine)

        def fail(*_: Any) -> None:
            raise ValueError("planted")

        gang.worker.loaded.pipeline.pipe.vae.decoder.register_forward_pre_hook(fail)
        found = _generate(engine)
        assert torch.equal(found.latents[0], expected.latents[0])
        (fault,) = found.report["faults"]
        assert fault["resumed_after"] == 4
        assert found.report["ranks"][0]["step_ms"] == []
        Console(width=200).print(survived(fault), summary(found.report))
        shown = capsys.readouterr().out
        assert "survived: rank 0: ValueError: planted (in decode)" in shown
        assert "went on after step 4" in shown


def test_steps_that_exchanged_other_things_are_done_again(z_image_dir: Path) -> None:
    """Found a moment too late, what they computed would be kept, and nothing of the next attempt would show it."""
    with _engine(z_image_dir) as (engine, gang):
        expected = _generate(engine)
        _fail(gang, RankError(0, "issued another collective", "collectives"), at=4)
        found = _generate(engine)
        (fault,) = found.report["faults"]
        assert (fault["kind"], fault["resumed_after"]) == ("collectives", 0)
        assert len(found.report["ranks"][0]["step_ms"]) == 4
        assert torch.equal(found.latents[0], expected.latents[0])


def test_what_took_too_long_is_not_tried_again(z_image_dir: Path) -> None:
    """A limit that is up once would be up every time: three times the wait, and the same end."""
    with _engine(z_image_dir) as (engine, gang):
        _fail(gang, RankError(0, "was not done in time", "late"))
        with pytest.raises(RankError, match="not done in time"):
            _generate(engine)
        assert (gang.starts, gang.closed) == (1, True)


def test_memory_that_runs_out_lowers_the_budget_once(z_image_dir: Path) -> None:
    """One notch, and it is said; a second time is an error that says what to do."""
    with _engine(z_image_dir, "6MiB") as (engine, gang):
        expected = _generate(engine)
        before = engine.plan.memory.budget_bytes
        schedule = expected.report["schedule"]
        assert schedule["verdict"] == schedule["schedule_note"], "its former name, for one version"
        _fail(gang, torch.OutOfMemoryError("planted"))
        found = _generate(engine)
        assert before is not None
        assert engine.plan.memory.budget_bytes == int(before * 0.9)
        assert found.report["schedule"]["budget_bytes"] == engine.plan.memory.budget_bytes
        remedy = f"device budget lowered from {before} bytes to {int(before * 0.9)} bytes"
        assert found.report["faults"][0]["remedy"] == remedy
        assert torch.equal(found.latents[0], expected.latents[0])
        setup = RankWorker.setup

        def never_enough(worker: RankWorker, *args: Any, **options: Any) -> Any:
            report = setup(worker, *args, **options)
            _fail(gang, torch.OutOfMemoryError("planted"), at=1)
            return report

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RankWorker, "setup", never_enough)
            _fail(gang, torch.OutOfMemoryError("planted"), at=1)
            with pytest.raises(RankError, match=r"planted(.|\n)*ask for a smaller picture"):
                _generate(engine)
        assert gang.closed


@thorough
def test_the_least_budget_is_a_notch_as_well(z_image_dir: Path) -> None:
    """A budget just above the least one counts as one that cannot be lowered."""
    with _engine(z_image_dir, "6MiB") as (engine, _):
        least = engine.plan.least_budget_bytes
    with pytest.raises(ConfigError, match=f"at least {least} bytes"), _engine(z_image_dir, f"{least - 1}B"):
        pass
    with _engine(z_image_dir, f"{least + 256}B") as (engine, gang):
        expected = _generate(engine)
        _fail(gang, torch.OutOfMemoryError("planted"))
        found = _generate(engine)
        assert engine.plan.memory.budget_bytes == least
        assert torch.equal(found.latents[0], expected.latents[0])


@thorough
def test_auto_that_took_too_much(z_image_dir: Path) -> None:
    """The memory that the first steps left free is needed by the decoder: out of memory in every first request."""
    with _engine(z_image_dir, "auto") as (engine, gang):

        def too_much(*_: Any) -> None:
            raise torch.OutOfMemoryError("planted")

        gang.worker.loaded.pipeline.pipe.vae.decoder.register_forward_pre_hook(too_much)
        found = _generate(engine)
        (fault,) = found.report["faults"]
        assert fault["remedy"] == "device budget lowered from auto to as little as possible"
        assert found.report["schedule"]["budget_bytes"] is None
        assert len(found.images) == 1


@thorough
def test_memory_that_runs_out_while_new_ranks_load(z_image_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new ranks are loaded with the same budget, until there are no attempts left."""
    setup, fails = RankWorker.setup, [1]

    def faulty(worker: RankWorker, *args: Any, **options: Any) -> Any:
        if fails[0] > 0:
            fails[0] -= 1
            raise torch.OutOfMemoryError("no room")
        return setup(worker, *args, **options)

    with _engine(z_image_dir, "6MiB") as (engine, gang):
        before = engine.plan.memory.budget_bytes
        monkeypatch.setattr(RankWorker, "setup", faulty)
        _fail(gang, ValueError("planted"))
        found = _generate(engine)
        assert before is not None
        assert engine.plan.memory.budget_bytes == int(before * 0.9)
        (fault,) = found.report["faults"]
        assert [text.partition(" (")[0] for text in fault["meanwhile"]] == ["rank 0: OutOfMemoryError: no room"]
        assert "after 1 more faults" in survived(fault)


@thorough
@pytest.mark.parametrize("budget", ["least", None])
def test_where_nothing_can_be_lowered(budget: str | None, z_image_dir: Path) -> None:
    """Without a budget, or at the least one, the error says what would help, after one attempt."""
    if budget == "least":
        with pytest.raises(ConfigError) as caught, _engine(z_image_dir, "1KiB"):
            pass
        budget = str(caught.value).split("at least ")[1].split(" ")[0] + "B"
    with _engine(z_image_dir, budget) as (engine, gang):
        _fail(gang, torch.OutOfMemoryError("planted"))
        with pytest.raises(RankError, match="ask for a smaller picture, or split the work over more ranks"):
            _generate(engine)
        assert (gang.starts, gang.closed) == (1, True)


@pytest.mark.parametrize("retries", some([1, 0, 2], 1))
def test_attempts_are_limited(retries: int, z_image_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that comes every time ends with its own message."""
    setup = RankWorker.setup
    with _engine(z_image_dir, retries=retries) as (engine, gang):

        def faulty(worker: RankWorker, *args: Any, **options: Any) -> Any:
            report = setup(worker, *args, **options)
            _fail(gang, ValueError("always"), at=1)
            return report

        monkeypatch.setattr(RankWorker, "setup", faulty)
        _fail(gang, ValueError("always"), at=1)
        with pytest.raises(RankError, match="ValueError: always"):
            _generate(engine)
        assert gang.starts == 1 + retries
        assert gang.closed


def test_a_gang_that_does_not_come_up_is_started_again(z_image_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that dies while it loads costs one more start; one that always does ends it."""
    setup, fails = RankWorker.setup, [1]

    def faulty(worker: RankWorker, *args: Any, **options: Any) -> Any:
        if fails[0] > 0:
            fails[0] -= 1
            raise ValueError("no load")
        return setup(worker, *args, **options)

    monkeypatch.setattr(RankWorker, "setup", faulty)
    with _engine(z_image_dir) as (engine, gang):
        assert gang.starts == 2
        assert _generate(engine).report["faults"][0]["error"].startswith("rank 0: ValueError: no load")
    fails[0] = 100
    with pytest.raises(RankError, match="no load"), _engine(z_image_dir, retries=1):
        pass
    assert fails[0] == 98


@pytest.mark.parametrize("kind", some([CompositionError, CrossdockError], 1))
def test_what_a_new_gang_would_not_mend_is_not_tried_again(kind: type[CrossdockError], z_image_dir: Path) -> None:
    """A composition that does not hold is no accident."""
    with _engine(z_image_dir) as (engine, gang):
        _fail(gang, kind("planted"))
        with pytest.raises(kind, match="planted"):
            _generate(engine)
        assert (gang.starts, gang.closed) == (1, True)


def test_cancelling(z_image_dir: Path) -> None:
    """From another thread, between two steps; the next request is right."""
    with _engine(z_image_dir) as (engine, gang):
        expected = _generate(engine)

        def cancel(step: int, _: int) -> None:
            if step == 2:
                threading.Thread(target=engine.cancel, args=("changed my mind",)).start()
                time.sleep(0.2)

        with pytest.raises(RequestCancelled, match="stopped after step 3: changed my mind"):
            _generate(engine, progress=cancel)
        assert torch.equal(_generate(engine).latents[0], expected.latents[0])
        assert gang.starts == 1


@thorough
def test_cancelling_while_ranks_are_replaced(z_image_dir: Path) -> None:
    """The cancel is lost with the rank that it was told to, or it makes an error of its own."""
    with _engine(z_image_dir) as (engine, gang):
        expected = _generate(engine)
        restart = gang.restart

        def cancelled_meanwhile() -> None:
            gang.rpc = unreachable  # type: ignore[method-assign]
            engine.cancel("too late for the old ranks")
            del gang.rpc
            restart()

        def unreachable(*_: Any, **__: Any) -> Any:
            raise RankError(0, "does not answer", "silent")

        gang.restart = cancelled_meanwhile  # type: ignore[method-assign]
        _fail(gang, ValueError("planted"))
        with pytest.raises(RequestCancelled, match="stopped after step 2: too late for the old ranks"):
            _generate(engine)
        gang.restart = restart  # type: ignore[method-assign]
        assert torch.equal(_generate(engine).latents[0], expected.latents[0])


@thorough
def test_cancelling_between_two_rounds_of_prompts(z_image_dir: Path) -> None:
    """A cancel that comes when one round is over stops that one only, and the next one is drawn."""
    with _engine(z_image_dir) as (engine, _):
        steps: list[int] = []

        def cancel(step: int, of: int) -> None:
            steps.append(step)
            if step == of:  # told when the round is over
                engine.cancel("enough")

        with pytest.raises(RequestCancelled, match="stopped after step 0: enough"):
            engine.generate((PROMPT, PROMPT), steps=2, height=SIZE, width=SIZE, progress=cancel)
        assert steps == [1, 2]
        assert len(_generate(engine).images) == 1


def test_what_happens_is_told_at_once(z_image_dir: Path) -> None:
    """A fault that is survived is only told when the picture is there."""
    with _engine(z_image_dir) as (engine, gang):
        told: list[str] = []
        engine._ranks.notify = told.append
        seen_by_new_ranks: list[int] = []
        restart = gang.restart

        def noting() -> None:
            seen_by_new_ranks.append(len(told))
            restart()

        gang.restart = noting  # type: ignore[method-assign]
        _fail(gang, ValueError("planted"))
        _generate(engine)
        assert seen_by_new_ranks == [1]
        assert told[0].startswith("rank 0: ValueError: planted (in step 3, block layers.1")
        assert told[0].endswith("; remedy: new ranks")
        assert "Traceback" not in told[0]


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds go by on this process's clocks, at once: how busy the machine is does not matter."""
    passed = [0.0]
    for name in ("perf_counter", "monotonic"):
        true = getattr(time, name)
        monkeypatch.setattr(time, name, lambda true=true: true() + passed[0])

    def pass_time(seconds: float) -> None:
        passed[0] += seconds

    return pass_time


def test_a_time_limit_counts_what_was_lost(z_image_dir: Path, pass_time: Callable[[float], None]) -> None:
    """Every new attempt gets the whole time again, and a request of 10 s takes minutes."""
    with _engine(z_image_dir) as (engine, gang):
        expected = _generate(engine)
        restart = gang.restart

        def slowly() -> None:
            pass_time(300.0)
            restart()

        gang.restart = slowly  # type: ignore[method-assign]
        _fail(gang, ValueError("planted"))
        with pytest.raises(RequestTimeout, match="stopped after step 2: the time limit is 300 s"):
            _generate(engine, time_limit_s=300.0)
        gang.restart = restart  # type: ignore[method-assign]
        assert torch.equal(_generate(engine).latents[0], expected.latents[0])
        for limit in (0, 0.0, -1.0):
            with pytest.raises(CrossdockError, match="time_limit_s: found"):
                _generate(engine, time_limit_s=limit)


@thorough
def test_a_time_limit(z_image_dir: Path, pass_time: Callable[[float], None]) -> None:
    """The request ends with the step in which its time is up; the next one is right."""
    with _engine(z_image_dir) as (engine, gang):
        expected = _generate(engine)
        with pytest.raises(RequestTimeout, match="stopped after step 2"):
            _generate(engine, time_limit_s=300.0, progress=lambda step, _: pass_time(300.0 * (step == 1)))
        assert torch.equal(_generate(engine).latents[0], expected.latents[0])
        assert gang.starts == 1
