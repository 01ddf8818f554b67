"""Ranks that load a model by its hub id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from crossdock.launch import Engine
from crossdock.launch.commands.builtin_configs import CONFIGS, builtin_configs
from crossdock.runtime.watch.gang import Gang
from hub_stand_in import BESIDE, REPO, Hub
from tiers import thorough


def test_from_a_name_to_a_picture(hub: Hub, gang_of: Callable[[int], Gang]) -> None:
    """What arrives on the devices is compared with the files, which are links here."""
    said: list[str] = []
    with Engine.start(builtin_configs()["layerwise_tp2"], REPO, gang=gang_of(2), notify=said.append) as engine:
        made = engine.generate("a red fox", width=32, height=32, steps=1)
        assert made.images[0].size == (32, 32)
        assert made.report["composition"]
    assert said[0] == f"{REPO}: fetching: 0.00 of 0.01 GB"
    assert hub.sent == {path: len(data) for path, data in hub.files.items() if path not in BESIDE}


@thorough
def test_ranks_of_torchrun_fetch_once(hub: Hub, tmp_path: Path) -> None:
    """One rank asks which commit is meant, and one fetches it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "crossdock.launch.torchrun", "check"]
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "ranks"), "HF_HUB_DISABLE_XET": "1"}

    def check(name: str) -> subprocess.CompletedProcess[str]:
        line = [*command, name, "--config", str(CONFIGS / "layerwise_tp2.yaml"), "--json"]
        return subprocess.run(line, capture_output=True, text=True, timeout=300, env=os.environ | own)

    done = check(REPO)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["holds"] is True
    assert hub.sent == {path: len(data) for path, data in hub.files.items() if path not in BESIDE}
    assert [path for _, path, _ in hub.asked].count(f"/api/models/{REPO}") == 1
    refused = check("acme/none")
    assert refused.stderr.count("crossdock: error: acme/none: no such directory, and no such model") == 1
    assert "crossdock/launch" not in refused.stderr  # no traceback of ours
