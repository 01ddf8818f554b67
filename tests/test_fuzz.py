"""Damaged input of every kind: each is accepted, or refused with one message, in time and in memory; nothing runs.

Seeded: 100 inputs, 10,000 in `make test-all` (or CROSSDOCK_FUZZ=N). They run one by one in a process of their own
(`fuzz_process.py`), on the way of the command line. A failure prints the input and the command that repeats it alone.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from fuzzing import SHARES, FuzzInput, make_input, shorten
from tiers import how_many, not_quick

INPUTS = int(os.environ.get("CROSSDOCK_FUZZ") or how_many(30, 100, 10_000))
LIMIT_S = 5.0
"""Of the process's own time; one that only waits has `WAITS` times as long, for the machine may be busy."""
WAITS = 6
PREPARE_S = 180.0
CHUNK = 500
"""Inputs of one test, at most."""
MOST_HANGS = 20
"""After so many a test ends: each costs its limit and a new process."""
PROGRAM = Path(__file__).with_name("fuzz_process.py")
CHUNKS = [
    (kind, begin, min(begin + CHUNK, round(INPUTS * share)))
    for kind, share in SHARES.items()
    for begin in range(0, round(INPUTS * share), CHUNK)
]


@dataclass
class Answer:
    """What became of one input; `problem` says in words why it is a failure."""

    outcome: str
    problem: str | None = None
    detail: str = ""
    seconds: float = 0.0
    memory: int = 0


class FuzzProcess:
    """The process that runs inputs; a new one where the last one hung, died or grew.

    Args:
        folder: for the checkpoints, which every process finds there, and for what inputs write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "stderr"
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, kind: str, number: int | str, limit_s: float = LIMIT_S) -> Answer:
        """One input; a process that does not answer in `limit_s` of its own time is killed."""
        self._begin("start" if kind == "planted" else "prepare")
        text = self._ask(f"{kind} {number} {limit_s}", limit_s)
        if text is None:
            tail, code = self._log.read_text(errors="replace")[-4000:], self._end()
            problem = f"hang: no answer in {limit_s:g} s" if code is None else f"died: exit code {code}"
            return Answer("none", problem, tail, limit_s)
        answer = Answer(**json.loads(text))
        if (answer.problem or "").startswith("memory"):
            self._end()
        return answer

    def close(self) -> None:
        self._end()

    def _begin(self, how: str) -> None:
        """Have a process that is ready; that takes long, and is no input's time."""
        if self._process is None and self._ask(f"{how} - 0", PREPARE_S) is None:
            self._end()
            raise RuntimeError(f"the process does not start:\n{self._log.read_text(errors='replace')[-4000:]}")

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, str(PROGRAM), "--serve", str(self.folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                )
        return self._process

    def _ask(self, job: str, limit_s: float) -> bytes | None:
        """The line that answers `job`; None: there is none, in time or at all."""
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{job}\n".encode())
        began, line, clock = time.monotonic(), b"", psutil.Process(process.pid)
        used_s = sum(clock.cpu_times()[:2])
        while not line.endswith(b"\n"):
            if not select.select([process.stdout], [], [], 0.2)[0]:
                waited_s, busy_s = time.monotonic() - began, sum(clock.cpu_times()[:2]) - used_s
                if busy_s > limit_s or waited_s > WAITS * limit_s:
                    return None
                continue
            part = process.stdout.read(65536)
            if not part:
                return None
            line += part
        return line

    def _end(self) -> int | None:
        """End the process; its exit code, None where it had not ended by itself."""
        process, self._process = self._process, None
        if process is None:
            return None
        with process:
            try:
                code: int | None = process.wait(0.5)
            except subprocess.TimeoutExpired:
                code = None
                process.send_signal(signal.SIGKILL)
            process.wait(30)
        return code


