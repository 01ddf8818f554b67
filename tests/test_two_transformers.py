"""A pipeline whose steps are denoised by one transformer first, then by another: one rank, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import admitted, changed, rank_request
from test_recovery import InProcessGang
from torch import Tensor

from crossdock.launch.engine.engine import Engine
from crossdock.offload.schedule.residency import Costs
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.contract.numbers import RETURNED, same_as_one, same_numbers
from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.errors import ConfigError
from crossdock.runtime.pipeline.denoise_loop import DenoiseLoop
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.memory_plan import MemoryPlan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.reschedule import RankObservation, reschedule
from crossdock.runtime.rank.probe.probe import probe_numbers, probe_request
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.rank_result import RankResult
from reference import PROMPT, TOLERANCE, max_error, reference
from tiers import not_quick, some, thorough

pytestmark = not_quick
FIRST, SECOND = "transformer", "transformer_2"
SIZE, FRAMES, STEPS = (64, 128), 9, 4
SWITCH = 2
"""After so many of the four steps the other transformer has its turn."""
PASSES = 2
"""Of a step: guidance is two calls."""
REQUEST = rank_request(PROMPT, height=SIZE[0], width=SIZE[1], frames=FRAMES, steps=STEPS, number=1)


@pytest.fixture(scope="module")
def directory(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("wan2.2-a14b")


def _plan(directory: Path, **offload: Any) -> RunPlan:
    return make_plan(RunConfig.parse({"offload": {"layerwise": True} | offload}), directory, "cpu")


def _blocks_bytes(plan: RunPlan, name: str = "") -> int:
    return sum(block.layout.slot_bytes for block in plan.memory.blocks if block.name.startswith(name))


def _budget(directory: Path, share: float) -> str:
    """From the least (0.0) to all blocks of one transformer (1.0)."""
    plan = _plan(directory)
    least = plan.least_budget_bytes
    return f"{least + int(share * (plan.memory.outside_bytes + _blocks_bytes(plan, f'{FIRST}.') - least)) + 4096}B"


def _transformer_of(name: str) -> str:
    return name.partition(".")[0]


def _loads(result: RankResult) -> list[list[str]]:
    """Per step, the blocks whose loads began in it."""
    ends = [span.end_s for span in result.timeline.spans if span.name.startswith("step ")]
    loads: list[list[str]] = [[] for _ in ends]
    for event in result.timeline.events:
        if event.kind == "load_begin":
            loads[next((n for n, end in enumerate(ends) if event.at_s < end), len(ends) - 1)].append(event.block)
    return loads


# -- the plan -------------------------------------------------------------------------------------------------------


def test_the_plan_has_both(directory: Path) -> None:
    """Names say whose they are; files are asked for what they call it; one order, but two passes."""
    plan = _plan(directory)
    assert plan.layout.transformers == (FIRST, SECOND)
    assert {_transformer_of(fqn) for fqn in plan.layout.dtypes} == {FIRST, SECOND}
    for fqn, stored in plan.layout.stored.items():
        assert fqn == f"{stored.file.parent.name}.{stored.name}"
    assert [{_transformer_of(plan.memory.blocks[index].name) for index in pass_} for pass_ in plan.memory.passes] == [
        {FIRST},
        {SECOND},
    ]
    assert tuple(chain(*plan.memory.passes)) == plan.memory.order == tuple(range(len(plan.memory.blocks)))


def test_both_use_the_same_memory(directory: Path) -> None:
    """No more than one of them would need, at the least budget and at any other."""
    kept = []
    for share in (0.0, 0.7, 1.0):
        plan = _plan(directory, device_budget=_budget(directory, share))
        assert plan.memory.arena_bytes is not None
        assert plan.memory.arena_bytes <= max(_blocks_bytes(plan, f"{FIRST}."), *plan.memory.turn_bytes.values())
        slots = [[plan.memory.blocks[index].slot for index in pass_] for pass_ in plan.memory.passes]
        assert slots[0] == slots[1]
        assert None not in slots[0]
        kept.append(len(plan.memory.residency.resident))
    assert 0 < kept[0] <= kept[1] < kept[2] == len(plan.memory.passes[0]), "one of them fits"
    with pytest.raises(ConfigError, match="this model needs at least"):
        _plan(directory, device_budget=f"{_plan(directory).least_budget_bytes - 1}B")


@thorough
def test_what_fits_stays(directory: Path) -> None:
    """Where both fit, neither has to come again."""
    plan = _plan(directory)
    budget = plan.memory.outside_bytes + _blocks_bytes(plan) + 4096
    plan = _plan(directory, device_budget=f"{budget}B")
    assert plan.memory.resident == frozenset(range(len(plan.memory.blocks)))
    with admitted(plan) as worker:
        first, second = worker.generate(REQUEST), worker.generate(REQUEST)
        inside = len(plan.layout.dtypes) - len(plan.memory.outside)
        assert {len(found) for found in (first.arrivals, second.arrivals)} == {inside, 0}
        loads = _loads(second)
        assert set(chain.from_iterable(loads)) < {block.name for block in plan.memory.blocks}, (
            "only what the VAE and the encoder took"
        )
        assert not loads[1]
        assert not loads[3]


def test_one_that_is_not_there_is_left_out(directory: Path, tmp_path: Path) -> None:
    """[null, null] in model_index.json, for either of them: the names are as they are for any pipeline."""
    for name in (FIRST, SECOND):
        alone = tmp_path / name
        shutil.copytree(directory, alone)
        index = json.loads((alone / "model_index.json").read_text())
        index[name] = [None, None]
        (alone / "model_index.json").write_text(json.dumps(index))
        shutil.rmtree(alone / name)
        plan = _plan(alone)
        assert plan.layout.transformers == (SECOND if name == FIRST else FIRST,)
        assert len(plan.memory.passes) == 1
        assert plan.memory.blocks[0].name == "blocks.0"


# -- what is streamed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", some([0.7, None, 0.0, 1.0], 1))
def test_only_the_one_that_runs_is_streamed(
    share: float | None, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that do not run are not brought: the bytes of a step are those of the transformer whose turn it is."""
    budget = {} if share is None else {"device_budget": _budget(directory, share)}
    plan = _plan(directory, **budget)
    with admitted(plan) as worker:
        tick = DenoiseLoop.tick

        def drained(loop: DenoiseLoop, *step: Any) -> dict[str, Any]:
            """What is brought ahead belongs to the step that asked for it, however busy the machine is."""
            worker.loaded.stream.engine.drain()
            return tick(loop, *step)

        monkeypatch.setattr(DenoiseLoop, "tick", drained)
        latents = worker.generate(REQUEST).latents
        result = worker.generate(REQUEST)
        assert latents is not None
        assert result.latents is not None
        assert torch.equal(result.latents, latents), "another request before it changes nothing"
        assert max_error(latents, reference(directory, PROMPT, SIZE, frames=FRAMES).latents) <= TOLERANCE
        assert result.measurements.misses == 0
        plan = worker.loaded.plan
    loads = _loads(result)
    for step, found in enumerate(loads):
        name = FIRST if step < SWITCH else SECOND
        assert {_transformer_of(block) for block in found} <= {name}, f"step {step + 1}"
        pass_ = plan.memory.passes[step >= SWITCH]
        slots = [plan.memory.blocks[index].slot for index in pass_]
        passing = sum(plan.memory.slot_sizes_of([i for i in pass_ if slots.count(plan.memory.blocks[i].slot) > 1]))
        if step in (1, 3):  # a turn's first step brings what stays in it, too
            assert result.measurements.steps[step].h2d_bytes == PASSES * passing
    assert share != 0.7 or 0 < result.measurements.steps[1].h2d_bytes < PASSES * _blocks_bytes(plan, f"{FIRST}.")
    assert share != 1.0 or not loads[1]


