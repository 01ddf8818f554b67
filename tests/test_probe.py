"""same-numbers: a probe step gives the same bits with streaming on and off, and whatever breaks that is named."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import admitted, rank_request

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import SHOWN, Coordinator
from crossdock.runtime.contract.numbers import FINAL_LATENTS, same_numbers
from crossdock.runtime.contract.result import CompositionError, Violation
from crossdock.runtime.contract.verify import verify_composition
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.inspection import checksum
from crossdock.runtime.rank.probe import probe as probe_module
from crossdock.runtime.rank.probe.probe import probe_numbers, probe_request
from crossdock.runtime.rank.weights.load import WeightLoader
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.records import Deviation, ProbeReport
from crossdock.runtime.watch.gang import Gang
from layouts import FAMILIES
from reference import ODD_SIZE, PROMPT
from tiers import not_quick, some, thorough

pytestmark = not_quick

Checkpoints = dict[str, Path]
GangOf = Callable[[int], Gang]
REQUEST = rank_request(PROMPT, steps=2, height=ODD_SIZE[0], width=ODD_SIZE[1])
STREAMED = {
    "shared": {"layerwise": True},
    "mmap": {"layerwise": True, "host": "mmap"},
    "budget": {"layerwise": True, "device_budget": "5MiB"},
}
ONE_RANK: dict[str, dict[str, Any]] = {**STREAMED, "resident": {}}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "tp": {"tp_degree": 2},
    "hsdp": {"dp_degree": 2, "hsdp": {"shard": 2}},
    "ulysses": {"ulysses_degree": 2},
}


@pytest.fixture(autouse=True)
def streaming_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank in this process leaves the unsharded model out, which is `test_same_as_one`'s."""
    monkeypatch.setattr(probe_module, "deviations", lambda *_: ())


def _worker(directory: Path, **offload: Any) -> AbstractContextManager[RankWorker]:
    return admitted(make_plan(RunConfig.parse({"offload": offload}), directory, "cpu"))


def _probe(worker: RankWorker) -> ProbeReport:
    return probe_numbers(worker, probe_request(worker.loaded.plan.layout))


def _found(worker: RankWorker) -> list[Violation]:
    return list(same_numbers(worker.loaded.plan.layout, [_probe(worker)]))


def _expect_first(violations: list[Violation], block: str) -> None:
    """The first violation is of that very block, in its first call."""
    assert violations, "nothing was found"
    first = str(violations[0])
    assert violations[0].where.split(" (")[0] == block, first
    assert "(call 2" not in first
    assert "without streaming (checksum 0x" in first
    assert "found 0x" in first


# -- healthy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", some(FAMILIES, 1))
@pytest.mark.parametrize("offload", some([*ONE_RANK.values()][::-1], 1), ids=some([*ONE_RANK][::-1], 1))
def test_the_same_numbers_on_one_rank(offload: dict[str, Any], family: str, checkpoints: Checkpoints) -> None:
    """No false alarm; every block is compared, and the checksums are of different things."""
    with _worker(checkpoints[family], **offload) as worker:
        probe = _probe(worker)
        assert list(same_numbers(worker.loaded.plan.layout, [probe])) == []
        blocks = {block.name for block in worker.loaded.plan.memory.blocks}
        assert {name for name, _ in probe.on} == blocks | {FINAL_LATENTS}
        assert probe.on[-1][0] == FINAL_LATENTS
        assert len({value for _, value in probe.on}) == len(probe.on)
        assert _probe(worker) == probe, "a second probe differs"


