"""The xfuser adapter: its limits, and its numbers against softmax attention in float64.

The numbers come from xfuser's real USP on four gloo processes. Only what probes for an accelerator is stubbed, in
those processes alone: see `import_without_accelerator`.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_rank import admitted
from processes import run_ranks
from torch import Tensor, nn

import crossdock.parallel.xfuser_attention as xfuser_attention
import crossdock.runtime.rank.parallelize as model_parallelism
from crossdock.parallel.mesh import Mesh
from crossdock.parallel.sequence import SequenceLayout
from crossdock.parallel.xfuser_attention import XFuserAttention, xfuser_installed, xfuser_limits
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.parallelize import ModelParallelism
from tiers import thorough

RANKS = 4
TIME_LIMIT_S = 120
LAYOUTS = {"ulysses 4": (4, 1), "ring 4": (1, 4), "ulysses 2 x ring 2": (2, 2)}
SEGMENTS, HEADS = (16, 144), 8
ERRORS = {
    "uneven": r"segments \(5, 143\) give \(38, 37, 37, 36\); use parallel.attention: native",
    "scale": "the scale asked for is 0.7; use parallel.attention: native",
    "causal": "bidirectional",
    "mask": "it takes no mask with ring",
    "float32": "its ring needs float16 or bfloat16",
}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("cuda", 1, 24, 4), None),
        (("cuda", 1, 30, 1), None),
        (("cpu", 1, 24, 4), "it runs on CUDA only, and the device is cpu"),
        (("cuda", 2, 24, 4), "it works with tp_degree 1 only, and tp_degree is 2"),
        (("cuda", 1, 30, 4), "30 attention heads do not divide by ulysses_degree 4"),
    ],
)
def test_limits(arguments: tuple[str, int, int, int], reason: str | None) -> None:
    assert xfuser_limits(*arguments) == reason


def test_copies_may_use_the_link_after_each_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 32: whoever holds copies back for collectives must hear of xfuser's as well, and not before them."""
    order: list[str] = []

    def usp(query: Tensor, *_: Any, **__: Any) -> Tensor:
        order.append("attention")
        return query

    stub = types.SimpleNamespace(USP=usp, AttentionBackendType=types.SimpleNamespace(SDPA=None))
    monkeypatch.setattr(xfuser_attention, "_module", lambda _: stub)
    place: dict[str, Any] = {"ulysses_rank": 0, "ulysses_degree": 2, "ring_rank": 0, "ring_degree": 1}
    attention = XFuserAttention(
        **place, ulysses_group=None, ring_group=None, after_collective=lambda: order.append("link")
    )
    query = torch.zeros(1, 4, 2, 8)
    for _ in range(2):
        attention.attend(query, query, query, layout=SequenceLayout((8,), 2))
    assert order == ["attention", "link"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(1, 1, 8, 8)}, r"padding, and this one of shape \(1, 1, 8, 8\) has rows .*; use parallel"),
        (
            {"key_layout": SequenceLayout((4, 4), 2)},
            "the queries' own sequence, and these are of another; use parallel",
        ),
    ],
)
def test_what_only_the_native_attention_has(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = types.SimpleNamespace(USP=None, AttentionBackendType=types.SimpleNamespace(SDPA=None))
    monkeypatch.setattr(xfuser_attention, "_module", lambda _: stub)
    place: dict[str, Any] = {"ulysses_rank": 0, "ulysses_degree": 2, "ring_rank": 0, "ring_degree": 1}
    attention = XFuserAttention(**place, ulysses_group=None, ring_group=None)
    query = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention.attend(query, query, query, layout=SequenceLayout((8,), 2), **options)


@pytest.mark.parametrize("kind", ["xfuser", "native"])
def test_a_rank_has_the_attention_that_its_config_asks_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    for name in ("XFuserAttention", "SequenceParallelAttention"):
        monkeypatch.setattr(model_parallelism, name, lambda name=name, **options: given.update({name: options}))
    shape = types.SimpleNamespace(ulysses=2, ring=1)
    mesh: Any = types.SimpleNamespace(shape=shape, groups={"ulysses": None, "ring": None}, index_in=lambda _: 0)
    plan: Any = types.SimpleNamespace(config=RunConfig.parse({"parallel": {"attention": kind}}))
    calls: list[int] = []
    model_parallelism.make_attention(plan, mesh, lambda: calls.append(1))
    assert list(given) == ["XFuserAttention" if kind == "xfuser" else "SequenceParallelAttention"]
    next(iter(given.values()))["after_collective"]()
    assert calls == [1]


def test_the_worker_tells_its_stream_of_collectives(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else copies do not know when the link is free."""
    apply, given = ModelParallelism.apply, []

    def applied(model: nn.Module, plan: RunPlan, mesh: Mesh, after_collective: Callable[[], None]) -> ModelParallelism:
        given.append(after_collective)
        return apply(model, plan, mesh, after_collective)

    monkeypatch.setattr(ModelParallelism, "apply", applied)
    with admitted(make_plan(RunConfig.parse({"offload": {"layerwise": True}}), flux2_dir, "cpu")) as worker:
        calls: list[int] = []
        monkeypatch.setattr(worker.loaded.stream, "collective_issued", lambda: calls.append(1))
        given[0]()
    assert calls == [1]


def test_importing_the_adapter_does_not_import_xfuser() -> None:
    code = "import sys, crossdock.parallel.xfuser_attention; sys.exit('xfuser' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank wrote down: errors in numbers, and the messages of refused calls."""
    if not xfuser_installed():
        pytest.skip("xfuser is not installed: pip install 'crossdock[xdit]'")
    for needed in ("distvae", "einops"):  # all that the import of USP needs of xfuser's many dependencies
        pytest.importorskip(needed)
    return run_ranks(__file__, tmp_path_factory.mktemp("gang"), RANKS, TIME_LIMIT_S)


@thorough
@pytest.mark.parametrize(
    ("layout", "call", "limit"),
    [
        ("ulysses 4", "plain", 2e-6),
        ("ulysses 4", "masked", 2e-6),
        ("ulysses 4", "gqa", 2e-6),
        ("ring 4", "plain", 2e-3),
        ("ring 4", "gqa", 2e-3),
        ("ulysses 2 x ring 2", "plain", 2e-3),
        ("ulysses 2 x ring 2", "gqa", 2e-3),
    ],
)
def test_numbers(measured: list[dict[str, Any]], layout: str, call: str, limit: float) -> None:
    error = max(of_rank[f"{layout}: {call}"] for of_rank in measured)
    print(f"{layout}: {call}: {error:.1e}")
    assert error < limit


@thorough
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", ERRORS)
def test_refuses(measured: list[dict[str, Any]], layout: str, call: str) -> None:
    if layout == "ulysses 4" and call in ("mask", "float32"):
        pytest.skip("a limit of ring only")
    for of_rank in measured:
        assert pytest.raises(ValueError, match=ERRORS[call]).matches(ValueError(of_rank[f"{layout}: {call}"]))


# -- in the four processes -----------------------------------------------------------------------------------


def import_without_accelerator() -> None:
    """xfuser 0.7.0 imports on no machine without CUDA and triton; and its flash kernel for the ring is CUDA's."""
    triton_kernels: Any = types.ModuleType("xfuser.core.sparge_attention.block_mask")
    triton_kernels.get_block_map_meansim = None
    sys.modules[triton_kernels.__name__] = triton_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "cuda", "12.8")
        backend = importlib.import_module("xfuser.core.distributed.attention_backend")
        importlib.import_module("xfuser.model_executor.layers.usp")

    def flash(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        return out, lse

    backend.ATTENTION_FUNCTION_REGISTRY[backend.AttentionBackendType.SDPA_FLASH] = flash


def work(folder: Path, rank: int) -> None:
    from test_sequence_attention import Case, Place, difference, make_bias, random_heads, softmax_attention

    torch.set_num_threads(1)
    import_without_accelerator()
    store, timeout = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timeout)
    layout = SequenceLayout(SEGMENTS, RANKS)
    found: dict[str, Any] = {}

    def measure(place: Place, attention: XFuserAttention, dtype: torch.dtype, kv_heads: int, mask: str) -> float:
        torch.manual_seed(0)
        heads = (HEADS, kv_heads, kv_heads)
        full = [random_heads(2, layout.total, count, dtype=dtype) for count in heads]
        bias, keep = make_bias(Case(SEGMENTS, HEADS, mask=mask))
        local = [place.local(tensor, layout) for tensor in full]
        out = attention.attend(*local, layout=layout, mask=keep, enable_gqa=kv_heads != HEADS)
        return difference(out, place.local(softmax_attention(*full, bias)[0], layout))

    def refusal(attention: XFuserAttention, segments: tuple[int, ...] = SEGMENTS, **options: Any) -> str:
        odd = SequenceLayout(segments, RANKS)
        dtype = options.pop("dtype", torch.float16)
        query = random_heads(1, odd.lengths[rank], HEADS, dtype=dtype)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked by the test
            attention.attend(query, query, query, layout=odd, **options)
        return str(caught.value)

    for name, degrees in LAYOUTS.items():
        place = Place.connect(rank, *degrees)
        attention = place.attention(XFuserAttention)
        dtype = torch.float32 if degrees[1] == 1 else torch.float16
        found[f"{name}: plain"] = measure(place, attention, dtype, HEADS, "")
        found[f"{name}: gqa"] = measure(place, attention, dtype, HEADS // 2, "")
        found[f"{name}: uneven"] = refusal(attention, (5, 143))
        found[f"{name}: scale"] = refusal(attention, scale=0.7)
        found[f"{name}: causal"] = refusal(attention, is_causal=True)
        if degrees[1] == 1:
            found[f"{name}: masked"] = measure(place, attention, dtype, HEADS, "tail bool 2")
        else:
            found[f"{name}: mask"] = refusal(attention, mask=torch.ones(1, layout.total, dtype=torch.bool))
            found[f"{name}: float32"] = refusal(attention, dtype=torch.float32)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
