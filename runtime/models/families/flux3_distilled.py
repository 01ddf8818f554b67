"""FLUX.3 [klein], distilled to few steps: each is told where it is to arrive, and there is no guidance."""

from __future__ import annotations

from dataclasses import replace

from crossdock.runtime.models.families import flux3
from crossdock.runtime.models.spec import Published

SPEC = replace(
    flux3.SPEC,
    family="flux3-distilled",
    pipeline="Flux3DistilledModularPipeline",
    branches=None,
    guidance=None,
    negative_prompt=False,
    steps=16,
    published=(Published("FLUX.3-image-klein", 5.6e9, {"flow_map": True}),),
)
