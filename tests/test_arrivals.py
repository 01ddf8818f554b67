"""arrives: whatever happens to weights in a request, in the step in which it happens at the earliest and at its end at
the latest, the check says so, with the rank and the block; and no alarm without a fault.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cloudpickle
import faults_in_steps
import faults_in_weights as faults
import pytest
import torch
from faults_in_steps import BLOCK, NEXT, OUTSIDE
from faults_in_weights import Plant
from judged_run import REQUEST, STEPS, HereGang, Run, with_fault
from one_rank import changed, rank_request
from torch import nn

import crossdock.runtime.pipeline.pipeline as pipeline_module
import crossdock.runtime.plan.reschedule as rescheduling
from crossdock.launch.engine.engine import Engine
from crossdock.launch.gangs.local.gang import LocalGang
from crossdock.offload.memory.layout import BlockLayout
from crossdock.offload.stream.block import Home, StreamedBlock
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.contract.result import CompositionError, Violation
from crossdock.runtime.errors import RequestCancelled
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.weights.arrivals import ArrivalWatch
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.watch.gang import Gang
from layouts import PARTLY_RESIDENT
from reference import PROMPT
from tiers import ALL, not_quick, quick, some, thorough

cloudpickle.register_pickle_by_value(faults)
cloudpickle.register_pickle_by_value(faults_in_steps)

GangOf = Callable[[int], Gang]
LAYERWISE = {"layerwise": True}
HSDP = {"dp_degree": 4, "hsdp": {"replicate": 2, "shard": 2}}


@dataclass(frozen=True)
class Fault:
    """What `plant` does on rank `rank` in one of the steps `at`; it is told of `where` on every rank of `blamed`.

    Attributes:
        shows: the step that is named; None: that in which it is planted; 0: none, it shows at the request's end.
        ends: the steps that are run; None: up to the one that is named.
    """

    plant: Plant
    where: str = BLOCK
    at: tuple[int, ...] = (2, STEPS)
    shows: int | None = None
    rank: int = 1
    blamed: tuple[int, ...] | None = None


REST = Fault(faults.at_rest)
BYTE = Fault(faults.byte_at_rest, shows=STEPS)
FIRST = Fault(faults.before_the_request, at=(1,))
LEFT_OUT, HALF, HOME = Fault(faults.left_out), Fault(faults.half_done), Fault(faults_in_steps.another_home)
COMPUTING = Fault(faults.while_computing)
BESIDE = Fault(faults.outside, OUTSIDE, shows=0)
TEXT = Fault(faults.component("text_encoder"), "text_encoder, ", at=(1,), shows=0, rank=0)
TEXT_LAST = Fault(faults.component("text_encoder", -1), "text_encoder, ", at=(1,), shows=0, rank=0)
VAE = Fault(faults.component("vae"), "vae, ", at=(1,), shows=0, rank=0)
RESIDENT = Fault(faults.resident, "single_transformer_blocks.0")
SWAPPED = Fault(faults.sources_swapped)
SHARED = (1, 3)
"""Ranks of one machine that hold the same part share the memory in which it rests."""
TOGETHER = (0, 1)
"""Ranks that gather a block together, of which one brought something else than what rests there."""
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Fault, ...]]] = {
    "layerwise": ({}, LAYERWISE, (BYTE, LEFT_OUT, COMPUTING, TEXT, REST, FIRST, HALF, HOME, BESIDE, TEXT_LAST, VAE)),
    "on the device": ({}, {}, (REST, BESIDE, VAE, BYTE, FIRST, COMPUTING, TEXT)),
    "budget": ({}, PARTLY_RESIDENT, (SWAPPED, HALF, TEXT, VAE, REST, BESIDE, TEXT_LAST)),
    "all resident": ({}, {**LAYERWISE, "device_budget": 1.0}, (RESIDENT, COMPUTING, BESIDE, TEXT, VAE)),
    "mmap": ({}, {**LAYERWISE, "host": "mmap"}, (HALF, HOME, LEFT_OUT, SWAPPED, COMPUTING)),
    "tp2": ({"tp_degree": 2}, LAYERWISE, (REST, BYTE, HALF, COMPUTING, BESIDE)),
    "layerwise hsdp": (
        HSDP,
        LAYERWISE,
        (
            Fault(faults.gather_swapped),
            Fault(faults.at_rest, blamed=SHARED),
            Fault(faults.byte_at_rest, shows=STEPS, blamed=SHARED),
            Fault(faults.left_out, blamed=TOGETHER),
            Fault(faults.half_done, blamed=TOGETHER),
            COMPUTING,
            BESIDE,
        ),
    ),
    "hsdp": (HSDP, {}, (REST, BYTE, Fault(faults.gather_swapped), BESIDE)),
}

FIRST_OF_ALL = ("layerwise", "budget", "tp2")


def _plan(directory: Path, parallel: dict[str, Any], offload: dict[str, Any], **more: Any) -> RunPlan:
    config = RunConfig.parse({"parallel": parallel, "offload": offload, **more})
    return make_plan(config, directory, "cpu", device_bytes=2**33)


@not_quick
@pytest.mark.parametrize(
    "layout", some(sorted(LAYOUTS, key=FIRST_OF_ALL.__contains__, reverse=True), len(FIRST_OF_ALL))
)
def test_every_fault_is_caught(layout: str, gang_of: GangOf, flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one load, so that each comes in a second request; with a budget, after a rescheduling."""
    parallel, offload, planted = LAYOUTS[layout]
    plan = _plan(flux2_dir, parallel, offload)
    monkeypatch.setattr(rescheduling, "WORTHWHILE", -10)  # change the schedule, whatever it brings
    size = plan.layout.mesh.world_size
    with Run(plan, gang_of(size) if size > 1 else HereGang()) as run:
        assert run.judged() == ([], STEPS)
        assert layout != "budget" or run.coordinator.plan is not plan
        for fault in some(planted, 4 if size == 1 else 2):
            rank = min(fault.rank, size - 1)
            for at in fault.at if ALL else fault.at[:1]:
                found, steps = run.judged(fault.plant, rank, at)
                mine = [one for one in found if one.check == "arrives"]
                print(layout, getattr(fault.plant, "__qualname__", ""), at, *found[:4], sep="\n   ")
                blamed, expected = {one.rank for one in mine}, {rank} if size == 1 else {*(fault.blamed or (rank,))}
                assert blamed == expected or (fault.blamed is SHARED and blamed and blamed < expected), found
                named = at if fault.shows is None else fault.shows
                if fault.blamed is SHARED and steps == named - 1:  # a slower rank read it in its step before
                    named = steps
                begin = f"step {named}: " if named else ""
                others = (f"{begin}{NEXT}",) if fault is SWAPPED else ()
                assert all(one.where.startswith((f"{begin}{fault.where}", *others)) for one in mine)
                assert any(one.where.startswith(f"{begin}{fault.where}") for one in mine)
                assert not named or steps == named, "the request went on"
        assert run.judged() == ([], STEPS)


