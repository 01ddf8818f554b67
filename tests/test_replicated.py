"""What encodes runs on one rank: nothing of that may show on it afterwards."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from crossdock.parallel.mesh import Mesh, MeshShape
from crossdock.runtime.replicated import replicated


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
