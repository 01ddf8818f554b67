"""Requests from many threads: each gets its own answer, in order; a cancel ends its own request and no other.

The gang is one of threads, with the agreement at a step's end that real ranks have. The last test does the same on real
ranks.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock.launch.engine import engine as engine_module
from crossdock.launch.engine import ranks as ranks_module
from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.request_run import RequestHandle, RequestRun
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.errors import (
    CrossdockError,
    EngineClosedError,
    RankError,
    RequestCancelled,
    RequestError,
    RequestTimeout,
)
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.request import GenerateRequest, RankRequest
from crossdock.runtime.watch.gang import Gang
from fake_gang import LIMIT_S, FakeGang, TrustingCoordinator
from tiers import not_quick, thorough


@pytest.fixture(scope="module")
def plan(flux2_dir: Path) -> RunPlan:
    return make_plan(RunConfig(), flux2_dir, "cpu")


@pytest.fixture
def gang() -> FakeGang:
    return FakeGang()


@pytest.fixture
def engine(plan: RunPlan, gang: FakeGang, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(ranks_module, "Coordinator", TrustingCoordinator)
    engine = Engine(plan, gang, owns_gang=True)
    engine._ranks.start(ranks_module.Survived())
    yield engine
    gang.gate.set()
    engine.close()
    gc.collect()
    assert not _threads(), "a thread is left"


def _threads(patience_s: float = 5.0) -> list[threading.Thread]:
    """Those of queues, which may just be ending."""
    deadline = time.monotonic() + patience_s
    while (left := [t for t in threading.enumerate() if t.name == "crossdock requests"]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.01)
    return left


def _request(seed: int = 0, steps: int = 2, prompt: str = "a fox") -> GenerateRequest:
    return GenerateRequest.of(prompt, seed=seed, steps=steps)


def _begun(gang: FakeGang) -> None:
    assert gang.entered.acquire(timeout=LIMIT_S), "no step has begun"


def _ended(handle: RequestHandle) -> BaseException | float:
    try:
        return float(handle.result(LIMIT_S).latents[0])
    except CrossdockError as error:
        return error


def _cancelled(handle: RequestHandle, text: str) -> None:
    error = _ended(handle)
    assert isinstance(error, RequestCancelled), error
    assert str(error) == text


# -- in order, and each its own ----------------------------------------------------------------------------------------


def test_requests_run_in_the_order_of_their_ids(engine: Engine, gang: FakeGang) -> None:
    gang.gate.clear()
    handles: list[RequestHandle] = []
    lock = threading.Lock()

    def submit(thread: int) -> None:
        for number in range(5):
            handle = engine.submit(_request(seed=100 * thread + number))
            with lock:
                handles.append(handle)

    _together(submit, 8)
    gang.gate.set()
    found = {handle.id: _ended(handle) for handle in handles}
    assert sorted(found) == list(range(1, 41))
    assert [float(seed) for _, seed in gang.ran] == [found[number] for number in sorted(found)]
    by_thread = [[seed for _, seed in gang.ran if seed // 100 == thread] for thread in range(8)]
    assert all(seeds == sorted(seeds) for seeds in by_thread), "each thread's own order"


def test_a_program_with_one_thread_stays_one(engine: Engine, gang: FakeGang) -> None:
    """Callbacks on another thread, or Ctrl-C that does not reach the wait for the ranks."""
    shown: list[tuple[int, int, int]] = []
    engine.generate("a fox", progress=lambda *step: shown.append((threading.get_ident(), *step)))
    me = threading.get_ident()
    assert gang.threads == {me}
    assert shown == [(me, step, 4) for step in (1, 2, 3, 4)]


def test_generate_waits_for_what_was_submitted_before(engine: Engine, gang: FakeGang) -> None:
    gang.gate.clear()
    first = engine.submit(_request(1))
    threading.Timer(0.1, gang.gate.set).start()
    assert float(engine.generate("a fox", seed=2).latents[0]) == 2
    assert first.done
    assert [seed for _, seed in gang.ran] == [1, 2]


def test_progress_counts_all_rounds(engine: Engine, gang: FakeGang) -> None:
    request = GenerateRequest.of(["a fox", "a dog"], steps=3, images_per_prompt=2)
    gang.gate.clear()
    handle = engine.submit(request)
    _begun(gang)
    assert (handle.progress, handle.done) == ((0, 12), False)
    gang.gate.set()
    generation = handle.result(LIMIT_S)
    assert (handle.progress, handle.done) == ((12, 12), True)
    assert generation.images == ["a fox", "a fox", "a dog", "a dog"]
    assert [float(latents) for latents in generation.latents] == [0, 1, 2, 3]


def test_what_does_not_fit_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(RequestError, match="height: found 250"):
        engine.submit(GenerateRequest.of("a fox", height=250))


def test_a_result_that_is_not_there_in_time(engine: Engine, gang: FakeGang) -> None:
    gang.gate.clear()
    handle = engine.submit(_request(3))
    with pytest.raises(TimeoutError):
        handle.result(0.05)
    gang.gate.set()
    assert _ended(handle) == 3, "the request went on"
    assert _ended(handle) == 3, "asked twice"


def test_a_callback_that_waits_for_a_request(engine: Engine) -> None:
    """It would wait for itself, for ever."""
    with pytest.raises(RuntimeError, match="waits for a request"):
        engine.generate("a fox", progress=lambda *_: engine.submit(_request()).result())


# -- cancels -----------------------------------------------------------------------------------------------------------


def test_a_cancel_before_the_request_begins(engine: Engine, gang: FakeGang) -> None:
    """It never reaches the ranks, and it is none of the others'."""
    gang.gate.clear()
    first, second, third = (engine.submit(_request(seed)) for seed in (1, 2, 3))
    _begun(gang)
    second.cancel("nobody wants it")
    assert second.done
    second.cancel("again")
    gang.gate.set()
    _cancelled(second, "stopped after step 0: nobody wants it")
    assert (_ended(first), _ended(third)) == (1, 3)
    assert [seed for _, seed in gang.ran] == [1, 3]
    assert gang.told == []


