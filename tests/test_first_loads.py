"""What arrives in the first step is compared there, once, before it computes; what differs ends the request at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import admitted, rank_request
from test_recovery import InProcessGang
from torch import Tensor, nn

from crossdock.launch.engine.engine import Engine
from crossdock.offload.memory.copy_engine import CpuCopyEngine
from crossdock.offload.memory.layout import ALIGNMENT
from crossdock.offload.stream.block import Home, StreamedBlock
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.errors import RequestCancelled
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.watch.gang import Gang
from reference import ODD_SIZE, PROMPT
from tiers import not_quick, pairs, some, thorough
from toy_blocks import build

pytestmark = not_quick

GangOf = Callable[[int], Gang]
BLOCK = "single_transformer_blocks.2"
WEIGHT = f"{BLOCK}.attn.to_out.weight"
SIZE = 64
REQUEST = rank_request(PROMPT, height=ODD_SIZE[0], width=ODD_SIZE[1], steps=3, number=1)


def damage(worker: Any, name: str = WEIGHT) -> None:
    """One byte, where it rests."""
    block = next(block for block in worker.loaded.stream.blocks if name.startswith(f"{block.name}."))
    entry = next(entry for entry in block.layout.entries if f"{block.name}.{entry.name}" == name)
    entry.view(block.source)[0, 0] += 1


def _plan(directory: Path, **verify: Any) -> RunPlan:
    return make_plan(RunConfig.parse({"offload": {"layerwise": True}, "verify": verify}), directory, "cpu")


@contextmanager
def _engine(directory: Path) -> Iterator[tuple[Engine, InProcessGang]]:
    recovery = {"recovery": {"keep_every": 1}}
    config, gang = RunConfig.parse({"offload": {"layerwise": True}, "launch": recovery}), InProcessGang()
    with Engine.start(config, directory, make_gang=lambda *_: gang) as engine:
        yield engine, gang


def _generate(engine: Engine, shown: list[int]) -> Any:
    return engine.generate(PROMPT, steps=4, height=SIZE, width=SIZE, progress=lambda step, _: shown.append(step))


# -- the stream ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residents", [(), (1, 2)])
@pytest.mark.parametrize("home", [Home.HOST, Home.HOST_SHARD, Home.DEVICE_SHARD])
def test_each_block_is_seen_once_before_it_computes(home: Home, residents: tuple[int, ...]) -> None:
    """Seen twice it costs every step; seen later, what it computed with was not what was seen."""
    case = build([home] * 5, 1, resident=residents)
    told: list[tuple[str, str]] = []

    def look(block: StreamedBlock, memory: Tensor) -> None:
        told.append(("seen", block.name))
        assert len(memory) == block.layout.slot_bytes
        assert torch.equal(block.layout.entries[0].view(memory), next(iter(block.tensors())))
        assert not bool(memory[:4].eq(0xFF).all()), "poisoned: it has not come"

    for block in case.stream.blocks:
        block.module.register_forward_pre_hook(lambda module, *_, name=block.name: told.append(("computes", name)))
    case.stream.observe_first_loads(look)
    for _ in range(2):
        case.check([0, 1, 3, 4])
    assert [name for what, name in told if what == "seen"] == [f"blocks.{index}" for index in (0, 1, 3, 4)]
    for name in (f"blocks.{index}" for index in (0, 1, 3, 4)):
        assert told.index(("seen", name)) < told.index(("computes", name))
    case.stream.rehearse(unseen=True)
    assert told[-1] == ("seen", "blocks.2")
    assert case.stream.recorded_order is None, "the first pass skipped it"
    told.clear()
    case.check(range(5))
    case.stream.rehearse(unseen=True)
    case.stream.rehearse()
    assert [what for what, _ in told] == ["computes"] * 5
    case.finish()


def test_what_was_read_is_told_when_no_load_is_under_way() -> None:
    """Skipped blocks come after the last step, and fetch ahead: that load counted as one that had read nothing."""

    class Slow(CpuCopyEngine):
        def move(self, target: Tensor, source: Tensor) -> None:
            time.sleep(0.05)
            super().move(target, source)

    case = build([Home.HOST] * 5, 1, engine=Slow(60))
    case.stream.observe_first_loads(lambda *_: None)
    case.check([0, 1, 3, 4])
    case.stream.rehearse(unseen=True)
    read = case.stream.read
    assert len(read) == 5
    assert all(read.values())
    case.finish()


def test_what_comes_unrecorded_does_not_count() -> None:
    """It would be there already when the first step begins, and pass for what that step brings."""
    case = build([Home.HOST] * 5, 1)
    seen: list[str] = []
    case.stream.observe_first_loads(lambda block, memory: seen.append(block.name))
    with case.stream.unrecorded():
        case.check(range(5))
    assert seen == []
    for slot in case.stream._table.shared:
        case.stream.engine.wait(slot.ready)
        assert bool((slot.memory.view(-1, ALIGNMENT)[:, : ALIGNMENT // 4] == 0xFF).all())
    case.check(range(5))
    assert len(seen) == 5
    case.finish()


def test_a_look_that_fails_leaves_the_stream_usable() -> None:
    """The checkpoint cannot be read: the block's slot is taken to be read for ever."""
    case = build([Home.HOST] * 4, 1)

    def look(block: StreamedBlock, memory: Tensor) -> None:
        raise OSError("planted")

    case.stream.observe_first_loads(look)
    with pytest.raises(OSError, match="planted"):
        case.check([0])
    case.stream.observe_first_loads(lambda *_: None)
    case.check(range(4))
    case.finish()


