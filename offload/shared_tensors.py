"""Tensors of a block that rest elsewhere: with what is outside the blocks, because another block uses them too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from crossdock.offload.block import StreamedBlock
from crossdock.offload.layout import Distribution, local_part


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
