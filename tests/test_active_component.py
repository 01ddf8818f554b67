"""One component at a time on the device, whichever way a pipeline calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from crossdock.runtime.pipeline.presence import ActiveComponent


class Recorded:
    """A component that tells when it comes and goes."""

    turn_bytes = 0

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    @contextmanager
    def present(self) -> Iterator[None]:
        self.told.append(f"{self.name} comes")
        yield
        self.told.append(f"{self.name} goes")

    def discard(self) -> None:
        pass


def test_a_part_of_a_component_is_the_component() -> None:
    """A language model may be called without its head; it must be there before its first layer runs."""
    told: list[str] = []
    active = ActiveComponent({name: Recorded(name, told) for name in ("text", "other")}, torch.device("cpu"))
    text, other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    text[0].register_forward_pre_hook(lambda *_: told.append("a layer runs"))
    active.watch("text", text)
    active.watch("other", other)
    with active:
        text[0](torch.ones(2))
        text(torch.ones(2))
        other(torch.ones(2))
    assert told == ["text comes", "a layer runs", "a layer runs", "text goes", "other comes", "other goes"]
