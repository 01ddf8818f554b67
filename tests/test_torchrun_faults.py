"""Ranks under torchrun that raise, die, stop or issue something else: one message, all end, the next try succeeds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from crossdock.launch.engine.engine import Engine
from crossdock.launch.gangs.torchrun_judge import Beat, Judge, ProcessState
from crossdock.parallel.group import Collective, GroupRecord
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.errors import LaunchError, RankError
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.watch.gang import Gang
from layouts import CONFIGS
from reference import PROMPT
from tiers import thorough

HERE = Path(__file__).parent
LIMIT_S = 150
GONE_WITHIN_S = 15.0
"""From the fault until no process of that try is there: generous, for the machine may be busy; it is printed."""
SIZE = 64
STEPS = 4

# -- the judge, without processes --------------------------------------------------------------------------------

HERE_AGENT, FAR_AGENT = ("host", "0"), ("far", "1")
TP = GroupRecord("tp", (0, 1), 7, 0, (Collective(7, "all_reduce float32 64"),), None)


def _beat(rank: int, number: int = 1, waiting_s: float | None = None, **more: Any) -> Beat:
    group = replace(TP, waiting_s=waiting_s, issued=7 - (waiting_s is None))
    status = RankStatus(rank, "host", 100 + rank, "denoise", 2, "blocks.3", groups=(group,))
    return Beat(number, status, more.pop("agent", HERE_AGENT), **more)


class Court:
    """A judge on rank 0 of two, and what it sees."""

    def __init__(self) -> None:
        self.states: dict[int, ProcessState] = {}
        self.judge = Judge(0, 2, HERE_AGENT, lambda pid: self.states.get(pid, "runs"))

    def at(self, now_s: float, *beats: Beat, hurried: bool = False) -> RankError | None:
        for beat in beats:
            self.judge.hear(beat, now_s)
        verdict = self.judge.verdict(now_s, hurried)
        return None if verdict is None else verdict.error  # type: ignore[return-value]


def test_judge_a_rank_that_raises() -> None:
    """Blamed only when the others had time to publish that they wait for it, which the message then says."""
    court = Court()
    raised = RankError(1, "ValueError: planted")
    assert court.at(0.0, _beat(0), _beat(1, error=raised)) is None
    error = court.at(0.4, _beat(0, 2, waiting_s=0.3))
    assert str(error).startswith(
        "rank 1: ValueError: planted; last seen in step 2, block blocks.3; rank 0 waits for it"
    )
    assert "in step 2, block blocks.3, all_reduce float32 64 (number 7) of group tp with rank 1, for 0.3 s" in str(
        error
    )


def test_judge_a_process_that_is_gone() -> None:
    """Found as soon as it is silent, or at once when torchrun says that something failed; not one that left."""
    court = Court()
    court.at(0.0, _beat(0), _beat(1))
    court.states[101] = "gone"
    assert court.at(0.5, _beat(0, 2)) is None
    assert court.at(0.7, _beat(0, 3)) is None
    error = court.at(1.1, _beat(0, 4, waiting_s=0.9))
    assert error is not None
    assert (error.rank, error.kind) == (1, "died")
    assert "process 101 on host is gone" in str(error)

    hurried = Court()
    hurried.states[101] = "gone"
    assert hurried.at(0.0, _beat(0), _beat(1), hurried=True) is None
    assert hurried.judge.certain
    assert hurried.at(0.35, hurried=True) is not None

    left = Court()
    left.states[101] = "gone"
    left.at(0.0, _beat(0), _beat(1, left=True), hurried=True)
    assert left.at(5.0, hurried=True) is None
    assert not left.judge.certain


def test_judge_a_stopped_process() -> None:
    """Not a short stop, as debuggers make them; the verdict carries the process, which does not hear SIGTERM."""
    court = Court()
    court.states[101] = "stopped"
    court.at(0.0, _beat(0), _beat(1))
    assert court.at(0.7, _beat(0, 2)) is None
    assert court.at(1.4) is None
    assert court.at(1.5, _beat(0, 3), _beat(1, 2)) is None, "it went on"
    assert court.at(3.1, _beat(0, 4)) is None
    verdict = court.judge.verdict(3.5)
    assert verdict is not None
    assert verdict.stopped == (HERE_AGENT, 101)
    assert isinstance(verdict.error, RankError)
    assert verdict.error.kind == "stopped"


def test_judge_a_rank_that_was_cut_off() -> None:
    """Waits for whoever cut it off: one that raised, one on another machine that fell silent, or nobody."""
    cut = RankError(0, "RuntimeError: Connection closed by peer", "cut off")
    better = Court()
    assert better.at(0.0, _beat(0, error=cut), _beat(1)) is None
    assert better.at(2.0, _beat(1, 2, error=RankError(1, "out of memory", "memory"))) is not None

    silent = Court()
    silent.states[101] = "gone"  # of another machine: nobody looks
    silent.at(0.0, _beat(0, error=cut), _beat(1, agent=FAR_AGENT))
    assert silent.at(2.9) is None
    error = silent.at(3.1)
    assert error is not None
    assert (error.rank, error.kind) == (1, "silent")
    assert "has not been heard of for 3.1 s" in str(error)

    nobody = Court()
    nobody.at(0.0, _beat(0, error=cut), _beat(1))
    error = nobody.at(3.1, _beat(1, 2))
    assert error is not None
    assert (error.rank, error.kind) == (0, "cut off")

    absent = Court()
    absent.at(0.0, _beat(0, error=cut))
    assert str(absent.at(3.1)) == "rank 1: has not come up"


def test_judge_who_waits() -> None:
    """A rank that has done its part of the latest call is not coming; of an earlier one, it is only late to say."""
    court = Court()
    assert court.at(0.0, _beat(0, waiting_s=3.0, call=2), _beat(1, call=1, ended=True)) is None
    error = court.at(0.3, _beat(0, 2, waiting_s=3.3, call=2), _beat(1, 2, call=2, ended=True))
    assert error is not None
    assert (error.rank, error.kind) == (1, "collectives")
    assert "it has ended its part, but rank 0 waits for it in step 2" in str(error)


def test_judge_says_a_mistake_of_the_user_as_it_is() -> None:
    """Where memory is too small on one node, the message and the exit code are its own."""
    court = Court()
    court.at(0.0, _beat(0), _beat(1, error=LaunchError("too little memory", "offload.host")))
    error = court.at(0.5)
    assert type(error) is LaunchError
    assert str(error) == "offload.host: too little memory"


# -- real processes ----------------------------------------------------------------------------------------------


class Try:
    """One start of all ranks by torchrun: what its processes noted."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number

    def note(self, name: str) -> str | None:
        path = self._folder / f"try{self._number}.{name}"
        return path.read_text() if path.exists() else None

    @property
    def pids(self) -> list[int]:
        notes = self._folder.glob(f"try{self._number}.rank*.pid")
        return [int(text) for path in notes if (text := path.read_text())]


