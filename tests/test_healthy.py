"""No false alarm: unusual settings that are all right, each with real requests and every check on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import faults_in_steps as faults
import pytest
from faults_in_steps import BLOCK
from test_recovery import InProcessGang

from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.generation import Generation
from crossdock.offload.schedule.residency import Costs
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import RequestCancelled, RequestTimeout
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.reschedule import RankObservation
from crossdock.runtime.rank import worker as worker_module
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.watch.gang import Gang
from reference import OTHER_PROMPT, PROMPT
from tiers import not_quick, thorough

pytestmark = not_quick

cloudpickle.register_pickle_by_value(faults)

CheckpointOf = Callable[[str], Path]
GangOf = Callable[[int], Gang]
LAYERWISE: dict[str, Any] = {"layerwise": True}


def _ask(engine: Engine, prompt: str | list[str] = PROMPT, **options: Any) -> Generation:
    """A request; every check has held in it."""
    generation = engine.generate(prompt, **{"steps": 3, "height": 64, "width": 64} | options)
    rows = {row["check"]: (row["status"], row["detail"]) for row in engine.contract_result.composition}
    assert {status for status, _ in rows.values()} == {"holds", "not probed"}, rows
    assert rows["same-numbers"][0] == "not probed"
    return generation


@contextmanager
def _one(directory: Path, offload: dict[str, Any] | None = None, **config: Any) -> Iterator[tuple[Engine, Any]]:
    gang = InProcessGang()
    parsed = RunConfig.parse({"offload": LAYERWISE | (offload or {}), **config})
    with Engine.start(parsed, directory, make_gang=lambda *_: gang) as engine:
        yield engine, gang


def _budget(directory: Path, share: float) -> str:
    """From the least (0.0) to the whole model (1.0)."""
    plan = make_plan(RunConfig.parse({"offload": LAYERWISE}), directory, "cpu")
    blocks = sum(block.layout.slot_bytes for block in plan.memory.blocks)
    return f"{int(plan.least_budget_bytes + share * (plan.memory.outside_bytes + blocks - plan.least_budget_bytes))}B"


SETTINGS: dict[str, dict[str, Any]] = {
    "resident": {"offload": {"layerwise": False}},
    "prefetch of all": {"offload": {"prefetch": 8}},
    "a fraction": {"offload": {"device_budget": 0.9}},
    "auto": {"offload": {"device_budget": "auto"}},
    "mmap": {"offload": {"host": "mmap"}},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16", "offload": {"prefetch": 2}},
}
FEW = {"prefetch of all"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else thorough) for n in SETTINGS])
def test_settings(name: str, z_image_dir: Path) -> None:
    """Twice, and once with a single step: of which nothing was measured before."""
    with _one(z_image_dir, **SETTINGS[name]) as (engine, _):
        for steps in (1, 3, 2):
            _ask(engine, steps=steps)


@thorough
@pytest.mark.parametrize("host", ["shared", "mmap"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_budget(host: str, share: float, flux2_dir: Path) -> None:
    with _one(flux2_dir, {"host": host, "device_budget": _budget(flux2_dir, share)}) as (engine, _):
        for _ in range(2):
            _ask(engine)


def test_a_forced_reschedule(z_image_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the first request, to other residents and slots, because of costs that nobody measured."""
    observe = worker_module.observe

    def told(*seen: Any) -> RankObservation | None:
        found = observe(*seen)
        assert found is not None
        count = len(found.order)
        return replace(found, costs=Costs((1e-3,) * count, tuple(1e-3 * (1 + 9 * (n % 2)) for n in range(count))))

    monkeypatch.setattr(worker_module, "observe", told)
    with _one(z_image_dir, {"device_budget": _budget(z_image_dir, 0.6)}) as (engine, gang):
        before = copy.copy(engine.plan)
        _ask(engine, steps=5)
        assert engine.plan.memory.resident != before.memory.resident, gang.worker.loaded.schedule_note
        _ask(engine)


@thorough
def test_cancels_and_time_outs_between_requests(z_image_dir: Path) -> None:
    """Of none, of one that waits, of one in its first step; a limit that is up at once."""
    with _one(z_image_dir) as (engine, _):
        engine.cancel()
        _ask(engine)
        handle = engine.submit(_request(engine))
        handle.cancel()
        with pytest.raises(RequestCancelled):
            handle.result(60)
        _ask(engine)
        with pytest.raises(RequestCancelled):
            _ask(engine, progress=lambda *_: engine.cancel())
        _ask(engine, steps=2)
        with pytest.raises(RequestTimeout):
            _ask(engine, time_limit_s=1e-6)
        _ask(engine)


def _request(engine: Engine) -> Any:
    from crossdock.runtime.request import GenerateRequest

    return GenerateRequest.of(PROMPT, steps=3, height=64, width=64)


