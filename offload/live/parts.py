"""The parts of a live model: the layouts of its blocks and of what belongs to none, and how they rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from crossdock.offload.codecs.codec import IDENTITY, Codec
from crossdock.offload.codecs.lossless import lossless
from crossdock.offload.live.discovery import FoundBlock, shared_storage
from crossdock.offload.memory.layout import BlockLayout


def codec_of(layout: BlockLayout, encodes: bool) -> Codec:
    """Of a block of a live model. Nobody stands between a DTensor at rest and its reader: it rests as it computes."""
    distributed = any(entry.distributed for entry in layout.entries)
    return lossless(layout) if encodes and not distributed else IDENTITY


def held_bytes(layout: BlockLayout, codec: Codec = IDENTITY) -> int:
    """Of a block's, or of the outside's, host copy."""
    return codec.held_bytes(layout, 1)


def component_layouts(model: nn.Module, found: Sequence[FoundBlock]) -> tuple[list[BlockLayout], BlockLayout]:
    """Layouts of the blocks, and of everything else. Meta tensors will do.

    What two blocks share, or a block and the rest, is placed once, outside: by identity of the storage, not by name.
    """
    shared = shared_tensors(model, found)
    layouts = [BlockLayout.of(block.module, without=shared) for block in found]
    inside = {id(t) for block in found for t in _tensors(block.module)} - shared
    return layouts, BlockLayout.of(model, without=inside)


def shared_tensors(model: nn.Module, found: Sequence[FoundBlock]) -> frozenset[int]:
    """`id`s of the tensors whose storage belongs to more than one block, or to a block and the rest."""
    names = {name for pair in shared_storage(model, found) for name in (pair.fqn, pair.other_fqn)}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return frozenset(id(tensor) for name, tensor in named if name in names)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
