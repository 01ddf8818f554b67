"""Ranks that die, stop or raise, anywhere in a run: the request is answered, with the same picture."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch
from torch import Tensor

from crossdock.launch.engine.engine import Engine, Generation
from crossdock.launch.gangs.local.gang import LocalGang
from crossdock.runtime.config.schema import LaunchConfig, RunConfig
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.errors import FaultKind, RankError
from crossdock.runtime.rank.worker import RankWorker
from layouts import CONFIGS
from reference import PROMPT
from tiers import ALL, some, thorough

Kind = Literal["kill", "stop", "raise"]
Moment = Literal["launch", "load", "verify", "first step", "middle step", "last step", "decode"]
IN_REQUEST: tuple[Moment, ...] = ("first step", "middle step", "last step", "decode")
COMING_UP: tuple[Moment, ...] = ("launch", "load", "verify")
KINDS: dict[Kind, FaultKind] = {"kill": "died", "stop": "stopped", "raise": "raised"}
STEPS = 6
SIZE = 64
PASS_S = 0.06
"""Added to every pass, so that the coordinator sees each of them."""
DETECTED_WITHIN_S = 5.0
RANDOM_FAULTS = int(os.environ.get("CROSSDOCK_FAULTS", "2"))
EVERY_RANK = RANDOM_FAULTS > 2
"""Also every rank at every moment: a quarter of an hour."""
LOCAL = pytest.mark.parametrize("run", ["local"], indirect=True)
"""Ray's ranks meet some of the faults, this machine's all."""


@dataclass(frozen=True)
class Planted:
    """A rank meets its end once; `note` is a file to which it writes when."""

    rank: int
    kind: Kind
    moment: Moment
    note: Path


def _end(kind: Kind, note: Path) -> Callable[[], None]:
    """What the rank does; pickled by value, for a rank cannot import the tests."""

    def end() -> None:
        note.write_text(str(time.time()))
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)
        else:
            raise ValueError("planted")

    return end


class Faulty:
    """A gang whose next starts meet the planted faults, one each."""

    def __init__(self, config: LaunchConfig, world_size: int, device: str) -> None:
        super().__init__(config, world_size, device)  # type: ignore[call-arg]
        self.planted: list[Planted] = []
        self.errors: list[tuple[float, RankError]] = []  # when it was known, and what

    def pid(self, rank: int) -> int:
        raise NotImplementedError

    def _meet(self, deadline: float) -> None:
        if self.planted and self.planted[0].moment == "launch":
            planted = self.planted.pop(0)
            planted.note.write_text(str(time.time()))
            os.kill(self.pid(planted.rank), signal.SIGSTOP if planted.kind == "stop" else signal.SIGKILL)
        with self._noticed():
            super()._meet(deadline)  # type: ignore[misc]

    def collective_rpc(self, work: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        if work is RankWorker.setup and self.planted:
            planted = self.planted.pop(0)
            work = _faulty_setup(planted, _end(planted.kind, planted.note))
        with self._noticed():
            return super().collective_rpc(work, *args, **options)  # type: ignore[misc]

    @contextmanager
    def _noticed(self) -> Iterator[None]:
        try:
            yield
        except RankError as error:
            self.errors.append((time.time(), error))
            raise


class FaultyLocalGang(Faulty, LocalGang):
    def pid(self, rank: int) -> int:
        assert self._ranks is not None
        return self._ranks.pids[rank]


def _faulty_class(launcher: str) -> type[Any]:
    if launcher == "local":
        return FaultyLocalGang
    pytest.importorskip("ray", reason="ray is not installed: local gangs meet the same faults")
    from crossdock.launch.gangs.ray.gang import RayGang

    class FaultyRayGang(Faulty, RayGang):
        def pid(self, rank: int) -> int:
            return self._places[rank].pid

    return FaultyRayGang


def _faulty_setup(planted: Planted, end: Callable[[], None]) -> Callable[..., Any]:
    rank, moment = planted.rank, planted.moment

    def setup(worker: RankWorker, *args: Any) -> Any:
        from crossdock.offload.stream.block_stream import BlockStream
        from crossdock.runtime.rank.weights.load import WeightLoader

        if worker.rank == rank:
            owner, name = (WeightLoader, "load_outside") if moment == "load" else (BlockStream, "observe_first_loads")
            setattr(owner, name, lambda *_, **__: end())
        return worker.setup(*args)

    return setup


def _plant_in_request(planted: Planted) -> Callable[[RankWorker], None]:
    """For a rank that is set up: in the middle of a step's blocks, or in the turn of the VAE."""
    rank, moment = planted.rank, planted.moment
    end = _end(planted.kind, planted.note)
    at = {"first step": 1, "middle step": STEPS // 2 + 1, "last step": STEPS}.get(moment)

    def plant(worker: RankWorker) -> None:
        if worker.rank != rank:
            return
        if at is None:
            worker.loaded.pipeline.turn = lambda *_: end()  # type: ignore[assignment, return-value]
            return
        passes = [0]

        def count(*_: Any) -> None:
            passes[0] += 1
            if passes[0] == 2 * at:  # guidance makes two passes of a step
                end()

        worker.loaded.model.single_transformer_blocks[1].attn.register_forward_pre_hook(count)

    return plant


@dataclass
class Run:
    """An engine whose ranks meet faults, and what it gave before the first of them."""

    engine: Engine
    gang: Any
    expected: Tensor
    folder: Path

    def generate(self, **options: Any) -> Generation:
        seconds = PASS_S

        def slow(worker: RankWorker) -> None:
            worker.loaded.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))

        self.gang.collective_rpc(slow, timeout_s=60)
        return self.engine.generate(PROMPT, steps=STEPS, height=SIZE, width=SIZE, **options)

    def pids(self) -> set[int]:
        return set(self.gang.collective_rpc(lambda worker: os.getpid(), timeout_s=60))

    def survive(self, *faults: tuple[int, Kind, Moment]) -> dict[str, Any]:
        """One request with faults: the first in the request, the others while new ranks come up. Its row of the report,
        with the longest time until one was noticed.
        """
        planted = plant(self.folder, faults)
        self.gang.collective_rpc(_plant_in_request(planted[0]), timeout_s=60)
        self.gang.planted = planted[1:]
        self.gang.errors.clear()
        generation = self.generate()
        assert torch.equal(torch.cat(generation.latents), self.expected)
        (fault,) = generation.report["faults"]
        assert len(fault["meanwhile"]) == len(planted) - 1
        detected_s = noticed(self.gang, planted)
        print(f"{faults}: noticed after {detected_s:.2f} s, recovered in {fault['recovery_s']:.1f} s")
        return {**fault, "detected_s": detected_s}


