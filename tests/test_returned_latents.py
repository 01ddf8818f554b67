"""What `--latents` writes: exactly what diffusers returns with `output_type="latent"`, so that its VAE takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_rank import admitted, rank_request
from safetensors.torch import load_file

from crossdock.launch.commands.options import Outputs
from crossdock.launch.commands.outputs import write_outputs
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.plan.make_plan import make_plan
from layouts import ROWS, Row
from reference import PROMPT, TOLERANCE, max_error, pipeline_of
from tiers import some

OWN_WAY = ("flux2-klein", "helios", "ltx2", "flux3")
"""Not what the loop leaves; the last one has blocks."""


@pytest.mark.parametrize(
    "row", some(sorted(ROWS, key=lambda row: row.recipe not in OWN_WAY), 2), ids=lambda r: r.recipe
)
def test_latents_as_diffusers_returns_them(row: Row, checkpoint_of: Callable[[str], Path]) -> None:
    directory, (height, width) = checkpoint_of(row.recipe), row.sizes[1]
    size: dict[str, Any] = {"height": height, "width": width}
    with admitted(make_plan(RunConfig(), directory, "cpu")) as worker:
        made = worker.generate(rank_request(PROMPT, steps=row.steps, frames=row.frames, **size))
        more = worker.loaded.plan.layout.spec.more_steps
    if row.frames is not None:
        size["num_frames"] = row.frames
    expected = pipeline_of(directory)(
        prompt=PROMPT,
        num_inference_steps=row.steps + more,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="latent",
        return_dict=False,
        **size,
    )[0]
    assert made.returned_latents is not None
    expected = expected if len(expected) == 1 else expected[None]  # of one prompt some pipelines know no batch
    assert max_error(made.returned_latents, expected.float()) <= TOLERANCE


def test_both_are_written(tmp_path: Path) -> None:
    ours, theirs = [torch.zeros(1, 4), torch.ones(1, 4)], [torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]
    made: Any = SimpleNamespace(images=[], latents=ours, returned_latents=theirs)
    write_outputs(made, Outputs(tmp_path / "o.png", tmp_path / "l.safetensors"))
    written = load_file(tmp_path / "l.safetensors")
    assert torch.equal(written["latents"], torch.cat(theirs))
    assert torch.equal(written["loop_latents"], torch.cat(ours))