@thorough
def test_a_resumed_request(flux2_dir: Path) -> None:
    """A rank raises in the third step; the new one goes on from the second."""
    with _one(flux2_dir, launch={"recovery": {"keep_every": 1}}) as (engine, gang):
        _ask(engine)
        stream = gang.worker.loaded.stream
        block, calls = next(block for block in stream.blocks if block.name == BLOCK), []

        def fail(*_: Any) -> None:
            calls.append(gang.worker._state.log.running)
            if calls[-1] == 3:
                raise OSError("planted")

        block.module.register_forward_pre_hook(fail)
        (fault,) = _ask(engine, steps=4).report["faults"]
        assert fault["resumed_after"] == 2
        _ask(engine)


@thorough
def test_two_transformers_at_every_switch(checkpoint_of: CheckpointOf) -> None:
    """The second one has its turn from the second, third or last step on, or never; with and without a budget."""
    directory, video = checkpoint_of("wan2.2-a14b"), {"steps": 4, "width": 128, "frames": 9}
    for offload in ({}, {"device_budget": _budget(directory, 0.2)}):
        with _one(directory, offload) as (engine, gang):
            _ask(engine, **video)
            pipe = gang.worker.loaded.pipeline.pipe
            times = [float(time) for time in pipe.scheduler.timesteps]
            for switch in (1, 2, 3):
                between = (times[switch - 1] + times[switch]) / 2 / pipe.scheduler.config.num_train_timesteps
                pipe.register_to_config(boundary_ratio=between)
                _ask(engine, **video)
                events = gang.worker.loaded.stream.trace()
                last = [event.block for event in events if event.kind == "compute_begin"]
                assert {name.partition(".")[0] for name in last} == {"transformer", "transformer_2"}


def test_requests_that_differ_in_turn(z_image_dir: Path) -> None:
    """Guidance on and off, other sizes, prompts of other lengths in one batch, one step, several pictures of one."""
    long = " ".join([PROMPT] * 6)
    with _one(z_image_dir) as (engine, _):
        for options in (
            {"guidance_scale": 1.0},
            {"guidance_scale": 4.0},
            {"guidance_scale": 1.0, "steps": 1},
            {"height": 96, "width": 64},
            {"height": 64, "width": 128, "guidance_scale": 4.0},
            {"prompt": ["a", long, OTHER_PROMPT], "batch_size": 3, "steps": 2},
            {"prompt": ["a", long], "images_per_prompt": 2, "batch_size": 3, "steps": 2},
            {},
        ):
            _ask(engine, **options)


TWO: dict[str, tuple[str, dict[str, int], list[dict[str, Any]]]] = {
    "odd prompts over replicas": (
        "flux2-klein",
        {"dp_degree": 2},
        [{"prompt": ["a", OTHER_PROMPT, PROMPT]}, {}, {"prompt": ["a", "b", "c"], "batch_size": 2}],
    ),
    "guidance in turn on two": (
        "flux2-klein",
        {"cfg_degree": 2},
        [{"guidance_scale": 4.0}, {"guidance_scale": 1.0}, {"guidance_scale": 4.0, "steps": 1}],
    ),
    "sizes in turn on a ring": (
        "z-image",
        {"ring_degree": 2},
        [{}, {"height": 96}, {"prompt": ["a", OTHER_PROMPT], "batch_size": 2}, {"guidance_scale": 0.0, "steps": 1}],
    ),
}


@thorough
@pytest.mark.parametrize("name", TWO)
def test_two_ranks(name: str, gang_of: GangOf, checkpoints: dict[str, Path]) -> None:
    family, parallel, requests = TWO[name]
    config = RunConfig.parse({"parallel": parallel, "offload": LAYERWISE})
    with Engine.start(config, checkpoints[family], gang_of(2)) as engine:
        for options in requests:
            _ask(engine, **options)


def _skips(worker: RankWorker) -> None:
    """A step cache: a block is left out in every other step, on all ranks alike."""
    stack, _, number = BLOCK.partition(".")
    modules = worker.loaded.model.get_submodule(stack)._modules
    block, skipped = modules[number], faults._Skipped()

    def choose(*_: Any) -> None:
        state = worker._state
        modules[number] = skipped if state is not None and state.log.running % 2 == 0 else block

    worker.loaded.model.register_forward_pre_hook(choose)


def test_a_step_cache(gang_of: GangOf, flux2_dir: Path) -> None:
    config = RunConfig.parse({"parallel": {"tp_degree": 2}, "offload": LAYERWISE})
    with Engine.start(config, flux2_dir, gang_of(2)) as engine:
        engine.gang.collective_rpc(lambda worker: _skips(worker), timeout_s=60)
        for steps in (4, 3):
            _ask(engine, steps=steps)