@thorough
@pytest.mark.parametrize("layerwise", [True, False], ids=["layerwise", "resident"])
@pytest.mark.parametrize("parallel", TWO_RANKS.values(), ids=TWO_RANKS.keys())
def test_the_same_numbers_on_two_ranks(
    parallel: dict[str, Any], layerwise: bool, gang_of: GangOf, checkpoints: Checkpoints
) -> None:
    """No false alarm with TP slices, gathered shards or a cut sequence; the engine serves requests afterwards."""
    config = RunConfig.parse({"parallel": parallel, "offload": {"layerwise": layerwise}})
    latents = []
    for probed in (False, True):
        with Engine.start(config, checkpoints["z-image"], gang_of(2)) as engine:
            assert engine.contract_result.composition[-1]["status"] == "not probed"
            if probed:
                engine.probe()
                assert engine.contract_result.composition[-1]["status"] == "holds"
            latents.append(engine.generate(PROMPT, steps=2, height=ODD_SIZE[0], width=ODD_SIZE[1]).latents[0])
            reports = engine.gang.collective_rpc(RankWorker.report, timeout_s=60)
            assert verify_composition(engine.plan, reports) == [], "a load that is told of nowhere filled a slot"
    assert torch.equal(*latents)


@pytest.mark.parametrize("family", some(FAMILIES, 1))
@pytest.mark.parametrize("offload", some([*ONE_RANK.values()], 1), ids=some([*ONE_RANK], 1))
def test_a_probe_leaves_nothing_behind(offload: dict[str, Any], family: str, checkpoints: Checkpoints) -> None:
    """A probe that is taken for a step, stays in the trace or leaves blocks bound elsewhere spoils what follows."""
    results = []
    for probed in (False, True):
        with _worker(checkpoints[family], **offload) as worker:
            before, trace = worker.report(), worker.loaded.stream.trace()
            tensors = dict(worker.loaded.model.named_parameters())
            if probed:
                _probe(worker)
                assert worker.report() == before
                assert worker.loaded.stream.trace() == trace
                assert all(tensors[name] is tensor for name, tensor in worker.loaded.model.named_parameters())
                assert worker.model_steps == 0
                assert worker.loaded.stream.recorded_order is None
            coordinator = Coordinator(worker.loaded.plan)
            for _ in range(2):
                results.append(worker.generate(REQUEST))
                coordinator.review([results[-1]])
            assert worker.model_steps == 4
    plain, after = results[:2], results[2:]
    for one, other in zip(plain, after, strict=True):
        assert one.latents is not None
        assert other.latents is not None
        assert torch.equal(one.latents, other.latents)
        assert one.measurements.peak_weight_bytes == other.measurements.peak_weight_bytes
    if "device_budget" not in offload:  # there it depends on the costs that were measured
        assert [one.measurements.misses for one in plain] == [other.measurements.misses for other in after]
        assert plain[1].measurements.h2d_bytes_per_step == after[1].measurements.h2d_bytes_per_step


@pytest.mark.parametrize("moment", some(["on", "off"], 1))
def test_a_probe_that_fails_leaves_nothing_behind(moment: str, checkpoints: Checkpoints) -> None:
    """A block that raises in the middle: hooks, bindings and the order of running are as before."""

    def fail(*_: Any) -> None:
        if worker.loaded.stream._hooks.suspended == (moment == "off"):
            raise ZeroDivisionError("planted")

    with _worker(checkpoints["flux2-klein"], **STREAMED["shared"]) as worker:
        expected, before, trace = worker.generate(REQUEST).latents, worker.report(), worker.loaded.stream.trace()
        handle = worker.loaded.weights.blocks[3].module.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError, match="planted"):
            _probe(worker)
        handle.remove()
        assert not worker.loaded.stream._hooks.suspended
        assert worker.report() == before
        assert worker.loaded.stream.trace() == trace
        again = worker.generate(REQUEST).latents
        assert expected is not None
        assert again is not None
        assert torch.equal(again, expected)


def test_what_was_loaded_unrecorded_is_loaded_again(checkpoints: Checkpoints) -> None:
    """A block that a probe left in its slot would compute without a load in the trace: a false alarm of in-order."""
    with _worker(checkpoints["flux2-klein"], **STREAMED["shared"]) as worker:
        with worker.loaded.stream.unrecorded():
            worker.loaded.stream._before(worker.loaded.plan.memory.order[0])
        worker.loaded.stream.rehearse()
        assert verify_composition(worker.loaded.plan, [worker.report()]) == []


