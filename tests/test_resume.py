"""Requests that are resumed: bit-identical to the uninterrupted run, wherever it was cut."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
from one_rank import admitted, changed, rank_request
from torch import Tensor

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import RequestError
from crossdock.runtime.pipeline.snapshot import Snapshot, common_start
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.rank_result import RankResult
from crossdock.runtime.request import RankRequest, RequestItem
from crossdock.runtime.watch.gang import Gang
from layouts import FAMILIES
from reference import ODD_SIZE, OTHER_PROMPT, PROMPT, TOLERANCE, max_error
from tiers import ALL, every, not_quick, some, thorough

pytestmark = not_quick

Checkpoints = dict[str, Path]
GangOf = Callable[[int], Gang]
STEPS = 5
REQUEST = rank_request(PROMPT, seed=3, steps=STEPS, height=ODD_SIZE[0], width=ODD_SIZE[1], keep_every=1)


class _UniPC(diffusers.UniPCMultistepScheduler):
    """diffusers 0.42 multiplies Z-Image's list of sigmas by a float."""

    def set_timesteps(self, *args: Any, sigmas: Any = None, **kwargs: Any) -> None:
        super().set_timesteps(*args, sigmas=None if sigmas is None else numpy.array(sigmas), **kwargs)


def _flow(scheduler: Any, **settings: Any) -> Any:
    return scheduler(use_flow_sigmas=True, prediction_type="flow_prediction", **settings)


_SHIFTED = {"use_dynamic_shifting": True, "time_shift_type": "exponential"}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "euler": lambda own: own,
    "stochastic euler": lambda own: type(own).from_config(own.config, stochastic_sampling=True),
    "lcm": lambda own: diffusers.FlowMatchLCMScheduler(shift=3.0),
    "unipc": lambda own: _flow(_UniPC, solver_order=3, flow_shift=3.0),
    "dpm": lambda own: _flow(diffusers.DPMSolverMultistepScheduler, **_SHIFTED),
    "stochastic dpm": lambda own: _flow(
        diffusers.DPMSolverMultistepScheduler, **_SHIFTED, algorithm_type="sde-dpmsolver++"
    ),
}
TAKES_NO_SIGMAS = {"dpm", "stochastic dpm"}
"""Z-Image gives its scheduler sigmas, which diffusers' DPMSolverMultistep refuses."""
CASES = [
    (family, name) for family in FAMILIES for name in SCHEDULERS if family != "z-image" or name not in TAKES_NO_SIGMAS
]
CASES.append(("longcat-image", "stochastic euler"))  # a pipeline that calls nobody at a step's end
FEW = [("flux2-klein", "stochastic dpm"), CASES[-1]]


@contextmanager
def _worker(directory: Path, scheduler: str = "euler", device: str = "cpu") -> Iterator[RankWorker]:
    """A rank in this process, admitted; its blocks are streamed."""
    plan = make_plan(RunConfig.parse({"offload": {"layerwise": True}}), directory, device, device_bytes=2**33)
    with admitted(plan) as worker:
        worker.loaded.pipeline.pipe.scheduler = SCHEDULERS[scheduler](worker.loaded.pipeline.pipe.scheduler)
        yield worker


class _FaultError(Exception):
    """Plays what ends a request."""


def _cut(worker: RankWorker, request: RankRequest) -> dict[int, Snapshot]:
    """Run `request`; what another thread could have read at each step's end, sent to another process afterwards."""
    found: dict[int, Snapshot] = {}

    def look(finished: int) -> None:
        assert worker.kept is not None
        found[finished] = worker.kept

    worker.on_progress = look
    try:
        worker.generate(request)
    finally:
        worker.on_progress = None
    return {step: pickle.loads(pickle.dumps(snapshot)) for step, snapshot in found.items()}


def _latents(result: RankResult) -> Tensor:
    assert result.latents is not None
    return result.latents


def _resume(worker: RankWorker, snapshot: Snapshot, request: RankRequest = REQUEST) -> tuple[RankResult, list[int]]:
    """The result, and the step numbers that were reported."""
    seen: list[int] = []
    worker.on_progress = seen.append
    try:
        return worker.generate(request, [snapshot]), seen
    finally:
        worker.on_progress = None


@pytest.mark.parametrize(("family", "scheduler"), CASES if ALL else FEW)
def test_every_step_can_be_resumed(family: str, scheduler: str, checkpoint_of: Callable[[str], Path]) -> None:
    """Latents, history, random numbers or the place in the schedule that are not those of the snapshot, under
    guidance, at an odd size, in another process; a worker that is not the same afterwards.
    """
    with _worker(checkpoint_of(family), scheduler) as worker:
        snapshots = _cut(worker, REQUEST)
        expected = _latents(worker.generate(REQUEST))
        other = changed(REQUEST, items=(RequestItem(PROMPT, seed=4),))
        assert not torch.equal(expected, _latents(worker.generate(other)))
    assert sorted(snapshots) == list(range(1, STEPS + 1))
    assert all(snapshots[step].step == step for step in snapshots)
    torch.manual_seed(1234)  # another process has other random numbers
    with _worker(checkpoint_of(family), scheduler) as worker:
        own = worker.loaded.pipeline.pipe.scheduler.set_timesteps
        for step, snapshot in every(snapshots.items(), 2):
            result, seen = _resume(worker, snapshot)
            assert torch.equal(_latents(result), expected), f"resumed after step {step}"
            assert seen == list(range(step + 1, STEPS + 1))
            assert worker.loaded.pipeline.pipe.scheduler.set_timesteps == own
        assert torch.equal(_latents(worker.generate(REQUEST)), expected), "the next request"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
