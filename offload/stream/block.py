"""A block: the unit that is streamed. Where its bytes rest, and binding its tensors to memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn

from crossdock.offload.codecs.codec import IDENTITY, Codec
from crossdock.offload.memory.copy_engine import Event
from crossdock.offload.memory.layout import BlockLayout, TensorEntry


class Home(StrEnum):
    """Where a block's bytes rest."""

    RESIDENT = "resident"
    """the whole block on the device, and nowhere else"""
    HOST = "host"
    """the whole block in host memory, shared by the ranks of the node; copied into a slot"""
    DEVICE_SHARD = "device_shard"
    """1/S of the block on each rank's device; gathered into a slot"""
    HOST_SHARD = "host_shard"
    """1/S of the block in host memory; copied, then gathered into a slot"""

    @property
    def streamed(self) -> bool:
        return self is not Home.RESIDENT

    @property
    def sharded(self) -> bool:
        return self in (Home.DEVICE_SHARD, Home.HOST_SHARD)

    @property
    def on_host(self) -> bool:
        return self in (Home.HOST, Home.HOST_SHARD)


@dataclass(frozen=True)
class Piece:
    """Bytes of a block, from `offset` on.

    `source`: uint8 `[n]`, or `[rows, row_bytes]`, whose rows are `step` bytes apart in the block.
    """

    offset: int
    source: Tensor
    step: int = 0

    def target(self, memory: Tensor) -> Tensor:
        """Where it goes in `memory` (uint8, the block's bytes); the shape of `source`."""
        if self.source.dim() == 1:
            return memory[self.offset : self.offset + self.source.nbytes]
        return memory[self.offset :].as_strided(self.source.shape, (self.step, 1))


Bound = tuple[nn.Module, str, Tensor]
"""(module, attribute, its parameter or buffer)"""


@dataclass(frozen=True)
class StreamedBlock:
    """One transformer block, or another part of a model that moves as one.

    Attributes:
        source: the bytes at rest, uint8: the whole block, or this rank's shard; or the pieces that make it up.
        is_called: its module is called; otherwise it is brought in by `BlockStream.hold` only.
        codec: between `source` and the slot.
    """

    name: str
    module: nn.Module
    layout: BlockLayout
    home: Home
    source: Tensor | tuple[Piece, ...]
    is_called: bool = True
    codec: Codec = IDENTITY

    def __post_init__(self) -> None:
        if not (self.home.streamed or self.codec.in_place):
            raise ValueError(f"{self.name} stays on the device: what computes rests there, not what a codec made")

    @property
    def held_bytes(self) -> int:
        """What rests here of it."""
        if isinstance(self.source, Tensor):
            return self.source.nbytes
        return sum(piece.source.nbytes for piece in self.source)

    @property
    def rests_plain(self) -> bool:
        """Whole, as it computes, in one place."""
        return isinstance(self.source, Tensor) and not self.home.sharded and self.codec.in_place

    def at_rest(self, entry: TensorEntry) -> Tensor:
        """This rank's part of a tensor where it rests: the very memory.

        Raises:
            RuntimeError: there is none: the block is cut, encoded, or scattered over the checkpoint's files.
        """
        return entry.view(self._plain_source())

    def apart(self) -> list[Tensor]:
        """`at_rest` of every entry, each in a storage of its own, and with versions of its own."""
        source = self._plain_source()
        return [entry.apart(source) for entry in self.layout.entries]

    def _plain_source(self) -> Tensor:
        if not self.rests_plain:
            raise RuntimeError(f"{self.name} ({self.home}, codec {self.codec.name}) has no place for a tensor alone")
        assert isinstance(self.source, Tensor)
        return self.source

    def owners(self) -> Iterator[tuple[nn.Module, str]]:
        """(module, attribute) of every name of every tensor."""
        for entry in self.layout.entries:
            for name in entry.names:
                path, _, leaf = name.rpartition(".")
                yield self.module.get_submodule(path), leaf

    def tensors(self) -> list[Tensor]:
        """What the module has now, one per entry of the layout."""
        return [
            self.module.get_parameter(entry.name) if entry.kind == "parameter" else self.module.get_buffer(entry.name)
            for entry in self.layout.entries
        ]

    def named(self, memory: Tensor) -> dict[str, Tensor]:
        """Its tensors inside `memory` (uint8, the whole block), under every name."""
        tensors = ((entry.names, entry.tensor(memory)) for entry in self.layout.entries)
        return {name: tensor for names, tensor in tensors for name in names}

    def bound(self) -> list[Bound]:
        """What the module has now, for `put_back`: under every name."""
        return [(owner, leaf, getattr(owner, leaf)) for owner, leaf in self.owners()]

    def placed(self, memory: Tensor, apart: bool = False) -> list[Tensor]:
        """Its parameters and buffers in `memory` (uint8, the whole block), each with versions of its own.

        `apart`: each in a storage of its own as well.
        """
        return [
            nn.Parameter(tensor, requires_grad=False) if entry.kind == "parameter" else tensor
            for entry in self.layout.entries
            for tensor in [entry.wrap(entry.apart(memory) if apart else entry.view(memory.data))]
        ]

    def bind(self, memory: Tensor) -> None:
        """Make the module's parameters and buffers views of `memory` (uint8, the whole block); tied ones stay tied.

        A DTensor becomes one of the same mesh, placements and shape whose local tensor is such a view.
        """
        owners = self.owners()
        for entry, tensor in zip(self.layout.entries, self.placed(memory), strict=True):
            for _ in entry.names:
                owner, leaf = next(owners)
                kept = owner._parameters if entry.kind == "parameter" else owner._buffers
                kept[leaf] = tensor  # type: ignore[assignment]

    @contextmanager
    def bound_to(self, memory: Tensor) -> Iterator[None]:
        """Bound to `memory` (uint8, the whole block) meanwhile; afterwards the module has the very tensors it had."""
        before = self.bound()
        self.bind(memory)
        try:
            yield
        finally:
            put_back(before)


def put_back(tensors: Iterable[Bound]) -> None:
    """The modules have these very tensors again."""
    for owner, leaf, tensor in tensors:
        kept = owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers
        kept[leaf] = tensor  # type: ignore[assignment]


class Turns:
    """What the modules of `blocks` have as their tensors, by the blocks' indices: here their slots, for good.

    Others exchange them when a block comes to the device and when it goes.
    """

    def __init__(self, blocks: Sequence[StreamedBlock]) -> None:
        self.blocks = blocks
        self._unbound: dict[int, list[Bound]] = {}

    def bind(self, index: int, memory: Tensor) -> None:
        """The block has `memory` (uint8) in its turns from here on."""
        self._unbound.setdefault(index, self.blocks[index].bound())
        self.blocks[index].bind(memory)

    def put_back(self) -> None:
        """The modules have the tensors that they had before."""
        for before in reversed(self._unbound.values()):
            put_back(reversed(before))
        self._unbound.clear()

    def begin(self, index: int) -> None:
        """The block's bytes are in its memory, and it is about to be used."""

    def end(self, index: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Its use is over. Returns (at rest, in its memory) of each tensor that was written in it, as uint8."""
        return ()

    def written(self, index: int, event: Event) -> None:
        """What `end` returned has been copied when `event` happens."""

    def is_stale(self, index: int) -> bool:
        """Whether what rests was written to since the last call."""
        return False

    def finish(self) -> None:
        """Wait until all that was written is back."""
