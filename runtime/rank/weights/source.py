"""The stored tensors of a checkpoint: where a rank reads them, whatever for.

Whoever reads has a source of its own: the weight check trusts nothing that the loader has opened, read or kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossdock.offload.codecs.packed import PackedTensor, Piece
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.adapters.lora import Changes, Lora
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import Rows, StoredTensor, open_weights, stored_in

_FEW = 64
"""Rows that are read one by one."""


class WeightSource:
    """Tensors and parts of them, as they are stored. Files are memory-mapped: only what is touched comes from disk.

    Files that change while they are mapped are not noticed.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], loras: Sequence[Lora] = ()) -> None:
        """`loras`: merged into what is read; it is float32 then."""
        self._stored = stored
        self._changes = Changes(loras)
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
        if last is None:
            last = part.size if part is not None and part.dim == 0 else stored.shape[0]
        cut: Any
        if stored.packed:
            cut = _PackedRows(self.packed(fqn), stored.shape)
        elif stored.rows:
            cut = _JoinedRows(opened, stored.rows)
        else:
            cut = opened.get_slice(stored.name)
        return _cut(_ChangedRows(cut, self._changes, fqn) if fqn in self._changes else cut, part, first, last)

    def picked(self, fqn: str, rows: Tensor | None = None) -> Tensor:
        """Those rows of the whole tensor; None: all. Of what is decoded or merged few are, if few are asked for."""
        is_made = self._stored[fqn].packed or fqn in self._changes
        if rows is None or not is_made or len(rows) > _FEW:
            return self.rows(fqn) if rows is None else self.rows(fqn)[rows]
        return torch.cat([self.rows(fqn, None, row, row + 1) for row in rows.tolist()])

    def is_packed(self, fqn: str) -> bool:
        """What rests of it is in the file, encoded."""
        return fqn in self._stored and bool(self._stored[fqn].packed) and fqn not in self._changes

    def packed(self, fqn: str) -> PackedTensor:
        """A tensor that is stored encoded."""
        stored = self._stored[fqn]
        held = self._open(fqn).get_tensor(stored.name)
        return PackedTensor(stored.dtype, math.prod(stored.shape), held)

    def fields(self, fqn: str, part: TensorSlice | None, start: int, stop: int) -> Piece:
        """As `flat`, of a tensor that is stored encoded, and not decoded."""
        packed, shape = self.packed(fqn), self._stored[fqn].shape
        width, first, last = _rows_of(shape, part, start, stop)
        place = slice(start - first * width, stop - first * width)
        if part is None:
            whole = (start, stop) == (0, math.prod(shape))
            return packed, None if whole else packed.fields(start, stop)
        full = math.prod(shape[1:])
        low = min(low for low, _ in part.ranges) if part.dim == 0 else first
        high = max(high for _, high in part.ranges) if part.dim == 0 else last

        def cut(field: NDArray[np.uint8]) -> NDArray[np.uint8]:
            rows = torch.from_numpy(field.reshape(high - low, *shape[1:]))
            return _cut(_Shifted(rows, low), part, first, last).reshape(-1).numpy()[place]

        return packed, packed.fields(low * full, high * full).each(cut)

    def flat(self, fqn: str, part: TensorSlice | None, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the (sliced) tensor in C order, as a 1-d tensor; reads only their rows."""
        width, first, last = _rows_of(self._stored[fqn].shape, part, start, stop)
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


def _rows_of(shape: Sequence[int], part: TensorSlice | None, start: int, stop: int) -> tuple[int, int, int]:
    """Of elements [start, stop) of a (sliced) tensor: how many are in a row, and their rows [first, last)."""
    sizes = list(shape)
    if part is not None:
        sizes[part.dim] = part.size
    width = max(math.prod(sizes[1:]), 1)
    return width, start // width, -(-stop // width)


def _cut(cut: Any, part: TensorSlice | None, first: int, last: int) -> Tensor:
    """Rows [first, last) of `part`. `cut`: is cut by a slice of rows, and one of columns."""
    if part is None:
        return cut[first:last]  # type: ignore[no-any-return]
    if part.dim == 1:
        return torch.cat([cut[first:last, start:stop] for start, stop in part.ranges], dim=1)
    pieces, offset = [], 0
    for start, stop in part.ranges:
        low, high = max(first - offset, 0), min(last - offset, stop - start)
        if low < high:
            pieces.append(cut[start + low : start + high])
        offset += stop - start
    return torch.cat(pieces)


class _ChangedRows:
    """Rows of a tensor with what adapters change, in float32; `base` is cut likewise."""

    def __init__(self, base: Any, changes: Changes, fqn: str) -> None:
        self._base, self._changes, self._fqn = base, changes, fqn

    def __getitem__(self, index: slice | tuple[slice, slice]) -> Tensor:
        rows, *others = index if isinstance(index, tuple) else (index,)
        change = self._changes.rows(self._fqn, rows.start, rows.stop)[(slice(None), *others)]
        base: Tensor = self._base[index]
        return base.float() + change


class _PackedRows:
    """Rows of a tensor that is stored encoded, cut as those of another are; only they are read."""

    def __init__(self, packed: PackedTensor, shape: Sequence[int]) -> None:
        self._packed, self._shape = packed, shape

    def __getitem__(self, index: slice | tuple[slice, slice]) -> Tensor:
        rows, *others = index if isinstance(index, tuple) else (index,)
        width = math.prod(self._shape[1:])
        found = self._packed.read(rows.start * width, rows.stop * width).reshape(-1, *self._shape[1:])
        return found[(slice(None), *others)]


class _Shifted:
    """Some rows of a tensor, from `first` on, cut by their numbers in it."""

    def __init__(self, rows: Tensor, first: int) -> None:
        self._rows, self._first = rows, first

    def __getitem__(self, index: slice | tuple[slice, slice]) -> Tensor:
        rows, *others = index if isinstance(index, tuple) else (index,)
        return self._rows[(slice(rows.start - self._first, rows.stop - self._first), *others)]


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
