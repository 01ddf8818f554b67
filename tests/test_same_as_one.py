"""same-as-one: every block returns what it returns in the unsharded model, and where it does not, it is named, with the
ranks. `test_matrix_e2e` probes every family in its layouts and prints the errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
import faults_in_numbers as faults
import pytest
import torch
from faults_in_numbers import Plant
from one_rank import admitted

from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.contract.numbers import RETURNED, SAME_AS_ONE, SHARED_OUT, bound, by_block, same_as_one, told
from crossdock.runtime.contract.result import CompositionError, Violation
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.probe.deviations import _parts_of
from crossdock.runtime.rank.probe.probe import probe_numbers, probe_request
from crossdock.runtime.rank.probe.unsharded import Segment, UnshardedModel
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.records import Deviation, ProbeReport
from crossdock.runtime.request import GenerateRequest
from crossdock.runtime.watch.gang import Gang
from layouts import FAMILIES
from tiers import not_quick, some, thorough

pytestmark = not_quick

cloudpickle.register_pickle_by_value(faults)

Checkpoints = dict[str, Path]
GangOf = Callable[[int], Gang]
TIMEOUT_S = 120.0
LAYERWISE = {"layerwise": True}


# -- faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """`rank`: where it is planted; None: on all. `wrong`: the ranks whose outputs differ by it."""

    plant: Plant
    rank: int | None = None
    wrong: frozenset[int] = frozenset(range(4))


@dataclass(frozen=True)
class Load:
    """`block`: the one in which they are planted, and the first one that is wrong."""

    family: str
    parallel: dict[str, int]
    block: str
    faults: tuple[Fault, ...]
    dtype: str = "auto"


SEQUENCE_4 = {"ulysses_degree": 2, "ring_degree": 2}
TABLE = Fault(faults.rotary_table_of_the_neighbour, 1)
HEADS = Fault(faults.heads_in_another_order)
OF_TOKENS = (
    TABLE,
    HEADS,
    Fault(faults.mask_shifted_by_one),
    Fault(faults.padding_attended),
    Fault(faults.keys_and_values_swapped_in_a_hop, 1, frozenset({2, 3})),
    Fault(faults.merged_without_weights),
    Fault(faults.own_tokens_in_another_order, 2, frozenset({2})),
)
OF_FEATURES = tuple(
    Fault(plant, wrong=frozenset({0, 1}))
    for plant in (faults.bias_on_every_rank, faults.norm_over_the_shard, faults.reduce_left_out)
)
CONFUSED = Fault(faults.branches_confused, wrong=frozenset({0, 1}))
LOADS = {
    "tokens": Load("z-image", SEQUENCE_4, "layers.2", OF_TOKENS),
    "features": Load("wan2.1", {"tp_degree": 2}, "blocks.2", OF_FEATURES),
    "branches": Load("flux2-klein", {"cfg_degree": 2}, SHARED_OUT, (CONFUSED,)),
    "text": Load("flux2-klein", SEQUENCE_4, "transformer_blocks.0", (Fault(faults.text_counted_twice),)),
    "scattered": Load("qwen-image-2.1", SEQUENCE_4, "transformer_blocks.2", (HEADS,)),
    "half": Load("z-image", SEQUENCE_4, "layers.2", (TABLE, HEADS), "bfloat16"),
}
FEW = ("tokens", "features", "branches")


def _plan(directory: Path, parallel: dict[str, int], **more: Any) -> RunPlan:
    return make_plan(RunConfig.parse({"parallel": parallel, "offload": LAYERWISE, **more}), directory, "cpu")


def _with(fault: Fault | None, block: str) -> Callable[[RankWorker, GenerateRequest], ProbeReport]:
    """A probe with the fault planted meanwhile."""
    place_of = faults.Place

    def run(worker: RankWorker, request: GenerateRequest) -> ProbeReport:

        import pytest

        with pytest.MonkeyPatch.context() as patch, ExitStack() as hooks:
            if fault is not None and fault.rank in (None, worker.rank):
                fault.plant(patch, place_of(worker, block, hooks).watch())
            return probe_numbers(worker, request)

    return run


def _judged(plan: RunPlan, probes: list[ProbeReport]) -> list[Violation]:
    coordinator = Coordinator(plan)
    try:
        coordinator.compare(probes)
    except CompositionError as error:
        return list(error.violations)
    print(coordinator.composition[-1]["detail"])
    return []


@pytest.mark.parametrize(
    "load", [pytest.param(load, id=name, marks=[thorough] * (name not in FEW)) for name, load in LOADS.items()]
)
def test_every_fault_names_its_block(load: Load, gang_of: GangOf, checkpoint_of: Callable[[str], Path]) -> None:
    """A wrong number leaves, or another block or rank is blamed. What is probed after a fault is right again.

    All ranks are wrong alike, with and without streaming, so that nothing else could tell.
    """
    plan = _plan(checkpoint_of(load.family), load.parallel, dtype=load.dtype)
    gang, request = gang_of(plan.layout.mesh.world_size), probe_request(plan.layout)
    try:
        gang.collective_rpc(RankWorker.setup, plan, timeout_s=TIMEOUT_S)
        for fault in (None, *load.faults, None):
            probes = gang.collective_rpc(_with(fault, load.block), request, timeout_s=TIMEOUT_S)
            found = _judged(plan, probes)
            print(fault and fault.plant.__name__, *found[:2], sep="\n   ")
            assert {one.check for one in found} == ({SAME_AS_ONE} if fault else set())
            assert {one.where.partition(" (")[0] for one in found} == ({load.block} if fault else set())
            ranks = {one.rank for one in found}
            if load.dtype == "auto":
                assert ranks == (fault.wrong if fault else set())
            else:  # on some it may be less than rounding makes
                assert ranks if fault else not ranks
    finally:
        gang.collective_rpc(RankWorker.teardown, timeout_s=TIMEOUT_S)


def _one_row_off(plan: RunPlan, fqn: str) -> RunPlan:
    """The ranks still have every row once, each in one place; but not those that belong to the rank's other tensors."""
    rows = plan.layout.stored[fqn].shape[0]
    parts = (((1, rows // 2 + 1),), ((rows // 2 + 1, rows), (0, 1)))
    off = [{fqn: TensorSlice(0, ranges, rows)} for ranges in parts]
    slices = tuple({**right, **wrong} for right, wrong in zip(plan.layout.slices, off, strict=True))
    return replace(plan, layout=replace(plan.layout, slices=slices))


def test_a_plan_that_is_one_row_off(gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """What is planned is read, arrives and adds up: no other check can see that it is not what a rank needs."""
    block = "transformer_blocks.1"
    plan = _plan(checkpoints["flux2-klein"], {"tp_degree": 2})
    plan = _one_row_off(plan, f"{block}.attn.to_q.weight")
    gang = gang_of(2)
    try:
        reports = gang.collective_rpc(RankWorker.setup, plan, True, timeout_s=TIMEOUT_S)
        Coordinator(plan).admit(reports, rehearsed=True)
        found = _judged(plan, gang.collective_rpc(probe_numbers, probe_request(plan.layout), timeout_s=TIMEOUT_S))
    finally:
        gang.collective_rpc(RankWorker.teardown, timeout_s=TIMEOUT_S)
    print(*found, sep="\n")
    assert {(one.check, one.rank, one.where) for one in found} == {
        (SAME_AS_ONE, rank, f"{block} (call 1)") for rank in (0, 1)
    }


# -- the unsharded model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", some(FAMILIES, 1))
def test_one_block_at_a_time(family: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not fit where the model does not; and what is away gives no numbers."""
    present, seen = list[str](), list[tuple[str, ...]]()
    bring = UnshardedModel._present

    @contextmanager
    def counted(model: UnshardedModel, owner: str) -> Iterator[None]:
        present.append(owner)
        seen.append(tuple(present))
        away = [
            weight.table[weight.leaf]
            for name in model._weights
            if name not in present
            for weight in model._weights[name]
        ]
        assert all(tensor.isnan().all() for tensor in away if tensor.is_floating_point())
        assert all(set(tensor.stride()) <= {0} for tensor in away), "memory is held for it"
        with bring(model, owner):
            yield
        present.remove(owner)

    monkeypatch.setattr(UnshardedModel, "_present", counted)
    with admitted(_plan(checkpoints[family], {})) as worker:
        report = probe_numbers(worker, probe_request(worker.loaded.plan.layout))
        blocks = [block.name for block in worker.loaded.plan.memory.blocks]
    calls = max(found.call for found in report.alone)
    assert seen == [("",), *(("", name) for name in blocks)] * calls
    assert [found.block for found in report.alone] == [*blocks, RETURNED] * calls
    assert {found.error for found in report.alone} == {0.0}


def test_it_is_held_against_itself_in_float32(checkpoints: Checkpoints) -> None:
    """In shorter numbers, where that says how much is rounding."""
    with admitted(_plan(checkpoints["z-image"], {}, dtype="bfloat16")) as worker:
        report = probe_numbers(worker, probe_request(worker.loaded.plan.layout))
    assert {found.error for found in report.alone} == {0.0}
    own = [found.own_error for found in report.alone]
    print(own)
    assert all(1e-4 < error < 0.1 for error in own)


def test_the_probe_has_padding_and_tokens_that_do_not_divide(checkpoints: Checkpoints) -> None:
    """Or it could not tell whether these are handled."""
    with admitted(_plan(checkpoints["z-image"], {})) as worker:
        masks = list[torch.Tensor]()
        worker.loaded.model.get_submodule("layers.0").register_forward_pre_hook(
            lambda module, args: masks.append(args[1])
        )
        probe_numbers(worker, probe_request(worker.loaded.plan.layout))
        plan, request = worker.loaded.plan, probe_request(worker.loaded.plan.layout)
    assert not masks[0].all()
    assert masks[0].any(1).all()
    assert (request.height or 0) // plan.layout.pixel_multiple % 2
    assert (request.width or 0) // plan.layout.pixel_multiple % 2


# -- whose tokens ----------------------------------------------------------------------------------------------------


def _own(tokens: int, segments: tuple[int, ...], parts: int, index: int) -> set[tuple[int, ...]]:
    whole = torch.arange(tokens)[None, :, None]
    found = _parts_of(whole, [Segment(count) for count in segments], parts, index)
    return {tuple(part.own[0, :, 0].tolist()) for part in found}


def test_own_tokens() -> None:
    """Of each segment, neighbouring ones; the first parts have one more. What is in no segment is whole, or may be."""
    assert _own(7, (7,), 3, 0) == {tuple(range(7)), (0, 1, 2)}
    assert _own(7, (7,), 3, 1) == {tuple(range(7)), (3, 4)}
    assert _own(7, (3, 4), 2, 1) == {tuple(range(7)), (2, 5, 6)}
    assert _own(4, (3, 4), 2, 1) == {tuple(range(4)), (2, 3)}
    assert _own(1, (1,), 2, 1) == {(0,)}  # a copy, that is not compared
    assert _own(5, (3, 4), 2, 1) == {tuple(range(5))}
    assert _own(5, (), 2, 1) == {tuple(range(5))}


def test_padding_is_not_compared() -> None:
    """What it computes is nobody's business; the kernels differ."""
    real = torch.tensor([[True, True, False, False]])
    found = list(_parts_of(torch.zeros(1, 6, 1), [Segment(2), Segment(4, real)], 2, 1))
    rows = [part.real.tolist() for part in found if part.real is not None]
    assert rows == [[[True, True, True, True, False, False]], [[True, False, False]]]


# -- judged ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(flux2_dir: Path) -> RunPlan:
    """Four ranks: two guidance branches, each of two ranks."""
    return _plan(flux2_dir, {"cfg_degree": 2, "ulysses_degree": 2})


def _probe(rank: int, *errors: float, own: float = 0.0, found: str = "") -> ProbeReport:
    return ProbeReport(
        rank, (), (), tuple(Deviation(1, f"b{n}", error, own, "", found) for n, error in enumerate(errors))
    )


def _judge(plan: RunPlan, *probes: ProbeReport) -> list[tuple[int, str]]:
    return [(one.rank, one.where) for one in same_as_one(plan.layout, probes)]


def test_the_earliest_output_of_each_branch(plan: RunPlan) -> None:
    """What follows from a fault is not told; of several ranks, the one that is farthest off comes first."""
    right = _probe(0, 0.0, 1e-4, 9e-5)
    assert _judge(plan, *(replace(right, rank=rank) for rank in range(4))) == []
    wrong = [
        _probe(0, 0.0, 2e-4, 1.0),
        _probe(1, 0.0, 3e-4, 1.0),
        _probe(2, 0.0, 0.0, 0.0),
        _probe(3, 0.0, 0.0, 1.1e-4),
    ]
    assert _judge(plan, *wrong) == [(1, "b1"), (0, "b1"), (3, "b2")]
    (alone,) = [one for one in same_as_one(plan.layout, wrong) if one.rank == 3]
    assert alone.found == "1.1e-04, and beyond it 0 of the 0 outputs behind it; 1 ranks are right here"
    assert [found.error for found in by_block(plan.layout, wrong)] == [0.0, 3e-4, 1.0, 0.0, 0.0, 1.1e-4]


def test_what_cannot_be_told_is_a_fault(plan: RunPlan) -> None:
    """Fails closed: not finite, another shape, or nothing at all."""
    for error in (math.inf, math.nan):
        assert _judge(plan, _probe(0, error)) == [(0, "b0")]
    (other,) = same_as_one(plan.layout, [_probe(0, math.inf, found="a tensor of shape [1] for [2]")])
    assert other.found.startswith("a tensor of shape [1] for [2]")
    assert _judge(plan, ProbeReport(0, (), ())) == [(0, "step of the unsharded model")]
    assert told(plan.layout, ()) == "nothing was compared"


def test_the_bound(plan: RunPlan) -> None:
    """In float32 one number; in shorter ones four times the model's own error, between two roundings and a quarter."""
    assert bound(plan.layout, Deviation(1, "b", 0.0, 0.5)) == 1e-4
    half = replace(plan.layout, dtypes=dict.fromkeys(plan.layout.dtypes, torch.bfloat16))
    assert bound(half, Deviation(1, "b", 0.0, 0.01)) == pytest.approx(0.04)
    assert bound(half, Deviation(1, "b", 0.0, 1e-4)) == pytest.approx(2 / 128)
    assert bound(half, Deviation(1, "b", 0.0, math.inf)) == 0.25
    mixed = replace(plan.layout, dtypes={**plan.layout.dtypes, "kept": torch.float32, "norm": torch.float16})
    assert bound(mixed, Deviation(1, "b", 0.0, 0.0)) == pytest.approx(2 / 1024)


def test_a_rank_without_tokens_answers_for_none() -> None:
    """It has a copy of the first one, behind which attention left nothing."""
    whole = torch.randn(1, 6, 3)
    part = next(each for each in _parts_of(whole, (Segment(2), Segment(4)), 4, 3) if each.text)
    assert torch.equal(part.own, whole[:, [0, 5]])
    assert part.real is not None
    assert part.real.tolist() == [[False, True]]
