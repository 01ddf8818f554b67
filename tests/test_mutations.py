"""Mutation tests of the composition contract: faults planted in ranks of real gangs, each caught by the check that is
responsible for it, with the rank and the block or parameter; and nothing is found on any layout without one.

Where all ranks make the same mistake with and without streaming, same-as-one alone sees it, in a probe; without one a
wrong picture leaves.
"""

from __future__ import annotations

import ast
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from one_rank import changed, rank_request
from test_steps import FAULTS

import mutations
import mutations_running as running
from crossdock.launch.gangs.local.gang import LocalGang
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.contract.numbers import SAME_AS_ONE, SAME_NUMBERS
from crossdock.runtime.contract.result import CompositionError, Violation
from crossdock.runtime.contract.verify import CHECKS, STEP_CHECKS
from crossdock.runtime.errors import RankError
from crossdock.runtime.plan import make_plan as plan_module
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.probe.probe import probe_numbers, probe_request
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.rank_result import RankResult
from crossdock.runtime.request import GenerateRequest, RankRequest
from crossdock.runtime.watch.gang import Gang
from layouts import COMBINED, FAMILIES, LAYOUTS, PARTLY_RESIDENT
from mutations import BLOCK, NEXT, OUTSIDE, PACKED, TABLE, TO_Q, Mutation, Plant, Stage
from reference import PROMPT, TOLERANCE, max_error, reference_latents
from tiers import ALL, one_each, quick, some, thorough

for module in (mutations, running):  # the ranks cannot import the tests
    cloudpickle.register_pickle_by_value(module)

GangOf = Callable[[int], Gang]
Checkpoints = dict[str, Path]
Told = dict[Stage, list[Any]]
"""Stage -> by rank a RankReport, RankResult or ProbeReport, as far as the ranks got."""
Found = dict[Stage, list[Violation]]
"""Stage -> what the coordinator found in it; there is none after one in which something was found."""
SIZE = 64
REQUEST = rank_request(PROMPT, steps=1, height=SIZE, width=SIZE)
TWO_STEPS = rank_request(PROMPT, steps=2, height=SIZE, width=SIZE)
TIMEOUT_S = 120.0

_FROM_FILES = {"layerwise": True, "host": "mmap"}
MORE: dict[str, dict[str, Any]] = {
    **{name: {**parallel, "offload": PARTLY_RESIDENT} for name, parallel in COMBINED.items()},
    "mmap_tp2": {"parallel": {"tp_degree": 2}, "offload": _FROM_FILES},
    "mmap_hsdp": {"parallel": {"dp_degree": 4, "hsdp": {"replicate": 2, "shard": 2}}, "offload": _FROM_FILES},
}
"""Layouts beside the built-in ones."""

TP = ("layerwise_tp2", "tp2")
HSDP = ("hsdp", "layerwise_hsdp")
OFFLOAD = ("layerwise_tp2", "layerwise_ulysses2_ring2")

