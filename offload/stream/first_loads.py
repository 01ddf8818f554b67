"""When a block's bytes have come for the first time, somebody may look at them before the block computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from crossdock.offload.stream.block import StreamedBlock

Look = Callable[[StreamedBlock, Tensor], None]
"""Gets a block and its memory: uint8, all its bytes, on the device; they have come, for the compute stream."""


class FirstArrivals:
    """Lets somebody look at every block once.

    Attributes:
        unseen: indices of the blocks that have not come yet; when it is empty, nobody looks any more.
    """

    def __init__(self) -> None:
        self.unseen: set[int] = set()
        self._look: Look | None = None

    def watch(self, look: Look, indices: Iterable[int]) -> None:
        """`look` at each of these blocks."""
        self._look, self.unseen = look, set(indices)

    def came(self, index: int, block: StreamedBlock, memory: Tensor) -> None:
        """`memory`: the block's slot."""
        if self._look is None or index not in self.unseen:
            return
        self._look(block, memory[: block.layout.nbytes])
        self.unseen.remove(index)
        if not self.unseen:
            self._look = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What comes meanwhile is not looked at, and does not count as seen."""
        look, self._look = self._look, None
        try:
            yield
        finally:
            self._look = look
