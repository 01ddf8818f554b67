"""Whether what arrives on the device is what the checkpoint has.

Before the first step all slots are poisoned. When a block has come for the first time, and before it computes, rows of
each of its tensors are compared with the same rows of the file. These are read on a way of their own: neither the
layout's byte ranges nor the host store have a part in it, only the file, the slice of tensor parallelism and the dtype.
That happens in the first step, or in a rehearsal before it; what stays on the device is compared when it is loaded.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from crossdock.offload.memory.layout import BlockLayout, TensorEntry
from crossdock.offload.stream.block import Home, StreamedBlock
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.offload.stream.first_loads import FirstLoadCallback, to_nobody
from crossdock.parallel.tensor import TensorSlice, part_shape
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import stored_tensors
from crossdock.runtime.models.meta import non_persistent_buffers
from crossdock.runtime.models.transformers import build_transformers
from crossdock.runtime.plan.memory_plan import PlannedBlock
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.rank.weights.digests import tensor_digest
from crossdock.runtime.rank.weights.source import WeightSource
from crossdock.runtime.reports.records import ArrivalRecord

WHOLE_BYTES = 32 * 1024
"""Tensors up to this size are compared whole."""
LARGE_BYTES = 1024 * 1024
"""From here on digests are compared: they are faster, and taken on the device."""
BETWEEN = 3
"""How many rows between the first and the last are compared."""


class WeightCheck:
    """Compares tensors of one rank with the checkpoint; `records` has one record for each.

    Attributes:
        differ: some tensor was not what the checkpoint has.
        on_arrival: gets every block, and its memory, when it is compared.
    """

    def __init__(self, layout: ModelLayout, outside: Sequence[str], rank: int, model: nn.Module, *, full: bool) -> None:
        """`outside`: what lies outside the blocks. `full`: compare all bytes, not some rows."""
        self.records: list[ArrivalRecord] = []
        self.differ = False
        self.on_arrival: FirstLoadCallback = to_nobody
        self._pinned: dict[str, int] = {}
        self._reported = 0
        self._layout = layout
        self._outside = outside
        self._model = model
        self._full = full
        self._slices = layout.slices_of(rank)
        self._unstored = non_persistent_buffers(model)
        self._source = WeightSource(layout.stored, layout.loras)  # its own: nothing that the loader has read or kept

    def begin(self, stream: BlockStream, *, rehearse: bool) -> None:
        """Compare what is on the device to stay.

        Args:
            rehearse: and every block that is streamed, once, now. Collective.
        """
        if rehearse:
            self.watch(stream)
            stream.rehearse()
        for block in stream.blocks:
            if not block.home.streamed and isinstance(block.source, Tensor):
                self.block(block, block.source)
        self.outside()
        self.unreported()

    def watch(self, stream: BlockStream) -> None:
        """Compare every streamed block when it comes for the first time; until then, slots are poisoned."""
        stream.observe_first_loads(self.block)

    def watch_again(self, stream: BlockStream) -> None:
        """As `watch`, and all rows: where the blocks come from, or go to, has changed."""
        self._full = True
        self.watch(stream)

    def pin(self, blocks: Sequence[PlannedBlock]) -> None:
        """Before a run that reads its blocks from the files while it goes on: what they have now is what is right."""
        if not self._full:
            for block in blocks:
                shapes = torch.empty(block.layout.slot_bytes, dtype=torch.uint8, device="meta")
                for fqn, tensor, cuts in self._entries(block.name, block.layout, block.home, shapes):
                    if fqn in self._layout.stored and tuple(tensor.shape) == self._shape(fqn):
                        rows = sampled_rows(fqn, tensor, self._slices.get(fqn), cuts)
                        self._pinned[fqn] = _crc(_brief(_bytes(self._expected(fqn, rows), None), self._layout.device))
            self._source.close()

    def unreported(self) -> tuple[ArrivalRecord, ...]:
        """The records that are new since the last call."""
        self._source.close()
        start, self._reported = self._reported, len(self.records)
        return tuple(self.records[start:])

    def block(self, block: StreamedBlock, memory: Tensor) -> None:
        """`memory`: uint8, on the device: all of the block's bytes."""
        self._compare(self._entries(block.name, block.layout, block.home, memory))
        self.on_arrival(block, memory)

    def _entries(
        self, block: str, layout: BlockLayout, home: Home, memory: Tensor
    ) -> Iterator[tuple[str, Tensor, Sequence[int]]]:
        parts = self._layout.mesh.hsdp_shard if home.sharded else 1
        size = layout.slot_bytes // parts
        for entry in layout.entries:
            # where a shard begins; so that of every rank's shard something is compared
            cuts = [cut - entry.offset for cut in range(size, parts * size, size)]
            yield self._name(block, entry), entry.view(memory), cuts

    def _name(self, block: str, entry: TensorEntry) -> str:
        names = [f"{block}.{name}" for name in entry.names]
        return next((name for name in names if name in self._layout.stored), names[0])

    def first_difference(self, block: StreamedBlock, held: Tensor, start: int, stop: int) -> str:
        """The first tensor of which `held`, bytes [start, stop) of the block, is not what the file has; empty: none."""
        try:
            for entry in block.layout.entries:
                low, high = max(entry.offset, start), min(entry.offset + entry.nbytes, stop)
                if low < high:
                    fqn = self._name(block.name, entry)
                    right = _bytes(self._expected(fqn, None), None)
                    found = held[low - start : high - start].cpu()
                    if not torch.equal(found, right[low - entry.offset : high - entry.offset]):
                        return fqn
        except CheckpointError:  # the file is not the one that it was
            pass
        finally:
            self._source.close()
        return ""

    def component(self, name: str, module: nn.Module) -> None:
        """A text encoder or decoder, where it rests after its load: its parameters that a file has by the same name and
        shape. What differs is recorded.
        """
        stored = stored_tensors(self._layout.model_dir / name, self._layout.variant)
        source = WeightSource(stored)
        for fqn, parameter in module.named_parameters():
            tensor = parameter.data
            if fqn in stored and stored[fqn].shape == tuple(tensor.shape):
                rows = None if self._full else sampled_rows(f"{name}.{fqn}", tensor, None, ())
                right = _bytes(source.picked(fqn, rows).to(tensor.dtype), None)
                live = _bytes(tensor, rows).cpu()
                if not torch.equal(live, right):
                    self.records.append(ArrivalRecord(f"{name}.{fqn}", right.nbytes, _crc(right), _crc(live)))
                    self.differ = True

    def outside(self) -> None:
        """The model's live tensors outside the blocks."""
        found = []
        for fqn in self._outside:
            path, _, leaf = fqn.rpartition(".")
            found.append((fqn, getattr(self._model.get_submodule(path), leaf), ()))
        self._compare(found)

    def _compare(self, found: Iterable[tuple[str, Tensor, Sequence[int]]]) -> None:
        """(fqn, tensor on the device, bytes of it at which another shard begins). What cannot be compared gets no
        record: other checks say why, and `complete` misses it.
        """
        expected, picked = [], []
        for fqn, tensor, cuts in found:
            if tensor.is_meta or tuple(tensor.shape) != self._shape(fqn):
                continue
            rows = None if self._full else sampled_rows(fqn, tensor, self._slices.get(fqn), cuts)
            live = _bytes(tensor, rows)
            right = None if self._full else self._pinned.get(fqn)
            if right is None:
                right = _crc(_brief(_bytes(self._expected(fqn, rows), None), tensor.device.type))
            expected.append((fqn, live.nbytes, right))
            picked.append(_brief(live, tensor.device.type))
        for record, live in zip(expected, _on_host(picked), strict=True):
            self.records.append(ArrivalRecord(*record, _crc(live)))
            self.differ |= self.records[-1].found != self.records[-1].expected

    def _shape(self, fqn: str) -> tuple[int, ...]:
        if fqn in self._unstored:
            return tuple(self._recomputed.get_buffer(fqn).shape)
        return part_shape(self._layout.stored[fqn].shape, self._slices.get(fqn))

    def _expected(self, fqn: str, rows: Tensor | None) -> Tensor:
        """Rows of this rank's part of a tensor, in the dtype in which it is held."""
        if fqn in self._unstored:
            whole = self._recomputed.get_buffer(fqn)
            return (whole if rows is None else whole[rows]).to(self._layout.dtypes[fqn])
        pick = partial(self._source.picked, fqn)
        return _rows_of_part(pick, self._slices.get(fqn), rows).to(self._layout.dtypes[fqn])

    @cached_property
    def _recomputed(self) -> nn.Module:
        """The model once more, for the buffers that its constructor computes."""
        layout = self._layout
        return build_transformers(layout.spec.transformer, layout.model_dir, layout.transformers)