OWN_BUDGET = mutations.planned_alone(device_budget="5MiB")
MUTATIONS = (
    # name, pitfalls, check, where, layouts, plant
    Mutation("order swapped", (), "same-schedule", BLOCK, OFFLOAD, mutations.order_swapped, needs="streamed !sharded"),
    Mutation(
        "slots by turns",
        (17,),
        "same-schedule",
        "context_refiner.0",
        OFFLOAD,
        mutations.slots_by_turns,
        needs="streamed !sharded",
    ),
    Mutation("another set of residents", (), "same-schedule", "layers", OFFLOAD, OWN_BUDGET, needs="copied !sharded"),
    Mutation(
        "a wider window",
        (),
        "same-schedule",
        "slot 2 (of ",
        OFFLOAD,
        mutations.planned_alone(prefetch=2),
        needs="copied !sharded",
    ),
    Mutation(
        "a private copy",
        (1,),
        "single-owner",
        TO_Q,
        ("layerwise_tp2", "hsdp"),
        mutations.private_copy,
        needs="streamed",
    ),
    Mutation(
        "nothing is freed",
        (1,),
        "single-owner",
        BLOCK,
        ("layerwise", "hsdp"),
        mutations.nothing_is_freed,
        needs="streamed",
    ),
    Mutation(
        "a host copy never read",
        (1,),
        "single-owner",
        BLOCK,
        ("layerwise_tp2", "layerwise_hsdp", "mmap_tp2"),
        running.host_copy_never_read,
        needs="streamed",
    ),
    Mutation(
        "a copy read after the load",
        (1,),
        "single-owner",
        BLOCK,
        ("layerwise_tp2", "hsdp"),
        running.host_copy_never_read,
        "request",
        needs="streamed",
    ),
    Mutation("left on meta", (9,), "single-owner", "x_pad_token", ("tp2", "layerwise_hsdp"), mutations.left_on_meta),
    Mutation("accelerate hook", (4,), "single-owner", BLOCK, ("single", "layerwise_hsdp"), mutations.accelerate_hook),
    Mutation(
        "fully_shard",
        (1, 2, 4),
        "single-owner",
        BLOCK,
        ("layerwise_tp2", "hsdp"),
        mutations.fully_sharded,
        rank=None,
        needs="ranks",
    ),
    Mutation("adapter registered", (26,), "single-owner", "lora_a", ("ring4", "hsdp"), mutations.adapter_registered),
    Mutation("another dtype", (), "single-owner", OUTSIDE, ("tp2", "layerwise"), mutations.another_dtype),
    Mutation(
        "whole blocks read",
        (6,),
        "single-owner",
        "device memory",
        ("hsdp",),
        mutations.whole_blocks_read,
        needs="sharded !copied",
    ),
    Mutation("slice of another rank", (), "complete", TO_Q, TP, mutations.slice_of_another_rank, needs="tp"),
    Mutation(
        "parts in another order",
        (),
        "complete",
        PACKED,
        TP,
        mutations.parts_in_another_order,
        family="flux2-klein",
        needs="tp",
    ),
    Mutation("shard of the neighbour", (), "complete", BLOCK, HSDP, mutations.shard_of_the_neighbour, needs="sharded"),
    Mutation(
        "shard off by the alignment",
        (),
        "complete",
        BLOCK,
        HSDP,
        mutations.shard_off_by_the_alignment,
        needs="sharded",
    ),
    Mutation(
        "gathered without slicing",
        (3,),
        "complete",
        "context_refiner.0",
        HSDP,
        mutations.gathered_without_slicing,
        rank=None,
        needs="sharded",
    ),
    Mutation(
        "bytes of the next block",
        (),
        "complete",
        BLOCK,
        ("layerwise_tp2", "hsdp"),
        mutations.bytes_of_the_next_block,
        needs="streamed",
    ),
    Mutation("tail left out", (), "complete", BLOCK, OFFLOAD, mutations.tail_left_out, needs="copied"),
    Mutation("initialised at random", (), "complete", OUTSIDE, ("tp2", "ulysses4"), mutations.initialised_at_random),
    Mutation(
        "table not rebuilt",
        (14,),
        "complete",
        TABLE,
        ("layerwise_tp2", "hsdp"),
        mutations.table_not_rebuilt,
        needs="!one_store",
    ),
    Mutation(
        "cached view",
        (10,),
        "no-alias",
        "attention.to_q.cache",
        ("layerwise_tp2", "hsdp"),
        mutations.cached_view,
        needs="streamed",
    ),
    Mutation("tied across blocks", (11,), "no-alias", NEXT, ("layerwise", "hsdp"), mutations.tied_across_blocks),
    Mutation("tied in a block", (11,), "no-alias", BLOCK, ("layerwise_tp2", "tp2"), mutations.tied_in_a_block),
    Mutation(
        "outside in a slot",
        (9,),
        "no-alias",
        OUTSIDE,
        ("layerwise_tp2", "hsdp"),
        mutations.outside_in_a_slot,
        needs="streamed",
    ),
    Mutation(
        "another code", (), "same-bits", BLOCK, ("layerwise_tp2", "hsdp"), mutations.another_code, needs="streamed"
    ),
    Mutation("one place at rest", (16,), "no-alias", NEXT, ("layerwise_tp2", "hsdp"), mutations.one_place_at_rest),
    Mutation("slots overlap", (16,), "no-alias", "slot", OFFLOAD, mutations.slots_overlap, needs="streamed"),
    Mutation(
        "load left out",
        (16,),
        "in-order",
        BLOCK,
        ("layerwise_tp2", "layerwise"),
        running.load_left_out,
        needs="copied !sharded",
    ),
    Mutation(
        "left out in the first step",
        (16,),
        "in-order",
        BLOCK,
        ("layerwise_tp2",),
        running.first_load_left_out,
        "request",
        steps=4,
        needs="copied !sharded",
    ),
    Mutation(
        "stale from the start",
        (16,),
        "in-order",
        "noise_refiner.1",
        ("layerwise_ulysses2_ring2",),
        running.stale_from_the_start,
        "request",
        needs="copied !sharded",
    ),
    Mutation("wait left out", (), "in-order", BLOCK, OFFLOAD, running.wait_left_out, "request", needs="streamed"),
    Mutation(
        "readers not waited for",
        (17,),
        "in-order",
        "in slot",
        OFFLOAD,
        running.readers_not_waited_for,
        "request",
        needs="streamed !sharded",
    ),
    Mutation(
        "trusted prediction",
        (15,),
        "in-order",
        NEXT,
        ("layerwise", "layerwise_tp2"),
        running.trusted_prediction,
        "request",
        rank=None,
        needs="copied !sharded",
    ),
    Mutation("error swallowed", (21,), "in-order", BLOCK, OFFLOAD, running.error_swallowed, "request", needs="copied"),
    Mutation(
        "gathered too early",
        (),
        "in-order",
        BLOCK,
        ("layerwise_hsdp",),
        running.gathered_too_early,
        needs="copied sharded",
    ),
    Mutation(
        "gathers swapped",
        (5,),
        "same-collectives",
        "layers.",
        ("layerwise_hsdp",),
        mutations.order_swapped,
        needs="sharded",
        sooner="same-schedule",
    ),
    Mutation(
        "axes confused",
        (5, 7),
        "same-collectives",
        "ulysses",
        ("ulysses2_ring2",),
        running.axes_confused,
        rank=None,
        needs="ulysses ring",
    ),
    Mutation(
        "replica is the world",
        (5,),
        "same-collectives",
        "replica",
        ("hsdp",),
        running.replica_is_the_world,
        rank=None,
        needs="dp",
    ),
    Mutation(
        "hooks missing", (), "same-numbers", BLOCK, OFFLOAD, running.hooks_missing, "probe", needs="copied !sharded"
    ),
    Mutation(
        "turn not taken",
        (16,),
        "same-numbers",
        "noise_refiner.0",
        ("layerwise", "layerwise_tp2"),
        running.turn_not_taken,
        "probe",
        rank=0,
        needs="copied !sharded",
    ),
    Mutation(
        "copy left out",
        (16,),
        "same-numbers",
        BLOCK,
        ("layerwise_tp2", "layerwise_hsdp"),
        running.copy_left_out,
        "probe",
        needs="copied",
    ),
    Mutation(
        "damaged at rest",
        (),
        "same-numbers",
        BLOCK,
        ("layerwise_ulysses2_ring2", "hsdp"),
        running.damaged_at_rest,
        "probe",
    ),
)


