"""What takes connections during a run on one machine: nothing of ours, but on loopback."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import descendants, listening

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.watch.gang import Gang
from reference import PROMPT
from tiers import thorough

LOOPBACK = {"127.0.0.1", "::1"}


def _own() -> Callable[[Any], tuple[int, list[tuple[str, int]], dict[str, str | None]]]:
    """What asks a rank for (pid, what it listens on, what it was told). Made here: the rank knows nothing of tests."""

    def own(worker: Any) -> tuple[int, list[tuple[str, int]], dict[str, str | None]]:
        import os

        import psutil

        there = [each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        names = ("GLOO_SOCKET_IFNAME", "RAY_AUTH_MODE")
        return os.getpid(), [(each.ip, each.port) for each in there], {name: os.environ.get(name) for name in names}

    return own


def test_ranks_of_ray_listen_on_loopback(ray_gang_of: Callable[[int], Gang]) -> None:
    """The rendezvous, and what gloo opens for the other ranks. Ray's own worker port is one per process, and asks for a
    token; it is told apart by being there in a process that is no rank.
    """
    ray = pytest.importorskip("ray")

    ranks = ray_gang_of(2).collective_rpc(_own(), timeout_s=60)
    rays_own = len(ray.get(ray.remote(num_cpus=0)(_own()).remote(None), timeout=60)[1])
    for rank, (pid, sockets, environment) in enumerate(ranks):
        outside = [socket for socket in sockets if socket[0] not in LOOPBACK]
        print(f"rank {rank} (process {pid}): loopback ports {sorted({p for a, p in sockets if a in LOOPBACK})}; Ray's")
        print("   ", *(f"{address} port {port}" for address, port in outside))
        assert len(outside) <= rays_own, "a rank listens outside loopback, beside Ray's worker port"
        assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert any(address in LOOPBACK for address, _ in ranks[0][1]), "the rendezvous is not where it was looked for"


def test_ray_asks_for_a_token(ray_gang_of: Callable[[int], Gang]) -> None:
    """Whoever reaches Ray's ports could run code in it; one that is started here asks who he is, as by default."""
    ranks = ray_gang_of(2).collective_rpc(_own(), timeout_s=60)
    assert [environment["RAY_AUTH_MODE"] for *_, environment in ranks] == ["token"] * 2


def test_what_rays_processes_listen_on(ray_gang_of: Callable[[int], Gang]) -> None:
    """For the table in the README: printed, as Ray's ports are its own."""
    ray_gang_of(2)
    found = {
        (child.name(), address) for child in descendants(os.getpid()) for address, _ in listening(child.pid) if address
    }
    for name, address in sorted(found):
        print(f"{name}: {address}")


@thorough
def test_a_run_with_one_rank_of_ray(ray_gang_of: Callable[[int], Gang], flux2_dir: Path) -> None:
    """With a picture: nothing is opened while it is drawn."""
    gang = ray_gang_of(1)
    before = gang.collective_rpc(_own(), timeout_s=60)[0][1]
    with Engine.start(RunConfig(), flux2_dir, gang) as engine:
        engine.generate(PROMPT, steps=1, height=64, width=64)
        after = gang.collective_rpc(_own(), timeout_s=60)[0][1]
    assert {socket for socket in after if socket[0] not in LOOPBACK} == {s for s in before if s[0] not in LOOPBACK}
