"""The true weights of a block, whatever its slot holds; also those that rest elsewhere.

What another block uses too, or the part outside the blocks, is placed outside: the block's own layout has it not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from crossdock.offload.block import StreamedBlock
from crossdock.offload.layout import Distribution, aligned_bytes, local_part
from crossdock.offload.loader import BlockLoader


@contextmanager
def true_weights(
    index: int,
    parts: Sequence[StreamedBlock],
    loader: BlockLoader,
    device: torch.device,
    write_back: bool,
    forget: Callable[[int], None],
) -> Iterator[dict[str, Tensor]]:
    """The weights of block `index` of `parts`, by their names in it: copies on the device. Collective when sharded.

    The names are those of the block's `state_dict()` and of its non-persistent buffers, also where a tensor is shared
    with another block or lies outside the blocks. Under tensor parallelism it is this rank's slice. Of a part that is
    no module of its own (`runs` is False), it is what the part alone holds.

    Args:
        write_back: what was changed goes to where it rests, unless the body raises; a shared tensor changes for all
            that share it. Processes that share a host store must all have read before one of them writes, and must
            make the same change.
        forget: called with the index of each part whose bytes on the device are out of date then.
    """
    block = parts[index]
    memory = _copy_of(block, loader, device)
    tensors = {name: tensor for e in block.layout.entries for tensor in (e.tensor(memory),) for name in e.names}
    shared = [(t, t.copy(device)) for t in shared_tensors_of(block, parts)] if block.runs else []
    yield tensors | {name: own for tensor, own in shared for name in tensor.names}
    if not write_back:
        return
    for part in {index, *(tensor.part for tensor, _ in shared if tensor.part is not None)}:
        forget(part)
    loader.store(block, memory)
    for tensor, own in shared:
        tensor.write(own)


def _copy_of(block: StreamedBlock, loader: BlockLoader, device: torch.device) -> Tensor:
    """All bytes of a block in memory of their own on the device."""
    memory = aligned_bytes(block.layout.nbytes, device)
    if block.home.streamed:
        loader.load(block, memory, (loader.engine.record(),), None, loader.engine.wait, noted=False)
    else:
        assert isinstance(block.source, Tensor)
        memory.copy_(block.source)
    return memory


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
        return SharedTensor(names, entry.view(part.source), entry.distributed, number if part.home.streamed else None)
    return SharedTensor(names, local_part(tensor), Distribution.of(tensor), None)