def _kinds(moment: Moment) -> tuple[Kind, ...]:
    """Where ranks meet, nothing of theirs runs that could raise."""
    return ("kill", "stop") if moment == "launch" else ("kill", "stop", "raise")


def _random_fault(choice: random.Random, moments: Sequence[Moment]) -> tuple[int, Kind, Moment]:
    moment = choice.choice(moments)
    return choice.randrange(4), choice.choice(_kinds(moment)), moment


def plant(folder: Path, faults: Sequence[tuple[int, Kind, Moment]]) -> list[Planted]:
    return [Planted(*fault, folder / f"{time.time_ns()}-{number}") for number, fault in enumerate(faults)]


def noticed(gang: Any, planted: Sequence[Planted]) -> float:
    """The longest time from a fault until it was known, in seconds; each is blamed on its rank, for what it was."""
    assert all(each.note.exists() for each in planted), "a fault did not happen"
    assert len(gang.errors) == len(planted), gang.errors
    for each, (_, error) in zip(planted, gang.errors, strict=True):
        assert (error.rank, error.kind) == (each.rank, KINDS[each.kind]), (each, error)
    times = [at - float(each.note.read_text()) for each, (at, _) in zip(planted, gang.errors, strict=True)]
    assert max(times) < DETECTED_WITHIN_S, list(zip(planted, times, strict=True))
    return max(times)


