"""Blocks in tensor and sequence parallelism under `torch.compile`: no graph break, the same numbers, the same record.

The ranks are forked from one process, this file run as a script, which has imported everything once.
"""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from parallel_models import CASES, Case, build
from processes import run_ranks
from test_parallel_models import tensors
from test_tensor_parallel import fill
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from crossdock.offload.live.offloader import LayerwiseOffloader
from crossdock.parallel.attention import SequenceParallelAttention
from crossdock.parallel.group import AtRunTime, Group
from crossdock.parallel.mesh import Mesh, MeshShape
from crossdock.parallel.regions import SequenceParallelism
from crossdock.parallel.tensor import EXCHANGING, TensorParallelism
from crossdock.runtime.rank.attention_backend import AttentionBinding
from tiers import ALL, not_quick

TIME_LIMIT_S = 1500 if ALL else 240
pytestmark = [not_quick, pytest.mark.timeout(TIME_LIMIT_S + 60)]
LAYOUTS = {
    "tp 2": MeshShape(tp=2),
    "ulysses 2": MeshShape(ulysses=2),
    "ring 2": MeshShape(ring=2),
    "ulysses 2 x ring 2": MeshShape(ulysses=2, ring=2),
}
FAMILIES = list(CASES) if ALL else ["FLUX.2"]
BACKENDS = {"eager": FAMILIES, "aot_eager": FAMILIES if ALL else ["Wan"], "inductor": ["Wan"] if ALL else []}
JOBS = [
    (family, layout, backend)
    for backend, families in BACKENDS.items()
    for layout in LAYOUTS
    for family in families
    if layout != "ulysses 2 x ring 2" or (backend == "eager" and family in FAMILIES[:: 4 if ALL else 1])
]
STREAMED = [("Wan", "tp 2", way) for way in ("streamed, block", "streamed, forward")]
INDUCTOR_LIMIT = 1e-6
"""Relative; it sums in another order."""

Job = tuple[str, str, str]
Found = dict[str, Any]


# -- in one process ------------------------------------------------------------------------------------------


@pytest.fixture
def lone(monkeypatch: pytest.MonkeyPatch) -> Group:
    """A group of one rank, in effect."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.mul_(2))
    torch._dynamo.reset()
    counters.clear()
    return Group(None, "tp", (0, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"] if ALL else ["eager", "aot_eager"])
def test_what_has_no_use_or_no_order_is_kept(lone: Group, backend: str) -> None:
    """A collective whose result nobody uses is dropped, two that do not depend on each other change places."""

    def exchange(x: Tensor) -> Tensor:
        unused, first, second = x[:1].clone(), x[:2] + 1, x[:3] + 1
        for part in (second, first, unused):
            lone.all_reduce(part)
        return first.sum() - second.sum()

    compiled: Callable[[Tensor], Tensor] = torch.compile(exchange, fullgraph=True, backend=backend)
    assert torch.equal(compiled(torch.arange(4.0)), exchange(torch.arange(4.0)))
    names = [call.what for call in lone.record().last]
    assert names == [f"all_reduce torch.float32 {size}" for size in (3, 2, 1)] * 2


def test_sizes_that_change(lone: Group) -> None:
    """What is recorded of a symbol is the size that it had first."""

    def exchange(x: Tensor) -> Tensor:
        arrived = torch.empty_like(x)
        lone.all_to_all(arrived, x, [len(x)], [len(x)], ((len(x), 2), [len(x)], (7,)))
        return arrived + 1

    compiled: Callable[[Tensor], Tensor] = torch.compile(exchange, fullgraph=True, backend="eager", dynamic=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", lambda arrived, message, *_, group: arrived.copy_(message))
        for size in (3, 4, 5):
            assert torch.equal(compiled(torch.arange(float(size))), torch.arange(float(size)) + 1)
            assert lone.record().last[-1].what == f"all_to_all torch.float32 ({size}, 2) [{size}] (7,)"
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_code_does_not_keep_a_group(lone: Group) -> None:
    """A mesh that is gone stays in memory, or a compiled block goes on with a group that is closed."""
    group = Group(None, "tp", (0, 1))  # type: ignore[arg-type]
    graphs: list[Callable[..., Any]] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.forward)
        return graph.forward

    def exchange(x: Tensor, group: Group) -> Tensor:
        total = x + 1
        group.all_reduce(total)
        return total

    torch.compile(exchange, fullgraph=True, backend=keep)(torch.ones(1), group)
    assert group.record().issued == 1
    del group
    gc.collect()
    with pytest.raises(RuntimeError, match="is gone"):
        graphs[0](torch.ones(1))


# -- on two and four processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Found]]:
    """Job -> what every rank wrote down."""
    result: dict[str, list[Found]] = run_ranks(__file__, tmp_path_factory.mktemp("gang"), 1, TIME_LIMIT_S)[0]
    return result


@pytest.mark.parametrize("job", JOBS + STREAMED, ids=", ".join)
def test_every_block_is_one_graph(found: dict[str, list[Found]], job: Job) -> None:
    """A block breaks, gives other numbers, or issues its collectives when it is traced, not each time that it runs."""
    for of_rank in found[", ".join(job)]:
        print(f"{', '.join(job)}: {of_rank}")
        assert of_rank["breaks"] == {}
        assert 0 < of_rank["graphs"] <= of_rank["blocks"]
        assert of_rank["issued"] > 0
        assert of_rank["records"] == ["same", "same"]
        assert of_rank["callbacks"] == [of_rank["callbacks"][0]] * 3 != [0] * 3
        assert of_rank["error"] <= (INDUCTOR_LIMIT if job[2] == "inductor" else 0)


# -- what a rank does ----------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Of every stack of blocks."""
    lists = [module for module in model.children() if isinstance(module, nn.ModuleList)]
    return [block for stack in lists for block in stack if any(True for _ in block.parameters())]


