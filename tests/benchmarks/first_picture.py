"""Seconds from the command to the first picture, beside a script with plain diffusers.

    python tests/benchmarks/first_picture.py [--rounds 5] [--heads 0]

Both are started as programs in turn, on one rank or in one process, with the files in the page cache, and write the
same picture: of the trained demo model, and with `--heads` of a random model in the format of FLUX.2 [klein] (25: 8.7
GB in float32, in which it computes one step without guidance: a core takes half a minute for it). Both have as many
compute threads as a rank has. Where crossdock's time goes says its report.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from checking import make_large_checkpoint
from figures import spread, verdict
from PIL import Image, ImageChops

from crossdock.runtime.config.threads import compute_threads

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tests/emoji_model/model"
SIZE = 48
LIMIT_S = 600
_DIFFUSERS = """
import sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads({threads})
model, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.{dtype})
pipe(
    prompt="a red apple", num_inference_steps={steps}, height={size}, width={size}, guidance_scale={scale},
    generator=torch.Generator().manual_seed(0),
).images[0].save(out)
"""


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each kind, in turn.")] = 5,
    heads: Annotated[int, typer.Option(help="Of a large random model; 0: none.")] = 0,
) -> None:
    """Time first pictures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _compare(DEMO, folder, rounds, "bfloat16", steps=2, scale=3.0)
        if heads:
            make_large_checkpoint(folder / "large", heads)
            _compare(folder / "large", folder, rounds, "float32", steps=1, scale=1.0)


def _compare(model: Path, folder: Path, rounds: int, dtype: str, steps: int, scale: float) -> None:
    weights = sum(file.stat().st_size for file in model.rglob("*.safetensors"))
    config, plain, own, report = (folder / name for name in ("one.yaml", "plain.png", "own.png", "report.json"))
    config.write_text(f"dtype: {dtype}\nlaunch: {{launcher: local, device: cpu}}\n")
    script = _DIFFUSERS.format(steps=steps, size=SIZE, scale=scale, dtype=dtype, threads=compute_threads(1))
    wishes = ["--steps", steps, "--height", SIZE, "--width", SIZE, "--guidance-scale", scale]
    files = ["--config", config, "--out", own, "--report", report]
    command = [sys.executable, "-m", "crossdock.launch.cli", "generate", model, "--prompt", "a red apple"]
    times: dict[str, list[float]] = {"diffusers": [], "crossdock": []}
    for _ in range(rounds + 1):  # the first brings the files to the page cache
        times["diffusers"].append(_took([sys.executable, "-c", script, model, plain]))
        times["crossdock"].append(_took([*command, *wishes, *files]))
    pairs = list(zip(times["crossdock"][1:], times["diffusers"][1:], strict=True))
    ratios = [one / other for one, other in pairs]
    same = ImageChops.difference(Image.open(plain), Image.open(own)).getbbox() is None
    print(f"{model.name}, {weights / 1e9:.2f} GB: diffusers {spread([other for _, other in pairs], 2)} s", end="; ")
    print(f"crossdock {spread([one for one, _ in pairs], 2)} s; ratio {spread(ratios, 2)}", end="; ")
    print(f"aim 1.0: {verdict(ratios, 1.0)}; pictures {'equal' if same else 'differ'}")
    phases = json.loads(report.read_text())["phases_s"]
    print("of the last: " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in phases.items()), flush=True)


def _took(command: list[object]) -> float:
    began = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, timeout=LIMIT_S, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    typer.run(main)
