"""finite, same-state, same-order, and what was read: faults in the steps of a request, each caught by its check, with
the step and the rank; and no alarm without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import faults_in_steps as faults
import pytest
from faults_in_steps import BLOCK, OUTSIDE, Plant
from judged_run import HereGang
from one_rank import rank_request

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.contract.result import CompositionError, Violation
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.rank_result import RankResult
from crossdock.runtime.request import RankRequest
from crossdock.runtime.watch.gang import Gang
from reference import PROMPT
from tiers import ALL, not_quick, thorough

pytestmark = not_quick

cloudpickle.register_pickle_by_value(faults)

GangOf = Callable[[int], Gang]
STEPS = 4
REQUEST = rank_request(PROMPT, steps=STEPS, height=64, width=64)
TIMEOUT_S = 120.0
LAYERWISE = {"layerwise": True}
PARALLEL: dict[str, dict[str, int]] = {
    "one": {},
    "tp2": {"tp_degree": 2},
    "cfg2": {"cfg_degree": 2},
    "sequence4": {"ulysses_degree": 2, "ring_degree": 2},
}


@dataclass(frozen=True)
class Fault:
    """`where` and `check` are in a violation on every rank of `blamed`; `at` are the steps in which it is planted.

    Attributes:
        later: the step in which it shows is so many behind.
        late: at the request's end only, so that no step is named.
    """

    check: str
    where: str
    plant: Plant
    at: tuple[int, ...] = (2, STEPS)
    later: int = 0
    late: bool = False


NAN = Fault("finite", BLOCK, faults.nan_in_block)
LATENTS = Fault("same-state", "the latents", faults.latents)
HOME = Fault("single-owner", BLOCK, faults.another_home, late=True)
HOOKS = Fault("same-order", BLOCK, faults.hooks_lost, late=True)
SOME_TIME = Fault("same-order", BLOCK, faults.hooks_lost_and_found, late=True)
WEIGHT = Fault("arrives", OUTSIDE, faults.outside_weight, late=True)
EMBEDDINGS = Fault("same-state", "encoder_hidden_states, given to the transformer", faults.embeddings)
BROADCAST = Fault("same-state", "what encode_prompt returned[0]", faults.embeddings, at=(1,))
NUMBERS = (
    Fault("same-state", "seeds[0]", faults.seeds, at=(1,)),
    Fault("same-state", "timesteps", faults.timesteps),
    Fault("same-state", "sigmas", faults.sigmas),
    Fault("same-state", "guidance scale", faults.guidance),
)
TABLE = Fault("same-state", "rotary_emb", faults.rotary_table)
SKIPPED = Fault("same-order", BLOCK, faults.block_skipped)
FAULTS: dict[str, tuple[Fault, ...]] = {
    "one": (NAN, HOME, HOOKS, SOME_TIME, WEIGHT),
    "tp2": (LATENTS, EMBEDDINGS, BROADCAST, *NUMBERS, TABLE, WEIGHT, HOME),
    "cfg2": (NAN, LATENTS, EMBEDDINGS, SKIPPED, HOOKS, SOME_TIME, WEIGHT),
    "sequence4": (NAN, LATENTS, EMBEDDINGS, BROADCAST, *NUMBERS),
}


def _plan(directory: Path, parallel: dict[str, int], **more: Any) -> RunPlan:
    return make_plan(RunConfig.parse({"parallel": parallel, "offload": LAYERWISE, **more}), directory, "cpu")


def _with(plant: Plant | None, rank: int, at: int) -> Callable[[RankWorker, RankRequest], RankResult]:
    """A request with the fault planted on one rank meanwhile."""
    put_back = faults.put_back

    def run(worker: RankWorker, request: RankRequest) -> RankResult:
        import pytest

        with pytest.MonkeyPatch.context() as patch:
            if plant is not None and worker.rank == rank:
                plant(worker, patch, at)
            try:
                return worker.generate(request)
            finally:
                put_back(worker)

    return run


def _review(plan: RunPlan, reports: Any, results: Sequence[RankResult]) -> list[Violation]:
    coordinator = Coordinator(plan)
    coordinator.admit(reports, rehearsed=True)
    try:
        coordinator.review(results)
    except CompositionError as error:
        return list(error.violations)
    return []


@thorough
def test_the_other_transformer(gang_of: GangOf, checkpoint_of: Callable[[str], Path]) -> None:
    """One rank runs the transformer of the other steps, from `at` on."""
    plan = _plan(checkpoint_of("wan2.2-a14b"), PARALLEL["cfg2"])
    gang, request = gang_of(2), rank_request(PROMPT, steps=STEPS, height=64, width=128, frames=9)
    try:
        reports = gang.collective_rpc(RankWorker.setup, plan, False, True, timeout_s=TIMEOUT_S)
        for plant, at in ((None, 0), (faults.other_transformer, 2), (faults.other_transformer, STEPS), (None, 0)):
            results = gang.collective_rpc(_with(plant, 1, at), request, timeout_s=TIMEOUT_S)
            found = _review(plan, reports, results)
            print(at, *found[:4], sep="\n   ")
            order = [one for one in found if one.check == "same-order"]
            assert {one.rank for one in order} == (set() if plant is None else {0, 1}), (at, found)
            assert all(f"step {at}: " in one.where for one in order)
    finally:
        gang.collective_rpc(RankWorker.teardown, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[thorough] * (name == "sequence4")) for name in FAULTS])
def test_every_fault_is_caught(layout: str, gang_of: GangOf, flux2_dir: Path) -> None:
    """A wrong picture leaves, or somebody else is blamed. All in one load: what comes after a fault is right again."""
    plan = _plan(flux2_dir, PARALLEL[layout])
    size = plan.layout.mesh.world_size
    gang: Any = gang_of(size) if size > 1 else HereGang()
    rank, ask = min(1, size - 1), lambda *work: gang.collective_rpc(*work, timeout_s=TIMEOUT_S)
    try:
        reports = ask(RankWorker.setup, plan, False, True)
        assert _review(plan, reports, ask(_with(None, rank, 0), REQUEST)) == []
        for fault in FAULTS[layout]:
            for at in fault.at if ALL else fault.at[:1]:
                results = ask(_with(fault.plant, rank, at), REQUEST)
                found = _review(plan, reports, results)
                mine = [one for one in found if one.check == fault.check and fault.where in one.where]
                print(layout, fault.plant.__name__, at, *found[:4], sep="\n   ")
                blamed = {one.rank for one in mine}
                undecided = size == 2 and fault.check in ("same-state", "same-order") and not fault.late
                assert blamed == ({0, 1} if undecided else {rank}), (fault, at, found)
                if not fault.late:
                    assert all(f"step {at}: " in one.where for one in mine), (fault, at, mine)
                    steps = {len(result.seen.steps) for result in results}
                    assert steps == {at}, "the request went on"
                    assert not any(result.media for result in results)
        assert _review(plan, reports, ask(_with(None, rank, 0), REQUEST)) == []
    finally:
        ask(RankWorker.teardown)