def test_a_cancel_while_the_request_runs(engine: Engine, gang: FakeGang) -> None:
    gang.gate.clear()
    first, second = engine.submit(_request(1, steps=4)), engine.submit(_request(2))
    _begun(gang)
    first.cancel("enough")
    first.cancel("the first reason counts")
    gang.gate.set()
    _cancelled(first, "stopped after step 1: enough")
    assert _ended(second) == 2


def test_a_cancel_after_the_request(engine: Engine, gang: FakeGang) -> None:
    gang.gate.clear()
    first, second = engine.submit(_request(1)), engine.submit(_request(2, steps=3))
    gang.gate.set()
    assert _ended(first) == 1
    first.cancel("too late")
    assert _ended(first) == 1
    assert _ended(second) == 2


def test_a_cancel_between_the_queue_and_the_ranks(engine: Engine, gang: FakeGang) -> None:
    """Taken off the queue, and not begun: neither the queue nor a rank can be told."""
    generation = engine._generation

    def late(run: RequestRun) -> Any:
        if run.request.items[0].seed == 1:
            handle.cancel("in between")
        return generation(run)

    engine._generation = late  # type: ignore[method-assign]
    gang.gate.clear()
    busy = engine.submit(_request(0))
    _begun(gang)
    handle, other = engine.submit(_request(1)), engine.submit(_request(2))
    gang.gate.set()
    _cancelled(handle, "stopped after step 0: in between")
    assert (_ended(busy), _ended(other)) == (0, 2)


