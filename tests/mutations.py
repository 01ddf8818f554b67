"""Composition faults as a maintainer could make them, to be planted in ranks, and the checks that have to catch them.

A plant runs on a rank: it patches the product there, or the model. The ranks cannot import this module: whoever sends
its functions has them pickled by value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from crossdock.offload.codecs.codec import IDENTITY
from crossdock.offload.memory.copy_engine import CpuCopyEngine
from crossdock.offload.memory.layout import ALIGNMENT, aligned_bytes
from crossdock.offload.stream.block import StreamedBlock
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.offload.stream.loader import BlockLoader
from crossdock.parallel.mesh import Mesh
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank import worker as worker_module
from crossdock.runtime.rank.probe import probe as probe_module
from crossdock.runtime.rank.probe import unsharded as unsharded_module
from crossdock.runtime.rank.weights import compare as arrival_module
from crossdock.runtime.rank.weights.compare import WeightCheck
from crossdock.runtime.rank.weights.load import WeightLoader
from crossdock.runtime.rank.weights.source import WeightSource
from crossdock.runtime.rank.worker import RankWorker

BLOCK = "layers.2"
NEXT = "layers.3"
TO_Q = f"{BLOCK}.attention.to_q.weight"
PACKED = "single_transformer_blocks.2.attn.to_qkv_mlp_proj.weight"
OUTSIDE = "cap_embedder.1.weight"
TABLE = f"{BLOCK}.table"
LATE_S = 0.15
"""How late copies come where a wait for them is left out."""
VERY_LATE_S = 0.5
"""How late one copy comes to be later than a block that computes on a busy machine."""
TOO_LATE_S = 5.0
"""The longest that a copy waits for a block that does not wait for it."""

Plant = Callable[[RankWorker, pytest.MonkeyPatch], None]
Stage = Literal["load", "request", "probe"]
"""When a fault is planted and where it must show: in what ranks report before the first step or in the first request;
in a request after a good rehearsal; or when streaming on and off are compared after one.
"""


@dataclass(frozen=True)
class Mutation:
    """A planted fault.

    Attributes:
        pitfalls: numbers in the list of what goes wrong elsewhere when offload meets sharding; empty: none of these.
        check: what must catch it: a row of the composition contract.
        sooner: what may refuse it where there is no rehearsal, at once, before `check` has seen anything.
        where: the violation says it: block, parameter, slot or group.
        rank: where it is planted, the only rank of a layout that has one; None: on all.
        steps: of the request.
        needs: what a layout must have for it, and with a `!` must not, in words of `Layout.facts`.
    """

    name: str
    pitfalls: tuple[int, ...]
    check: str
    where: str
    layouts: tuple[str, ...]
    plant: Plant
    stage: Stage = "load"
    rank: int | None = 1
    family: str = "z-image"
    steps: int = 1
    needs: str = ""
    sooner: str = ""

    def applies(self, facts: frozenset[str]) -> bool:
        return all((word.removeprefix("!") in facts) != word.startswith("!") for word in self.needs.split())


# -- tools -----------------------------------------------------------------------------------------------------------


def _is_transformers(stream: BlockStream) -> bool:
    """Not of the text encoder or the VAE."""
    return any(block.name in (BLOCK, "single_transformer_blocks.2") for block in stream.blocks)


def when_attached(patch: pytest.MonkeyPatch, act: Callable[[BlockStream], None]) -> None:
    """`act` on the transformer's stream, between loading and comparing."""
    attach = BlockStream.attach

    def attached(stream: BlockStream) -> None:
        attach(stream)
        if _is_transformers(stream):
            act(stream)

    patch.setattr(BlockStream, "attach", attached)


def _when_loaded(patch: pytest.MonkeyPatch, act: Callable[[BlockStream], None]) -> None:
    """`act` when all that was loaded has been compared, or is watched for."""
    begin = WeightCheck.begin

    def begun(check: WeightCheck, stream: BlockStream, **options: Any) -> None:
        begin(check, stream, **options)
        act(stream)

    patch.setattr(WeightCheck, "begin", begun)


def block_of(stream: BlockStream, name: str = BLOCK) -> StreamedBlock:
    return next(block for block in stream.blocks if block.name == name)


def index_of(stream: BlockStream, name: str = BLOCK) -> int:
    return [block.name for block in stream.blocks].index(name)


def _rebind(module: nn.Module, fqn: str, tensor: Tensor) -> None:
    path, _, leaf = fqn.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _tie(model: nn.Module, fqn: str, other: str) -> None:
    _rebind(model, fqn, model.get_parameter(other).detach())


# -- same-schedule ---------------------------------------------------------------------------------------------------