def test_a_request_may_end_before_the_switch(directory: Path) -> None:
    """What did not run is compared at the end of it, once; the next request runs it as any other."""
    plan = _plan(directory)
    with admitted(plan) as worker:
        coordinator = Coordinator(plan)
        coordinator.admit([worker.report()], rehearsed=False)
        short = worker.generate(changed(REQUEST, steps=1))
        assert {_transformer_of(e.block) for e in short.timeline.events if e.kind == "compute_begin"} == {FIRST}
        assert {_transformer_of(record.fqn) for record in short.arrivals} == {FIRST, SECOND}
        coordinator.review([short])
        result = worker.generate(changed(REQUEST, number=2))
        assert result.arrivals == ()
        coordinator.review([result])
        assert result.latents is not None
        assert max_error(result.latents, reference(directory, PROMPT, SIZE, frames=FRAMES).latents) <= TOLERANCE


# -- checks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some([SECOND, FIRST], 1))
def test_wrong_bytes_end_the_request_at_their_first_step(name: str, directory: Path) -> None:
    """Of the second transformer, that is the step of the switch; no step follows, and no video is handed out."""
    config, gang = RunConfig.parse({"offload": {"layerwise": True}}), InProcessGang()
    with Engine.start(config, directory, make_gang=lambda *_: gang) as engine:
        block = next(block for block in gang.worker.loaded.stream.blocks if block.name == f"{name}.blocks.3")
        assert isinstance(block.source, Tensor)
        block.layout.entries[0].view(block.source).view(-1)[0] += 1
        shown: list[int] = []
        with pytest.raises(CompositionError, match=rf"complete: rank 0: {name}\.blocks\.3\."):
            engine.generate(
                PROMPT, height=SIZE[0], width=SIZE[1], frames=FRAMES, steps=STEPS, progress=lambda n, _: shown.append(n)
            )
        assert shown == ([] if name == FIRST else list(range(1, SWITCH + 1)))