def _config(layout: str) -> RunConfig:
    if layout in MORE:
        return RunConfig.parse(MORE[layout])
    return load_config(next(known for known in LAYOUTS if known.name == layout).config)


def _plan(layout: str, directory: Path) -> RunPlan:
    return make_plan(_config(layout), directory, "cpu")


def _layouts_of(mutation: Mutation) -> tuple[str, ...]:
    """All that are named, one outside of `make test-all`; with `CROSSDOCK_MUTATIONS=all` all that it fits."""
    if os.environ.get("CROSSDOCK_MUTATIONS") != "all":
        turn = MUTATIONS.index(mutation) % len(mutation.layouts)
        return mutation.layouts if ALL else mutation.layouts[turn : turn + 1]
    applicable = [layout.name for layout in LAYOUTS if mutation.applies(layout.facts)]
    return tuple(dict.fromkeys([*mutation.layouts, *applicable]))


def _cases() -> list[Any]:
    """One for each row of the contract and stage; in `make test-all` all."""
    wide = os.environ.get("CROSSDOCK_MUTATIONS") == "all"
    chosen = MUTATIONS if wide else one_each(MUTATIONS, lambda mutation: (mutation.check, mutation.stage))
    return [
        pytest.param(
            mutation,
            layout,
            id=f"{mutation.name.replace(' ', '-')}-{layout}",
            marks=[quick] * (mutation.stage == "request" and layout == "layerwise_tp2"),
        )
        for mutation in chosen
        for layout in _layouts_of(mutation)
    ]