def _told(found: Sequence[Violation]) -> set[tuple[str, str]]:
    return {(one.check, one.where) for one in found}


@not_quick
def test_a_file_is_changed_in_place(flux2_dir: Path, tmp_path: Path) -> None:
    """While it is mapped: the file is told, and the block that computed with what it has now."""
    directory = Path(shutil.copytree(flux2_dir, tmp_path / "checkpoint"))
    plan = _plan(directory, {}, {**LAYERWISE, "host": "mmap"})
    with Run(plan, HereGang()) as run:
        assert run.judged() == ([], STEPS)
        found, steps = run.judged(faults.file_in_place, 0, 3)
        file = next(tensor.file for fqn, tensor in plan.layout.stored.items() if fqn.startswith(BLOCK))
        assert _told(found) == {("arrives", str(file)), ("arrives", f"step {STEPS}: {BLOCK}")}
        assert "changed while in use" in found[0].found
        assert steps == STEPS


@not_quick
def test_a_file_is_changed_before_the_first_step(flux2_dir: Path, tmp_path: Path) -> None:
    """What it had when the model was loaded is what has to arrive."""
    directory = Path(shutil.copytree(flux2_dir, tmp_path / "checkpoint"))
    with Run(_plan(directory, {}, {**LAYERWISE, "host": "mmap"}), HereGang()) as run:
        found, steps = run.judged(faults.file_in_place, 0, 1)
        assert {one.check for one in found} == {"arrives", "complete"}
        assert steps == 1