def test_the_probe_runs_both(directory: Path) -> None:
    """One step would be of the first alone, and nothing would be known of the second."""
    plan = _plan(directory)
    with admitted(plan) as worker:
        report = probe_numbers(worker, probe_request(plan.layout))
        assert {block.name for block in plan.memory.blocks} < {name for name, _ in report.on}
        assert list(same_numbers(plan.layout, [report])) == []
        assert {block.name for block in plan.memory.blocks} < {found.block for found in report.alone}
        assert [found.call for found in report.alone if found.block == RETURNED] == [1, 2, 3, 4], (
            "guided, a step of each"
        )
        assert list(same_as_one(plan.layout, [report])) == []
        second = next(block for block in worker.loaded.stream.blocks if block.name.startswith(SECOND))
        assert isinstance(second.source, Tensor)
        second.layout.entries[0].view(second.source).mul_(1.5)
        found = list(same_numbers(plan.layout, [probe_numbers(worker, probe_request(plan.layout))]))
        assert found[0].where.startswith(second.name)


@thorough
def test_one_that_never_has_a_turn_is_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(directory)
    monkeypatch.setattr("crossdock.runtime.rank.probe.probe._MOST_STEPS", 4)
    with admitted(plan) as worker:
        worker.loaded.pipeline.pipe.register_to_config(boundary_ratio=None)
        report = probe_numbers(worker, probe_request(plan.layout))
    (violation,) = same_numbers(plan.layout, [report])
    assert (violation.check, violation.where, violation.found) == ("same-numbers", SECOND, "none")


# -- the schedule that follows what was measured --------------------------------------------------------------------


def _observed(memory: MemoryPlan, pass_: int, spare: int = 0) -> RankObservation:
    order = (*memory.passes[pass_][::2], *memory.passes[pass_][1::2])
    return RankObservation(order, Costs((1.0,) * len(order), (2.0,) * len(order)), spare)