def test_one_block_at_a_time(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that kept the blocks it read would not fit where the model does not."""
    read = WeightLoader.read_block
    elsewhere: list[int] = []

    def counted(loader: WeightLoader, block: Any) -> torch.Tensor:
        ranges = [(m.data_ptr(), m.data_ptr() + m.nbytes) for m in worker.loaded.stream.slot_memory]
        tensors = [t for b in worker.loaded.weights.blocks for t in b.tensors()]
        outside = [t for t in tensors if not any(low <= t.data_ptr() < high for low, high in ranges)]
        elsewhere.append(len(outside))
        return read(loader, block)

    monkeypatch.setattr(WeightLoader, "read_block", counted)
    with _worker(checkpoints["z-image"], **STREAMED["shared"]) as worker:
        _probe(worker)
        blocks = worker.loaded.plan.memory.blocks
    assert elsewhere == [0] * len(blocks)


# -- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", some(FAMILIES, 1))
@pytest.mark.parametrize("place", some([4, -1, 0], 1))
@pytest.mark.parametrize("offload", [STREAMED["shared"], {}], ids=["shared", "resident"])
def test_a_flipped_bit_names_its_block(
    offload: dict[str, Any], place: int, family: str, checkpoints: Checkpoints
) -> None:
    """One sign of one weight, where the block rests: the blocks before it are right, and it is named."""
    with _worker(checkpoints[family], **offload) as worker:
        block = worker.loaded.weights.blocks[place]
        assert isinstance(block.source, torch.Tensor)
        entry = max(block.layout.entries, key=lambda entry: entry.nbytes)
        block.source[entry.offset + 7] ^= 0x80
        violations, blocks = _found(worker), [other.name for other in worker.loaded.plan.memory.blocks]
    _expect_first(violations, block.name)
    behind = blocks.index(block.name) - len(blocks) + 1
    passes = 2 if family == "flux2-klein" else 1
    assert f"of the {(passes - 1) * len(blocks) - behind} calls behind it" in violations[0].found


@pytest.mark.parametrize("family", some(FAMILIES, 1))
def test_pages_of_another_block_are_found(family: str, checkpoints: Checkpoints) -> None:
    """From the page cache a block comes in pieces: pieces of its neighbour have the right shapes and wrong numbers."""
    with _worker(checkpoints[family], **STREAMED["mmap"]) as worker:
        blocks = list(worker.loaded.stream.blocks)
        blocks[-1] = replace(blocks[-1], source=blocks[-2].source)
        worker.loaded.stream.blocks = tuple(blocks)
        _expect_first(_found(worker), blocks[-1].name)


@pytest.mark.parametrize("offload", some([*STREAMED.values()], 1), ids=some([*STREAMED], 1))
def test_a_load_that_is_left_out_is_found(
    offload: dict[str, Any], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale slot: the block runs with the weights of the one that was there before."""
    with _worker(checkpoints["flux2-klein"], **offload) as worker:
        stale = worker.loaded.plan.memory.streamed[-1].name
        load = worker.loaded.stream._loader.load
        left_out: list[str] = []

        def forgetful(block: Any, memory: Any, after: Any, slot: Any, done: Any, **more: Any) -> None:
            if block.name == stale and not left_out:
                left_out.append(stale)
                done(worker.loaded.copy_engine.record())
            else:
                load(block, memory, after, slot, done, **more)

        monkeypatch.setattr(worker.loaded.stream._loader, "load", forgetful)
        _expect_first(_found(worker), stale)
        assert left_out == [stale]


@pytest.mark.parametrize("poison", some([False, True], 1))
def test_a_wait_that_is_left_out_is_found(
    poison: bool, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that come late, and one block that does not wait for its own: it computes with what was there before."""
    with _worker(checkpoints["z-image"], **STREAMED["shared"]) as worker:
        index = worker.loaded.plan.memory.order[5]
        wait, slots = worker.loaded.copy_engine.wait, worker.loaded.stream._table.of
        left_out: list[int] = []

        def impatient(event: Any) -> None:
            if slots[index].holder == index and event is slots[index].ready and not left_out:
                left_out.append(index)
            else:
                wait(event)

        worker.loaded.stream.poison_freed = poison
        monkeypatch.setattr(worker.loaded.copy_engine, "_delay", lambda: time.sleep(0.02))
        monkeypatch.setattr(worker.loaded.copy_engine, "wait", impatient)
        _expect_first(_found(worker), worker.loaded.plan.memory.blocks[index].name)
        assert left_out == [index]


@pytest.mark.parametrize("fault", some(["hsdp", "tp"], 1))
def test_the_part_of_another_rank_is_found(fault: str, gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """Rank 1 holds rank 0's slice, or shard, of one block: right shapes, right sizes, wrong numbers."""

    def plant(worker: Any) -> str:
        from crossdock.runtime.models.meta import build_on_meta
        from crossdock.runtime.rank.weights.load import WeightLoader

        plan, block = worker.loaded.plan, worker.loaded.weights.blocks[3]
        if worker.rank == 1:
            fresh = build_on_meta(plan.layout.spec.transformer, plan.layout.model_dir / "transformer")
            loader = WeightLoader(plan, worker.loaded.mesh, fresh, worker.device)
            loader._slices = plan.layout.slices[0]
            whole = loader.read_block(next(planned for planned in plan.memory.blocks if planned.name == block.name))
            block.source.copy_(whole[: block.source.nbytes])
        return str(block.name)

    config = RunConfig.parse({"parallel": TWO_RANKS[fault], "offload": {"layerwise": True}})
    with Engine.start(config, checkpoints["flux2-klein"], gang_of(2)) as engine:
        name = engine.gang.collective_rpc(plant, timeout_s=60)[0]
        with pytest.raises(CompositionError, match="same-numbers: rank") as caught:
            engine.probe()
        assert engine.contract_result.composition[-2]["status"] == "violated"
        assert {violation.rank for violation in caught.value.violations} == {0, 1}
        _expect_first(list(caught.value.violations), name)


def test_every_tensor_of_an_output_counts(checkpoints: Checkpoints) -> None:
    """Some blocks return a tuple: a fault that shows in its last part only is a fault, and so is another order."""

    def add(module: Any, args: Any, output: Any) -> Any:
        return (*output[:-1], output[-1] + 1) if worker.loaded.stream._hooks.suspended else output

    def swap(module: Any, args: Any, output: Any) -> Any:
        return output[::-1] if worker.loaded.stream._hooks.suspended else output

    with _worker(checkpoints["flux2-klein"], **STREAMED["shared"]) as worker:
        block = worker.loaded.weights.blocks[2]
        assert block.name.startswith("transformer_blocks."), "this one returns text and image"
        for change in (add, swap):
            handle = block.module.register_forward_hook(change)
            _expect_first(_found(worker), block.name)
            handle.remove()


def test_a_checksum_sees_every_sign() -> None:
    """The top bit of a word, weighted with an odd number, would count alike everywhere: two would cancel."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensor = torch.randn(64, dtype=torch.float64).to(dtype)
        for changed in ([1], [3], [1, 3], [3, 7], range(64)):
            other = tensor.clone()
            other[list(changed)] *= -1
            assert checksum(other) != checksum(tensor), (dtype, changed)


# -- judged ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(flux2_dir: Path) -> RunPlan:
    """Two ranks of one replica."""
    return make_plan(RunConfig.parse({"parallel": {"tp_degree": 2}}), flux2_dir, "cpu")


CALLS = (("a", 1), ("b", 2), ("a", 3), (FINAL_LATENTS, 4))


def _judge(plan: RunPlan, *probes: tuple[int, tuple[Any, ...], tuple[Any, ...]]) -> list[str]:
    return [str(violation) for violation in same_numbers(plan.layout, [ProbeReport(*probe) for probe in probes])]


def test_equal_probes_hold(plan: RunPlan) -> None:
    """The baseline of the tests below."""
    assert _judge(plan, (0, CALLS, CALLS), (1, CALLS, CALLS)) == []


def test_a_rank_without_a_probe_is_named(plan: RunPlan) -> None:
    """Nothing is proven of a rank that said nothing."""
    assert _judge(plan, (0, CALLS, CALLS)) == [
        "same-numbers: rank 1: probe: expected one, found none; a rank is missing; start again"
    ]


def test_the_earliest_difference_comes_first(plan: RunPlan) -> None:
    """A fault on one rank shows on the others later: the first line is where to look."""
    late = (*CALLS[:2], ("a", 30), (FINAL_LATENTS, 40))
    early = (CALLS[0], ("b", 20), ("a", 30), (FINAL_LATENTS, 40))
    first, second = _judge(plan, (0, late, CALLS), (1, early, CALLS))
    assert first.startswith(
        "same-numbers: rank 1: b: expected the output without streaming (checksum 0x2), found 0x14 and other outputs "
        "of 1 of the 1 calls behind it; "
    )
    assert second.startswith("same-numbers: rank 0: a (call 2 of it): ")


def test_latents_alone_point_outside_the_blocks(plan: RunPlan) -> None:
    """All blocks agree, the picture does not: the weights are not to blame."""
    (found,) = _judge(plan, (0, (*CALLS[:3], (FINAL_LATENTS, 5)), CALLS), (1, CALLS, CALLS))
    assert "rank 0: final latents" in found
    assert "outside the blocks" in found


@pytest.mark.parametrize(
    ("on", "text"),
    [
        ((CALLS[0], ("c", 2), *CALLS[2:]), "block call 1: expected b as without streaming, found c"),
        ((CALLS[0], *CALLS[2:]), "block call 1: expected b as without streaming, found a"),
        ((), "block call 0: expected a as without streaming, found nothing"),
        ((*CALLS, ("d", 4)), "block call 4: expected nothing as without streaming, found d"),
    ],
    ids=["another", "left out", "none", "more"],
)
def test_other_calls_are_found(plan: RunPlan, on: tuple[Any, ...], text: str) -> None:
    """Streaming must not change which blocks run."""
    found = _judge(plan, (0, CALLS, CALLS), (1, on, CALLS))
    assert len(found) == (1 if on else 2), "and that the transformer had no turn, where nothing ran"
    assert any(f"rank 1: {text}" in violation for violation in found)


def test_ranks_that_run_other_blocks_are_found(plan: RunPlan) -> None:
    """Each is consistent in itself, but they do not do the same work."""
    other = (*CALLS[:2], ("z", 3), CALLS[3])
    first, second = _judge(plan, (0, CALLS, CALLS), (1, other, other))  # of two, it is not known which is wrong
    assert "rank 0: block call 2 without streaming: expected z as on rank 1, found a" in first
    assert "rank 1: block call 2 without streaming: expected a as on rank 0, found z" in second


def test_the_coordinator_carries_all_violations(plan: RunPlan) -> None:
    """The message lists a few; whoever prints a report gets every one."""
    coordinator = Coordinator(plan)
    wide = make_plan(RunConfig.parse({"parallel": {"dp_degree": 8}}), plan.layout.model_dir, "cpu")
    coordinator.plan = wide
    right = (Deviation(1, "a", 0.0),)
    with pytest.raises(CompositionError, match=r"and 3 more violations") as caught:
        coordinator.compare([ProbeReport(rank, CALLS, (("a", 9), *CALLS[1:]), right) for rank in range(SHOWN + 3)])
    assert len(caught.value.violations) == SHOWN + 3
    assert [row["status"] for row in coordinator.composition] == ["violated", "holds"]
