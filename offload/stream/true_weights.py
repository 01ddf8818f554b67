"""The true weights of a streamed block, wherever they rest: as copies, and back again.

Some rest elsewhere than the block: with what is outside the blocks, because another block uses them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn

from crossdock.offload.memory.layout import Distribution, aligned_bytes, local_part
from crossdock.offload.stream.block import StreamedBlock
from crossdock.offload.stream.loader import BlockLoader


@dataclass(frozen=True)
class TrueWeights:
    """Copies of a block's tensors on the device.

    Attributes:
        named: the tensors by their names in the block.
        parts: which of the stream's blocks change with them.
    """

    named: dict[str, Tensor]
    parts: frozenset[int]
    _block: StreamedBlock
    _memory: Tensor
    _shared: Sequence[tuple[SharedTensor, Tensor]]
    _loader: BlockLoader

    @classmethod
    def of(cls, index: int, blocks: Sequence[StreamedBlock], loader: BlockLoader, device: torch.device) -> Self:
        """Of `blocks[index]`. Collective when sharded."""
        block = blocks[index]
        memory = aligned_bytes(block.layout.slot_bytes, device)
        if block.home.streamed:
            staging, after = aligned_bytes(loader.staging_bytes(block), device), (loader.engine.record(),)
            loader.load(block, memory, after, None, loader.engine.wait, noted=False, staging=staging)
        else:
            assert isinstance(block.source, Tensor)
            memory.copy_(block.source)
        shared = [(each, each.copy(device)) for each in shared_tensors_of(block, blocks)] if block.is_called else []
        named = block.named(memory) | {name: own for each, own in shared for name in each.names}
        parts = frozenset({index, *(each.part for each, _ in shared if each.part is not None)})
        return cls(named, parts, block, memory, shared, loader)

    def write_back(self) -> None:
        """Bring what the copies hold now to where the tensors rest: this rank's part of it."""
        self._loader.store(self._block, self._memory)
        for shared, own in self._shared:
            shared.write(own)


@dataclass(frozen=True)
class SharedTensor:
    """One tensor under all its `names` in the block.

    Attributes:
        rest: where this rank's part of it rests: the very memory.
        whole: what makes it a DTensor; None for a plain tensor.
        part: which of the stream's parts brings it to the device; None where it is there for good.
    """

    names: tuple[str, ...]
    rest: Tensor
    whole: Distribution | None
    part: int | None

    def copy(self, device: torch.device) -> Tensor:
        own = self.rest.to(device, copy=True)
        return own if self.whole is None else self.whole.wrap(own)

    def write(self, changed: Tensor) -> None:
        self.rest.copy_(local_part(changed))


def shared_tensors_of(block: StreamedBlock, parts: Sequence[StreamedBlock]) -> list[SharedTensor]:
    """What the module of `block` has and its layout has not; `parts` are all that the stream knows."""
    own = {name for entry in block.layout.entries for name in entry.names}
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in chain(
        block.module.named_parameters(remove_duplicate=False), block.module.named_buffers(remove_duplicate=False)
    ):
        if name not in own:
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    return [_shared(block, tuple(names[key]), tensor, parts) for key, tensor in tensors.items()]


def _shared(
    block: StreamedBlock, names: tuple[str, ...], tensor: Tensor, parts: Sequence[StreamedBlock]
) -> SharedTensor:
    path, _, leaf = names[0].rpartition(".")
    place: tuple[nn.Module, str] = block.module.get_submodule(path), leaf
    for number, part in enumerate(parts):
        if not isinstance(part.source, Tensor) or part.home.sharded or place not in part.owners():
            continue
        owners = part.owners()
        entry = next(entry for entry in part.layout.entries for _ in entry.names if next(owners) == place)
        return SharedTensor(names, part.at_rest(entry), entry.distributed, number if part.home.streamed else None)
    return SharedTensor(names, local_part(tensor), Distribution.of(tensor), None)
