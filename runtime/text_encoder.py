"""One text encoder per replica: the first rank runs it, the others get what it returned.

The pipeline does not notice: it calls its text encoder on every rank, and the proxy that stands there answers with
the same output everywhere. So no rank but the first holds its weights.
"""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from crossdock.parallel.mesh import Mesh


class ReplicatedTextEncoder(nn.Module):
    """Stands in a pipeline for its text encoder.

    Args:
        encoder: the real one on the replica's first rank, None on the others.
        device: where it runs, and where its output is put.
        turn: the context in which it is on its device; entered on every rank.
    """

    def __init__(
        self,
        encoder: nn.Module | None,
        dtype: torch.dtype,
        device: torch.device,
        mesh: Mesh,
        turn: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = device
        self.calls: list[tuple[float, float]] = []  # begin and end, seconds of time.perf_counter
        self._held = [encoder]  # in a list: not a submodule, so that it is moved by nobody else
        self._mesh = mesh
        self._turn = turn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        with self._turn():
            output = self._encode(*args, **kwargs)
        output = _broadcast(output, self.device, self._mesh)
        self.calls.append((began, time.perf_counter()))
        return output

    def _encode(self, *args: Any, **kwargs: Any) -> Any:
        encoder = self._held[0]
        if encoder is None:
            return None
        with torch.no_grad():
            return encoder(*args, **kwargs)


def _broadcast(value: Any, device: torch.device, mesh: Mesh) -> Any:
    """`value` of the replica's first rank, on all its ranks. Collective over the replica."""
    group, source = mesh.groups["replica"], mesh.ranks["replica"][0]
    if group is None:
        return value
    tensors: list[Tensor] = []
    envelope: Any = None
    if mesh.rank == source:
        structure = _dump(value, tensors)
        envelope = structure, [(t.shape, t.dtype) for t in tensors]
    structure, shapes = group.broadcast_object(envelope, source=0)
    if mesh.rank != source:
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    tensors = [tensor.to(device).contiguous() for tensor in tensors]
    for tensor in tensors:
        group.broadcast(tensor, source=0)
    return value if mesh.rank == source else _load(structure, tensors)


def _dump(value: Any, tensors: list[Tensor]) -> bytes:
    """Pickle `value` with its tensors taken out, into `tensors`."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> int | None:
            if isinstance(item, Tensor):
                tensors.append(item)
                return len(tensors) - 1
            return None

    buffer = io.BytesIO()
    Pickler(buffer).dump(value)
    return buffer.getvalue()


def _load(structure: bytes, tensors: list[Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(structure)).load()
