"""Ranks as plain processes: every test file that needs them is also the program that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from crossdock.offload.memory.store_handle import PREFIX


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


def listening(pid: int) -> list[tuple[str, int]]:
    """(address, port) of every TCP socket on which a process takes connections; none, where it is gone."""
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return []
    return [(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN]


def descendants(pid: int) -> list[psutil.Process]:
    """The processes that a process has started, and those that these have; none, where it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def store_holders(inode: int) -> set[int]:
    """Processes that map or hold open the host store with this inode."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines = (process / "maps").read_text().splitlines()
            files = list((process / "fd").iterdir())
        except OSError:  # it ended, or is not ours
            continue
        mapped = any(PREFIX in line and line.split()[4] == str(inode) for line in lines)
        if mapped or any(_is_store(file, inode) for file in files):
            found.add(int(process.name))
    return found


def _is_store(file: Path, inode: int) -> bool:
    try:
        return PREFIX in os.readlink(file) and file.stat().st_ino == inode
    except OSError:  # closed meanwhile
        return False