class Counted:
    """A backend that counts its graphs."""

    def __init__(self, backend: str) -> None:
        self.graphs = 0
        self._compile: Any = lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return self._compile(graph, inputs)


def parallel(case: Case, mesh: Mesh, callback: AtRunTime) -> nn.Module:
    """The rank's part of the model."""
    whole = build(case)
    model, shape = copy.deepcopy(whole), mesh.shape
    place = mesh.index_in("tp"), shape.tp, mesh.groups["tp"]
    fill(model, whole, TensorParallelism.apply(model, case.plan, *place))
    for module in model.modules():
        if isinstance(module, EXCHANGING):
            module.register_forward_hook(lambda *_: callback())
    if (group := mesh.groups["sequence"]) is not None:
        attention = SequenceParallelAttention(
            ulysses_group=mesh.groups["ulysses"],
            ulysses_rank=mesh.index_in("ulysses"),
            ulysses_degree=shape.ulysses,
            ring_group=mesh.groups["ring"],
            ring_rank=mesh.index_in("ring"),
            ring_degree=shape.ring,
            after_collective=callback,
        )
        sequence = SequenceParallelism(attention, shape.sequence_index(mesh.rank), shape.sequence, group, callback)
        sequence.apply(model, case.regions)
        AttentionBinding(model, sequence)
    return model


def compare(case: Case, mesh: Mesh, way: str) -> Found:
    """One run as it is, then two with every block compiled."""
    called: list[None] = []
    callback = AtRunTime(lambda: called.append(None))
    model = parallel(case, mesh, callback)
    torch.manual_seed(1)
    inputs = case.inputs()

    def run() -> tuple[list[Tensor], dict[str, list[str]], int]:
        before = {record.name: record.issued for record in mesh.records()}
        called.clear()
        output = tensors(model(**copy.deepcopy(inputs), return_dict=False))
        names = {r.name: [call.what for call in r.last if call.number > before[r.name]] for r in mesh.records()}
        assert all(len(names[r.name]) == r.issued - before[r.name] for r in mesh.records()), "more than are kept"
        return output, names, len(called)

    offloader = LayerwiseOffloader(model, torch.device("cpu")) if "streamed" in way else None
    expected, record, callbacks = run()
    torch._dynamo.reset()
    counters.clear()
    backend = Counted("eager" if offloader else way)
    blocks = blocks_of(model)
    for block in blocks:
        if "forward" in way:
            block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)  # type: ignore[method-assign]
        else:
            block.compile(fullgraph=True, backend=backend)
    runs = [run(), run()]
    if offloader:
        offloader.remove()
    return {
        "graphs": backend.graphs,
        "blocks": len(blocks),
        "breaks": dict(counters["graph_break"]),
        "issued": sum(map(len, record.values())),
        "records": ["same" if names == record else [names, record] for _, names, _ in runs],
        "callbacks": [callbacks, *(count for _, _, count in runs)],
        "error": max(
            float((found - whole).abs().max() / whole.abs().max())
            for output, _, _ in runs
            for found, whole in zip(output, expected, strict=True)
        ),
    }


def work(folder: Path, layout: str, rank: int) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    shape, store = LAYOUTS[layout], f"file://{folder}/{layout.replace(' ', '')}"
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=shape.world_size, timeout=timeout)
    mesh = Mesh.connect(shape, rank, 60, None)
    jobs = [job for job in JOBS + STREAMED if job[1] == layout]
    results = {", ".join(job): compare(CASES[job[0]], mesh, job[2]) for job in jobs}
    (folder / f"{layout}, {rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def lead(folder: Path) -> None:
    """Every layout's ranks, one layout after the other."""
    found: dict[str, list[Found]] = {}
    fork = multiprocessing.get_context("fork")
    for layout, shape in LAYOUTS.items():
        ranks = [
            fork.Process(target=work, args=(folder, layout, rank), daemon=True) for rank in range(shape.world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIME_LIMIT_S)
        assert [process.exitcode for process in ranks] == [0] * len(ranks)
        for rank in range(len(ranks)):
            for job, result in json.loads((folder / f"{layout}, {rank}.json").read_text()).items():
                found.setdefault(job, []).append(result)
    (folder / "rank0.json").write_text(json.dumps(found))


if __name__ == "__main__":
    lead(Path(sys.argv[1]))