# -- one rank -----------------------------------------------------------------------------------------------------


def test_wrong_bytes_end_the_request_with_its_first_step(flux2_dir: Path) -> None:
    """A picture leaves, further steps are computed, or new ranks are started that would bring the same."""
    with _engine(flux2_dir) as (engine, gang):
        damage(gang.worker)
        shown: list[int] = []
        decoded: list[Any] = []
        gang.worker.loaded.pipeline.pipe.vae.decoder.register_forward_pre_hook(lambda *given: decoded.append(given))
        with pytest.raises(CompositionError, match=f"complete: rank 0: {WEIGHT}: expected the bytes of") as caught:
            _generate(engine, shown)
        assert {violation.where for violation in caught.value.violations} == {WEIGHT}
        assert {row["check"]: row["status"] for row in engine.contract_result.composition}["complete"] == "violated"
        assert (shown, decoded, gang.starts, gang.closed) == ([], [], 1, True)


def test_a_resumed_request_looks_again(flux2_dir: Path) -> None:
    """What new ranks are brought after a fault is as unknown as what the first were."""
    with _engine(flux2_dir) as (engine, gang):
        shown: list[int] = []
        first = _generate(engine, shown)
        setup = RankWorker.setup

        def damaged(worker: RankWorker, *args: Any) -> Any:
            report = setup(worker, *args)
            damage(worker)
            return report

        passes = [0]

        def fail(*_: Any) -> None:
            passes[0] += 1
            if passes[0] == 5:  # guidance makes two passes of a step
                raise ValueError("planted")

        gang.worker.loaded.model.register_forward_pre_hook(fail)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RankWorker, "setup", damaged)
            shown.clear()
            with pytest.raises(CompositionError, match=f"complete: rank 0: {WEIGHT}"):
                _generate(engine, shown)
        assert len(first.images) == 1
        assert (shown, gang.starts, gang.closed) == ([1, 2], 2, True)


@thorough
def test_later_requests_compare_nothing(flux2_dir: Path) -> None:
    """With the file, that is; with `rolling`, what first arrived is held on to."""
    with admitted(_plan(flux2_dir, arrivals="first")) as worker:
        assert {record.fqn for record in worker.report().arrivals} == set(worker.loaded.plan.memory.outside)
        first = worker.generate(REQUEST)
        plan = worker.loaded.plan
        assert {record.fqn for record in first.arrivals} == set(plan.layout.dtypes) - set(plan.memory.outside)
        damage(worker)
        second = worker.generate(REQUEST)
        assert second.arrivals == ()
        assert len(second.measurements.steps) == REQUEST.asked.steps