@pytest.mark.parametrize(("family", "scheduler"), [("flux2-klein", "stochastic euler"), ("z-image", "unipc")])
def test_on_a_device(family: str, scheduler: str, checkpoints: Checkpoints) -> None:
    """What was on the device goes back to it, and the device's random numbers are kept as well."""
    with _worker(checkpoints[family], scheduler, "cuda") as worker:
        snapshots, expected = _cut(worker, REQUEST), _latents(worker.generate(REQUEST))
        for step, snapshot in snapshots.items():
            assert snapshot.latents.device.type == "cpu"
            assert torch.equal(_latents(_resume(worker, snapshot)[0]), expected), f"resumed after step {step}"


@thorough
@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_guidance_off_and_another_size(scheduler: str, checkpoints: Checkpoints) -> None:
    """Without guidance the transformer runs once per step, on another batch."""
    request = changed(REQUEST, height=256, width=128, guidance_scale=0.0)
    for family in FAMILIES:
        with _worker(checkpoints[family], scheduler) as worker:
            snapshots, expected = _cut(worker, request), _latents(worker.generate(request))
            for snapshot in snapshots.values():
                assert torch.equal(_latents(_resume(worker, snapshot, request)[0]), expected)


@thorough
def test_a_resumed_request_can_be_resumed(z_image_dir: Path) -> None:
    """A second fault: what a resumed loop keeps is as good as what the first one kept, and it keeps its start."""
    with _worker(z_image_dir, "unipc") as worker:
        snapshots, expected = _cut(worker, REQUEST), _latents(worker.generate(REQUEST))
        kept: list[Snapshot] = []

        def fail(finished: int) -> None:
            assert worker.kept is not None
            kept.append(worker.kept)
            raise _FaultError

        worker.on_progress = fail
        with pytest.raises(_FaultError):
            worker.generate(REQUEST, [snapshots[2]])
        assert worker.kept is kept[0], "what is there must survive the fault"
        worker.on_progress = None
        assert [snapshot.step for snapshot in worker.snapshots] == [2, 3]
        assert torch.equal(_latents(_resume(worker, kept[0])[0]), expected)
        assert worker.kept is None
        assert torch.equal(_latents(_resume(worker, snapshots[2])[0]), expected), "a snapshot used twice"


def test_the_repeated_step_is_not_counted(flux2_dir: Path) -> None:
    """Measurements, spans and the trace of a resumed request hold its own steps only."""
    with _worker(flux2_dir) as worker:
        snapshots = _cut(worker, REQUEST)
        worker.generate(REQUEST)
        plan = worker.loaded.plan
        streamed = 2 * sum(block.layout.slot_bytes for block in plan.memory.streamed)  # twice per step, under guidance
        finished = worker.model_steps
        part, _ = _resume(worker, snapshots[3])
        assert worker.model_steps == finished + STEPS - 3
        nothing, _ = _resume(worker, snapshots[STEPS])
    assert len(part.measurements.step_ms) == len(part.measurements.steps) == STEPS - 3
    assert part.measurements.h2d_bytes_per_step == streamed > 0
    names = ["encode", "encode", "step 4", "step 5", "decode"]
    assert [span.name for span in part.timeline.spans] == names
    ends = [(span.begin_s, span.end_s) for span in part.timeline.spans]
    assert all(begin <= end for begin, end in ends)
    assert all(left[1] <= right[0] for left, right in pairwise(ends))
    assert {times.runs for times in part.measurements.blocks.values()} == {2 * (STEPS - 3)}
    assert nothing.measurements.step_ms == []
    assert nothing.media


