"""The layouts that are held by tests: one table for the CPU tests, the GPU tests and the README."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "launch" / "configs"


@dataclass(frozen=True)
class Layout:
    """One shipped config. `through_torchrun`: also tested under torchrun."""

    name: str
    through_torchrun: bool = False

    @property
    def config(self) -> Path:
        return CONFIGS / f"{self.name}.yaml"


LAYOUTS = (
    Layout("single"),
    Layout("layerwise"),
    Layout("tp2"),
    Layout("layerwise_tp2", through_torchrun=True),
    Layout("hsdp"),
    Layout("layerwise_hsdp", through_torchrun=True),
    Layout("ulysses4"),
    Layout("ring4"),
    Layout("ulysses2_ring2"),
    Layout("layerwise_ulysses2_ring2", through_torchrun=True),
)
FAMILIES = ("flux2-klein", "z-image")