def _on_ranks(
    stage: Stage, plant: Plant | None = None, rank: int | None = None, prepare: Plant | None = None
) -> Callable[[Stage, bool], Any]:
    """(stage, with a rehearsal) -> what a rank does then; the fault comes with `stage`, and stays until `_undo`."""

    def work_of(entered: Stage, rehearse: bool) -> Any:
        def run(worker: RankWorker, plan: RunPlan, request: RankRequest, probing: GenerateRequest) -> Any:
            import pytest

            mine = rank is None or worker.rank == min(rank, worker.world_size - 1)
            patch = vars(worker).setdefault("planted", pytest.MonkeyPatch())
            if prepare is not None and entered == "load":
                prepare(worker, patch)
            if plant is not None and mine and entered == stage:
                plant(worker, patch)
            if entered == "load":
                return worker.setup(plan, rehearse=rehearse)
            return worker.generate(request) if entered == "request" else probe_numbers(worker, probing)

        return run

    return work_of


def _run(
    gang: Gang,
    plan: RunPlan,
    request: RankRequest,
    work_of: Callable[[Stage, bool], Any],
    *stages: Stage,
    rehearse: bool = False,
) -> tuple[Found, Told]:
    """As an engine does it: each stage is judged before the next one, and what is refused goes no further."""

    def undo(worker: RankWorker) -> None:
        vars(worker).pop("planted").undo()

    coordinator, found, told = Coordinator(plan), Found(), Told()
    judge: dict[Stage, Callable[[list[Any]], None]] = {
        "load": lambda reports: coordinator.admit(reports, rehearse),
        "request": coordinator.review,
        "probe": coordinator.compare,
    }
    try:
        for stage in stages:
            work = work_of(stage, rehearse)
            told[stage] = gang.collective_rpc(work, plan, request, probe_request(plan.layout), timeout_s=TIMEOUT_S)
            found[stage] = []
            try:
                judge[stage](told[stage])
            except CompositionError as error:
                found[stage] = list(error.violations)
                break
    finally:
        gang.collective_rpc(undo, timeout_s=TIMEOUT_S)
        gang.collective_rpc(RankWorker.teardown, timeout_s=TIMEOUT_S)
    return found, told


def _error(told: Told, directory: Path) -> float:
    """Of the picture of TWO_STEPS, to that of diffusers."""
    result: RankResult = told["request"][0]
    assert result.latents is not None
    return max_error(result.latents, reference_latents(directory, size=(SIZE, SIZE), steps=TWO_STEPS.asked.steps))


