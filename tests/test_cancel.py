"""Stopping a request between two steps: all ranks at the same step, and the next request is as good as the first."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import admitted, changed, rank_request

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import CrossdockError, RankError, RequestCancelled, RequestError, RequestTimeout
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.request import RankRequest
from crossdock.runtime.watch.gang import Gang
from layouts import FAMILIES
from reference import ODD_SIZE, PROMPT
from tiers import not_quick, pairs, some, thorough

pytestmark = not_quick

Checkpoints = dict[str, Path]
GangOf = Callable[[int], Gang]
STEPS = 4
REQUEST = rank_request(PROMPT, steps=STEPS, height=ODD_SIZE[0], width=ODD_SIZE[1], number=7)


def _worker(directory: Path) -> AbstractContextManager[RankWorker]:
    config = RunConfig.parse({"offload": {"layerwise": True}})
    return admitted(make_plan(config, directory, "cpu", device_bytes=2**33))


def _run(worker: RankWorker, request: RankRequest, at: int | None = None) -> Any:
    """The latents, or the error; with `at`, another thread cancels the request while the step after `at` runs."""

    def look(finished: int) -> None:
        if finished == at:
            other = threading.Thread(target=worker.cancel, args=("nobody wants it", request.number))
            other.start()
            other.join()

    worker.on_progress = look
    try:
        return worker.generate(request).latents
    except CrossdockError as error:
        return error
    finally:
        worker.on_progress = None


@pytest.mark.parametrize("family", some(FAMILIES, 1))
def test_one_rank(family: str, checkpoints: Checkpoints) -> None:
    """Stopped late or not at all, or at the cost of the next request: hooks, a turn, a scheduler left as they were."""
    with _worker(checkpoints[family]) as worker:
        expected = _run(worker, REQUEST)
        hooks = len(worker.loaded.model._forward_pre_hooks)
        for at in some([2, 1, 3], 1):
            stopped = _run(worker, changed(REQUEST, keep_every=1), at)
            assert type(stopped) is RequestCancelled
            assert (stopped.finished_steps, stopped.reason) == (at + 1, "nobody wants it")
            assert str(stopped) == f"stopped after step {at + 1}: nobody wants it"
            assert worker.kept is None
            assert worker.phase == "idle"
            assert len(worker.loaded.model._forward_pre_hooks) == hooks
            assert torch.equal(_run(worker, REQUEST), expected)
        assert torch.equal(_run(worker, REQUEST, at=STEPS), expected), "too late"
        assert torch.equal(_run(worker, REQUEST), expected), "a cancel that came too late hit the next one"


def test_a_cancel_names_its_request(z_image_dir: Path) -> None:
    """One for an earlier or a later request hits this one; of two the first counts; one while the text is encoded."""
    with _worker(z_image_dir) as worker:
        expected = _run(worker, REQUEST)
        worker.cancel("long gone", 6)
        worker.cancel("to come", 9)
        assert torch.equal(_run(worker, REQUEST), expected)
        worker.cancel("late", 7)
        assert torch.equal(_run(worker, changed(REQUEST, number=8)), expected)
        early = _run(worker, changed(REQUEST, number=9))
        assert (early.reason, early.finished_steps) == ("to come", 1)
        assert torch.equal(_run(worker, changed(REQUEST, number=10)), expected)

        encoder = worker.loaded.pipeline.pipe.text_encoder
        handle = encoder.register_forward_hook(lambda *_: worker.cancel(f"reason {next(reasons)}", 11))
        reasons = iter(range(10))
        encoding = _run(worker, changed(REQUEST, number=11))
        handle.remove()
        assert (encoding.reason, encoding.finished_steps) == ("reason 0", 1)
        assert torch.equal(_run(worker, changed(REQUEST, number=12)), expected)


def test_a_time_limit(z_image_dir: Path) -> None:
    """Never noticed, or taken for a fault; a limit that is not reached, or that hits the next request."""
    with _worker(z_image_dir) as worker:
        expected = _run(worker, REQUEST)
        stopped = _run(worker, changed(REQUEST, time_limit_s=1e-6))
        assert isinstance(stopped, RequestTimeout)
        assert (stopped.finished_steps, stopped.reason) == (1, "the time limit is 1e-06 s")
        assert torch.equal(_run(worker, REQUEST), expected)
        assert torch.equal(_run(worker, changed(REQUEST, time_limit_s=600.0)), expected)

        def dawdle(finished: int) -> None:
            time.sleep(1.1 if finished == 2 else 0)

        worker.on_progress = dawdle
        with pytest.raises(RequestTimeout) as caught:
            worker.generate(changed(REQUEST, time_limit_s=1.0))
        assert caught.value.finished_steps <= 3
        worker.on_progress = None
        worker.cancel("wins", 7)
        both = _run(worker, changed(REQUEST, time_limit_s=1e-6))
        assert type(both) is RequestCancelled


@thorough
def test_a_resumed_request_can_be_cancelled(z_image_dir: Path) -> None:
    """It is asked at the end of the repeated step, which counts as the one that was resumed."""
    request = changed(REQUEST, keep_every=1)
    with _worker(z_image_dir) as worker:
        kept: list[Any] = []
        worker.on_progress = lambda _: kept.append(worker.kept)
        worker.generate(request)
        worker.on_progress = None
        worker.cancel("no more", 7)
        with pytest.raises(RequestCancelled) as caught:
            worker.generate(request, [kept[1]])
        assert caught.value.finished_steps == 2
        assert worker.generate(request, [kept[1]]).latents is not None


@pytest.mark.parametrize("error", [RequestCancelled("why", 3), RequestTimeout("late", 4)])
def test_the_error_arrives_whole(error: RequestCancelled) -> None:
    """Lost on its way from an actor: what was said, and how far it got."""
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error)
    assert (found.reason, found.finished_steps, str(found)) == (error.reason, error.finished_steps, str(error))


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan")])
def test_senseless_time_limits_are_refused(limit: float) -> None:
    """nan compares false with everything: a limit that never comes."""
    with pytest.raises(RequestError, match="time_limit_s: found"):
        changed(REQUEST, time_limit_s=limit).asked.validate()


# -- several ranks --------------------------------------------------------------------------------------------------

LAYOUTS = {"tp2": {"tp_degree": 2}, "hsdp2": {"dp_degree": 2, "hsdp": {"shard": 2}}, "dp2": {"dp_degree": 2}}


Outcome = Callable[[RankWorker, list[RankRequest], tuple[int, int] | None], Any]


def _outcome() -> Outcome:
    """For actors, which cannot import this module."""

    def run(worker: RankWorker, requests: list[RankRequest], cancel: tuple[int, int] | None) -> Any:
        """Latents, or an error's class, text, and step or rank; `cancel`: after that many steps, on that rank only."""
        on, after = cancel or (-1, 0)

        def look(finished: int) -> None:
            if worker.rank == on and finished == after:
                threading.Timer(0.0, worker.cancel, ("from one side", requests[on].number)).start()
                time.sleep(0.05)

        look(0)
        worker.on_progress = look
        try:
            return worker.generate(requests[worker.rank]).latents
        except RequestCancelled as error:
            return type(error), str(error), error.finished_steps
        except RankError as error:
            return type(error), str(error), error.rank
        finally:
            worker.on_progress = None

    return run


