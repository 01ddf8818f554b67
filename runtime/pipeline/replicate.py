"""One text encoder per replica: the first rank runs it, the others get what it returned.

The pipeline does not notice: it calls its own methods that encode (`encode_prompt`), or the encoders, on every rank,
and they return the same everywhere. So no rank but the first holds the weights of the text encoders.

What they return is pickled, for it can be anything; it comes from a rank of this run, over its process group
(`parallel.group` says why that may be unpickled).
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from crossdock.parallel.mesh import Mesh
from crossdock.runtime.pipeline.refusal import PipelineRefusedError, refusal


def replicated(
    method: Callable[..., Any],
    device: torch.device,
    mesh: Mesh,
    turn: Callable[[], AbstractContextManager[None]],
    shapes_only: bool = False,
) -> Callable[..., Any]:
    """`method` on the replica's first rank, its return value on all of them. Collective over the replica.

    Random numbers that it draws are drawn apart: the process's generators stay the same on all ranks. What it refuses,
    it refuses on all of them.

    Args:
        device: where the other ranks put the tensors; those that it leaves on the CPU stay there.
        turn: the context in which it runs; entered on every rank.
        shapes_only: nobody else needs the values: the other ranks get zeros in the tensors' place.
    """

    @functools.wraps(method, updated=())  # pipelines may look at the signature
    def call(*args: object, **kwargs: object) -> Any:
        with turn():
            value = None
            if mesh.rank == mesh.ranks["replica"][0]:
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    value = _or_refusal(method, args, kwargs)
            value = _broadcast(value, device, mesh, shapes_only)
        if isinstance(value, PipelineRefusedError):
            raise value
        return value

    return call


def _or_refusal(method: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
    try:
        return method(*args, **kwargs)
    except ValueError as error:
        if (text := refusal(error)) is None:
            raise
        return PipelineRefusedError(text)


def _broadcast(value: object, device: torch.device, mesh: Mesh, shapes_only: bool) -> Any:
    """`value` of the replica's first rank, or zeros of its shapes, on all its ranks. Collective over the replica."""
    group, source = mesh.groups["replica"], mesh.ranks["replica"][0]
    if group is None:
        return value
    tensors: list[Tensor] = []
    envelope: Any = None
    if mesh.rank == source:
        structure = _dump(value, device, tensors)
        envelope = structure, [(t.shape, t.dtype) for t in tensors]
    structure, shapes = group.broadcast_object(envelope, source=0)
    if shapes_only:
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype in shapes]
        return value if mesh.rank == source else _load(structure, zeros)
    if mesh.rank != source:
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    tensors = [tensor.to(device).contiguous() for tensor in tensors]
    for tensor in tensors:
        group.broadcast(tensor, source=0)
    return value if mesh.rank == source else _load(structure, tensors)


def _dump(value: object, device: torch.device, tensors: list[Tensor]) -> bytes:
    """Pickle `value` with its tensors on `device` taken out, into `tensors`."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> int | None:
            if isinstance(item, Tensor) and item.device.type == device.type:
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
