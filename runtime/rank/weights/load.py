"""Bringing a rank's bytes from the checkpoint to where they rest: host store, shard, or device."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from crossdock.offload.codecs.codec import WrongCodeError, encoded
from crossdock.offload.codecs.part_format import IncompressibleError
from crossdock.offload.live.discovery import move_plain_tensors
from crossdock.offload.memory.host_memory import FOR_A_RUN, GIB, HostMemoryError, host_memory, require
from crossdock.offload.memory.host_store import HostStore, mapped_share_bytes
from crossdock.offload.memory.layout import aligned_bytes
from crossdock.offload.stream.block import Home, Piece, StreamedBlock
from crossdock.parallel.group import exchange
from crossdock.parallel.hsdp import shard_range
from crossdock.parallel.mesh import Mesh
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.errors import EncodingRefused, LaunchError
from crossdock.runtime.models.meta import non_persistent_buffers
from crossdock.runtime.plan.memory_plan import PlannedBlock
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.weights.kept_stores import StoreHolder
from crossdock.runtime.rank.weights.mmap_pages import CheckpointPages
from crossdock.runtime.rank.weights.packed_parts import PackedParts
from crossdock.runtime.rank.weights.source import WeightSource


def node_id() -> str:
    """The same on all ranks that can share memory: host name and boot."""
    return f"{socket.gethostname()}|{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


@dataclass
class RankWeights:
    """What a rank holds of the transformer, outside the module itself.

    `ranges`: block -> which of its slot's bytes rest here. `slices`: fqn -> the part that was read, of what is cut.
    `filled`: the blocks whose bytes this rank read itself; the ranks that share a store divide that work.
    """

    blocks: list[StreamedBlock]
    ranges: dict[str, tuple[int, int]]
    slices: Mapping[str, TensorSlice]
    filled: frozenset[str]
    store: HostStore | None
    shares_store_with: tuple[int, ...]

    @cached_property
    def host_share_bytes(self) -> int:
        """This rank's proportional share of the host stores, looked up once, when it is first asked for: at the end of
        a request, when every rank has read its blocks. The kernel walks all mapped pages for it, so what that takes
        goes with the size of the model.
        """
        return mapped_share_bytes() if self.store is not None else 0


@dataclass(frozen=True)
class HostPart:
    """What ranks must have in common to share a host store: the node, the TP slice and the shard."""

    node: str
    tp: int
    shard: int

    def key(self, plan: RunPlan, held_bytes: int) -> str:
        """A digest of everything that decides the bytes: the files, the layout, the codec, the part."""
        digest = hashlib.sha256()
        files = sorted({stored.file for stored in plan.layout.stored.values()})
        facts: list[object] = [self.tp, self.shard, held_bytes, plan.layout.mesh.tp, plan.layout.mesh.hsdp_shard]
        facts += [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        facts += [(block.name, block.layout, block.codec.name) for block in plan.memory.blocks]
        facts += [(str(lora.file), lora.stamp, lora.scale, lora.prefix) for lora in plan.layout.loras]
        for fact in facts:
            digest.update(repr(fact).encode())
        return digest.hexdigest()


def _firsts(parts: Sequence[HostPart], node: str) -> list[int]:
    """The first rank of every part on `node`."""
    return [rank for rank, part in enumerate(parts) if part.node == node and parts.index(part) == rank]


class WeightLoader:
    """Reads one rank's part of the transformer: TP slices, HSDP shards, and nothing else."""

    def __init__(
        self,
        plan: RunPlan,
        mesh: Mesh,
        model: nn.Module,
        device: torch.device,
        holder: StoreHolder | None = None,
        told: Callable[[int, int], None] = lambda read_bytes, all_bytes: None,
    ) -> None:
        """
        Args:
            holder: keeps the host memory beyond this rank.
            told: called with the bytes that this rank has brought to their homes, and all that it brings.
        """
        self._plan, self._layout, self._memory = plan, plan.layout, plan.memory
        self._mesh = mesh
        self._model = model
        self._device = device
        self._holder = holder
        self._told = told
        self._slices = plan.layout.slices_of(mesh.rank)
        self._files = WeightSource(plan.layout.stored, plan.layout.loras)
        self._packed = PackedParts(plan.layout.stored, self._slices, self._files)
        self._unstored = non_persistent_buffers(model)
        self._buffers = {fqn: model.get_buffer(fqn) for fqn in self._unstored}
        self._found_filled = False
        self._kept_as = "", ""
        self._free: Tensor | None = None
        in_files = plan.config.offload.host == "mmap"
        self._pages = CheckpointPages(self._files, plan.layout.stored) if in_files else None

    def load_blocks(self) -> RankWeights:
        """Fill every block's home. Collective over the world where blocks or components rest in host memory.

        Raises:
            LaunchError: there is not enough host memory for them; before a byte was read.
            EncodingRefused: a codec does not make all tensors smaller that the plan encodes.
        """
        components = self._component_bytes()
        if self._pages or not any(block.home.on_host for block in self._memory.blocks):
            self._check_memory(0, components)
        store, sharers = (None, (self._mesh.rank,)) if self._pages else self._host_store(components)
        self._free = None if store is None else store.bytes
        blocks, filled, ranges = [], [], {}
        own = {block.name for block in self._memory.blocks[sharers.index(self._mesh.rank) :: len(sharers)]}
        brought = {b.name: b.held_bytes for b in self._memory.blocks if b.name in own and not self._is_there(b)}
        read_bytes, all_bytes = 0, sum(brought.values())
        refused: dict[str, frozenset[str]] = {}
        for block in self._memory.blocks:
            start, stop = ranges[block.name] = self._range(block)
            source = self._source(block, start, stop)
            if isinstance(source, Tensor) and block.name in own:
                if block.name in brought:
                    try:
                        self._fill_home(block, source, start, stop)
                    except IncompressibleError as error:
                        refused[block.name] = error.tensors
                    self._told(read_bytes := read_bytes + block.held_bytes, all_bytes)
                filled.append(block.name)
            module = self._model.get_submodule(block.name)
            blocks.append(StreamedBlock(block.name, module, block.layout, block.home, source, codec=block.codec))
        self._agree(refused, store)
        if store is not None:
            if self._holder and self._mesh.rank == sharers[0]:
                self._holder.keep(*self._kept_as, store.handle)
            if self._device.type == "cuda":
                store.register()
        return RankWeights(blocks, ranges, self._slices, frozenset(filled), store, sharers)

    def _agree(self, refused: Mapping[str, frozenset[str]], store: HostStore | None) -> None:
        """Every rank has filled what it fills, and has encoded it. Collective where it matters.

        Raises:
            EncodingRefused: of some tensors there would be more bytes: all that are known of.
        """
        if store is None and all(block.codec.in_place for block in self._memory.blocks):
            return
        by_rank = exchange(refused, self._mesh.world)
        if not any(by_rank):
            return
        if store is not None:
            store.close()
        plain = dict(self._plan.plain)
        for block, names in chain.from_iterable(found.items() for found in by_rank):
            plain[block] = plain.get(block, frozenset()) | names
        raise EncodingRefused(plain)

    def _is_there(self, block: PlannedBlock) -> bool:
        """Its bytes are the page cache's, or were found in the store."""
        return block.home.on_host and (self._pages is not None or self._found_filled)

    def _source(self, block: PlannedBlock, start: int, stop: int) -> Tensor | tuple[Piece, ...]:
        """Where bytes [start, stop) of the block rest: still empty, but in the page cache."""
        if not block.home.on_host:
            return aligned_bytes(block.held_bytes, self._device).zero_()
        if self._pages is not None:
            return self._pages.pieces(block, self._slices, self._buffers, start, stop)
        assert self._free is not None
        source, self._free = self._free[: block.held_bytes], self._free[block.held_bytes :]
        return source

    def read_block(self, block: PlannedBlock) -> Tensor:
        """All bytes of the block (of this rank's TP slice), straight from the files into fresh device memory; uint8."""
        memory = aligned_bytes(block.layout.slot_bytes, self._device)
        self._fill(block, memory, 0, block.layout.slot_bytes)
        return memory

    def load_outside(self) -> None:
        """Everything outside the blocks goes to the device: parameters, buffers, tensors kept as plain attributes."""
        for fqn in self._memory.outside:
            path, _, leaf = fqn.rpartition(".")
            module = self._model.get_submodule(path)
            value = self._value(fqn).to(self._device, self._layout.dtypes[fqn], copy=True)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value
        move_plain_tensors(self._model, self._device)

    def close(self) -> None:
        self._files.close()

    def _range(self, block: PlannedBlock) -> tuple[int, int]:
        """Which of the bytes of the block's slot rest on this rank."""
        if not block.home.sharded:
            return 0, block.layout.slot_bytes
        parts = self._mesh.shape.hsdp_shard
        return shard_range(block.layout.slot_bytes, parts, self._mesh.index_in("weights"))

    def _component_bytes(self) -> int:
        """Host memory that text encoders and VAEs need on this node: the first rank of each replica runs them."""
        if not self._memory.component_host_bytes:
            return 0
        runs = self._mesh.rank == self._mesh.ranks["replica"][0]
        on_node = exchange((node_id(), runs), self._mesh.world)
        return self._memory.component_host_bytes * on_node.count((node_id(), True))

    def _host_store(self, components: int) -> tuple[HostStore | None, tuple[int, ...]]:
        """One store per node and slice: the first rank that holds the slice makes or finds it, the others map it."""
        on_host = [block for block in self._memory.blocks if block.home.on_host]
        if not on_host:
            return None, (self._mesh.rank,)
        world_size, rank = self._mesh.shape.world_size, self._mesh.rank
        shard = self._mesh.index_in("weights") if on_host[0].home is Home.HOST_SHARD else 0
        held_bytes = sum(block.held_bytes for block in on_host)
        part = HostPart(node_id(), self._mesh.shape.coordinates(rank)["tp"], shard)
        parts = exchange(part, self._mesh.world)
        sharers = tuple(other for other in range(world_size) if parts[other] == part)
        owner = rank == sharers[0]
        self._kept_as = f"tp {part.tp}, shard {part.shard}", part.key(self._plan, held_bytes)
        store = self._kept() if owner else None
        found = exchange(store is not None, self._mesh.world)
        self._check_memory(held_bytes * sum(not found[first] for first in _firsts(parts, part.node)), components)
        if owner and store is None:
            store = HostStore.create(held_bytes)
        self._found_filled = found[sharers[0]]
        handles = exchange(store.handle if store else None, self._mesh.world)
        return store or HostStore.attach(handles[sharers[0]]), sharers

    def _kept(self) -> HostStore | None:
        """What ranks before this one had filled."""
        handle = self._holder and self._holder.find(*self._kept_as)
        try:
            return HostStore.attach(handle) if handle else None
        except OSError:  # its holder has ended meanwhile
            return None

    def _check_memory(self, blocks: int, components: int) -> None:
        """Before a byte is read: too little memory would end in a SIGKILL. The same verdict on all ranks of a node.

        Args:
            blocks, components: the bytes that are still to be taken for them on this node.
        """
        what = f"the transformer's blocks ({blocks / GIB:.2f} GiB)" if blocks else ""
        if components:
            what += f"{' and ' if what else ''}text encoders and VAE ({components / GIB:.2f} GiB)"
        try:
            remedy = FOR_A_RUN if blocks else "run fewer replicas per node, or use a smaller dtype"
            require(blocks + components, f"{self._layout.model_dir}: {what}", host_memory(), remedy)
        except HostMemoryError as error:
            raise LaunchError(str(error), "offload.host") from None

    def _fill_home(self, block: PlannedBlock, source: Tensor, start: int, stop: int) -> None:
        """Bytes [start, stop) of the block, encoded, into `source` (uint8, all that is held of them)."""
        if block.codec.in_place:
            self._fill(block, source, start, stop)
            return
        raw = torch.zeros(stop - start, dtype=torch.uint8)  # what lies between tensors is the same on all ranks
        place = start // len(raw) if len(raw) else 0
        if (taken := self._packed.of(block, place, start, stop)) is not None:
            self._fill(block, raw, start, stop, without=taken.names)
            source.copy_(taken.part(raw))
            return
        self._fill(block, raw, start, stop)
        try:
            source.copy_(encoded(block.codec, block.layout, block.parts, place, raw.to(self._device)))
        except WrongCodeError as error:
            name = self._memory.tensor_at(block.name, place * len(raw) + error.byte)
            raise RuntimeError(f"{name}: {error}") from None

    def _fill(self, block: PlannedBlock, target: Tensor, start: int, stop: int, without: Collection[str] = ()) -> None:
        """Bytes [start, stop) of the block into `target` (uint8, stop - start long), but those of some tensors."""
        for entry in block.layout.entries:
            low, high = max(entry.offset, start), min(entry.offset + entry.nbytes, stop)
            if low >= high or entry.name in without:
                continue
            fqn = f"{block.name}.{entry.name}"
            size = entry.dtype.itemsize
            flat = self._flat(fqn, (low - entry.offset) // size, (high - entry.offset) // size)
            target[low - start : high - start].view(entry.dtype).copy_(flat)

    def _flat(self, fqn: str, start: int, stop: int) -> Tensor:
        if fqn in self._unstored:
            return self._model.get_buffer(fqn).reshape(-1)[start:stop]
        return self._files.flat(fqn, self._slices.get(fqn), start, stop)

    def _value(self, fqn: str) -> Tensor:
        if fqn in self._unstored:
            return self._model.get_buffer(fqn)
        return self._files.rows(fqn, self._slices.get(fqn))
