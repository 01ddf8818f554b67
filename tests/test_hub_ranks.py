"""Ranks that load a model by its hub id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
    assert said[0] == f"{REPO}: fetching: 0 bytes of 11.9 MB"
    assert hub.sent == {path: len(data) for path, data in hub.files.items() if path not in BESIDE}


_DRIVER = """
import json, shutil, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from crossdock.launch import Engine
from crossdock.launch.gangs.ray.gang import RayGang
from crossdock.runtime import RunConfig

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**27})
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=2**27)
config = RunConfig.parse({
    "parallel": {"tp_degree": 2},
    "launch": {"ray_address": cluster.address, "device": "cpu", "cpus_per_rank": 1.0},
})


class Elsewhere(RayGang):
    def start(self):
        super().start()
        shutil.rmtree(sys.argv[2])  # on the ranks' nodes nothing was fetched yet


def node_of(worker):
    return __import__("ray").get_runtime_context().get_node_id()


with Engine.start(config, sys.argv[1], make_gang=Elsewhere, rehearse=True) as engine:
    nodes = engine.gang.collective_rpc(node_of, timeout_s=60)
    print("RESULT " + json.dumps({"nodes": len(set(nodes)), "violations": len(engine.contract_result.violations)}))
cluster.shutdown()
"""


@thorough
def test_nodes_of_a_cluster_fetch_for_themselves(hub: Hub, tmp_path: Path) -> None:
    """They are on one machine here, where one of them fetches what both read."""
    pytest.importorskip("ray", reason="ray is not installed")
    cache = tmp_path / "nodes"
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", _DRIVER, REPO, str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | own)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    assert result == {"nodes": 2, "violations": 0}
    once = {path: len(data) for path, data in hub.files.items() if path not in BESIDE}
    assert hub.sent == {path: 2 * nbytes for path, nbytes in once.items()}  # the driver, which plans, and the nodes


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