def test_a_cancel_just_before_the_ranks_begin(engine: Engine, gang: FakeGang) -> None:
    """The engine has looked, and the ranks do not work on the request yet: they have to know its number already."""
    looked = engine._stop_if_asked

    def then_cancelled(run: RequestRun, *rest: Any) -> None:
        looked(run, *rest)
        if run.request.items[0].seed == 1:
            handle.cancel("just then")

    engine._stop_if_asked = then_cancelled  # type: ignore[method-assign]
    gang.quiet = True
    gang.gate.clear()
    busy = engine.submit(_request(0))
    _begun(gang)
    handle, other = engine.submit(_request(1)), engine.submit(_request(2))
    gang.gate.set()
    _cancelled(handle, "stopped after step 1: just then")
    assert (_ended(busy), _ended(other)) == (0, 2)


def test_a_rank_that_was_not_told_is_told_again(engine: Engine, gang: FakeGang) -> None:
    """A message that is lost is a cancel that is lost."""
    gang.gate.clear()
    gang.deaf = True
    handle = engine.submit(_request(steps=50))
    _begun(gang)
    handle.cancel("listen")
    gang.deaf = False
    gang.gate.set()
    _cancelled(handle, "stopped after step 2: listen")
    assert gang.told == [0]


def test_the_engines_cancel_is_for_the_request_under_way(engine: Engine, gang: FakeGang) -> None:
    engine.cancel("nothing runs")
    assert float(engine.generate("a fox", seed=1).latents[0]) == 1
    gang.gate.clear()
    gang.entered = threading.Semaphore(0)
    first, second = engine.submit(_request(2)), engine.submit(_request(3))
    _begun(gang)
    engine.cancel("enough")
    gang.gate.set()
    _cancelled(first, "stopped after step 1: enough")
    assert _ended(second) == 3


def test_a_time_limit_is_its_requests_own(engine: Engine, gang: FakeGang) -> None:
    gang.gate.clear()
    first = engine.submit(GenerateRequest.of("a fox", seed=1, time_limit_s=0.05))
    second = engine.submit(_request(2))
    _begun(gang)
    time.sleep(0.1)
    gang.gate.set()
    assert isinstance(_ended(first), RequestTimeout)
    assert _ended(second) == 2


# -- faults, and the end -----------------------------------------------------------------------------------------------


def test_a_lost_rank_is_survived_by_every_request(engine: Engine, gang: FakeGang) -> None:
    gang.gate.clear()
    handles = [engine.submit(_request(seed)) for seed in range(3)]
    _begun(gang)
    gang.faults = [RankError(0, "its process died", "died")]
    gang.gate.set()
    assert [_ended(handle) for handle in handles] == [0, 1, 2]
    assert gang.starts == 2
    faults = [handle.result().report["faults"] for handle in handles]
    assert [len(each) for each in faults] == [1, 0, 0], "a fault is its request's own"