@pytest.mark.parametrize(("layout", "rank"), some(pairs(LAYOUTS, [0, 1]), 1))
def test_one_rank_is_asked_and_all_stop(rank: int, layout: str, gang_of: GangOf, z_image_dir: Path) -> None:
    """The others wait in a collective for the one that stopped; or they stop a step later, and the next one hangs."""
    run = RunConfig.parse({"parallel": LAYOUTS[layout], "offload": {"layerwise": True}})
    with Engine.start(run, z_image_dir, gang_of(2)) as engine:

        def ask(requests: list[RankRequest], cancel: tuple[int, int] | None = None) -> list[Any]:
            return engine.gang.collective_rpc(_outcome(), requests, cancel, timeout_s=60)

        expected = ask([REQUEST] * 2)
        stopped = ask([REQUEST] * 2, (rank, 2))
        assert stopped == [(RequestCancelled, "stopped after step 3: from one side", 3)] * 2
        limited = [changed(REQUEST, time_limit_s=limit) for limit in ((1e-6, None) if rank == 0 else (None, 1e-6))]
        assert ask(limited) == [(RequestTimeout, "stopped after step 1: the time limit is 1e-06 s", 1)] * 2
        both = ask(limited, (limited.index(REQUEST), 0))
        assert both == [(RequestCancelled, "stopped after step 1: from one side", 1)] * 2, "who asked hears of it"
        again = ask([REQUEST] * 2)
    for before, after in zip(expected, again, strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


@pytest.mark.parametrize("change", some([{"steps": STEPS + 1}, {"number": 8}], 1))
def test_ranks_that_run_other_steps(change: dict[str, int], gang_of: GangOf, z_image_dir: Path) -> None:
    """Pitfall 20: a hang, or a collective that pairs other tensors. All ranks say who is where."""
    run = RunConfig.parse({"parallel": LAYOUTS["tp2"], "offload": {"layerwise": True}})
    other = changed(REQUEST, **change)
    where = f"rank 0: step 1 of {STEPS} of request 7; rank 1: step 1 of {other.asked.steps} of request {other.number}"
    with Engine.start(run, z_image_dir, gang_of(2)) as engine:
        first = engine.gang.collective_rpc(_outcome(), [REQUEST, other], None, timeout_s=60)
        assert first[0] == first[1]
        assert first[0][0] is RankError
        assert where in first[0][1]
        fine = engine.gang.collective_rpc(_outcome(), [REQUEST] * 2, None, timeout_s=60)
        assert isinstance(fine[0], torch.Tensor), "all stopped at the same place: the next one works"


def test_a_rank_that_left_a_step_out(gang_of: GangOf, z_image_dir: Path) -> None:
    """Pitfall 20, in the middle of a request: one rank's loop is a step ahead."""

    run_one = _outcome()

    def skip(worker: RankWorker) -> Any:
        agree = worker.stopping.agree

        def ahead(finished: int, total: int, *rest: Any) -> None:
            agree(finished + (worker.rank == 1 and finished == 3), total, *rest)

        worker.stopping.agree = ahead  # type: ignore[method-assign]
        try:
            return run_one(worker, [REQUEST] * 2, None)
        finally:
            worker.stopping.agree = agree  # type: ignore[method-assign]

    run = RunConfig.parse({"parallel": LAYOUTS["dp2"], "offload": {"layerwise": True}})
    with Engine.start(run, z_image_dir, gang_of(2)) as engine:
        first, second = engine.gang.collective_rpc(skip, timeout_s=60)
    assert first == second
    assert first[0] is RankError
    assert "rank 0: step 3 of 4 of request 7; rank 1: step 4 of 4 of request 7" in first[1]