@pytest.mark.parametrize("pass_", [0, 1])
def test_what_one_has_shown_holds_for_both(pass_: int, directory: Path) -> None:
    """The order, the residents and the slots, place by place, whichever of them was observed."""
    plan = _plan(directory, device_budget=_budget(directory, 0.7))
    found = reschedule(plan.memory, plan.config.offload, [_observed(plan.memory, pass_)], 2).memory
    assert found is not None
    places = [plan.memory.passes[pass_].index(index) for index in _observed(plan.memory, pass_).order]
    assert found.passes == tuple(tuple(own[place] for place in places) for own in plan.memory.passes)
    slots = [[found.blocks[index].slot for index in own] for own in found.passes]
    assert slots[0] == slots[1]


def test_auto_takes_the_memory_for_one_or_for_both(directory: Path) -> None:
    """What is more than one needs and less than both is of no use."""
    plan = make_plan(
        RunConfig.parse({"offload": {"layerwise": True, "device_budget": "auto"}}), directory, "cpu", device_bytes=2**33
    )
    assert plan.memory.arena_bytes is not None
    arena, both, one = plan.memory.arena_bytes, _blocks_bytes(plan), _blocks_bytes(plan, f"{FIRST}.")
    for room, taken in ((one - 1, one - 1), (both - 1, one), (both, both)):
        if room < arena:
            continue
        found = reschedule(plan.memory, plan.config.offload, [_observed(plan.memory, 0, room - arena)], 2).memory
        assert found is not None
        assert found.arena_bytes == max(arena, taken)
        assert (found.resident == frozenset(found.order)) == (taken == both)


@pytest.mark.parametrize("budget", some(["half", "auto"], 1))
def test_a_changed_schedule_serves_both(budget: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed between two steps of the first, with all checks, and the same numbers before and after."""
    budget = _budget(directory, 0.7) if budget == "half" else budget
    config = RunConfig.parse({"offload": {"layerwise": True, "device_budget": budget}})
    plan = make_plan(config, directory, "cpu", device_bytes=2**33)
    monkeypatch.setattr("crossdock.runtime.rank.worker.observe", lambda memory, *_: _observed(memory, 0, 2**16))
    with admitted(plan) as worker:
        coordinator = Coordinator(plan)
        coordinator.admit([worker.report()], rehearsed=False)
        for number in (1, 2):
            result = worker.generate(changed(REQUEST, number=number))
            assert result.schedule_note.startswith("improved after step 2"), result.schedule_note
            assert (result.memory is not None) == (number == 1)
            coordinator.review([result])
            assert result.latents is not None
            assert max_error(result.latents, reference(directory, PROMPT, SIZE, frames=FRAMES).latents) <= TOLERANCE


# -- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", some([3, 2, 4], 1))
def test_a_request_goes_on_on_either_side_of_the_switch(step: int, directory: Path) -> None:
    """The rank fails in this step, and what is done again is one step at most; the same bits come out."""
    config = RunConfig.parse({"offload": {"layerwise": True}, "launch": {"recovery": {"keep_every": 1}}})
    gang = InProcessGang()
    options: dict[str, Any] = {"height": SIZE[0], "width": SIZE[1], "frames": FRAMES, "steps": STEPS}
    with Engine.start(config, directory, make_gang=lambda *_: gang) as engine:
        expected = engine.generate(PROMPT, **options).latents[0]
        _fail_at(gang.worker, PASSES * step - 1)
        found = engine.generate(PROMPT, **options)
        assert torch.equal(found.latents[0], expected)
        (fault,) = found.report["faults"]
        assert fault["resumed_after"] == step - 1
        name = FIRST if step <= SWITCH else SECOND
        assert f"(in step {step}, block {name}.blocks.1" in fault["error"]
        assert gang.starts == 2


def _fail_at(worker: RankWorker, passes: int) -> None:
    """In pass number `passes`, counted over both."""
    done = [0]

    def count(*_: Any) -> None:
        done[0] += 1
        if done[0] == passes:
            raise ValueError("planted")

    for name in (FIRST, SECOND):
        worker.loaded.model.get_submodule(f"{name}.blocks.1").register_forward_pre_hook(count)
