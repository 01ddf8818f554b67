"""Faults and interruptions: one clear message, the right exit code, and no process or shared memory afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from crossdock.runtime.contract.verify import CHECKS, STEP_CHECKS
from layouts import CONFIGS
from reference import PROMPT
from tiers import some, thorough

Checkpoints = dict[str, Path]
CLI = (sys.executable, "-m", "crossdock.launch.cli")
LIMIT_S = 150
ENDINGS = [signal.SIGINT, signal.SIGKILL, signal.SIGTERM]


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


class Watched:
    """A command, and every process that came out of it."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.family: dict[int, psutil.Process] = {}
        self.output = ""

    def look(self) -> None:
        try:
            parents = [psutil.Process(self.process.pid), *self.family.values()]
        except psutil.NoSuchProcess:
            parents = list(self.family.values())
        for parent in parents:
            try:
                self.family |= {child.pid: child for child in parent.children(recursive=True)}
            except psutil.NoSuchProcess:
                continue

    def wait_for_line(self, text: str) -> None:
        assert self.process.stdout is not None
        deadline = time.monotonic() + LIMIT_S
        while text not in self.output:
            assert time.monotonic() < deadline, f"{text!r} did not appear:\n{self.output}"
            line = self.process.stdout.readline()
            assert line or self.process.poll() is None, f"ended before {text!r}:\n{self.output}"
            self.output += line
        self.look()

    def finish(self) -> int:
        """The exit code; looks for new processes until the end."""
        deadline = time.monotonic() + LIMIT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self.look()
            time.sleep(0.05)
        out, _ = self.process.communicate(timeout=10)
        self.output += out
        return self.process.returncode

    def survivors(self, patience_s: float = 60.0) -> list[str]:
        """Processes that are still there, after they had time to end: one of Ray's agents looks for its parent when it
        has imported, which takes long where others import as well.
        """
        gone, alive = psutil.wait_procs(list(self.family.values()), timeout=patience_s)
        del gone
        return [" ".join(process.cmdline()[:4]) for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def _watched(command: list[str], environment: dict[str, str] | None = None) -> Iterator[Watched]:
    watched = Watched(command, environment)
    try:
        yield watched
    finally:
        for process in [*watched.family.values()]:
            if process.is_running():
                process.kill()
        watched.process.kill()


def _generate(directory: Path, config: Path, out: Path, *more: str) -> list[str]:
    return [*CLI, "generate", str(directory), "--config", str(config), "--prompt", PROMPT, "--out", str(out), *more]


def _config(folder: Path, layout: str, launcher: str, launch: str = "") -> Path:
    """A built-in layout with a launcher, and whatever else its section `launch` is to have."""
    path = folder / "config" / f"{layout}.yaml"
    path.parent.mkdir()
    built_in = (CONFIGS / f"{layout}.yaml").read_text()
    path.write_text(f"{built_in}\nlaunch: {{launcher: {launcher}{launch}}}\n")
    return path


@pytest.mark.parametrize("launcher", some(["local", "ray"], 1))
def test_a_run_ends_clean(launcher: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Also with a rendezvous of someone else in the environment: nothing is inherited by accident.

    Where Ray is not asked for, it is not imported.
    """
    before = _shared_memory()
    foreign = {"RANK": "7", "WORLD_SIZE": "9", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "LOCAL_RANK": "5"}
    if launcher == "local":
        (tmp_path / "no" / "ray").mkdir(parents=True)
        (tmp_path / "no" / "ray" / "__init__.py").write_text("raise ImportError('no ray here')\n")
        foreign["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path / "no"), os.environ.get("PYTHONPATH")]))
    out = tmp_path / "out"
    out.mkdir()
    report, config = out / "report.json", _config(tmp_path, "layerwise_tp2", launcher)
    command = _generate(checkpoints["flux2-klein"], config, out / "out.png", "--report", str(report))
    with _watched(command, foreign) as run:
        assert run.finish() == 0, run.output
        assert run.survivors() == []
    assert _shared_memory() == before
    assert sorted(path.name for path in out.iterdir()) == ["out.png", "report.json"]
    content = json.loads(report.read_text())
    verdicts = {row["check"]: row["status"] for row in content["composition"]}
    assert [verdicts.pop(check) for check in ("same-numbers", "same-as-one")] == ["not probed"] * 2
    assert verdicts == dict.fromkeys((*CHECKS, *STEP_CHECKS), "holds")
    assert set(content["phases_s"]) == {"launch", "load", "verify", "encode", "denoise", "decode"}
    assert [row["rank"] for row in content["ranks"]] == [0, 1]


@pytest.mark.parametrize(("launcher", "number"), some([*zip(["local", "ray"] * 3, ENDINGS * 2, strict=True)], 1))
def test_interrupted_in_the_middle(launcher: str, number: int, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Ctrl-C, a scheduler's SIGTERM, and kill -9 of the driver of four ranks, in the middle of the denoise loop."""
    before = _shared_memory()
    layout = "layerwise_ulysses2_ring2" if number == signal.SIGKILL else "layerwise_tp2"
    config, out = _config(tmp_path, layout, launcher), tmp_path / "out"
    out.mkdir()
    command = _generate(checkpoints["z-image"], config, out / "out.png", "--steps", "3000")
    with _watched(command) as run:
        run.wait_for_line("step 3/3000")
        os.kill(run.process.pid, number)
        assert run.finish() == (-9 if number == signal.SIGKILL else 130), run.output
        # after kill -9 of the driver, Ray's own agents look for it once a minute
        assert run.survivors(patience_s=100.0) == []
    assert "Traceback" not in run.output
    assert _shared_memory() == before
    assert list(out.iterdir()) == []


@thorough  # of a rank that is lost: test_faults
@pytest.mark.parametrize(("launcher", "retries"), [("local", 2), ("ray", 0), ("ray", 2), ("local", 0)])
def test_a_rank_that_is_killed(launcher: str, retries: int, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """kill -9 of one rank: survived and said; or, when it may not be, an error that names the rank and exit code 1."""
    before = _shared_memory()
    out = tmp_path / "out" / "out.png"
    out.parent.mkdir()
    recovery = f", recovery: {{retries: {retries}, keep_every: 1}}"
    config = _config(tmp_path, "layerwise_tp2", launcher, recovery)
    with _watched(_generate(checkpoints["z-image"], config, out, "--steps", "100")) as run:
        run.wait_for_line("step 3/100")
        ranks = [p for p in run.family.values() if "RankActor" in " ".join(p.cmdline()) or "-rank" in p.name()]
        assert len(ranks) == 2, [p.cmdline() for p in run.family.values()]
        ranks[1].kill()
        assert run.finish() == (0 if retries else 1), run.output
        assert run.survivors() == []
    begin = "survived: rank " if retries else "crossdock: error: rank "
    told = [line for line in run.output.splitlines() if line.startswith(begin)]
    assert len(told) == 1, run.output
    assert "died" in told[0]
    assert out.exists() == bool(retries)
    assert _shared_memory() == before


def _expect_user_error(command: list[str], *texts: str) -> None:
    with _watched(command) as run:
        assert run.finish() == 2, run.output
        assert run.survivors() == []
    assert "Traceback" not in run.output
    assert run.output.count("error:") == 1, run.output
    for text in texts:
        assert text in run.output, run.output


@thorough
def test_an_occupied_rendezvous_port(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Found by rank 0, in its own process; still one message with file and line, and nothing is left."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        config = tmp_path / "layout.yaml"
        config.write_text(f"parallel:\n  tp_degree: 2\nlaunch:\n  port: {taken.getsockname()[1]}\n  launcher: local\n")
        command = _generate(checkpoints["z-image"], config, tmp_path / "out.png")
        _expect_user_error(
            command, f"{config}:4: launch.port: port {taken.getsockname()[1]}", "free it, or use port: 0"
        )


@thorough
def test_more_ranks_than_gpus(checkpoints: Checkpoints, tmp_path: Path) -> None:
    config = tmp_path / "layout.yaml"
    config.write_text("parallel:\n  ulysses_degree: 64\nlaunch:\n  device: cuda\n")
    command = _generate(checkpoints["z-image"], config, tmp_path / "out.png")
    _expect_user_error(command, f"{config}:4: launch.device: 64 ranks need 64 GPUs, but this machine has")


@thorough
def test_heads_not_divisible_names_file_and_line(checkpoints: Checkpoints, tmp_path: Path) -> None:
    config = tmp_path / "layout.yaml"
    config.write_text("# six heads do not go into four\nparallel:\n  tp_degree: 4\n")
    command = _generate(checkpoints["z-image"], config, tmp_path / "out.png")
    _expect_user_error(command, f"{config}:3: parallel.tp_degree: found 4", "allowed: 1, 2")


@thorough
def test_a_size_that_does_not_fit_starts_nothing(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Known from the model directory alone: refused before a rank exists."""
    command = _generate(checkpoints["z-image"], CONFIGS / "tp2.yaml", tmp_path / "out.png", "--height", "250")
    with _watched(command) as run:
        assert run.finish() == 2, run.output
        assert not run.family
    assert "height: found 250; allowed for z-image: a multiple of 16, such as 240" in run.output


@thorough
def test_under_torchrun_one_rank_speaks(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """What is wrong with the input is wrong on every rank: it is said once, and every rank exits with 2."""
    config = tmp_path / "layout.yaml"
    config.write_text("parallel:\n  tp_degree: 4\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [*torchrun, "-m", "crossdock.launch.torchrun"]
    arguments = _generate(checkpoints["z-image"], config, tmp_path / "out.png")[len(CLI) :]
    with _watched([*command, *arguments]) as run:
        assert run.finish() != 0
        assert run.survivors() == []
    assert run.output.count("parallel.tp_degree: found 4") == 1, run.output
    assert "exitcode  : 2" in run.output


@thorough
def test_torchrun_with_another_number_of_processes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = _generate(checkpoints["z-image"], CONFIGS / "ring4.yaml", tmp_path / "out.png")[len(CLI) :]
    with _watched([*torchrun, "-m", "crossdock.launch.torchrun", *arguments]) as run:
        assert run.finish() != 0
        assert run.survivors() == []
    assert "the degrees ask for 4 ranks, but torchrun started 2; use --nproc-per-node 4" in run.output
