"""A node that is lost, with its ranks: others are started on the nodes that are left, and the picture is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reference import PROMPT
from tiers import thorough

pytest.importorskip("ray", reason="ray is not installed: torchrun has no nodes to lose")

_DRIVER = """
import json, os, signal, sys, threading, time
import psutil, ray, torch
from ray.cluster_utils import Cluster
from crossdock.launch import Engine
from crossdock.runtime import RunConfig

checkpoint, prompt = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**27})
nodes = [cluster.add_node(num_cpus=2, object_store_memory=2**27) for _ in range(2)]
config = RunConfig.parse({
    "parallel": {"tp_degree": 2},
    "offload": {"layerwise": True},
    "launch": {
        "ray_address": cluster.address, "device": "cpu", "cpus_per_rank": 1.0, "recovery": {"keep_every": 1},
    },
})


def lose(step, of):
    if step == 2 and len(nodes) == 2:
        (place,) = {row["NodeID"] for row in used}
        node = next(node for node in nodes if node.node_id == place)
        nodes.remove(node)
        threading.Thread(target=cluster.remove_node, args=(node, False)).start()


def node_of(worker):
    return __import__("ray").get_runtime_context().get_node_id()


with Engine.start(config, checkpoint) as engine:
    options = {"steps": 30, "height": 64, "width": 64}
    expected = engine.generate(prompt, **options).latents[0]
    places = engine.gang.collective_rpc(node_of, timeout_s=60)
    used = [{"NodeID": place} for place in places]
    found = engine.generate(prompt, progress=lose, **options)
    after = engine.gang.collective_rpc(node_of, timeout_s=60)
print("RESULT " + json.dumps({
    "equal": torch.equal(found.latents[0], expected),
    "faults": found.report["faults"],
    "before": places,
    "after": after,
}))
cluster.shutdown()
"""


@thorough
@pytest.mark.timeout(300)
def test_ranks_move_to_another_node(flux2_dir: Path) -> None:
    """The ranks' node is gone, with its host memory: they start elsewhere, read the checkpoint, and go on."""
    command = [sys.executable, "-c", _DRIVER, str(flux2_dir), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    print(result["faults"])
    assert result["equal"]
    (fault,) = result["faults"]
    assert fault["kind"] == "died"
    assert fault["resumed_after"] > 0
    assert set(result["before"]).isdisjoint(result["after"])
