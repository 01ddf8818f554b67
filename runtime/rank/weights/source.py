"""The stored tensors of a checkpoint: where a rank reads them, whatever for.

Whoever reads has a source of its own: the weight check trusts nothing that the loader has opened, read or kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import Rows, StoredTensor, open_weights, stored_in


class WeightSource:
    """Tensors and parts of them, as they are stored. Files are memory-mapped: only what is touched comes from disk.

    Files that change while they are mapped are not noticed.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored
        self._files: dict[Path, Any] = {}

    def rows(self, fqn: str, part: TensorSlice | None = None, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of the tensor, or of `part` of it; `last` None: to the end. One without dims is one row.

        Without `part` they are the mapped file's own bytes: nothing is read yet, and nothing may be written.

        Raises:
            CheckpointError: the file is not the one that the run was planned with.
        """
        stored = self._stored[fqn]
        opened = self._open(fqn)
        if not stored.shape:
            return opened.get_tensor(stored.name)  # type: ignore[no-any-return]
        cut = _JoinedRows(opened, stored.rows) if stored.rows else opened.get_slice(stored.name)
        if last is None:
            last = part.size if part is not None and part.dim == 0 else stored.shape[0]
        if part is None:
            return cut[first:last]
        if part.dim == 1:
            return torch.cat([cut[first:last, start:stop] for start, stop in part.ranges], dim=1)
        pieces, offset = [], 0
        for start, stop in part.ranges:
            low, high = max(first - offset, 0), min(last - offset, stop - start)
            if low < high:
                pieces.append(cut[start + low : start + high])
            offset += stop - start
        return torch.cat(pieces)

    def flat(self, fqn: str, part: TensorSlice | None, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the (sliced) tensor in C order, as a 1-d tensor; reads only their rows."""
        shape = list(self._stored[fqn].shape)
        if part is not None:
            shape[part.dim] = part.size
        width = max(math.prod(shape[1:]), 1)
        first, last = start // width, -(-stop // width)
        return self.rows(fqn, part, first, last).reshape(-1)[start - first * width : stop - first * width]

    def mapped(self, fqn: str) -> Tensor:
        """All bytes of the tensor, uint8 `[n]`, as the page cache has them."""
        return self.rows(fqn).reshape(-1).view(torch.uint8)

    def _open(self, fqn: str) -> Any:
        file = self._stored[fqn].file
        if file not in self._files:
            opened = open_weights(file)
            found = stored_in(file, opened)
            for stored in self._stored.values():
                if stored.file == file and not _is_in(found, stored):
                    raise CheckpointError(f"{file}: {stored.name[:100]} is not what it was when the run was planned")
            self._files[file] = opened
        return self._files[file]

    def close(self) -> None:
        """Let go of the files; what was read stays. Another read opens them again."""
        self._files.clear()


class _JoinedRows:
    """Rows of several tensors of a file, cut as those of one are: by a slice of them, and one of each."""

    def __init__(self, opened: Any, rows: Sequence[Rows]) -> None:
        self._cuts = [(opened.get_slice(part.name), part) for part in rows]

    def __getitem__(self, index: slice | tuple[slice, slice]) -> Tensor:
        rows, *others = index if isinstance(index, tuple) else (index,)
        found: list[Tensor] = []
        offset = 0
        for cut, part in self._cuts:
            size = part.last - part.first
            low, high = max(rows.start - offset, 0), min(rows.stop - offset, size)
            if low < high or not found:
                found.append(cut[(slice(part.first + low, part.first + max(low, high)), *others)])
            offset += size
        return found[0] if len(found) == 1 else torch.cat(found)


def _is_in(found: Mapping[str, StoredTensor], stored: StoredTensor) -> bool:
    """Whether the file has what the run was planned with."""
    if not stored.rows:
        return found.get(stored.name) == stored
    whole = {part.name: (stored.dtype, (part.of, *stored.shape[1:])) for part in stored.rows}
    return all(name in found and (found[name].dtype, found[name].shape) == kind for name, kind in whole.items())