@dataclass
class Tally:
    """What became of the inputs so far."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[tuple[FuzzInput, Answer]] = field(default_factory=list)
    seconds: float = 0.0
    slowest_s: float = 0.0
    memory: int = 0

    def add(self, given: FuzzInput, answer: Answer) -> None:
        self.outcomes[given.kind, "failed" if answer.problem else answer.outcome] += 1
        if answer.problem:
            self.failures.append((given, answer))
        self.seconds += answer.seconds
        self.slowest_s = max(self.slowest_s, answer.seconds)
        self.memory = max(self.memory, answer.memory)

    def __str__(self) -> str:
        lines = []
        for kind in sorted({kind for kind, _ in self.outcomes}):
            counts = {name: self.outcomes[kind, name] for name in ("refused", "accepted", "failed")}
            said = ", ".join(f"{count} {name}" for name, count in counts.items())
            lines.append(f"{kind}: {sum(counts.values())} inputs: {said}")
        problems = Counter((answer.problem or "").partition(":")[0] for _, answer in self.failures)
        found = {"traceback": 0, "hang": 0} | problems
        lines.append(", ".join(f"{name} {count}" for name, count in found.items()))
        memory = f"greatest memory {self.memory / 2**20:.0f} MiB more than before the input"
        lines.append(f"{self.seconds:.0f} s, slowest {self.slowest_s:.2f} s, {memory}")
        return "\n".join(lines)

    def show_failures(self, most: int = 15) -> str:
        """The shortest input of every way to fail, the most frequent ways first."""
        ways: dict[str, list[tuple[FuzzInput, Answer]]] = {}
        for given, answer in self.failures:
            ways.setdefault(answer.problem or "", []).append((given, answer))
        ranked = sorted(ways.items(), key=lambda way: -len(way[1]))
        shown = []
        for problem, cases in ranked[:most]:
            given, answer = min(cases, key=lambda case: (len(case[0].changes), len(case[0].data)))
            shown.append(f"--- {len(cases)} x {problem}\n{given.describe()}\n{shorten(answer.detail, 3000)}")
        if len(ranked) > most:
            shown.append(f"--- and {len(ranked) - most} ways more")
        return "\n".join(shown)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FuzzProcess]:
    made = FuzzProcess(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def total() -> Tally:
    """Of all tests of this file."""
    return Tally()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "begin", "end"), CHUNKS, ids=lambda value: str(value))
def test_every_input_is_accepted_or_refused(
    process: FuzzProcess, total: Tally, kind: str, begin: int, end: int
) -> None:
    tally, hangs = Tally(), 0
    for number in range(begin, end):
        answer = process.run(kind, number)
        given = make_input(kind, number, process.folder / "checkpoints")
        tally.add(given, answer)
        total.add(given, answer)
        hangs += (answer.problem or "").startswith("hang")
        if hangs >= MOST_HANGS:
            break
    print(tally)
    if tally.failures:
        pytest.fail(f"{tally}\n{tally.show_failures()}", pytrace=False)


def test_what_was_run(total: Tally) -> None:
    """The sum of the tests above, printed with `pytest -rP`. Each kind must have been refused and accepted."""
    if not total.outcomes:
        pytest.skip("no inputs were run in this process")
    print(f"{total.outcomes.total()} inputs\n{total}")
    if total.outcomes.total() >= 400:
        for kind in {kind for kind, _ in total.outcomes}:
            assert total.outcomes[kind, "refused"]
            assert total.outcomes[kind, "accepted"]


@not_quick
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("raises", "traceback: ZeroDivisionError"),
        ("exits", "traceback: SystemExit"),
        ("executes", "executed: "),
        ("asks", "stdin: "),
        ("starts", "forbidden: os.system"),
        ("memory", "memory: "),
        ("hangs", "hang: no answer in 1 s"),
        ("dies", "died: exit code 1"),
    ],
)
def test_the_harness_finds_a_planted_fault(tmp_path: Path, fault: str, problem: str) -> None:
    """Each in a process that has imported nothing yet, so that this takes no time."""
    process = FuzzProcess(tmp_path)
    try:
        answer: Any = process.run("planted", fault, limit_s=1.0 if fault == "hangs" else 20.0)
    finally:
        process.close()
    assert answer.problem is not None
    assert answer.problem.startswith(problem)
    if fault == "hangs":
        assert "time.sleep" in answer.detail or "<lambda>" in answer.detail  # where it hung