@not_quick
@pytest.mark.parametrize(("when", "worthwhile"), [("rescheduled", -10.0), ("new ranks", 10.0), ("never", 10.0)])
def test_all_rows_are_compared_again(
    when: str, worthwhile: float, flux2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a rescheduling, and when new ranks go on after a fault. Otherwise a first arrival is sampled: a bit that
    was wrong from the start, in a row that is not looked at, is what no check sees.
    """
    monkeypatch.setattr(rescheduling, "WORTHWHILE", worthwhile)
    with Run(_plan(flux2_dir, {}, LAYERWISE), HereGang(), all_rows=when == "new ranks") as run:
        found, _ = run.judged(faults.byte_before_the_request)
        assert {one.check for one in found} == (set() if when == "never" else {"complete"}), found
        assert all(one.where.startswith(f"{BLOCK}.") for one in found)


def test_new_ranks_after_a_fault_compare_all_rows(flux2_dir: Path) -> None:
    from crossdock.launch.engine.ranks import Ranks
    from crossdock.launch.engine.recovery import Survived
    from crossdock.runtime.errors import RankError

    plan, asked = _plan(flux2_dir, {}, LAYERWISE), list[Any]()

    class Fake:
        can_restart = True

        def start(self) -> None: ...
        def restart(self) -> None: ...
        def close(self) -> None: ...

        def collective_rpc(self, work: Any, *args: Any, timeout_s: float) -> list[Any]:
            asked.append(args[1:])
            return []

    ranks = Ranks(plan, cast(Any, Fake()), False, lambda text: None)
    cast(Any, ranks.coordinator).admit = lambda *_: None
    ranks.start(Survived())
    ranks.replace(RankError(0, "lost"), 1, Survived())
    assert asked == [(False, False, False), (False, False, True)]


@not_quick
@pytest.mark.parametrize("name", ["text_encoder", "vae"])
@pytest.mark.parametrize("offload", [LAYERWISE, PARTLY_RESIDENT], ids=["whole", "streamed"])
def test_components_are_compared_with_their_files(
    name: str, offload: dict[str, Any], flux2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = pipeline_module._load_pipeline

    def spoiled(*args: Any) -> Any:
        pipe = load(*args)
        next(getattr(pipe, name).parameters()).data.view(-1)[:1] += 1
        return pipe

    monkeypatch.setattr(pipeline_module, "_load_pipeline", spoiled)
    worker = RankWorker(0, 1, torch.device("cpu"))
    plan = _plan(flux2_dir, {}, offload)
    try:
        with pytest.raises(CompositionError) as caught:
            Coordinator(plan).admit([worker.setup(plan)], rehearsed=False)
        assert {(one.check, one.where.split(".")[0]) for one in caught.value.violations} == {("complete", name)}
    finally:
        worker.teardown()


@thorough
@not_quick
def test_a_block_that_is_not_in_the_last_step(checkpoint_of: Callable[[str], Path]) -> None:
    """Of two transformers the first has done its steps: its blocks are looked at once more."""
    request = rank_request(PROMPT, steps=STEPS, height=64, width=128, frames=9)
    with Run(_plan(checkpoint_of("wan2.2-a14b"), {}, LAYERWISE), HereGang()) as run:
        assert run.judged(request=request) == ([], STEPS)
        name = run.gang.worker.loaded.stream.blocks[0].name
        found, _ = run.judged(faults.first_transformer, 0, STEPS, request)
        assert {one.check for one in found} == {"arrives"}
        assert all(one.where.startswith(f"step {STEPS}: {name}.") for one in found)
        assert run.judged(request=request) == ([], STEPS)


@thorough
@pytest.mark.parametrize(
    ("offload", "more"),
    some(
        [
            ({**LAYERWISE, "prefetch": 8}, {}),
            ({**LAYERWISE, "device_budget": 0.001, "host": "mmap"}, {}),
            ({**LAYERWISE, "device_budget": "auto"}, {"dtype": "float16"}),
            (LAYERWISE, {"verify": {"arrivals": "every"}}),
            (LAYERWISE, {"verify": {"arrivals": "first", "state": False, "finite": False}}),
            ({}, {"dtype": "bfloat16"}),
        ],
        3,
    ),
    ids=str,
)
def test_no_alarm(offload: dict[str, Any], more: dict[str, Any], flux2_dir: Path) -> None:
    """Requests of four steps, of one and of two, with one between them that is cancelled."""
    gang = HereGang()
    with Run(_plan(flux2_dir, {}, offload, **more), gang) as run:
        for number, steps in enumerate((STEPS, 1, 2, STEPS)):
            assert run.judged(request=changed(REQUEST, steps=steps, number=10 * number)) == ([], steps)
            gang.worker.cancel("enough", 10 * number + 1)
            with pytest.raises(RequestCancelled):
                gang.worker.generate(changed(REQUEST, number=10 * number + 1))


@thorough
def test_every_step_reads_all(flux2_dir: Path) -> None:
    with Run(_plan(flux2_dir, {}, LAYERWISE, verify={"arrivals": "every"}), HereGang()) as run:
        assert run.judged() == ([], STEPS)
        found, steps = run.judged(faults.byte_at_rest, 0, 2)
        assert {one.check for one in found} == {"arrives"}
        assert steps == 2


class LosesARank(LocalGang):
    """Rank 1 is killed in step 2; the one that comes in its place has a copy that is half done in the last step."""

    attempts = 0

    def collective_rpc(self, work: Any, *args: Any, **options: Any) -> list[Any]:
        if work is RankWorker.generate:
            self.attempts += 1
            work = with_fault(faults.killed, 1, 2) if self.attempts == 1 else with_fault(faults.half_done, 1, STEPS)
        return super().collective_rpc(work, *args, **options)


@not_quick
def test_a_fault_after_a_recovery(flux2_dir: Path) -> None:
    """New ranks know anew what is right."""
    config = RunConfig.parse({"parallel": {"tp_degree": 2}, "offload": LAYERWISE})
    lines: list[str] = []
    with Engine.start(config, flux2_dir, make_gang=LosesARank, notify=lines.append) as engine:
        with pytest.raises(CompositionError) as found:
            engine.run(REQUEST.asked)
        assert cast(LosesARank, engine.gang).attempts == 2
    assert any("new ranks" in line for line in lines)
    assert {(one.check, one.rank) for one in found.value.violations} == {("arrives", 1)}
    assert found.value.violations[0].where.startswith(f"step {STEPS}: {BLOCK}")


@quick
def test_a_block_may_write_its_buffers() -> None:
    """That is no violation; its parameters are still compared when it does not."""
    module = nn.Module()
    module.weight, memory = nn.Parameter(torch.randn(200)), torch.zeros(2048, dtype=torch.uint8)
    module.register_buffer("count", torch.zeros(3))
    layout = BlockLayout.of(module)
    memory = memory[: layout.slot_bytes]
    layout.pack(module, memory)
    block = StreamedBlock("b", module, layout, Home.RESIDENT, memory)
    block.bind(memory)
    config = RunConfig()
    parts = {"layout": SimpleNamespace(stored={}, device="cpu"), "memory": SimpleNamespace(outside=())}
    plan = SimpleNamespace(config=config, **parts)
    stream = SimpleNamespace(blocks=(block,), observe_uses=lambda *callbacks: None)
    check = SimpleNamespace(first_difference=lambda *_: "")
    watch = ArrivalWatch(cast(RunPlan, plan), module, cast(Any, stream), cast(Any, check), {}, {})
    watch.arrived(block, memory)
    watch.begin(steps=9)
    for step in range(1, 7):
        if step == 2:
            module.get_buffer("count").add_(1)
        if step == 6:
            module.get_parameter("weight").data[:] = 0
        watch._used(block, memory)
        assert watch.end_step(step, 9) == (step < 6)