def _ranks() -> set[int]:
    """Processes of ranks that came out of this one."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "RankActor" in " ".join(process.cmdline()) or process.name().startswith("crossdock-rank"):
                found.add(process.pid)
    return found


@pytest.fixture(scope="module")
def config() -> RunConfig:
    config = load_config(CONFIGS / f"layerwise_{'ulysses2_ring2' if ALL else 'tp2'}.yaml")
    recovery = config.launch.recovery.model_copy(update={"keep_every": 1, "retries": 5})
    return config.model_copy(update={"launch": config.launch.model_copy(update={"recovery": recovery})})


@pytest.fixture(scope="module", params=["local", "ray"])
def run(
    request: pytest.FixtureRequest, config: RunConfig, flux2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    gang = _faulty_class(request.param)(config.launch, config.world_size, "cpu")
    before = _left()
    with Engine.start(config, flux2_dir, make_gang=lambda *_: gang) as engine:
        first = Run(engine, gang, torch.empty(0), tmp_path_factory.mktemp("faults"))
        first.expected = torch.cat(first.generate().latents)
        yield first
    deadline = time.monotonic() + 20
    while _left() - before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _left() - before, "something is left of an engine that was closed, or of the ranks it lost"


def _left() -> set[int | str]:
    """Rank processes, and files of shared memory; not those of tests that run beside."""
    return _ranks() | {name for name in os.listdir("/dev/shm") if "plasma" not in name}


FAULTS: list[tuple[int, Kind, Moment]] = [
    (0, "kill", "middle step"),
    (1, "stop", "last step"),
    (2, "raise", "first step"),
    (3, "kill", "decode"),
]


@pytest.mark.parametrize(
    ("run", "rank", "kind", "moment"),
    [*(("local", *fault) for fault in some(FAULTS, 1)), *(("ray", *fault) for fault in some(FAULTS, 1))],
    indirect=["run"],
)
def test_the_picture_is_the_same(rank: int, kind: Kind, moment: Moment, run: Run) -> None:
    """A fault never costs a request; who did it is known within seconds, and later steps are not computed again."""
    fault = run.survive((rank, kind, moment))
    assert (fault["rank"], fault["kind"]) == (rank, KINDS[kind])
    if moment != "decode":
        step = {"first step": 1, "middle step": STEPS // 2 + 1, "last step": STEPS}[moment]
        assert fault["resumed_after"] in range(max(0, step - 3), step)
        where = rf"step {step}, block single_transformer_blocks\.1, \w+ .*\(number \d+\) of group (ulysses|ring|tp)"
        assert re.search(rf"rank \d waits for it in {where} with rank {rank}", fault["error"]), fault["error"]


@thorough
@pytest.mark.parametrize("run", some(["local", "ray"], 1), indirect=True)
def test_faults_while_new_ranks_come_up(run: Run) -> None:
    """A second, third and fourth fault, in what the first one made necessary; each is known, and known as its own."""
    faults = [(3, "kill", "first step"), (2, "stop", "launch"), (1, "kill", "load"), (0, "raise", "verify")]
    run.survive(*faults)  # type: ignore[arg-type]


@LOCAL
@pytest.mark.skipif(not EVERY_RANK, reason="a quarter of an hour: make test-faults")
@pytest.mark.parametrize(
    ("rank", "kind", "moment"),
    [
        (rank, kind, moment)
        for moment in (*COMING_UP, *IN_REQUEST)
        for kind in _kinds(moment)
        for rank in (range(4) if kind == "kill" else (1,))
    ],
)
def test_every_rank_at_every_moment(rank: int, kind: Kind, moment: Moment, run: Run) -> None:
    """A rank that is special, or a moment at which nobody watches."""
    fault = (rank, kind, moment)
    run.survive(*([fault] if moment in IN_REQUEST else [((rank + 1) % 4, "kill", "first step"), fault]))


@thorough
@pytest.mark.parametrize(
    "faults",
    [
        [(0, "kill", "launch"), (2, "stop", "load")],
        pytest.param(
            [(1, "stop", "launch"), (3, "raise", "load"), (2, "kill", "verify"), (0, "stop", "verify")],
            marks=pytest.mark.skipif(not EVERY_RANK, reason="two minutes: make test-faults"),
        ),
    ],
)
def test_the_first_start(
    faults: list[tuple[int, Kind, Moment]], config: RunConfig, flux2_dir: Path, run: Run, tmp_path: Path
) -> None:
    """Ranks that are lost before there was a request: another start is tried, and the picture is right."""
    gang = type(run.gang)(config.launch, 4, "cpu")
    planted = plant(tmp_path, faults)
    gang.planted = list(planted)
    with Engine.start(config, flux2_dir, make_gang=lambda *_: gang) as engine:
        print(f"{faults}: noticed after at most {noticed(gang, planted):.2f} s")
        generation = engine.generate(PROMPT, steps=STEPS, height=SIZE, width=SIZE)
    assert torch.equal(torch.cat(generation.latents), run.expected)
    (fault,) = generation.report["faults"]
    assert len(fault["meanwhile"]) == len(faults) - 1


@thorough
@LOCAL
@pytest.mark.timeout(5400)
def test_random_faults(run: Run) -> None:
    """As many as CROSSDOCK_FAULTS says; the seed is fixed. Nothing is left of all the ranks that were lost."""
    others = _ranks() - run.pids()  # of other tests' gangs
    choice = random.Random(20261123)
    found: list[dict[str, Any]] = []
    left = RANDOM_FAULTS
    while left > 0:
        faults = [_random_fault(choice, IN_REQUEST)]
        if left > 1 and choice.random() < 0.2:
            faults.append(_random_fault(choice, COMING_UP))
        found.append(run.survive(*faults))
        left -= len(faults)
    for name in ("detected_s", "recovery_s"):
        times = sorted(fault[name] for fault in found)
        print(f"{name}: median {times[len(times) // 2]:.2f}, longest {times[-1]:.2f} of {len(times)}")
    deadline = time.monotonic() + 20
    while _ranks() - others != run.pids() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _ranks() - others == run.pids(), "a lost rank is still there"
