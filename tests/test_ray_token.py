"""Ray's token: sent to the clusters that ask for one, not to those that do not; what does not fit is one message."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crossdock.runtime.errors import LaunchError
from tiers import thorough

pytest.importorskip("ray")

import ray_cluster
from crossdock.launch.gangs.ray import cluster

ADDRESS = "192.0.2.1:6379"
MODE = "RAY_AUTH_MODE"


@pytest.mark.parametrize(
    ("wanted", "here", "asked", "sent"),
    [
        (None, None, None, "disabled"),
        (None, "a", None, "disabled"),
        (None, "a", "disabled", "disabled"),
        ("a", "a", None, "token"),
        ("a", "a", "Token", "token"),
        ("a", "a", "another", "another"),
        (None, "a", "token", "asks for no token, but RAY_AUTH_MODE is token"),
        ("a", "a", "disabled", "asks for a token, but RAY_AUTH_MODE is disabled; unset it"),
        ("a", None, None, "asks for a token, and there is none here; give the cluster's own: RAY_AUTH_TOKEN"),
        ("a", None, "token", "asks for a token, and there is none here"),
        ("a", "b", None, "does not take the token of ~/.ray/auth_token"),
        ("a", "b", "token", "does not take the token of ~/.ray/auth_token"),
    ],
)
def test_what_is_sent(
    wanted: str | None, here: str | None, asked: str | None, sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wanted`: the cluster's token, `here`: ours, `asked`: RAY_AUTH_MODE, `sent`: the mode, or the refusal."""
    monkeypatch.setenv(MODE, "")  # which is put back afterwards
    monkeypatch.delenv(MODE)
    if asked is not None:
        monkeypatch.setenv(MODE, asked)

    def refuses(cluster: str, mode: str, timeout_s: float) -> bool:
        os.environ[MODE] = mode
        return wanted is not None and wanted != (here if mode == "token" else None)

    tokens = SimpleNamespace(has_token=lambda ignore_auth_mode: here is not None)
    monkeypatch.setattr(cluster, "_refuses", refuses)
    loader = SimpleNamespace(instance=lambda: tokens)
    monkeypatch.setattr(cluster, "_native", SimpleNamespace(AuthenticationTokenLoader=loader))
    if " " in sent:
        with pytest.raises(LaunchError, match=f"launch.ray_address: the Ray cluster at {ADDRESS} {sent}"):
            cluster._agree_on_a_token(ADDRESS, 5)
    else:
        cluster._agree_on_a_token(ADDRESS, 5)
        assert os.environ[MODE] == sent


def test_what_was_chosen_is_not_for_the_next_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ({}, {MODE: "token"}):
        monkeypatch.setattr(os, "environ", dict(asked))
        with cluster._own_token_mode():
            os.environ[MODE] = "disabled"
        assert os.environ == asked


_DRIVER = """
import os, sys, ray
from crossdock.launch.gangs.ray.cluster import connect
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import LaunchError

for address in sys.argv[1:]:
    section = {"timeouts": {"launch_s": 60}} | ({} if address == "none" else {"ray_address": address})
    try:
        assert connect(RunConfig.parse({"launch": section}).launch, 1)
    except LaunchError as error:
        print("SAID", error)
        continue
    make = ray.remote(num_cpus=0)(lambda data: (os.environ.get("RAY_AUTH_MODE"), len(data)))
    print("SAID", *ray.get(make.remote(ray.put(bytes(10**6))), timeout=60))
    ray.shutdown()
"""


@thorough
@pytest.mark.timeout(900)
def test_clusters_with_and_without(tmp_path: Path) -> None:
    """Each kind, from the homes of users who have its token, another or none; by its address, and found by Ray."""
    token, other = secrets.token_hex(32), secrets.token_hex(32)
    homes = {"right": token, "wrong": other, "none": None}
    for name, content in homes.items():
        (folder := tmp_path / name / ".ray").mkdir(parents=True)
        if content is not None:
            (folder / "auth_token").write_text(content)

    def say(home: str, *addresses: str, **more: str) -> list[str]:
        environment = ray_cluster.environment(tmp_path / home, **more)
        command = [sys.executable, "-c", _DRIVER, *addresses]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "InvalidAuthToken" not in done.stderr
        return [line[5:] for line in done.stdout.splitlines() if line.startswith("SAID ")]

    taken, open_to_all = "token 1000000", "None 1000000"
    clusters: Any = ray_cluster.cluster
    with clusters(tmp_path / "right") as closed, clusters(tmp_path / "none") as opened:
        # one process, one cluster after the other, the last its own
        assert say("right", closed.address, opened.address, "none") == [taken, open_to_all, taken]
        assert say("none", closed.address, RAY_AUTH_TOKEN=token) == [taken]
        found, refused = say("wrong", "auto", closed.address, RAY_ADDRESS=opened.address)
        assert found == open_to_all
        assert "does not take the token of ~/.ray/auth_token" in refused
        (refused,) = say("none", closed.address)
        assert "asks for a token, and there is none here" in refused
    assert not list((tmp_path / "none").rglob("auth_token"))
