"""`crossdock check`: what it prints, its exit codes, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_nothing_left_behind import CLI, Watched

from crossdock.launch import cli
from crossdock.launch.commands import check, generate
from crossdock.launch.commands.options import run_app
from crossdock.runtime.contract.coordinator import SHOWN
from crossdock.runtime.contract.numbers import PROBE_CHECKS, SAME_AS_ONE, SAME_NUMBERS
from crossdock.runtime.contract.verify import CHECKS, STEP_CHECKS
from crossdock.runtime.errors import LaunchError, RankError
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.probe.probe import probe_numbers
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.records import RankReport
from layouts import CONFIGS
from tiers import some, thorough

Checkpoints = dict[str, Path]
Plant = Callable[[RankWorker, Any], None]
"""Gets the rank and what it is asked to do."""


class HereGang:
    """One rank, in this process; `plant` may break it before each call, `edit` what it answers."""

    can_restart = False
    own_rank = None

    def __init__(self, plant: Plant, edit: Callable[[Any], Any], *_: Any) -> None:
        self.world_size = 1
        self.worker = RankWorker(0, 1, torch.device("cpu"))
        self.closed = 0
        self.asked: list[tuple[Any, ...]] = []
        self._plant = plant
        self._edit = edit

    def begin(self, classes: object = ()) -> None:
        pass

    def start(self) -> None:
        pass

    def collective_rpc(self, work: Any, *args: Any, timeout_s: float, **_: Any) -> list[Any]:
        self.asked.append((work, *args))
        self._plant(self.worker, work)
        return [self._edit(work(self.worker, *args))]

    def close(self) -> None:
        self.closed += 1
        self.worker.teardown()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[HereGang]]:
    """Makes `check` run in this process; returns the gangs that it will have made."""

    def here(plant: Plant = lambda worker, work: None, edit: Callable[[Any], Any] = lambda answer: answer) -> Any:
        gangs: list[HereGang] = []

        def make_gang(*arguments: Any) -> HereGang:
            gangs.append(HereGang(plant, edit, *arguments))
            return gangs[-1]

        for command in (check, generate):
            monkeypatch.setattr(command, "choose_gang", lambda *_: make_gang)
        return gangs

    return here


@pytest.fixture(autouse=True)
def signals() -> Any:
    """`check` takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def _check(directory: Path, *options: str, config: str = "layerwise") -> int:
    return run_app(cli.app, ["check", str(directory), f"--config={CONFIGS / config}.yaml", *options])


def _flip(place: int, worker: RankWorker, work: Any) -> None:
    """Another sign for one weight of a block, once everything was verified and before the probe."""
    if work is probe_numbers:
        block = worker.loaded.weights.blocks[place]
        assert isinstance(block.source, torch.Tensor)
        block.source[block.layout.entries[0].offset + 7] ^= 0x80


def _misplace(answer: Any) -> Any:
    """Every tensor of a report lies elsewhere."""
    if not isinstance(answer, RankReport):
        return answer
    return replace(answer, tensors=tuple(replace(record, place="slot 9") for record in answer.tensors))


