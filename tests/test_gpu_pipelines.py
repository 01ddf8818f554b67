"""Whole pipelines on one GPU, against diffusers on the same GPU; skipped with a reason elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import rank_request
from safetensors.torch import load_file
from torch import Tensor

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.rank.worker import RankWorker
from layouts import CONFIGS, ROWS, Row
from reference import PROMPT, TOLERANCE, audio_error, max_error, max_levels, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Convolutions in full fp32, on both sides, and the same algorithm for both."""
    tf32, deterministic = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = tf32, deterministic


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.recipe)
def test_a_family_equals_diffusers(row: Row, checkpoint_of: Callable[[str], Path]) -> None:
    """Layerwise on and off are bit-identical, and within 1e-4 of diffusers; latents, pictures, videos and audio."""
    directory, prompt, (height, width) = checkpoint_of(row.recipe), PROMPT + row.also, row.sizes[1]
    wishes: dict[str, Any] = {"steps": row.steps, "frames": row.frames, "guided": row.guided}
    expected = reference(directory, prompt, (height, width), **wishes, device="cuda")
    found: list[Tensor] = []
    for layerwise in (False, True):
        plan = make_plan(RunConfig.parse({"offload": {"layerwise": layerwise}}), directory, "cuda")
        worker, coordinator = RankWorker(0, 1, torch.device("cuda:0")), Coordinator(plan)
        try:
            coordinator.admit([worker.setup(plan)], rehearsed=False)
            result = worker.generate(rank_request(prompt, steps=row.steps, height=height, width=width, **row.wishes))
            coordinator.review([result])
        finally:
            worker.teardown()
        assert result.latents is not None
        found.append(result.latents.cpu())
        error = max_error(found[-1], expected.latents)
        levels = max_levels(result.media[0], expected.media[0])
        print(f"{row.recipe} layerwise={layerwise} on {_device()}: max error {error:.1e}, {levels} of 256 levels")
        assert error <= TOLERANCE
        assert levels <= 1
        assert audio_error(result.media[0], expected.audio) <= TOLERANCE
    assert torch.equal(*found), "layerwise on and off differ"


@pytest.mark.parametrize("budget", [None, "4MiB"])
def test_torchrun_on_a_device(budget: str | None, flux2_dir: Path, tmp_path: Path) -> None:
    """The command line, with NCCL: the picture is diffusers', and the report has the device and what it held."""
    config, latents, report = tmp_path / "config.yaml", tmp_path / "latents.safetensors", tmp_path / "report.json"
    text = (CONFIGS / "layerwise.yaml").read_text()
    config.write_text(
        text if budget is None else text.replace("layerwise: true", f"layerwise: true\n  device_budget: {budget}")
    )
    command: list[Any] = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
        *("-m", "crossdock.launch.torchrun", "generate", flux2_dir, "--config", config, "--prompt", PROMPT),
        *("--out", tmp_path / "out.png", "--latents", latents, "--report", report),
    ]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    error = max_error(load_file(latents)["loop_latents"], reference(flux2_dir, device="cuda").latents)
    (rank,) = json.loads(report.read_text())["ranks"]
    peaks = {name: rank[name] for name in ("peak_weight_bytes", "peak_device_bytes", "reserved_device_bytes")}
    print(f"budget {budget}: max error {error:.1e}; {peaks}")
    assert error <= 10 * TOLERANCE  # the command leaves torch's default for convolutions: TF32
    assert rank["device"] == _device()
    assert 0 < rank["peak_device_bytes"] <= rank["reserved_device_bytes"]


def _device() -> str:
    return torch.cuda.get_device_name()