@pytest.mark.parametrize("every", some([2, 0, 3], 1))
def test_how_often_is_kept(every: int, z_image_dir: Path) -> None:
    """Kept without being asked, or not kept, or the wrong step's; kept beyond the request."""
    request = changed(REQUEST, keep_every=every)
    with _worker(z_image_dir) as worker:
        seen = []
        worker.on_progress = lambda _: seen.append(worker.kept.step if worker.kept else 0)
        worker.generate(request)
        assert worker.kept is None
    assert seen == [step // every * every if every else 0 for step in range(1, STEPS + 1)]


def test_a_snapshot_of_another_request_is_refused(z_image_dir: Path) -> None:
    """A wrong picture instead of an error; a worker that is of no use after the error."""
    with _worker(z_image_dir) as worker:
        snapshots, expected = _cut(worker, REQUEST), _latents(worker.generate(REQUEST))
        last = snapshots[STEPS]
        for request in (changed(REQUEST, steps=STEPS + 1), changed(REQUEST, height=256)):
            with pytest.raises(RequestError, match=r"resume: .* of another request"):
                worker.generate(request, [snapshots[2]])
        with pytest.raises(RequestError, match=f"of step {STEPS}, but this request has 2"):
            worker.generate(changed(REQUEST, steps=2), [last])
        with pytest.raises(RequestError, match=r"steps \[1, 2\]; allowed: one for each of 1"):
            worker.generate(REQUEST, [snapshots[1], snapshots[2]])
        assert torch.equal(_latents(worker.generate(REQUEST)), expected)


def test_nobody_elses_random_numbers_are_touched(z_image_dir: Path) -> None:
    """A stochastic scheduler draws from the process's generator: a request must neither move it nor hang on it."""
    with _worker(z_image_dir, "stochastic euler") as worker:
        torch.manual_seed(7)
        expected = _latents(worker.generate(REQUEST))
        drawn = torch.rand(4)
        torch.manual_seed(8)
        assert torch.equal(_latents(worker.generate(REQUEST)), expected)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4), drawn)


@pytest.mark.parametrize("scheduler", some(["stochastic euler", "lcm", "stochastic dpm"], 1))
def test_each_picture_draws_from_its_own_seed(scheduler: str, flux2_dir: Path) -> None:
    """However many are computed at once, and as diffusers does where the scheduler is told of the same generator."""
    two = rank_request(["a fox", "a boat"], seed=5, steps=3, height=64, width=64)
    with _worker(flux2_dir, scheduler) as worker:
        found = _latents(worker.generate(two))
        alone = [_latents(worker.generate(changed(two, items=(item,)))) for item in two.asked.items]
    pipe = diffusers.DiffusionPipeline.from_pretrained(flux2_dir)
    pipe.scheduler = SCHEDULERS[scheduler](pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    for picture, item in enumerate(two.asked.items):
        generator, expected = torch.Generator("cpu").manual_seed(item.seed), list[Tensor]()

        def keep(_pipe: Any, _step: int, _time: Any, kept: Any, into: list[Tensor] = expected) -> Any:
            into.append(kept["latents"])
            return kept

        pipe.scheduler.step = partial(type(pipe.scheduler).step, pipe.scheduler, generator=generator)
        size = {"num_inference_steps": 3, "height": 64, "width": 64}
        pipe(prompt=item.prompt, generator=generator, callback_on_step_end=keep, **size)
        assert max_error(found[picture : picture + 1], expected[-1]) <= TOLERANCE
        assert max_error(alone[picture], expected[-1]) <= TOLERANCE


def test_the_last_step_that_all_have() -> None:
    """Replicas are up to one kept step apart when they are asked."""

    def of(*steps: int) -> list[Snapshot]:
        return [Snapshot(step, 0.0, torch.zeros(1), {}, ()) for step in steps]

    found = common_start([of(2, 4), of(4, 6), of(4)])
    assert found is not None
    assert [snapshot.step for snapshot in found] == [4, 4, 4]
    assert common_start([of(2, 4), of(6)]) is None
    assert common_start([of(2), of()]) is None
    assert common_start([]) is None


@pytest.mark.parametrize("config", some([{"dp_degree": 2, "hsdp": {"shard": 2}}, {"tp_degree": 2}], 1), ids=str)
def test_several_ranks(config: dict[str, Any], gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """Ranks of one replica that go on from different states; replicas that share blocks, with other prompts each.

    With a stochastic scheduler: what it draws has to be the same on all ranks of a replica.
    """
    run = RunConfig.parse({"parallel": config, "offload": {"layerwise": True}})
    replicas = run.parallel.dp_degree
    request = changed(REQUEST, items=(RequestItem(PROMPT, seed=3), RequestItem(OTHER_PROMPT, seed=4))[:replicas])

    def make_stochastic(worker: RankWorker) -> None:
        own = worker.loaded.pipeline.pipe.scheduler
        worker.loaded.pipeline.pipe.scheduler = type(own).from_config(own.config, stochastic_sampling=True)
        torch.manual_seed(worker.rank)

    def cut(worker: RankWorker, request: RankRequest) -> tuple[Snapshot | None, Tensor | None]:
        found: list[Snapshot | None] = []
        worker.on_progress = lambda finished: found.append(worker.kept)
        try:
            return worker.generate(request).latents, found[2]
        finally:
            worker.on_progress = None

    with Engine.start(run, checkpoints["flux2-klein"], gang_of(2)) as engine:
        engine.gang.collective_rpc(make_stochastic, timeout_s=60)
        first = engine.gang.collective_rpc(cut, request, timeout_s=120)
        resume = [snapshot for _, snapshot in first if snapshot is not None]
        assert [snapshot.step for snapshot in resume] == [3] * replicas, "only the first rank of a replica keeps"
        second = engine.gang.collective_rpc(RankWorker.generate, request, resume, timeout_s=120)
    expected = [latents for latents, _ in first if latents is not None]
    found = [result.latents for result in second if result.latents is not None]
    assert len(expected) == len(found) == replicas
    assert all(torch.equal(left, right) for left, right in zip(expected, found, strict=True))
