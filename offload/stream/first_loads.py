"""When a block's bytes have been loaded for the first time, somebody may look at them before the block computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from crossdock.offload.stream.block import StreamedBlock

FirstLoadCallback = Callable[[StreamedBlock, Tensor], None]
"""Gets a block and its memory: uint8, all its bytes, on the device; they have come, for the compute stream."""


def to_nobody(block: StreamedBlock, memory: Tensor) -> None:
    """Nobody looks."""


class FirstLoadObserver:
    """Calls back for every block once.

    Attributes:
        unseen: indices of the blocks that have not come yet; when it is empty, nobody is called back any more.
    """

    def __init__(self) -> None:
        self.unseen: set[int] = set()
        self._callback: FirstLoadCallback | None = None

    def observe(self, callback: FirstLoadCallback, indices: Iterable[int]) -> None:
        """`callback` gets each of these blocks."""
        self._callback, self.unseen = callback, set(indices)

    def loaded(self, index: int, block: StreamedBlock, memory: Tensor) -> None:
        """`memory`: the block's slot."""
        if self._callback is None or index not in self.unseen:
            return
        self._callback(block, memory[: block.layout.slot_bytes])
        self.unseen.remove(index)
        if not self.unseen:
            self._callback = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What comes meanwhile is not shown to anybody, and does not count as seen."""
        callback, self._callback = self._callback, None
        try:
            yield
        finally:
            self._callback = callback