class Torchrun:
    """A run with a planted fault per try."""

    def __init__(self, folder: Path, checkpoint: Path, config: Path, *planted: dict[str, Any] | None) -> None:
        self.folder = folder
        self.latents = folder / "latents.safetensors"
        self.tries = [Try(folder, number) for number in range(len(planted))]
        self.gone_at: dict[int, float] = {}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", str(len(planted) - 1), "-m", "torchrun_with_faults", "generate", str(checkpoint)]
        command += ["--config", str(config), "--prompt", PROMPT, "--height", str(SIZE), "--width", str(SIZE)]
        command += ["--steps", str(STEPS), "--out", str(folder / "out.png"), "--latents", str(self.latents)]
        path = os.pathsep.join(filter(None, [str(HERE), str(folder), os.environ.get("PYTHONPATH")]))
        extra = {"PYTHONPATH": path, "PLANTED": json.dumps(planted), "NOTES": str(folder)}
        self._files = [(folder / name).open("w+") for name in ("stdout", "stderr")]
        self.process = subprocess.Popen(
            command, env={**os.environ, **extra}, stdout=self._files[0], stderr=self._files[1], text=True
        )

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def errors(self) -> list[str]:
        """What we said, without the tracebacks in it."""
        lines = self.stderr.splitlines()
        return [line for line in lines if line.startswith("crossdock: ")]

    def wait_for_fault(self, number: int = 0) -> None:
        deadline = time.monotonic() + LIMIT_S
        while self.tries[number].note("fault") is None:
            assert time.monotonic() < deadline, self.stderr
            assert self.process.poll() is None, self.stderr
            time.sleep(0.02)

    def finish(self) -> int:
        """The exit code; notes when the processes of each try are gone."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            ended = self.process.poll() is not None
            for number, each in enumerate(self.tries):
                faulty = number not in self.gone_at and each.note("fault") is not None
                if faulty and not any(map(psutil.pid_exists, each.pids)):
                    self.gone_at[number] = time.time()
            if ended:
                return self.process.returncode
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.02)

    def gone_after_s(self, number: int) -> float:
        """Seconds from the fault of a try until none of its processes was there."""
        noted = self.tries[number].note("fault")
        assert noted is not None, "the fault did not happen"
        assert number in self.gone_at, f"still there: {self.tries[number].pids}"
        return self.gone_at[number] - float(noted)

    def survivors(self) -> list[int]:
        return [pid for each in self.tries for pid in each.pids if psutil.pid_exists(pid)]

    def close(self) -> None:
        for pid in [self.process.pid, *self.survivors()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        for file in self._files:
            file.close()


@contextmanager
def _torchrun(folder: Path, *arguments: Any) -> Iterator[Torchrun]:
    (folder / "ray").mkdir(parents=True)
    (folder / "ray" / "__init__.py").write_text("raise ImportError('no ray here')\n")
    run = Torchrun(folder, *arguments)
    try:
        yield run
    finally:
        run.close()


def _fault(rank: int, kind: str, step: int = 2) -> dict[str, Any]:
    return {"rank": rank, "kind": kind, "step": step}


@pytest.fixture(scope="module")
def expected(flux2_dir: Path, gang_of: Callable[[int], Gang]) -> torch.Tensor:
    """The latents of a run without a fault, and without torchrun."""
    with Engine.start(load_config(CONFIGS / "layerwise_tp2.yaml"), flux2_dir, gang_of(2)) as engine:
        return engine.generate(PROMPT, steps=STEPS, height=SIZE, width=SIZE).latents[0]


@pytest.mark.timeout(300)
def test_torchrun_restarts_after_a_kill(flux2_dir: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    """One message, and the picture of the same layout under another launcher."""
    faults = (_fault(0, "kill"), None)
    with _torchrun(tmp_path, flux2_dir, CONFIGS / "layerwise_tp2.yaml", *faults) as run:
        assert run.finish() == 0, run.stderr
        assert run.gone_after_s(0) < GONE_WITHIN_S
        (killed,) = run.errors
        assert killed.startswith("crossdock: error: rank 0: its process")
        assert "rank 1 waits for it in step 2, block single_transformer_blocks.4, all_reduce torch.float32" in killed
        assert torch.equal(load_file(run.latents)["loop_latents"], expected)
        assert run.survivors() == []


@thorough
@pytest.mark.timeout(300)
def test_a_try_that_misses_its_time_limit(flux2_dir: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    """The second leaves a thread in torch's store, which Python's own way out would abort the process for."""
    with _torchrun(tmp_path, flux2_dir, CONFIGS / "layerwise_tp2.yaml", _fault(1, "late"), None) as run:
        assert run.finish() == 0, run.stderr
        assert run.errors == ["crossdock: error: stopped after step 2: the time limit is 0 s"], run.stderr
        assert "Traceback" not in run.stderr
        assert torch.equal(load_file(run.latents)["loop_latents"], expected)


@thorough
@pytest.mark.timeout(300)
def test_torchrun_restarts_after_any_fault(flux2_dir: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    """Said late, twice or without its place; a process that stays; a restart that fails."""
    faults = [_fault(1, "raise"), _fault(0, "kill"), _fault(1, "stop", 3), None]
    with _torchrun(tmp_path, flux2_dir, CONFIGS / "layerwise_tp2.yaml", *faults) as run:
        assert run.finish() == 0, run.stderr
        for number, fault in enumerate(faults[:3]):
            assert fault is not None
            gone_s = run.gone_after_s(number)
            print(f"{fault['kind']} of rank {fault['rank']}: all gone after {gone_s:.1f} s")
            assert gone_s < GONE_WITHIN_S
        raised, killed, stopped = run.errors
        assert raised.startswith("crossdock: error: rank 1: ValueError: planted (in step 2, block single_transformer_")
        assert "rank 0 waits for it in step 2, block single_transformer_blocks.4, all_reduce" in run.stderr
        assert killed.startswith("crossdock: error: rank 0: its process")
        assert "is gone: killed, or crashed; last seen in step 2, block" in killed
        assert "rank 1 waits for it in step 2, block single_transformer_blocks.4, all_reduce torch.float32" in killed
        assert stopped.startswith("crossdock: error: rank 1: its process")
        assert "is stopped; it is ended with SIGKILL; last seen in step 3, block" in stopped
        assert "rank 0 waits for it in step 3, block single_transformer_blocks.4, all_reduce torch.float32" in stopped
        assert torch.equal(load_file(run.latents)["loop_latents"], expected)
        assert run.survivors() == []


@thorough
@pytest.mark.timeout(300)
def test_torchrun_without_restarts(flux2_dir: Path, tmp_path: Path) -> None:
    """A collective that one rank leaves out hangs for minutes; exit codes of ranks that were cut off."""
    faults = [_fault(1, "skip"), _fault(1, "kill")]
    with _torchrun(tmp_path, flux2_dir, CONFIGS / "layerwise_tp2.yaml", *faults) as run:
        assert run.finish() == 1
        for number in range(2):
            print(f"{faults[number]['kind']}: all gone after {run.gone_after_s(number):.1f} s")
            assert run.gone_after_s(number) < GONE_WITHIN_S
        skipped, killed = run.errors
        assert skipped.startswith("crossdock: error: rank ")
        assert all(
            part in skipped
            for part in (
                "ranks 0, 1 wait for each other",
                "rank 0: step 2, block single_",
                "all_reduce",
                "group tp",
                "all_gather",
                "group world",
            )
        ), skipped
        assert killed.startswith("crossdock: error: rank 1: its process")
        codes = [line.split(":")[1].split()[0] for line in run.stderr.splitlines() if "exitcode  :" in line]
        assert sorted(codes) == ["-9", "1"], run.stderr
        assert run.survivors() == []


@thorough
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_and_another_size(rank: int, flux2_dir: Path, tmp_path: Path) -> None:
    """gloo ends the process that gets more than it expects; what it had issued is told by the other one."""
    with _torchrun(tmp_path, flux2_dir, CONFIGS / "layerwise_tp2.yaml", _fault(rank, "size")) as run:
        assert run.finish() == 1
        (told,) = run.errors
        print(told)
        assert "all_reduce torch.float32 7" in told
        assert "of group tp (ranks (0, 1)) in step 2, block single_transformer_blocks.4" in told
        assert "which of them is wrong is not known" in told
        assert run.survivors() == []


@thorough
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_torchrun_is_ended(number: int, flux2_dir: Path, tmp_path: Path) -> None:
    """A request to end is taken for a fault, or said by every rank; ranks outlive a torchrun that is killed."""
    with _torchrun(tmp_path, flux2_dir, CONFIGS / "layerwise_tp2.yaml", _fault(0, "none", 2)) as run:
        run.wait_for_fault()
        run.process.send_signal(number)
        assert run.finish() != 0
        deadline = time.monotonic() + GONE_WITHIN_S
        while run.survivors():
            assert time.monotonic() < deadline, run.stderr
            time.sleep(0.05)
        said = "error: torchrun (process" if number == signal.SIGKILL else "interrupted"
        assert len(run.errors) == 1, run.stderr
        assert run.errors[0].startswith(f"crossdock: {said}")
        assert not list(tmp_path.glob("out*"))