def test_memory_that_ran_out_before(engine: Engine, gang: FakeGang, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request may lower the budget once: one that did is no reason to refuse it to the next."""
    monkeypatch.setattr(ranks_module, "with_less_memory", lambda plan: plan)
    for seed in (1, 2):
        gang.faults = [RankError(0, "no room", "memory")]
        assert float(engine.generate("a fox", seed=seed).latents[0]) == seed
    gang.faults = [RankError(0, "no room", "memory"), RankError(0, "no room", "memory")]
    with pytest.raises(RankError, match="no room"):
        engine.generate("a fox")


def test_after_a_fatal_error_nobody_waits(engine: Engine, gang: FakeGang) -> None:
    gang.gate.clear()
    first, second, third = (engine.submit(_request(seed)) for seed in (1, 2, 3))
    _begun(gang)
    gang.faults = [CompositionError("single-owner: does not hold\n  more")]
    gang.gate.set()
    assert type(_ended(first)) is CompositionError
    text = "the engine takes no requests: its ranks are gone (single-owner: does not hold); start a new one"
    for handle in (second, third):
        error = _ended(handle)
        assert (type(error), str(error)) == (EngineClosedError, text)
    for later in (lambda: engine.submit(_request()), lambda: engine.generate("a fox"), engine.probe):
        with pytest.raises(EngineClosedError) as caught:
            later()
        assert str(caught.value) == text
    assert gang.closed


def test_closing_ends_what_waits(engine: Engine, gang: FakeGang) -> None:
    gang.gate.clear()
    first, second = engine.submit(_request(1, steps=50)), engine.submit(_request(2))
    _begun(gang)
    threading.Timer(0.1, gang.gate.set).start()
    engine.close()
    _cancelled(first, "stopped after step 1: the engine was closed")
    assert str(_ended(second)) == "the engine takes no requests: it was closed; start a new one"
    with pytest.raises(EngineClosedError):
        engine.submit(_request())
    engine.close()
    assert gang.starts == 1


@pytest.mark.parametrize("owned", [True, False])
def test_closing_does_not_wait_for_a_step_that_never_ends(
    owned: bool, engine: Engine, gang: FakeGang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the ranks' end looks like is no fault that is to be survived. Borrowed ranks end as well: they hang."""
    engine._ranks._owns_gang = owned
    monkeypatch.setattr(engine_module, "CLOSE_S", 0.2)
    gang.gate.clear()
    handle = engine.submit(_request())
    _begun(gang)
    began = time.monotonic()
    engine.close()
    with pytest.raises(EngineClosedError):
        handle.result(5)
    assert time.monotonic() - began < 10
    assert (gang.starts, gang.closed) == (1, True)


def test_ranks_that_come_up_after_the_close(engine: Engine, gang: FakeGang, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would end them: `close` is over."""
    monkeypatch.setattr(engine_module, "CLOSE_S", 0.2)
    restart, comes, goes_on = gang.restart, threading.Event(), threading.Event()

    def slowly() -> None:
        comes.set()
        assert goes_on.wait(LIMIT_S)
        restart()

    gang.restart = slowly  # type: ignore[method-assign]
    gang.faults = [RankError(0, "its process died", "died")]
    handle = engine.submit(_request())
    assert comes.wait(LIMIT_S)
    engine.close()
    goes_on.set()
    with pytest.raises(RequestCancelled, match="the engine was closed"):
        handle.result(5)
    assert (gang.starts, gang.closed) == (2, True)


def test_an_interrupt_in_the_middle_of_a_request(engine: Engine, gang: FakeGang) -> None:
    """Ctrl-C ends the wait; the ranks may still be at work, so that the next request gets new ones."""
    waiting: list[RequestHandle] = []

    def interrupt(step: int, _: int) -> None:
        waiting.append(engine.submit(_request(5)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate("a fox", progress=interrupt)
    assert _ended(waiting[0]) == 5
    assert gang.starts == 2
    assert float(engine.generate("a fox", seed=6).latents[0]) == 6
    assert gang.starts == 2


def test_an_interrupt_of_one_who_only_waits(engine: Engine, gang: FakeGang) -> None:
    """Others' requests are not touched, and nobody draws what nobody waits for any more."""
    gang.gate.clear()
    other = engine.submit(_request(1))
    _begun(gang)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate("a fox", seed=2)
    gang.gate.set()
    assert _ended(other) == 1
    assert [seed for _, seed in gang.ran] == [1]
    assert gang.starts == 1


def test_an_error_of_a_callback_is_its_requests_own(engine: Engine, gang: FakeGang) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("oops")

    gang.gate.clear()
    first, second = engine.submit(_request(1), progress=fail), engine.submit(_request(2))
    gang.gate.set()
    with pytest.raises(ZeroDivisionError):
        first.result(LIMIT_S)
    assert _ended(second) == 2


# -- torchrun: every rank runs the program -----------------------------------------------------------------------------


@pytest.fixture
def own_rank(gang: FakeGang) -> None:
    gang.own_rank = 3


@pytest.mark.usefixtures("own_rank")
def test_where_every_rank_runs_the_program(gang: FakeGang, request: pytest.FixtureRequest) -> None:
    """A request that runs on a thread of its own comes in another order on another rank."""
    engine: Engine = request.getfixturevalue("engine")
    first, second, third = (engine.submit(_request(seed)) for seed in (1, 2, 3))
    time.sleep(0.1)
    assert gang.ran == []
    assert _ended(second) == 2
    assert (first.done, third.done) == (True, False)
    assert float(engine.generate("a fox", seed=4).latents[0]) == 4
    assert third.done
    assert [seed for _, seed in gang.ran] == [1, 2, 3, 4]
    assert gang.threads == {threading.get_ident()}


@pytest.mark.usefixtures("own_rank")
def test_a_cancel_that_the_other_ranks_do_not_know_of(gang: FakeGang, request: pytest.FixtureRequest) -> None:
    """They begin the request: this one has to begin it, too, and all stop at its first step."""
    engine: Engine = request.getfixturevalue("engine")
    handle, other = engine.submit(_request(1)), engine.submit(_request(2))
    handle.cancel("here only")
    assert not handle.done
    _cancelled(handle, "stopped after step 1: here only")
    assert gang.told == [3], "the rank that this process is"
    assert _ended(other) == 2


# -- stress ------------------------------------------------------------------------------------------------------------


@dataclass
class Stressed:
    """What became of the requests of a stress."""

    right: int = 0
    cancelled: int = 0
    too_late: int = 0  # to be cancelled
    wrong: list[str] = field(default_factory=list)
    order: list[tuple[int, int]] = field(default_factory=list)  # seed of each id


def stress(
    engine: Engine,
    request_of: Callable[[int], GenerateRequest],
    expected: Callable[[int], torch.Tensor],
    kill: Callable[[], None],
    requests: int = 200,
    threads: int = 8,
    prompt_progress: bool = False,
) -> Stressed:
    """`requests` from `threads`, a third of them cancelled at some moment; `kill` is called once, in the middle.

    Args:
        request_of: request number n; its latents have to be `expected(n)`.
        prompt_progress: the engine hears of every step when it begins: then it is known which cancels came in time.
    """
    found, lock, submitted = Stressed(), threading.Lock(), [0]

    def one(thread: int) -> None:
        rng = random.Random(thread)
        for n in range(thread, requests, threads):
            handle = engine.submit(request_of(n))
            with lock:
                found.order.append((handle.id, n))
                submitted[0] += 1
                middle = submitted[0] == requests // 2
            if middle:
                kill()
            asked, in_time = rng.random() < 1 / 3, False
            if asked:
                time.sleep(rng.choice((0.0, 0.0, 0.002, 0.02)))
                handle.cancel(f"cancel {n}")
                finished, steps = handle.progress
                in_time = prompt_progress and not handle.done and finished < steps - 1
            if rng.random() < 0.3:  # else others come first
                _note(n, handle, asked, in_time)
            else:
                left.append((n, handle, asked, in_time))

    def _note(n: int, handle: RequestHandle, asked: bool, in_time: bool) -> None:
        try:
            latents = handle.result(600).latents[0]
            handle.cancel(f"cancel {n} when it is over")
            problem = "" if torch.equal(latents, expected(n)) else "wrong latents"
            problem = problem or ("lost cancel" if in_time else "")
            kind = "too_late" if asked else "right"
        except RequestCancelled as error:
            problem = "" if asked and error.reason == f"cancel {n}" else f"cancelled by {error.reason!r}"
            kind = "cancelled"
        except Exception as error:
            problem = kind = f"{type(error).__name__}: {error}"
        with lock:
            if problem:
                found.wrong.append(f"{n}: {problem}")
            else:
                setattr(found, kind, getattr(found, kind) + 1)

    left: list[tuple[int, RequestHandle, bool, bool]] = []
    _together(one, threads)
    for each in left:
        _note(*each)
    found.order.sort()
    return found


def _together(work: Callable[[int], None], threads: int) -> None:
    """`work(i)` on thread i; raises what one of them raises."""
    errors: list[BaseException] = []

    def caught(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    all_of_them = [threading.Thread(target=caught, args=(index,)) for index in range(threads)]
    for thread in all_of_them:
        thread.start()
    for thread in all_of_them:
        thread.join(900)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@dataclass(frozen=True)
class Held:
    """What this process holds."""

    threads: int
    runs: int
    kib: float

    @classmethod
    def now(cls) -> Held:
        _threads()
        gc.collect()
        runs = sum(type(thing) is RequestRun for thing in gc.get_objects())
        return cls(threading.active_count(), runs, tracemalloc.get_traced_memory()[0] / 1024)


def check_stress(
    engine: Engine,
    request_of: Callable[[int], GenerateRequest],
    kill: Callable[[], None],
    begin: Callable[[], None] = lambda: None,
    **options: Any,
) -> Stressed:
    """Each request's right latents are known from requests that came one by one; the memory is measured around it.

    Args:
        begin: called before each stress: a short one, after which there is what is made once, and the one that counts.
    """
    right = {n % 5: engine.run(request_of(n)).latents[0] for n in range(5)}
    tracemalloc.start()
    try:
        begin()
        stress(engine, request_of, lambda n: right[n % 5], kill, 16)
        before, snapshot = Held.now(), tracemalloc.take_snapshot()
        begin()
        found = stress(engine, request_of, lambda n: right[n % 5], kill, **options)
        after = Held.now()
        grown = tracemalloc.take_snapshot().compare_to(snapshot, "lineno")[:5]
    finally:
        tracemalloc.stop()
    print(f"before: {before}; after: {after}")
    print(f"right: {found.right}, cancelled: {found.cancelled}, too late to be cancelled: {found.too_late}")
    assert found.wrong == []
    assert found.right + found.cancelled + found.too_late == 200
    assert found.cancelled > 10
    assert (after.threads, after.runs) == (before.threads, before.runs)
    for line in grown:
        print(line)
    assert after.kib - before.kib < 200, "1 KiB for each request"
    return found


@not_quick
def test_200_requests_from_8_threads(engine: Engine, gang: FakeGang) -> None:
    """With cancels and a lost rank: every result is right, every cancel ends its own request, and order is kept."""

    def kill() -> None:
        gang.faults.append(RankError(0, "its process died", "died"))

    def request_of(n: int) -> GenerateRequest:
        return GenerateRequest.of(f"fox {n}", seed=n % 5, steps=4)

    def pause(request: RankRequest, step: int) -> None:
        time.sleep(0.001)
        at_step(request, step)

    at_step, gang.at_step = gang.at_step, pause  # type: ignore[method-assign]
    found = check_stress(engine, request_of, kill, gang.ran.clear, prompt_progress=True)
    assert gang.starts == 3
    begun = list(dict.fromkeys(int(prompt.removeprefix("fox ")) for prompt, _ in gang.ran))
    assert begun == [n for _, n in found.order if n in begun], "another order than that of submission"


@thorough
def test_200_requests_on_real_ranks(gang_of: Callable[[int], Gang], flux2_dir: Path) -> None:
    """The same, with a rank that is killed; its memory is measured where the engine is."""
    run = RunConfig.parse({"parallel": {"tp_degree": 2}, "offload": {"layerwise": True}})
    with Engine.start(run, flux2_dir, gang_of(2)) as engine:
        pids: list[list[int]] = []
        found = check_stress(
            engine,
            lambda n: GenerateRequest.of("a fox", seed=n % 5, steps=1, height=32, width=32),
            kill=lambda: os.kill(pids[-1][1], signal.SIGKILL),
            begin=lambda: pids.append(engine.gang.collective_rpc(_pid, timeout_s=60)),
        )
        pids.append(engine.gang.collective_rpc(_pid, timeout_s=60))
    assert len({pid for each in pids for pid in each}) == 6, "nobody was killed"
    assert [number for number, _ in found.order] == sorted(number for number, _ in found.order)


def _pid(worker: RankWorker) -> int:
    return os.getpid()