def order_swapped(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    def swap(stream: BlockStream) -> None:
        pass_, index = stream._run_order.passes[0].order, index_of(stream)
        pass_[index], pass_[index + 1] = pass_[index + 1], pass_[index]
        stream._look_ahead()

    when_attached(patch, swap)


def slots_by_turns(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """Two slots in turn for an odd number of blocks: the last and the first share one."""
    set_schedule = BlockStream._set_schedule

    def by_turns(stream: BlockStream, schedule: Any, resident: Any) -> None:
        if _is_transformers(stream):
            schedule = replace(schedule, slots=tuple(place % 2 for place in range(len(schedule.slots))))
        set_schedule(stream, schedule, resident)

    patch.setattr(BlockStream, "_set_schedule", by_turns)


def planned_alone(**offload: Any) -> Plant:
    """The rank makes its own plan, as if from what is free on its own device."""

    def plant(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
        setup = RankWorker.setup

        def with_own_plan(self: RankWorker, plan: RunPlan, **options: Any) -> Any:
            config = plan.config.model_copy(update={"offload": plan.config.offload.model_copy(update=offload)})
            return setup(self, make_plan(config, plan.layout.model_dir, plan.layout.device), **options)

        patch.setattr(RankWorker, "setup", with_own_plan)

    return plant


# -- single-owner ----------------------------------------------------------------------------------------------------


def private_copy(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A hook keeps one weight on the device after it had come: what is streamed afterwards is never read."""

    def keep(stream: BlockStream) -> None:
        _rebind(worker.loaded.model, TO_Q, worker.loaded.model.get_parameter(TO_Q).detach().clone())

    _when_loaded(patch, keep)


def nothing_is_freed(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """Every block has memory of its own, beside the slots."""
    bind = StreamedBlock.bind
    patch.setattr(StreamedBlock, "bind", lambda self, memory: bind(self, aligned_bytes(memory.nbytes, memory.device)))


def left_on_meta(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    load_outside = WeightLoader.load_outside

    def forgetful(loader: WeightLoader) -> None:
        memory = loader._memory
        loader._memory = replace(memory, outside=tuple(fqn for fqn in memory.outside if fqn != "x_pad_token"))
        load_outside(loader)

    patch.setattr(WeightLoader, "load_outside", forgetful)


def accelerate_hook(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    _when_loaded(patch, lambda stream: add_hook_to_module(block_of(stream).module, ModelHook()))


def fully_sharded(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """FSDP2 takes a block that is streamed already."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def shard(stream: BlockStream) -> None:
        fully_shard(block_of(stream).module, mesh=init_device_mesh("cpu", (worker.world_size,)))

    _when_loaded(patch, shard)


def adapter_registered(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    def register(stream: BlockStream) -> None:
        linear = block_of(stream).module.get_submodule("attention.to_q")
        linear.register_parameter("lora_a", nn.Parameter(torch.zeros(4, 4), requires_grad=False))

    _when_loaded(patch, register)


def another_dtype(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    def cast(stream: BlockStream) -> None:
        _rebind(worker.loaded.model, OUTSIDE, worker.loaded.model.get_parameter(OUTSIDE).bfloat16())

    _when_loaded(patch, cast)


def whole_blocks_read(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """The shard is a view of the whole block, which stays."""

    def source(loader: WeightLoader, block: Any, start: int, stop: int) -> Tensor:
        return aligned_bytes(block.layout.slot_bytes, loader._device)[start:stop].zero_()

    patch.setattr(WeightLoader, "_source", source)


# -- complete --------------------------------------------------------------------------------------------------------


def slice_of_another_rank(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    load_blocks = WeightLoader.load_blocks

    def crossed(loader: WeightLoader) -> Any:
        mine, loader._slices = loader._slices, loader._layout.slices[0]
        weights = load_blocks(loader)
        loader._slices = weights.slices = mine
        return weights

    patch.setattr(WeightLoader, "load_blocks", crossed)


def parts_in_another_order(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """The parts of a fused projection are put together from the last to the first."""
    rows = WeightSource.rows

    def backwards(source: WeightSource, fqn: str, part: Any = None, first: int = 0, last: int | None = None) -> Tensor:
        return rows(source, fqn, part and replace(part, ranges=part.ranges[::-1]), first, last)

    patch.setattr(WeightSource, "rows", backwards)


def shard_of_the_neighbour(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    range_of = WeightLoader._range

    def neighbours(loader: WeightLoader, block: Any) -> tuple[int, int]:
        start, stop = range_of(loader, block)
        size = stop - start
        start = (start + size) % (size * loader._mesh.shape.hsdp_shard)
        return start, start + size

    patch.setattr(WeightLoader, "_range", neighbours)


def shard_off_by_the_alignment(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    fill = WeightLoader._fill

    def shifted(loader: WeightLoader, block: Any, target: Tensor, start: int, stop: int) -> None:
        fill(loader, block, target, start - ALIGNMENT, stop - ALIGNMENT)

    patch.setattr(WeightLoader, "_fill", shifted)


def gathered_without_slicing(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """All gathers have the size of the largest block; a smaller one has a hole behind every shard."""
    make = worker_module.gather_of

    def gather(mesh: Mesh) -> Any:
        true = make(mesh)
        assert true is not None

        def all_gather(whole: Tensor, shard: Tensor) -> None:
            largest = max(block.layout.slot_bytes for block in worker.loaded.plan.memory.blocks)
            padded, gathered = shard.new_zeros(largest // true.parts), whole.new_empty(largest)
            padded[: len(shard)] = shard
            true.all_gather(gathered, padded)
            whole.copy_(gathered[: len(whole)])

        return replace(true, all_gather=all_gather)

    patch.setattr(worker_module, "gather_of", gather)


def bytes_of_the_next_block(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    load = BlockLoader.load

    def mistaken(loader: BlockLoader, block: StreamedBlock, *args: Any, **options: Any) -> None:
        if block.name == BLOCK:
            block = replace(block, source=block_of(worker.loaded.stream, NEXT).source)
        load(loader, block, *args, **options)

    patch.setattr(BlockLoader, "load", mistaken)


def tail_left_out(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A copy ends before the last alignment unit."""
    move = CpuCopyEngine.move
    short = lambda engine, target, source: move(engine, target[:-ALIGNMENT], source[:-ALIGNMENT])  # noqa: E731
    patch.setattr(CpuCopyEngine, "move", short)


def initialised_at_random(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    load_outside = WeightLoader.load_outside

    def loaded(loader: WeightLoader) -> None:
        load_outside(loader)
        nn.init.normal_(loader._model.get_parameter(OUTSIDE))

    patch.setattr(WeightLoader, "load_outside", loaded)


def table_not_rebuilt(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A rotary table that the model computes is empty on this rank. All ranks have one: see `with_table`."""
    built = worker_module.build_transformers

    def emptied(*args: Any) -> nn.Module:
        model = built(*args)
        if TABLE in dict(model.named_buffers()):
            model.get_buffer(TABLE).zero_()
        return model

    patch.setattr(worker_module, "build_transformers", emptied)


def with_table(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Give every transformer that `module` builds a table that no checkpoint holds, in a block."""
    build = module.build_transformers

    def built(*args: Any) -> nn.Module:
        model: nn.Module = build(*args)
        if hasattr(model, "noise_refiner"):
            model.get_submodule(BLOCK).register_buffer("table", torch.arange(64.0), persistent=False)
        return model

    patch.setattr(module, "build_transformers", built)


def table_on_ranks(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    for module in (worker_module, arrival_module, probe_module, unsharded_module):
        with_table(module, patch)


# -- no-alias --------------------------------------------------------------------------------------------------------


def cached_view(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A plain attribute, neither parameter nor buffer, over a weight that comes and goes."""

    def cache(stream: BlockStream) -> None:
        linear: Any = block_of(stream).module.get_submodule("attention.to_q")
        linear.cache = linear.weight.data[1:3]

    _when_loaded(patch, cache)


def tied_across_blocks(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """Another block's parameter: of the same shape, placed by name, streamed with both."""
    other = TO_Q.replace(BLOCK, NEXT)
    _when_loaded(patch, lambda stream: _tie(worker.loaded.model, other, TO_Q))


def tied_in_a_block(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    one, other = (f"{BLOCK}.attention_norm{number}.weight" for number in (1, 2))
    _when_loaded(patch, lambda stream: _tie(worker.loaded.model, one, other))


def outside_in_a_slot(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    def misplace(stream: BlockStream) -> None:
        weight = worker.loaded.model.get_parameter(OUTSIDE)
        memory = stream.slot_memory[1][: weight.nbytes].view(weight.dtype).view(weight.shape)
        _rebind(worker.loaded.model, OUTSIDE, memory)

    _when_loaded(patch, misplace)


def another_code(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A block rests in a code that was not planned."""
    load_blocks = WeightLoader.load_blocks

    def in_another(loader: WeightLoader) -> Any:
        weights, other = load_blocks(loader), replace(IDENTITY, name="another")
        weights.blocks = [replace(block, codec=other) if block.name == BLOCK else block for block in weights.blocks]
        return weights

    patch.setattr(WeightLoader, "load_blocks", in_another)


def one_place_at_rest(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """The place of a block in the host store, or on the device, is given to the next block as well."""
    source, given = WeightLoader._source, dict[str, Any]()

    def twice(loader: WeightLoader, block: Any, start: int, stop: int) -> Any:
        given[block.name] = source(loader, block, start, stop)
        return given[BLOCK] if block.name == NEXT else given[block.name]

    patch.setattr(WeightLoader, "_source", twice)


def slots_overlap(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    lease = BlockStream._lease

    def closer(stream: BlockStream) -> None:
        lease(stream)
        if _is_transformers(stream):
            slot = stream._table.shared[1]
            slot.memory = stream.arena.memory[slot.start - ALIGNMENT : slot.stop - ALIGNMENT]

    patch.setattr(BlockStream, "_lease", closer)