def sampled_rows(fqn: str, tensor: Tensor, part: TensorSlice | None, cuts: Sequence[int]) -> Tensor | None:
    """The rows (along dim 0) of a tensor that are compared; None: all, because it is small.

    The first, the last, both ends of every range of `part`, where another shard begins (`cuts`, in bytes), and some in
    between, which depend on the name alone.
    """
    if tensor.nbytes <= WHOLE_BYTES:
        return None
    length = len(tensor)
    rows = {0, length - 1}
    for number in range(BETWEEN):
        low, high = length * number // BETWEEN, length * (number + 1) // BETWEEN
        rows.add(low + zlib.crc32(f"{number} {fqn}".encode()) % max(high - low, 1))
    if part is not None and part.dim == 0:
        ends = list(itertools.accumulate(stop - start for start, stop in part.ranges))
        rows |= {end - 1 for end in ends} | set(ends[:-1])
    rows |= {cut // (tensor.nbytes // length) for cut in cuts if 0 < cut < tensor.nbytes}
    return torch.tensor(sorted(rows))


def _rows_of_part(pick: Callable[[Tensor | None], Tensor], part: TensorSlice | None, rows: Tensor | None) -> Tensor:
    """`rows` (None: all) of `part` of a stored tensor, of which `pick` reads rows."""
    if part is None:
        return pick(rows)
    if part.dim == 0:
        held = torch.cat([torch.arange(start, stop) for start, stop in part.ranges])
        return pick(held if rows is None else held[rows])
    picked = pick(rows)
    return torch.cat([picked.narrow(part.dim, start, stop - start) for start, stop in part.ranges], part.dim)


def _bytes(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """`rows` (None: all) of a tensor as uint8 `[n]`, where the tensor is."""
    length = tensor.shape[0] if tensor.dim() else 1
    if not tensor.numel():
        return tensor.new_empty(0, dtype=torch.uint8)
    raw = tensor.detach().contiguous().reshape(length, -1).view(torch.uint8)
    return (raw if rows is None else raw[rows]).reshape(-1)


def _brief(raw: Tensor, kind: str) -> Tensor:
    """What stands for bytes (uint8) when they are compared, where they are: themselves, or of many a digest.

    Args:
        kind: of the device where the bytes that came are.
    """
    return raw if raw.nbytes <= LARGE_BYTES else tensor_digest(raw, kind).view(torch.uint8)


def _on_host(parts: list[Tensor]) -> Sequence[Tensor]:
    """In one copy, where they are on a device."""
    if all(part.device.type == "cpu" for part in parts):
        return parts
    return torch.cat(parts).cpu().split([len(part) for part in parts])  # type: ignore[no-untyped-call,no-any-return]


def _crc(raw: Tensor) -> int:
    return zlib.crc32(raw.numpy().data)
