"""What arrives on the device is what the checkpoint has: faults planted in the load path, each caught by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from one_rank import rank_request
from safetensors.torch import save_file
from torch import Tensor, nn

import crossdock.offload.stream.loader as loader_module
import crossdock.runtime.rank.worker as worker_module
from crossdock.offload.memory.layout import ALIGNMENT, BlockLayout, aligned_bytes
from crossdock.offload.stream.block import Home, StreamedBlock
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.contract.result import CompositionError, Violation
from crossdock.runtime.contract.verify import verify_composition
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models import transformers as transformers_module
from crossdock.runtime.models.checkpoint import stored_tensors
from crossdock.runtime.plan import make_plan as plan_module
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.weights import compare as arrival
from crossdock.runtime.rank.weights.compare import WHOLE_BYTES, WeightCheck, sampled_rows
from crossdock.runtime.rank.weights.load import WeightLoader
from crossdock.runtime.rank.weights.source import WeightSource
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.records import RankReport
from crossdock.runtime.watch.gang import Gang
from layouts import FAMILIES
from reference import ODD_SIZE, PROMPT
from tiers import not_quick, pairs, some, thorough
from toy_blocks import build

pytestmark = not_quick

Checkpoints = dict[str, Path]
GangOf = Callable[[int], Gang]
WAYS: dict[str, dict[str, Any]] = {
    "shared": {"layerwise": True},
    "mmap": {"layerwise": True, "host": "mmap"},
    "some resident": {"layerwise": True, "device_budget": "4500KiB"},
    "all resident": {"layerwise": True, "device_budget": 1.0, "host": "mmap"},
    "off": {},
}
HEALTHY = [  # bytes from the page cache cannot be converted
    *(("mmap", "auto"), ("some resident", "bfloat16"), ("shared", "auto"), ("shared", "bfloat16")),
    *(("some resident", "auto"), ("all resident", "auto"), ("off", "auto"), ("off", "bfloat16")),
]
REQUEST = rank_request(PROMPT, height=ODD_SIZE[0], width=ODD_SIZE[1], steps=2)
BLOCK = "single_transformer_blocks.2"
NEXT = "single_transformer_blocks.3"
WEIGHT = f"{BLOCK}.attn.to_out.weight"


def _plan(directory: Path, offload: dict[str, Any] | None = None, **config: Any) -> RunPlan:
    run = RunConfig.parse({"offload": {"layerwise": True} if offload is None else offload, **config})
    return make_plan(run, directory, "cpu", device_bytes=2**33)


@contextmanager
def _worker(plan: RunPlan, probe: bool = False, rehearse: bool = True) -> Iterator[tuple[RankWorker, RankReport]]:
    worker = RankWorker(0, 1, torch.device("cpu"))
    try:
        yield worker, worker.setup(plan, probe, rehearse)
    finally:
        worker.teardown()


def _violations(plan: RunPlan, probe: bool = False) -> list[Violation]:
    """In a rehearsal. Without one the same is found, at the latest in the first request, which then has no picture."""
    with _worker(plan, probe) as (_, report):
        found = verify_composition(plan, [report])
    if not probe:
        early = _violations_in_the_first_request(plan)
        assert {(each.check, each.where) for each in early} == {(each.check, each.where) for each in found}
    return found


def _violations_in_the_first_request(plan: RunPlan) -> list[Violation]:
    coordinator = Coordinator(plan)
    result = None
    with _worker(plan, rehearse=False) as (worker, report):
        try:
            coordinator.admit([report], rehearsed=False)
            assert "compared in the first step" in coordinator.composition[0]["detail"]
            result = worker.generate(REQUEST)
            coordinator.review([result])
        except CompositionError as error:
            assert result is None or (not result.media and result.latents is None)
            assert result is None or len(result.measurements.steps) == 1, "it went on"
            return list(error.violations)
    assert "compared in the first step" not in coordinator.composition[0]["detail"]
    assert result.media
    return []


def _named(violations: Sequence[Violation], check: str) -> list[str]:
    return [violation.where for violation in violations if violation.check == check]


# -- no false alarm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "dtype"), some(HEALTHY, 2))
@pytest.mark.parametrize("family", some(FAMILIES, 1))
def test_a_healthy_load_is_admitted(family: str, way: str, dtype: str, checkpoints: Checkpoints) -> None:
    """A false alarm would stop a good run: sampled and in full, converted or not, wherever blocks rest."""
    plan = _plan(checkpoints[family], WAYS[way], dtype=dtype)
    records = []
    for probe in (False, True):
        with _worker(plan, probe) as (worker, report):
            assert verify_composition(plan, [report]) == []
            assert {record.fqn for record in report.arrivals} == set(plan.layout.dtypes)
            assert verify_composition(plan, [worker.report()]) == []
            records.append({record.fqn: record for record in report.arrivals})
    sampled, whole = records
    assert sum(record.nbytes for record in whole.values()) > 5 * sum(record.nbytes for record in sampled.values()) or (
        dtype != "auto"
    )
    for fqn, record in whole.items():
        assert record.nbytes == plan.layout.dtypes[fqn].itemsize * torch.Size(plan.layout.stored[fqn].shape).numel()
    assert _violations_in_the_first_request(plan) == []


@pytest.mark.parametrize("rehearse", some([False, True], 1))
def test_weights_that_were_changed_on_purpose_are_no_fault(rehearse: bool, flux2_dir: Path) -> None:
    """A LoRA is merged before the first step, and the schedule changes: what was merged is not compared."""
    plan = _plan(flux2_dir)
    with _worker(plan, rehearse=rehearse) as (worker, report):
        coordinator = Coordinator(plan)
        coordinator.admit([report], rehearse)
        with worker.loaded.stream.gathered(BLOCK, write_back=True) as weights:
            weights["attn.to_out.weight"].mul_(2)
        before = worker.report().arrivals
        assert {record.fqn for record in before} == set(plan.layout.dtypes)
        worker.loaded.stream.reschedule(plan.memory.schedule, plan.memory.resident, plan.memory.order)
        worker.loaded.stream.rehearse()
        again = worker.report()
        assert again.arrivals == before
        assert verify_composition(plan, [again]) == []
        result = worker.generate(REQUEST)
        coordinator.review([result])
        assert result.media
        assert worker.report().arrivals == before


# -- faults in one process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", some([-1, 0], 1))
def test_a_damaged_host_store_is_caught(row: int, flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit rot, or a store of another model under the same key: one byte of a row that is sampled."""
    load = WeightLoader.load_blocks

    def damaged(self: WeightLoader) -> Any:
        weights = load(self)
        block = next(block for block in weights.blocks if block.name == BLOCK)
        entry = next(entry for entry in block.layout.entries if entry.name == "attn.to_out.weight")
        assert isinstance(block.source, Tensor)
        entry.view(block.source)[row, 5] += 1
        return weights

    monkeypatch.setattr(WeightLoader, "load_blocks", damaged)
    violations = _violations(_plan(flux2_dir))
    assert _named(violations, "complete") == [WEIGHT]
    text = str(violations[0])
    assert f"complete: rank 0: {WEIGHT}: expected the bytes of diffusion_pytorch_model" in text
    assert f"after loading block {BLOCK} from host" in text


