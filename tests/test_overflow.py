"""`crossdock generate` in float16 where activations overflow: an error that says so, and no picture."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_recovery import InProcessGang

from crossdock.launch import cli
from crossdock.launch.commands.options import run_app
from crossdock.launch.engine import engine
from tiers import not_quick, some

pytestmark = not_quick


def _overflowing(z_image_dir: Path, directory: Path) -> Path:
    """The weights of one feed-forward, and of its neighbours, are finite in float16; what they make of it is not."""
    shutil.copytree(z_image_dir, directory)
    for file in (directory / "transformer").glob("*.safetensors"):
        tensors = load_file(file)
        save_file(
            {fqn: t * 3e3 if "feed_forward.w" in fqn else t for fqn, t in tensors.items()}, file, {"format": "pt"}
        )
    return directory


@pytest.mark.parametrize("dtype", some(["float16", "bfloat16"], 1))
def test_generate(
    dtype: str, z_image_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, the step, the block and the likely cause; and of what goes well, none of it."""
    monkeypatch.setattr(engine, "choose_gang", lambda *_: lambda *_: InProcessGang())
    config, model = tmp_path / "c.yaml", _overflowing(z_image_dir, tmp_path / "model")
    config.write_text(f"dtype: {dtype}\noffload:\n  layerwise: true\n")
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["generate", str(model), f"--config={config}", "--prompt=a red fox", "--steps=2", "--guidance-scale=0"]
    files = [f"--out={out / 'o.png'}", f"--latents={out / 'o.safetensors'}", f"--report={out / 'r.json'}"]
    code = run_app(cli.app, [*arguments, "--height=64", "--width=64", *files])
    written, told = sorted(path.name for path in out.iterdir()), " ".join(capsys.readouterr().err.split())
    if dtype == "bfloat16":
        assert (code, written) == (0, ["o.png", "o.safetensors", "r.json"])
        return
    assert (code, written) == (1, [])
    assert "error: offloading and sharding do not compose: finite: rank 0: step 1: " in told
    assert "expected finite numbers" in told
    assert "float16 ends at 65504, which activations exceed: set dtype to bfloat16 or float32 in the YAML file" in told
    assert told.count("error:") == 1
    assert "Traceback" not in told
