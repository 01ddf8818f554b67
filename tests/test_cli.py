"""The command line: what each mistake prints, and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from crossdock.launch import cli
from crossdock.launch.commands.options import ConfigFile, Outputs, build_app, run_app
from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.errors import LaunchError, RankError, RequestError
from crossdock.runtime.models.tiny.recipes import TINY
from crossdock.runtime.request import GenerateRequest, RequestItem


class Recorder:
    """Stands for the engine: keeps its arguments, or raises."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.calls: list[tuple[ConfigFile, str, GenerateRequest, Outputs, bool]] = []

    def __call__(self, config: ConfigFile, model: str, request: GenerateRequest, outputs: Outputs, probe: bool) -> None:
        self.calls.append((config, model, request, outputs, probe))
        if self.error is not None:
            raise self.error


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A valid `generate` call."""
    config = tmp_path / "run.yaml"
    config.write_text("parallel:\n  tp_degree: 2\n")
    (tmp_path / "model").mkdir()
    return [
        "generate",
        str(tmp_path / "model"),
        f"--config={config}",
        "--prompt=a fox",
        f"--out={tmp_path / 'out.png'}",
    ]


def run_with(error: BaseException | None, arguments: list[str]) -> tuple[int, Recorder]:
    recorder = Recorder(error)
    return run_app(build_app(recorder), arguments), recorder


def test_generate_passes_everything_on(tmp_path: Path, arguments: list[str]) -> None:
    more = ["--prompt=a dog", "--seed=7", "--steps=2", "--height=208", "--width=176", "--guidance-scale=1.5"]
    more += [
        "--negative-prompt=blur",
        "--frames=9",
        "--images-per-prompt=3",
        "--batch-size=2",
        "--time-limit-s=60",
        "--probe",
        "--transformer=t.safetensors",
        "--transformer-2=u.safetensors",
    ]
    files = [f"--latents={tmp_path / 'l.safetensors'}", f"--report={tmp_path / 'r.json'}"]
    code, recorder = run_with(None, arguments + more + files)
    assert code == 0
    assert recorder.calls == [
        (
            ConfigFile(tmp_path / "run.yaml", Path("t.safetensors"), Path("u.safetensors")),
            str(tmp_path / "model"),
            GenerateRequest(
                (RequestItem("a fox", "blur", 7), RequestItem("a dog", "blur", 10)), 2, 208, 176, 1.5, 9, 3, 2, 60.0
            ),
            Outputs(tmp_path / "out.png", tmp_path / "l.safetensors", tmp_path / "r.json"),
            True,
        )
    ]


def test_generate_defaults(arguments: list[str]) -> None:
    _, recorder = run_with(None, arguments)
    assert recorder.calls[0][2] == GenerateRequest((RequestItem("a fox", None, 0),), steps=4, height=256, width=256)
    assert recorder.calls[0][-1] is False


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (LaunchError("2 ranks, but 1 GPU"), 2, "crossdock: error: 2 ranks, but 1 GPU\n"),
        (RankError(3, "died"), 1, "crossdock: error: rank 3: died\n"),
        (CompositionError("single-owner: [bold]x[/bold]"), 1, "crossdock: error: single-owner: [bold]x[/bold]\n"),
        (KeyboardInterrupt(), 130, "crossdock: interrupted\n"),
        (SystemExit(3), 3, ""),
    ],
    ids=["user", "rank", "composition", "interrupt", "exit"],
)
def test_errors_are_one_message(
    arguments: list[str], capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    assert run_with(error, arguments)[0] == code
    assert capsys.readouterr() == ("", message)


def test_an_unforeseen_error_shows_its_traceback(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(ZeroDivisionError("oops"), arguments)[0] == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("Traceback")
    assert stderr.endswith("ZeroDivisionError: oops\n")


BAD_OPTIONS = {
    "steps": (["--steps=0"], "steps: found 0; allowed: an integer from 1 to 10000"),
    "height": (["--height=-8"], "height: found -8; allowed: an integer from 1 to 2147483647"),
    "width": (["--width=0"], "width: found 0; allowed: an integer from 1 to 2147483647"),
    "seed": (["--seed=-1"], "seed: found -1; allowed: an integer from 0 to 9223372036854775807"),
    "big seed": (
        ["--seed=9223372036854775808"],
        "seed: found 9223372036854775808; allowed: an integer from 0 to",
    ),
    "nan": (["--guidance-scale=nan"], "guidance_scale: found nan; allowed: a finite number >= 0"),
    "negative": (["--guidance-scale=-1"], "guidance_scale: found -1.0; allowed: a finite number >= 0"),
    "frames": (["--frames=0"], "frames: found 0; allowed: an integer from 1 to 2147483647"),
    "prompt": (["--prompt= "], "prompts: prompt 1 is empty; describe the picture"),
    "folder": (["--out={tmp}/no/out.png"], "--out {tmp}/no/out.png: the folder {tmp}/no does not exist"),
    "latents folder": (["--latents={tmp}/no/l"], "--latents {tmp}/no/l: the folder {tmp}/no does not exist"),
    "report folder": (["--report={tmp}/no/r"], "--report {tmp}/no/r: the folder {tmp}/no does not exist"),
    "report is a directory": (["--report={tmp}/model"], "--report {tmp}/model: is a directory; give a file"),
    "suffix": (
        ["--out={tmp}/out.gif"],
        "--out {tmp}/out.gif: allowed: a file ending in .png, .jpg, .jpeg, .webp, .mp4",
    ),
    "same file": (
        ["--latents={tmp}/r", "--report={tmp}/model/../r"],
        "--report {tmp}/model/../r: is the same file as --latents; give each output its own",
    ),
    "same file as the second picture": (
        ["--prompt=a dog", "--report={tmp}/out_1.png"],
        "--report {tmp}/out_1.png: is the same file as --out; give each output its own",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_stop_before_the_run(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    code, recorder = run_with(None, arguments + [option.format(tmp=tmp_path) for option in options])
    stderr = capsys.readouterr().err
    assert code == 2
    assert stderr.startswith(f"crossdock: error: {message.format(tmp=tmp_path)}")
    assert stderr.count("\n") == 1
    assert not recorder.calls


def test_bad_config_and_model_directory(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("parallel:\n  tp: 2\n")
    code, recorder = run_with(None, arguments)
    assert (code, recorder.calls) == (2, [])
    assert capsys.readouterr().err.startswith(f"crossdock: error: {config}:2: parallel.tp: unknown key;")
    config.write_text("")
    arguments[1] += "-missing"
    assert run_with(None, arguments)[0] == 2
    assert capsys.readouterr().err.startswith(f"crossdock: error: {arguments[1]}: no such directory;")


@pytest.mark.parametrize(
    "wrong", [["generate"], ["nonsense"], ["generate", "m", "--config=c", "--prompt=p", "--steps=x"]]
)
def test_usage_errors_are_two(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(None, wrong)[0] == 2
    assert "Usage:" in capsys.readouterr().err


def test_no_permission_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RequestError, match=r"--out .*: cannot be written: no permission"):
        Outputs(tmp_path / "out.png").check()


def test_image_paths() -> None:
    outputs = Outputs(Path("a/out.v1.png"))
    assert outputs.image_paths(1) == [Path("a/out.v1.png")]
    assert outputs.image_paths(2) == [Path("a/out.v1_0.png"), Path("a/out.v1_1.png")]


def test_a_request_needs_a_prompt() -> None:
    with pytest.raises(RequestError, match="prompts: found none"):
        GenerateRequest(()).validate()


def test_config_schema_is_plain_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(cli.app, ["config-schema"]) == 0
    assert "parallel" in json.loads(capsys.readouterr().out)["properties"]


def test_make_checkpoint_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(cli.app, ["make-checkpoint", "flux2klein", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == (
        f"crossdock: error: family: found 'flux2klein'; did you mean flux2-klein? allowed: {', '.join(TINY)}\n"
    )


def test_the_command_starts_without_torch(arguments: list[str], tmp_path: Path) -> None:
    """The config error of a fresh process: the message only, and no heavy import on the way."""
    (tmp_path / "run.yaml").write_text("dtype: int8\n")
    program = (
        "import sys; from crossdock.launch import cli; from crossdock.launch.commands import options; "
        "code = options.run_app(cli.app); "
        "heavy = {'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f'crossdock: error: {tmp_path / "run.yaml"}:1: dtype: found "int8" (a string);')
    assert done.stderr.count("\n") == 1


def test_both_entry_points_share_the_options() -> None:
    plain = typer.main.get_command(build_app(Recorder()))
    full = typer.main.get_command(cli.app)
    assert isinstance(plain, typer.core.TyperGroup)
    assert isinstance(full, typer.core.TyperGroup)
    assert set(plain.commands) == {"generate"}
    more = {"check", "make-checkpoint", "config-schema", "models", "pack", "serve", "timeline"}
    assert set(full.commands) == {"generate", *more}
    names = [[option.name for option in group.commands["generate"].params] for group in (plain, full)]
    assert names[0] == names[1]