def test_all_bytes_are_compared_by_a_probe(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check --probe` finds what the sample cannot: a byte of a row that it leaves out."""
    load = WeightLoader.load_blocks
    plan = _plan(flux2_dir)
    shape = plan.layout.stored[WEIGHT].shape
    rows = sampled_rows(WEIGHT, torch.empty(shape), None, ())
    assert rows is not None
    left_out = next(row for row in range(shape[0]) if row not in rows.tolist())

    def damaged(self: WeightLoader) -> Any:
        weights = load(self)
        block = next(block for block in weights.blocks if block.name == BLOCK)
        entry = next(entry for entry in block.layout.entries if entry.name == "attn.to_out.weight")
        assert isinstance(block.source, Tensor)
        entry.view(block.source)[left_out, -1] += 1
        return weights

    monkeypatch.setattr(WeightLoader, "load_blocks", damaged)
    assert _violations(plan) == []
    assert _named(_violations(plan, probe=True), "complete") == [WEIGHT]


@pytest.mark.parametrize("way", some(["mmap", "shared", "all resident"], 1))
def test_a_load_that_brings_nothing_is_caught(way: str, flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale slot: the events are all there and in order, but the slot has the bytes of the block before."""
    moves = loader_module._moves
    monkeypatch.setattr(
        loader_module, "_moves", lambda block, target: [] if block.name == BLOCK else moves(block, target)
    )
    plan = _plan(flux2_dir, WAYS[way])
    violations = _violations(plan)
    block = next(block for block in plan.memory.blocks if block.name == BLOCK)
    assert sorted(_named(violations, "complete")) == sorted(f"{BLOCK}.{entry.name}" for entry in block.layout.entries)
    assert {violation.check for violation in violations} == {"complete", "single-owner"}, (
        "nothing was read from where it rests"
    )


def test_a_tensor_left_out_of_a_load_is_caught(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the page cache a block comes tensor by tensor: one piece too few, and its bytes are another block's."""
    moves = loader_module._moves
    monkeypatch.setattr(
        loader_module,
        "_moves",
        lambda block, target: moves(block, target)[:-1] if block.name == BLOCK else moves(block, target),
    )
    plan = _plan(flux2_dir, WAYS["mmap"])
    last = next(block for block in plan.memory.blocks if block.name == BLOCK).layout.entries[-1]
    assert _named(_violations(plan), "complete") == [f"{BLOCK}.{last.name}"]


def test_a_private_copy_is_caught(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 1: a parameter that was never bound to the slot computes with the right bytes, and saves nothing."""
    attach = BlockStream.attach

    def copied(self: BlockStream) -> None:
        attach(self)
        block = next((block for block in self.blocks if block.name == BLOCK), None)
        if block is not None:
            owner = block.module.get_submodule("attn.to_out")
            owner._parameters["weight"] = nn.Parameter(torch.zeros(owner.weight.shape), requires_grad=False)

    monkeypatch.setattr(BlockStream, "attach", copied)
    violations = _violations(_plan(flux2_dir))
    texts = [str(violation) for violation in violations if violation.where == WEIGHT]
    assert any("found outside at byte 0" in text for text in texts)
    assert any("bytes of weights on the device" in text for text in texts)


def test_an_offload_that_saves_nothing_is_caught(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block has memory of its own on the device although the plan streams them: both figures are named."""
    bind = StreamedBlock.bind

    def kept(self: StreamedBlock, memory: Tensor) -> None:
        bind(self, aligned_bytes(memory.nbytes, memory.device))

    monkeypatch.setattr(StreamedBlock, "bind", kept)
    plan = _plan(flux2_dir)
    with _worker(plan) as (_, report):
        violations = verify_composition(plan, [report])
    text = next(str(violation) for violation in violations if "bytes of weights" in violation.expected)
    everything = sum(block.layout.slot_bytes for block in plan.memory.blocks)
    assert report.device_bytes.weights >= everything
    assert f"found {report.device_bytes.weights} bytes" in text


@pytest.mark.parametrize("way", some(["shared", "mmap", "off"], 1))
def test_a_loader_that_reads_wrong_rows_is_caught(way: str, flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check reads the files itself, through a source of its own: what went wrong in the loader's is not in it."""
    begin = WeightLoader.__init__

    def misled(self: WeightLoader, *args: Any) -> None:
        begin(self, *args)
        other = f"{NEXT}.attn.to_out.weight"
        self._files._stored = {**self._files._stored, WEIGHT: self._files._stored[other]}

    monkeypatch.setattr(WeightLoader, "__init__", misled)
    assert _named(_violations(_plan(flux2_dir, WAYS[way])), "complete") == [WEIGHT]


def test_a_checkpoint_that_was_replaced_after_planning(tmp_path: Path) -> None:
    """Another file under the same name: refused with its name when it is opened, not read at the planned shape."""
    save_file({"a": torch.zeros(4, 3), "b": torch.zeros(5)}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    assert torch.equal(WeightSource(stored).rows("a", None, 1, 3), torch.zeros(2, 3))
    for changed in ({"a": torch.zeros(3, 4)}, {"a": torch.zeros(4, 3).half()}, {"c": torch.zeros(4, 3)}):
        save_file({"b": torch.zeros(5), **changed}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"model\.safetensors: a is not what it was when the run was planned"):
            WeightSource(stored).rows("b")


@pytest.mark.parametrize("keep", some(["list", "attribute"], 1))
def test_a_plain_attribute_over_a_slot_is_caught(keep: str, flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached view of a weight: nothing streams it, so it changes into the weights of other blocks."""
    attach = BlockStream.attach

    def cached(self: BlockStream) -> None:
        attach(self)
        block = next((block for block in self.blocks if block.name == BLOCK), None)
        if block is not None:
            linear = cast(Any, block.module.get_submodule("attn.to_out"))
            view = linear.weight.data[1:3]
            linear.cache = view if keep == "attribute" else [view]

    monkeypatch.setattr(BlockStream, "attach", cached)
    violations = _violations(_plan(flux2_dir))
    name = f"{BLOCK}.attn.to_out.cache" + (".0" if keep == "list" else "")
    assert set(_named(violations, "no-alias")) == {name}
    assert "slot" in violations[0].found


def test_a_resident_tensor_inside_a_slot_is_caught(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is outside of the blocks must not lie where blocks are streamed."""
    attach = BlockStream.attach
    plan = _plan(flux2_dir)
    fqn = next(fqn for fqn in plan.memory.outside if fqn.endswith("weight") and len(plan.layout.stored[fqn].shape) == 2)

    def misplaced(self: BlockStream) -> None:
        attach(self)
        if self.blocks[0].name == plan.memory.blocks[0].name:
            model = models[-1]
            path, _, leaf = fqn.rpartition(".")
            owner = model.get_submodule(path)
            shape = owner._parameters[leaf].shape  # type: ignore[union-attr]
            memory = self.slot_memory[0][: shape.numel() * 4].view(torch.float32).view(shape)
            owner._parameters[leaf] = nn.Parameter(memory, requires_grad=False)

    models: list[nn.Module] = []
    build = worker_module.build_transformers

    def remembered(*args: Any) -> nn.Module:
        models.append(build(*args))
        return models[-1]

    monkeypatch.setattr(worker_module, "build_transformers", remembered)
    monkeypatch.setattr(BlockStream, "attach", misplaced)
    violations = _violations(plan)
    assert fqn in _named(violations, "no-alias")
    assert fqn in _named(violations, "complete"), "and its bytes are those of a block"


@pytest.mark.parametrize(("way", "wrong"), pairs(["shared", "mmap"], [True, False]))
def test_a_buffer_that_no_checkpoint_holds(
    way: str, wrong: bool, flux2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pitfall: a computed table that comes out otherwise on the rank; compared with what the constructor computes."""
    build = transformers_module.build_transformers

    def with_table(error: float) -> Callable[..., nn.Module]:
        def built(*args: Any) -> nn.Module:
            model = build(*args)
            if hasattr(model, "single_transformer_blocks"):
                table = torch.arange(40, dtype=torch.float32) + error
                model.get_submodule(BLOCK).register_buffer("table", table, persistent=False)
            return model

        return built

    monkeypatch.setattr(plan_module, "build_transformers", with_table(0))
    monkeypatch.setattr(arrival, "build_transformers", with_table(0))
    monkeypatch.setattr(worker_module, "build_transformers", with_table(1e-3 if wrong else 0))
    violations = _violations(_plan(flux2_dir, WAYS[way]))
    assert _named(violations, "complete") == ([f"{BLOCK}.table"] if wrong else [])
    assert all("that the model computes" in violation.expected for violation in violations)


def test_a_conversion_that_cuts_off_is_caught(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 held as bf16: rounded, as torch does it, not truncated."""
    flat = WeightLoader._flat

    def truncated(self: WeightLoader, *args: Any) -> Tensor:
        return flat(self, *args).clone().view(torch.int32).bitwise_and_(-(2**16)).view(torch.float32)

    monkeypatch.setattr(WeightLoader, "_flat", truncated)
    assert WEIGHT in _named(_violations(_plan(flux2_dir, dtype="bfloat16")), "complete")


# -- faults on two ranks ----------------------------------------------------------------------------------------------


def _report_of(gang: Gang, plan: RunPlan, setup: Callable[..., RankReport]) -> list[RankReport]:
    try:
        return gang.collective_rpc(setup, plan, timeout_s=120)
    finally:
        gang.collective_rpc(RankWorker.teardown, timeout_s=60)


@pytest.mark.parametrize("offload", [{"layerwise": True}, {"layerwise": True, "host": "mmap"}, {}])
def test_shards_in_the_wrong_order_are_caught(
    offload: dict[str, Any], gang_of: GangOf, checkpoints: Checkpoints
) -> None:
    """Every shard is whole and held once, but the gather puts them together the wrong way round."""

    def swapped(worker: Any, plan: Any) -> Any:
        import crossdock.runtime.rank.worker as rank

        make = rank.gather_of

        def gather(mesh: Any) -> Any:
            whole = make(mesh)

            def all_gather(out: Any, shard: Any) -> None:
                whole.all_gather(out, shard)
                out.copy_(out.roll(len(out) // 2))

            return replace(whole, all_gather=all_gather)

        rank.gather_of = gather
        try:
            return worker.setup(plan, rehearse=True)
        finally:
            rank.gather_of = make

    plan = _plan(checkpoints["z-image"], offload, parallel={"dp_degree": 2, "hsdp": {"shard": 2}})
    reports = _report_of(gang_of(2), plan, swapped)
    violations = verify_composition(plan, reports)
    assert {violation.rank for violation in violations} == {0, 1}
    assert {violation.check for violation in violations} == {"complete"}
    names = set(_named(violations, "complete"))
    assert all(any(name.startswith(f"{block.name}.") for name in names) for block in plan.memory.blocks)


@pytest.mark.parametrize("offload", [{"layerwise": True}, {"layerwise": True, "host": "mmap"}, {}])
def test_the_slice_of_another_rank_is_caught(
    offload: dict[str, Any], gang_of: GangOf, checkpoints: Checkpoints
) -> None:
    """The rank says that it holds its slice, of the right shape; the bytes are those of the other rank."""

    def crossed(worker: Any, plan: Any) -> Any:
        import crossdock.runtime.rank.worker as worker_module

        class Crossed(worker_module.WeightLoader):  # type: ignore[name-defined, misc]
            def load_blocks(self) -> Any:
                mine = self._slices
                if worker.rank == 1:
                    self._slices = plan.layout.slices[0]
                weights = super().load_blocks()
                self._slices = weights.slices = mine
                return weights

        loader, worker_module.WeightLoader = worker_module.WeightLoader, Crossed
        try:
            return worker.setup(plan, rehearse=True)
        finally:
            worker_module.WeightLoader = loader

    plan = _plan(checkpoints["z-image"], offload, parallel={"tp_degree": 2})
    violations = verify_composition(plan, _report_of(gang_of(2), plan, crossed))
    assert {violation.rank for violation in violations if violation.check == "complete"} == {1}
    named = set(_named(violations, "complete"))
    for cut in ("layers.1.attention.to_q.weight", "layers.1.attention.to_out.0.weight"):
        assert cut in named, "cut along dim 0, and along dim 1"
    assert not any(name not in plan.layout.slices[0] for name in named), "what is not cut came right"


# -- the comparison itself --------------------------------------------------------------------------------------------

TENSORS = {
    "b.matrix": torch.randn(300, 64),
    "b.wide": torch.randn(40, 900).bfloat16(),
    "b.cube": torch.randn(50, 8, 30),
    "b.fp8": torch.randn(300, 120).to(torch.float8_e4m3fn),
    "b.flags": torch.arange(1000) % 3 == 0,
    "b.scalar": torch.tensor(2.5),
    "b.empty": torch.zeros(0, 4),
    "b.row": torch.randn(20000),
}
CUTS: dict[str, dict[str, TensorSlice]] = {
    "whole": {},
    "one range": {"b.matrix": TensorSlice(0, ((30, 190),), 300), "b.wide": TensorSlice(1, ((90, 870),), 900)},
    "several": {
        "b.matrix": TensorSlice(1, ((0, 15), (27, 28), (40, 64)), 64),
        "b.wide": TensorSlice(0, ((0, 10), (30, 39)), 40),
        "b.cube": TensorSlice(1, ((1, 2), (4, 8)), 8),
        "b.fp8": TensorSlice(1, ((1, 40), (100, 120)), 120),
        "b.row": TensorSlice(0, ((19000, 20000), (0, 9000)), 20000),
    },
}


class _Case:
    """A block of TENSORS, cut and converted, in memory as it ought to be."""

    def __init__(self, folder: Path, cut: str, held: torch.dtype | None, full: bool, shards: int = 1) -> None:
        save_file(TENSORS, folder / "model.safetensors")
        slices = CUTS[cut]
        model, block = nn.Module(), nn.Module()
        model.b = block
        for fqn, tensor in TENSORS.items():
            value = tensor.to(held) if held is not None and tensor.is_floating_point() else tensor
            if (part := slices.get(fqn)) is not None:
                value = torch.cat([value.narrow(part.dim, a, b - a) for a, b in part.ranges], part.dim)
            block.register_buffer(fqn.removeprefix("b."), value)
        self.layout = BlockLayout.of(block, multiple=shards)
        self.memory = torch.full((self.layout.slot_bytes,), 0xFF, dtype=torch.uint8)
        self.layout.pack(block, self.memory)
        mesh = SimpleNamespace(hsdp_shard=shards)
        layout = SimpleNamespace(
            stored=stored_tensors(folder),
            slices_of=lambda rank: slices,
            mesh=mesh,
            dtypes={name: value.dtype for name, value in model.named_buffers()},
            loras=(),
        )
        home = Home.HOST if shards == 1 else Home.HOST_SHARD
        self._block = StreamedBlock("b", block, self.layout, home, ())
        self._make = lambda: WeightCheck(cast(ModelLayout, layout), (), 0, model, full=full)

    def wrong(self) -> set[str]:
        check = self._make()
        check.block(self._block, self.memory)
        assert {record.fqn for record in check.records} == set(TENSORS)
        return {record.fqn for record in check.records if record.found != record.expected}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("held", [None, torch.float16])
@pytest.mark.parametrize("cut", CUTS)
def test_every_dtype_and_cut(cut: str, held: torch.dtype | None, full: bool, tmp_path: Path) -> None:
    """No false alarm, and a changed first or last byte of any tensor is told, under its name alone."""
    case = _Case(tmp_path, cut, held, full)
    assert case.wrong() == set()
    for entry in case.layout.entries:
        for place in {entry.offset, entry.offset + entry.nbytes - 1} if entry.nbytes else ():
            case.memory[place] ^= 0x10
            assert case.wrong() == {f"b.{entry.name}"}
            case.memory[place] ^= 0x10
    assert case.wrong() == set()


@pytest.mark.parametrize("shards", [2, 7, 40])
def test_something_of_every_shard_is_compared(shards: int, tmp_path: Path) -> None:
    """A shard may lie wholly inside one large tensor: still, two shards that changed places show."""
    case = _Case(tmp_path, "whole", None, full=False, shards=shards)
    size = len(case.memory) // shards
    right = case.memory.clone()
    for shard in range(shards):
        case.memory[shard * size : (shard + 1) * size] = 0xFF
        assert case.wrong(), f"shard {shard} was not looked at"
        case.memory.copy_(right)


def test_rows_are_fixed_by_the_name(tmp_path: Path) -> None:
    """The same rows on every rank and in every run; the ends of every range; others for another tensor."""
    tensor = torch.empty(1000, WHOLE_BYTES)
    part = TensorSlice(0, ((100, 400), (2000, 2700)), 3000)
    rows = sampled_rows("a.weight", tensor, part, (5 * tensor[0].nbytes,))
    assert rows is not None
    assert {0, 299, 300, 999, 5} <= set(rows.tolist())
    assert len(rows) <= 8
    again = sampled_rows("a.weight", tensor, part, (5 * tensor[0].nbytes,))
    assert again is not None
    assert torch.equal(rows, again)
    other = sampled_rows("b.weight", tensor, part, (5 * tensor[0].nbytes,))
    assert other is not None
    assert rows.tolist() != other.tolist()
    assert sampled_rows("a.bias", torch.empty(7), None, ()) is None, "small: whole"


def _is_poisoned(memory: Tensor) -> bool:
    """Wherever a tensor can begin."""
    return bool((memory.view(-1, ALIGNMENT)[:, : ALIGNMENT // 4] == 0xFF).all())


@pytest.mark.parametrize("residents", [(), (1, 2)])
@pytest.mark.parametrize("home", [Home.HOST, Home.HOST_SHARD, Home.DEVICE_SHARD])
def test_slots_hold_nothing_before_the_rehearsal(
    home: Home, residents: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that were there before must not pass for bytes that were brought; right ones are seen as they come."""
    case = build([home] * 5, 1, resident=residents)
    stream = case.stream
    seen: dict[str, Tensor] = {}
    stream.observe_first_loads(lambda block, memory: seen.update({block.name: memory.clone()}))
    stream.rehearse()
    assert list(seen) == [block.name for block in stream.blocks]
    assert not any(map(_is_poisoned, seen.values()))
    monkeypatch.setattr(loader_module.BlockLoader, "load", lambda self, block, memory, after, slot, done, **_: None)
    stream.observe_first_loads(lambda block, memory: seen.update({block.name: memory.clone()}))
    stream.rehearse()
    assert all(map(_is_poisoned, seen.values()))
    monkeypatch.undo()
    stream.observe_first_loads(lambda *_: None)
    stream.rehearse()
    case.check(range(5))
    stream.remove()
    stream.engine.close()


@thorough
def test_the_picture_after_comparing(flux2_dir: Path) -> None:
    """What is poisoned and read, in a rehearsal or the first step, is loaded again where it must be: the same bits."""
    found = []
    for way in ("shared", "some resident", "off"):
        for rehearse in (True, False):
            with _worker(_plan(flux2_dir, WAYS[way]), rehearse=rehearse) as (worker, _):
                found.append(worker.generate(REQUEST).latents)
    assert all(torch.equal(cast(Tensor, one), cast(Tensor, found[0])) for one in found)