@thorough
@pytest.mark.parametrize(
    ("layout", "family"),
    [
        *((layout.name, family) for layout in LAYOUTS for family in FAMILIES),
        *zip(MORE, itertools.cycle(FAMILIES), strict=False),
    ],
)
def test_no_false_alarm(layout: str, family: str, gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """A healthy load, with a rehearsal or without one, request of two steps or probe is refused.

    On the layouts that `make test` runs the matrix sees it as well.
    """
    plan = _plan(layout, checkpoints[family])
    gang, work_of = gang_of(plan.layout.mesh.world_size), _on_ranks("load")
    assert _run(gang, plan, TWO_STEPS, work_of, "load", rehearse=True)[0] == {"load": []}
    found, told = _run(gang, plan, TWO_STEPS, work_of, "load", "request", "probe")
    assert found == {"load": [], "request": [], "probe": []}
    assert _error(told, checkpoints[family]) <= TOLERANCE


@pytest.mark.parametrize(("mutation", "layout"), _cases())
def test_mutation_is_caught(
    mutation: Mutation, layout: str, gang_of: GangOf, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault passes, or is blamed on another rank, block, parameter or check. One of loading must be refused
    by the end of the first request, and by a rehearsal."""
    prepare = None
    if mutation.where == TABLE:
        mutations.with_table(plan_module, monkeypatch)
        prepare = mutations.table_on_ranks
    plan = _plan(layout, checkpoints[mutation.family])
    gang, request = gang_of(plan.layout.mesh.world_size), changed(REQUEST, steps=mutation.steps)
    work_of = _on_ranks(mutation.stage, mutation.plant, mutation.rank, prepare)
    if mutation.stage == "load":
        found, told = _run(gang, plan, request, work_of, "load", "request")
        early = found.get("request", found["load"])
        if mutation.sooner:
            assert mutation.sooner in {violation.check for violation in early}, early
        else:
            _expect(mutation, plan, early)
        assert all(not result.media for result in told.get("request", ())) or mutation.check != "complete"
        if not mutation.sooner and "request" not in found:
            return  # a rehearsal is judged by that and more
        found, _ = _run(gang, plan, request, work_of, "load", rehearse=True)
    else:
        found, _ = _run(gang, plan, request, work_of, "load", mutation.stage, rehearse=True)
        assert found["load"] == []
    _expect(mutation, plan, found[mutation.stage])


def _expect(mutation: Mutation, plan: RunPlan, violations: list[Violation]) -> None:
    mine = [violation for violation in violations if violation.check == mutation.check]
    print(plan.layout_name, sorted({violation.check for violation in violations}), *mine[:2], sep="\n  ")
    rank = min(1 if mutation.rank is None else mutation.rank, plan.layout.mesh.world_size - 1)
    assert any(violation.rank == rank and mutation.where in violation.where for violation in mine), mine
    assert all(f"(holds {violation.where})" not in violation.found for violation in mine), "shared with itself"


# -- faults that end in a collective that never returns ---------------------------------------------------------------


@dataclass(frozen=True)
class Stuck:
    """A fault on rank 1 of two; `text` is in the error that names it. `pitfalls` as in `Mutation`."""

    name: str
    pitfalls: tuple[int, ...]
    parallel: dict[str, Any]
    text: str
    plant: Plant
    family: str = "z-image"
    kind: str = "collectives"


TP_2: dict[str, Any] = {"tp_degree": 2}
HSDP_2: dict[str, Any] = {"dp_degree": 2, "hsdp": {"shard": 2}}
ULYSSES_2: dict[str, Any] = {"ulysses_degree": 2}
STUCK = (
    Stuck("a reduce left out", (5,), TP_2, "group tp", running.reduce_left_out),
    Stuck("a reduce on the world", (5,), TP_2, "group", running.reduce_on_the_world),
    Stuck("text doubled", (7,), ULYSSES_2, "all_to_all", running.text_doubled_on_a_slow_link, "flux2-klein"),
    Stuck("text dropped", (7,), ULYSSES_2, "all_to_all", running.text_dropped_on_a_slow_link, "flux2-klein"),
    Stuck("blocks skipped", (5, 15), HSDP_2, "group weights", running.blocks_skipped),
    Stuck("one more step", (20,), TP_2, "not at the same step", running.one_more_step, kind="raised"),
)


@pytest.fixture(scope="module")
def pair() -> Iterator[LocalGang]:
    """Two ranks apart from those that all tests share: they do not survive."""
    gang = LocalGang(RunConfig().launch, 2, "cpu")
    gang.start()
    yield gang
    gang.close()


@pytest.mark.parametrize("stuck", some(STUCK, 1), ids=lambda stuck: stuck.name.replace(" ", "-"))
def test_a_rank_out_of_step_is_named(stuck: Stuck, pair: LocalGang, checkpoints: Checkpoints) -> None:
    """Ranks that wait for each other hang until the time limit, or somebody else is blamed."""
    launch = {"timeouts": {"collective_s": 60}}
    config = RunConfig.parse({"parallel": stuck.parallel, "offload": {"layerwise": True}, "launch": launch})
    plan = make_plan(config, checkpoints[stuck.family], "cpu")
    work_of = _on_ranks("request", stuck.plant, 1)
    what = plan, REQUEST, probe_request(plan.layout)
    began = time.monotonic()
    try:
        pair.collective_rpc(work_of("load", True), *what, timeout_s=TIMEOUT_S)
        with pytest.raises(RankError, match=stuck.text) as caught:
            pair.collective_rpc(work_of("request", True), *what, timeout_s=TIMEOUT_S)
    finally:
        took_s = time.monotonic() - began
        pair.restart()
    print(f"after {took_s:.1f} s: {caught.value}")
    assert (caught.value.rank, caught.value.kind) == (1, stuck.kind)
    assert took_s < 30


# -- mistakes that all ranks make, with and without streaming ---------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """A fault on all ranks; one of loading is in the plan as well. `pitfalls` as in `Mutation`.

    Attributes:
        seen: ranks come to different latents by it, which same-state sees.
    """

    name: str
    pitfalls: tuple[int, ...]
    layout: str
    plant: Plant
    family: str = "z-image"
    stage: Stage = "request"
    seen: bool = False


MISTAKES = (
    Mistake("a reduce left out", (5,), "tp2", running.reduce_left_out, seen=True),
    Mistake("text doubled", (7,), "ulysses2_ring2", running.text_doubled, "flux2-klein"),
    Mistake("text dropped", (7,), "ulysses2_ring2", running.text_dropped, "flux2-klein"),
    Mistake("padding attended", (7,), "ulysses4", running.padding_attended),
    Mistake("merged without weights", (7,), "ring4", running.merged_without_weights),
    Mistake("cut as one part", (37,), "tp2", running.cut_as_one_part, "flux2-klein", "load"),
)


@pytest.mark.parametrize("mistake", some(MISTAKES, 1), ids=lambda mistake: mistake.name.replace(" ", "-"))
def test_a_common_mistake_shows_in_the_picture(
    mistake: Mistake, gang_of: GangOf, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake that no rank can notice is not seen by the probe, though the picture differs from that of diffusers; or
    the latents of ranks differ by it, and a picture leaves.
    """
    if mistake.stage == "load":
        mistake.plant(None, monkeypatch)  # type: ignore[arg-type]
    directory = checkpoints[mistake.family]
    plan = _plan(mistake.layout, directory)
    work_of, gang = _on_ranks(mistake.stage, mistake.plant), gang_of(plan.layout.mesh.world_size)
    found, told = _run(gang, plan, TWO_STEPS, work_of, "load", "request", "probe")
    if mistake.seen:
        assert {violation.check for violation in found["request"]} == {"same-state"}
        assert not any(result.media for result in told["request"])
        return
    assert (found["load"], found["request"]) == ([], []), "a check sees it: put it in the table"
    assert {violation.check for violation in found["probe"]} == {SAME_AS_ONE}
    error = _error(told, directory)
    print(f"{mistake.name}: {error:.1e}")
    assert error > 10 * TOLERANCE


HELD_ELSEWHERE = {
    8: "test_offload_discovery::test_entries_that_hold_no_tensors_are_skipped",
    12: "test_offload_discovery::test_blocks_behind_a_property_go_by_their_true_paths",
    13: "test_offload_discovery::test_an_error_says_in_one_line_what_is_wrong",
    18: "test_offload_arena::test_a_prepared_turn_has_no_misses",
    19: "test_offload_arena::test_bytes_in_use_are_not_taken",
}
"""Pitfalls of the offloader alone, which need no gang: where they are tried."""


def test_every_row_and_every_pitfall_has_a_fault() -> None:
    """A row of the contract, or a failure that others had, is not tried."""
    assert {mutation.check for mutation in MUTATIONS} == {*CHECKS, SAME_NUMBERS}
    assert {fault.check for faults in FAULTS.values() for fault in faults} >= STEP_CHECKS.keys()
    tried = {number for fault in (*MUTATIONS, *STUCK, *MISTAKES) for number in fault.pitfalls}
    assert tried.isdisjoint(HELD_ELSEWHERE)
    assert set(range(1, 22)) <= tried | HELD_ELSEWHERE.keys()
    assert len(MUTATIONS) + len(STUCK) + len(MISTAKES) >= 40
    for test in HELD_ELSEWHERE.values():
        file, _, name = test.partition("::")
        parsed = ast.parse((Path(__file__).parent / f"{file}.py").read_text())
        assert name in {node.name for node in parsed.body if isinstance(node, ast.FunctionDef)}, test


def test_mutations_apply_to_the_layouts_that_they_name() -> None:
    """`CROSSDOCK_MUTATIONS=all` leaves out what runs by default, or runs nothing more."""
    facts = {layout.name: layout.facts for layout in LAYOUTS}
    assert len(set(facts.values())) >= 8
    for mutation in MUTATIONS:
        assert all(mutation.applies(facts[name]) for name in mutation.layouts if name in facts), mutation.name