def test_the_table(checkpoints: Checkpoints, here: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Every check with its promise and verdict; what was not asked for is not said to hold; the ranks' holdings."""
    gangs = here()
    assert _check(checkpoints["flux2-klein"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for name in CHECKS:
        assert name in printed.out
    words = " ".join(printed.out.replace("│", " ").split())
    assert words.count("holds") == len(CHECKS) + 1  # the column is called "holds when"
    assert "not probed" in words
    assert "8 host" in words
    assert "composition contract" in words
    assert [gang.closed for gang in gangs] == [1]
    assert not gangs[0].worker.ready, "the model was not given up"


def test_the_table_with_a_probe(
    checkpoints: Checkpoints, here: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """--probe compares all bytes and runs the step, and says of how many outputs it speaks."""
    gangs = here()
    assert _check(checkpoints["z-image"], "--probe") == 0
    out = capsys.readouterr().out
    assert "not probed" not in out
    words = " ".join(out.replace("│", " ").split())
    assert "10 outputs" in words
    assert "0.0e+00" in words, "one rank does what one rank does"
    assert [asked[2] for asked in gangs[0].asked if asked[0] is RankWorker.setup] == [True]


@pytest.mark.parametrize("config", some(["layerwise", "single"], 1))
def test_json_is_all_there_is(
    config: str, checkpoints: Checkpoints, here: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """For scripts: one object on stdout, nothing else; the sizes add up to the model."""
    here()
    assert _check(checkpoints["flux2-klein"], "--probe", "--json", config=config) == 0
    content = json.loads(capsys.readouterr().out)
    keys = {"model", "layout", "inferred", "holds", "composition", "violations", "ranks", "deviations"}
    assert set(content) == keys
    assert content["model"] == str(checkpoints["flux2-klein"])
    assert content["holds"] is True
    assert content["violations"] == []
    assert [row["check"] for row in content["composition"]] == [*CHECKS, *STEP_CHECKS, *PROBE_CHECKS]
    assert {row["status"] for row in content["composition"]} == {"holds", "no step yet"}
    assert all(set(row) == {"check", "status", "detail"} for row in content["composition"])
    assert len(content["deviations"]) == 18
    assert {row["error"] for row in content["deviations"]} == {0.0}
    (rank,) = content["ranks"]
    assert set(rank) == {"rank", "homes", "resident", "slots", "slot_bytes", "device_bytes", "host_bytes"}
    streamed = config == "layerwise"
    assert rank["homes"] == {"host": 8} if streamed else {"resident": 8}
    assert (rank["resident"], rank["slots"] > 0) == ((0, True) if streamed else (8, False))
    stored = sum(file.stat().st_size for file in (checkpoints["flux2-klein"] / "transformer").glob("*.safetensors"))
    whole = rank["device_bytes"] + rank["host_bytes"] - rank["slot_bytes"]
    assert 0.98 * stored < whole < 1.1 * stored


def test_a_violated_composition_is_told_whole(
    checkpoints: Checkpoints, here: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, and every violation, not only the few that an error shows; the probe is not run."""
    gangs = here(edit=_misplace)
    assert _check(checkpoints["z-image"], "--probe", "--json") == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    content = json.loads(printed.out)
    assert content["holds"] is False
    status = {row["check"]: row["status"] for row in content["composition"]}
    assert status["single-owner"] == "violated"
    assert status["complete"] == "holds"
    assert status[SAME_NUMBERS] == status[SAME_AS_ONE] == "not probed"
    found = [violation for violation in content["violations"] if violation["check"] == "single-owner"]
    assert len(found) > 10 * SHOWN
    assert set(found[0]) == {"check", "rank", "where", "expected", "found", "remedy"}
    assert [rank["homes"] for rank in content["ranks"]] == [{"host": 9}]
    assert not gangs[0].worker.ready


def test_a_violated_probe_names_the_block(
    checkpoints: Checkpoints, here: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight that is wrong where it rests: exit code 1, and the line under the table says which block."""
    gangs = here(plant=partial(_flip, 4))
    assert _check(checkpoints["z-image"], "--probe") == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    (plan, *_) = (argument for call in gangs[0].asked for argument in call if isinstance(argument, RunPlan))
    name = plan.memory.blocks[4].name
    (line,) = [line for line in printed.out.splitlines() if line.startswith("same-numbers: ")]
    assert line.startswith(f"same-numbers: rank 0: {name}: expected the output without streaming (checksum 0x")
    assert "violated" in printed.out
    assert [gang.closed for gang in gangs] == [1]


@pytest.mark.parametrize("faulty", [False, True])
def test_generate_probes_first(
    faulty: bool,
    checkpoints: Checkpoints,
    here: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the unsharded model does not compute is not drawn: exit code 1, one message, no file."""

    def wrong(worker: RankWorker, work: Any) -> None:
        if faulty and work is probe_numbers:
            worker.loaded.weights.blocks[4].module.register_forward_hook(lambda module, args, output: output * 1.001)

    gangs, out = here(plant=wrong), tmp_path / "out.png"
    size = ["--height=64", "--width=64", "--steps=1", "--prompt=a fox", f"--out={out}"]
    command = ["generate", str(checkpoints["z-image"]), f"--config={CONFIGS / 'layerwise.yaml'}", "--probe", *size]
    assert run_app(cli.app, command) == faulty
    printed = capsys.readouterr()
    asked = [work for work, *_ in gangs[0].asked]
    assert asked.index(probe_numbers) < (len(asked) if faulty else asked.index(RankWorker.generate))
    assert (RankWorker.generate in asked) != faulty
    assert out.exists() != faulty
    if faulty:
        assert "same-as-one: rank 0: layers.0: expected what one rank alone computes" in printed.err
    else:
        assert "same-as-one: largest error 0.0e+00 of at most 1.0e-04" in printed.out


def test_every_check_says_what_it_promises() -> None:
    """A check without a promise would be an empty cell."""
    assert set(CHECKS) | set(STEP_CHECKS) | set(PROBE_CHECKS) == set(check.PROMISES)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("offload:\n  layerwise: yes please\n", "offload.layerwise: found"),
        ("offload:\n  layerwise: true\n  device_budget: 1KiB\n", "run.yaml:3: offload.device_budget: "),
        ("parallel:\n  tp_degree: 4\n", "run.yaml:2: parallel.tp_degree: found 4"),
        ("launch:\n  launcher: torchrun\n", "-m crossdock.launch.torchrun check ..."),
    ],
    ids=["bad YAML", "budget", "degree", "launcher"],
)
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_user_errors_are_one_message(
    config: str,
    text: str,
    options: tuple[str, ...],
    checkpoints: Checkpoints,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2 and one line on stderr, found before a rank is started."""
    file = tmp_path / "run.yaml"
    file.write_text(config)
    assert run_app(cli.app, ["check", str(checkpoints["z-image"]), f"--config={file}", *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("crossdock: error: ")
    assert printed.err.count("\n") == 1
    assert text in printed.err
    assert "holds" not in printed.out
    if options:
        assert printed.out == ""


def test_a_missing_model_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, with the way out."""
    assert _check(tmp_path / "nowhere", "--json") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    way = "give a checkpoint in the diffusers format, or a hub id: org/name"
    assert printed.err == f"crossdock: error: {tmp_path / 'nowhere'}: no such directory; {way}\n"


@pytest.mark.parametrize(("error", "code"), [(RankError(0, "died"), 1), (LaunchError("no port"), 2)])
def test_other_errors_end_the_gang(
    error: Exception,
    code: int,
    checkpoints: Checkpoints,
    here: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of the probe: the message on stderr, nothing on stdout, the gang is ended."""

    def fail(worker: RankWorker, work: Any) -> None:
        if work is probe_numbers:
            raise error

    gangs = here(plant=fail)
    assert _check(checkpoints["z-image"], "--probe", "--json") == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"crossdock: error: {error}\n"
    assert gangs[0].closed >= 1


# -- real ranks --------------------------------------------------------------------------------------------------


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@thorough
def test_two_ranks_through_ray(checkpoints: Checkpoints) -> None:
    """The real command: one JSON object on stdout, nothing of Ray's; no process and no shared memory afterwards."""
    before = _shared_memory()
    config = CONFIGS / "layerwise_tp2.yaml"
    command = [*CLI, "check", str(checkpoints["flux2-klein"]), "--config", str(config), "--probe", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["holds"] is True
    assert [rank["rank"] for rank in content["ranks"]] == [0, 1]
    numbers, one = content["composition"][-2:]
    assert (numbers["status"], numbers["detail"]) == ("holds", "34 outputs of 2 ranks")
    assert one["status"] == "holds"
    assert one["detail"].startswith("largest error ")
    assert _shared_memory() == before


@thorough  # as `generate` is: test_nothing_left_behind
def test_interrupted(checkpoints: Checkpoints) -> None:
    """Ctrl-C while the ranks come up: 130, one word, nothing left."""
    before = _shared_memory()
    run = Watched([*CLI, "check", str(checkpoints["z-image"]), "--config", str(CONFIGS / "layerwise_tp2.yaml")])
    try:
        run.wait_for_line("starting 2 ranks")
        for _ in range(100):
            run.look()
            if any("RankActor" in " ".join(process.cmdline()) for process in _alive(run)):
                break
            time.sleep(0.1)
        os.kill(run.process.pid, signal.SIGINT)
        assert run.finish() == 130, run.output
        assert run.survivors() == []
    finally:
        for process in run.family.values():
            if process.is_running():
                process.kill()
        run.process.kill()
    assert "Traceback" not in run.output
    assert _shared_memory() == before


def _alive(run: Watched) -> list[Any]:
    return [process for process in run.family.values() if process.is_running() and process.status() != "zombie"]


@thorough
def test_under_torchrun_one_rank_speaks(checkpoints: Checkpoints) -> None:
    """Every rank checks, rank 0 prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "crossdock.launch.torchrun", "check", str(checkpoints["z-image"]), "--probe"]
    done = subprocess.run(
        [*command, "--config", str(CONFIGS / "layerwise_tp2.yaml"), "--json"],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["holds"] is True
    assert len(content["ranks"]) == 2
