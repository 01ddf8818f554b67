"""What encodes runs on one rank: nothing of that may show on it afterwards."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from crossdock.parallel.mesh import Mesh, MeshShape
from crossdock.runtime.pipeline.replicate import replicated


def test_random_numbers_of_an_encoder_are_not_the_loops() -> None:
    """An encoder that writes text may draw it; a scheduler that draws then has the same numbers on all ranks."""
    mesh = Mesh(MeshShape(), 0, {"replica": (0,)}, {"replica": None})
    encode = replicated(lambda: torch.rand(3), torch.device("cpu"), mesh, nullcontext)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn: Tensor = encode()
    assert torch.equal(drawn, expected), "drawn from the process's numbers, as without crossdock"
    assert torch.equal(torch.rand(3), expected), "which are what they were"


def test_what_stays_on_the_cpu_stays_there_on_all_ranks() -> None:
    """A pipeline may build its layout on the CPU, of indices that it kept there; on a device they would not fit."""
    sent: list[Any] = []
    broadcast: list[torch.device] = []

    class Pair:
        def broadcast_object(self, value: Any, source: int) -> Any:
            sent.append(value)
            return sent[0]

        def broadcast(self, tensor: Tensor, source: int) -> None:
            broadcast.append(tensor.device)

    def mesh(rank: int) -> Mesh:
        return SimpleNamespace(rank=rank, ranks={"replica": (0, 1)}, groups={"replica": Pair()})  # type: ignore[return-value]

    device, tags = torch.device("meta"), torch.arange(5)  # meta: in place of an accelerator
    encode = [replicated(lambda: (torch.ones(2, 3, device=device), tags), device, mesh(n), nullcontext) for n in (0, 1)]
    encode[0]()
    embeddings, found = encode[1]()
    assert embeddings.device == device
    assert torch.equal(found, tags)
    assert broadcast == [device, device], "one tensor, on both ranks"