class _Skipped(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


@pytest.mark.parametrize(("steps", "damaged"), pairs([1, 3], [True, False]))
def test_a_block_that_was_skipped_is_compared_in_the_end(steps: int, damaged: bool, flux2_dir: Path) -> None:
    """A cache left it out of the first request: nobody would look at it in the next one."""
    plan = _plan(flux2_dir)
    with admitted(plan) as worker:
        coordinator = Coordinator(plan)
        coordinator.admit([worker.report()], rehearsed=False)
        layers, _, number = BLOCK.partition(".")
        modules = worker.loaded.model.get_submodule(layers)._modules
        modules[number], block = _Skipped(), modules[number]
        if damaged:
            damage(worker)
        result = worker.generate(rank_request(PROMPT, height=SIZE, width=SIZE, steps=steps))
        modules[number] = block
        assert BLOCK not in {event.block for event in result.trace if event.kind == "compute_begin"}, "in no step"
        if damaged:
            with pytest.raises(CompositionError, match=f"complete: rank 0: {WEIGHT}"):
                coordinator.review([result])
        else:
            coordinator.review([result])
            assert coordinator.composition[0]["status"] == "holds"
        assert worker.generate(REQUEST).arrivals == () or damaged


def test_a_cancelled_request_does_not_hide_what_came(flux2_dir: Path) -> None:
    """Cancelled in the step in which all came: the next request has to tell of it, and of wrong bytes it ends."""
    plan = _plan(flux2_dir)
    with admitted(plan) as worker:
        worker.cancel("nobody wants it", REQUEST.number)
        with pytest.raises(RequestCancelled):
            worker.generate(REQUEST)
        result = worker.generate(rank_request(PROMPT, height=SIZE, width=SIZE, steps=1, number=2))
        assert {record.fqn for record in result.arrivals} == set(plan.layout.dtypes) - set(plan.memory.outside)
    with admitted(plan) as worker:
        damage(worker)
        worker.cancel("nobody wants it", REQUEST.number)
        assert not worker.generate(REQUEST).media, "wrong bytes come before a cancel"


def test_a_review_without_arrivals_is_refused(flux2_dir: Path) -> None:
    """A rank on which nobody looks: all is missed by name, and no picture leaves."""
    with _engine(flux2_dir) as (engine, gang):
        gang.worker.loaded.stream._first_loads.observe(lambda *_: None, range(len(engine.plan.memory.blocks)))
        with pytest.raises(CompositionError) as caught:
            _generate(engine, [])
        texts = [str(violation) for violation in caught.value.violations]
        assert any(text.startswith(f"complete: rank 0: {WEIGHT}: expected compared with") for text in texts)


@thorough
def test_a_probe_does_not_count_as_the_first_step(flux2_dir: Path) -> None:
    """It leaves no trace: nothing that came in it would ever be told."""
    with _engine(flux2_dir) as (engine, gang):
        before = gang.worker.report()
        engine.probe()
        assert gang.worker.report() == before
        assert len(_generate(engine, []).images) == 1
        assert {record.fqn for record in gang.worker.report().arrivals} == set(engine.plan.layout.dtypes)


# -- several ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "rank"), some([({"dp_degree": 2, "hsdp": {"shard": 2}}, 0), ({"tp_degree": 2}, 1)], 1), ids=str
)
def test_all_ranks_stop_together(parallel: dict[str, Any], rank: int, gang_of: GangOf, flux2_dir: Path) -> None:
    """One rank stops, and the other waits for it in a collective; or the wrong one is named."""

    def plant(worker: Any) -> None:
        worker.steps = steps = []  # type: ignore[var-annotated]
        agree = worker.stopping.agree

        def noted(finished: int, *args: Any) -> None:
            steps.append(finished)
            agree(finished, *args)

        worker.stopping.agree = noted
        if worker.rank == rank:
            block = next(block for block in worker.loaded.stream.blocks if block.name == BLOCK)
            block.source[: block.source.nbytes // 4] ^= 0x10

    def steps(worker: Any) -> Any:
        del worker.stopping.agree
        return worker.steps

    config = RunConfig.parse({"parallel": parallel, "offload": {"layerwise": True}})
    gang = gang_of(2)
    with Engine.start(config, flux2_dir, gang) as engine:
        close, gang.close = gang.close, lambda: None  # type: ignore[method-assign]
        try:
            gang.collective_rpc(plant, timeout_s=60)
            with pytest.raises(CompositionError, match="do not compose") as caught:
                engine.generate(PROMPT, steps=4, height=SIZE, width=SIZE)
        finally:
            gang.close = close  # type: ignore[method-assign]
        assert gang.collective_rpc(steps, timeout_s=60) == [[1], [1]]
    found = caught.value.violations
    assert {violation.check for violation in found} == {"complete"}
    assert all(violation.where.startswith(f"{BLOCK}.") for violation in found)
    assert {violation.rank for violation in found} == ({rank} if "tp_degree" in parallel else {0, 1})
