"""Ranks as plain processes: every test file that needs them is also the program that they run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run_ranks(program: str, folder: Path, ranks: int, limit_s: float) -> list[Any]:
    """Run `program FOLDER RANK` once for every rank; what each wrote to `rankN.json` in `folder`."""
    logs = [(folder / f"log{rank}").open("w") for rank in range(ranks)]
    gang = [
        subprocess.Popen([sys.executable, program, str(folder), str(rank)], stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + limit_s
    try:
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in gang]
    finally:
        for process, log in zip(gang, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    tails = [f"rank {rank}: {(folder / f'log{rank}').read_text()[-2000:]}" for rank in range(ranks)]
    assert codes == [0] * ranks, "\n".join(tails)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
