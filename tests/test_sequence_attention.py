"""Sequence-parallel attention against softmax attention in float64: the maths alone, then on four processes.

The processes are started once, as this file run as a script, and work through `LAYOUTS` x `CASES`; every rank
writes down how far it was off, and the tests read that.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import Tensor

from crossdock.parallel.attention import SequenceParallelAttention
from crossdock.parallel.group import Group
from crossdock.parallel.kernels import attention, attention_with_lse, merge
from crossdock.parallel.sequence import SequenceLayout, gather_shards, shard_lengths, take_shard
from tiers import not_quick

Attention = TypeVar("Attention")
RANKS = 4
DTYPES = ("float32", "bfloat16")
LAYOUTS = {"ulysses 4": (4, 1), "ring 4": (1, 4), "ulysses 2 x ring 2": (2, 2)}
HEAD_DIM = 16
TIME_LIMIT_S = 120


@dataclass(frozen=True)
class Case:
    segments: tuple[int, ...]
    heads: int
    kv_heads: int | None = None
    batch: int = 2
    mask: str = ""  # which keys (tail, keyless, bias), or who attends to whom (rows, heads); bool, float; 2, 4 dims
    keys: tuple[int, ...] = ()  # segments of another sequence, where the keys are not the queries' own
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    limit: float = 2e-6


CASES = {
    "divides": Case((16, 144), 8),
    "one segment": Case((143,), 6),
    "joint": Case((5, 143), 6, batch=1),
    "heads 3, masked tail": Case((15, 143), 3, mask="tail bool 2"),
    "heads 6, masked tail": Case((15, 143), 6, mask="tail bool 4"),
    "heads 1, masked tail": Case((15, 143), 1, mask="tail float 2"),
    "text shorter than ranks": Case((3, 42), 4, mask="tail float 4"),
    "three segments": Case((3, 11, 26), 5, mask="tail bool 2"),
    "ranks without tokens": Case((2,), 6),
    "ranks without tokens, batch 1": Case((1, 1), 3, batch=1, mask="tail bool 2"),
    "a keyless item": Case((15, 143), 6, mask="keyless bool 2"),
    "additive bias": Case((15, 143), 6, mask="bias float 4"),
    "one mask for the batch": Case((15, 143), 6, mask="shared bool 2"),
    "gqa, compact": Case((15, 143), 8, kv_heads=4, mask="tail bool 2"),
    "gqa, repeated": Case((15, 143), 6, kv_heads=3, mask="tail bool 2"),
    "gqa, one key head": Case((15, 143), 6, kv_heads=1),
    "rows": Case((15, 143), 6, mask="rows bool 4"),
    "rows of bias, one for the batch": Case((5, 43), 4, mask="rows float 4"),
    "rows, uneven heads": Case((3, 42), 3, mask="rows bool 4", batch=1),
    "a bias for every head": Case((15, 53), 6, mask="heads float 4"),
    "rows, gqa": Case((15, 143), 8, kv_heads=4, mask="heads bool 4"),
    "rows on ranks without tokens": Case((2,), 6, mask="rows bool 4"),
    "other keys": Case((143,), 6, keys=(21,)),
    "other keys, fewer than ranks": Case((15, 43), 5, keys=(3,), mask="tail bool 2"),
    "other keys, as many": Case((15, 43), 4, keys=(28, 30), mask="tail bool 4"),
    "other keys, gqa": Case((9,), 8, kv_heads=2, keys=(5, 70), mask="keyless bool 2"),
    "other keys, queries on one rank": Case((1,), 6, keys=(40,), mask="rows float 4"),
    "scale": Case((15, 143), 6, scale=0.1),
    "bfloat16": Case((15, 143), 6, mask="tail bool 2", dtype=torch.bfloat16, limit=2e-2),
    "float16": Case((15, 143), 6, mask="tail bool 2", dtype=torch.float16, limit=3e-3),
}
GATHERS = [(total, dim, dtype) for total in (0, 2, 8, 143) for dim in (0, 1, -1) for dtype in DTYPES]


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The reference, float64. bias: `[batch, keys]` or with rows. Returns out `[batch, seq, heads, head_dim]`, lse."""
    groups = query.shape[2] // key.shape[2]
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + (bias.double()[:, None, None, :] if bias.ndim == 2 else bias.double())
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2), torch.logsumexp(scores, -1)


def random_heads(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, HEAD_DIM).to(dtype)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    assert found.shape == expected.shape
    apart = (found.double() - expected.double()).abs().nan_to_num(torch.inf)
    return float(apart.amax()) if apart.numel() else 0.0


def bool_bias(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)


# -- without processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "parts", "expected"),
    [(143, 4, (36, 36, 36, 35)), (5, 4, (2, 1, 1, 1)), (2, 4, (1, 1, 0, 0)), (0, 3, (0, 0, 0)), (8, 1, (8,))],
)
def test_shard_lengths(total: int, parts: int, expected: tuple[int, ...]) -> None:
    assert shard_lengths(total, parts) == expected


@pytest.mark.parametrize(("total", "parts"), [(3, 0), (-1, 2)])
def test_shard_lengths_refuses(total: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"cannot cut {total} into {parts}"):
        shard_lengths(total, parts)


def test_layout_order_is_what_the_parts_hold() -> None:
    layout = SequenceLayout((5, 6), 4)
    assert layout.total == 11
    assert layout.lengths == (4, 3, 2, 2)
    assert layout.bounds == (0, 4, 7, 9, 11)
    assert layout.order().tolist() == [0, 1, 5, 6, 2, 7, 8, 3, 9, 4, 10]
    assert layout.order() is layout.order("cpu")


@pytest.mark.parametrize("segments", [(143,), (0,), (5, 143), (3, 11, 26), (0, 7)])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_order_matches_shards(segments: tuple[int, ...], parts: int) -> None:
    layout = SequenceLayout(segments, parts)
    pieces = torch.arange(layout.total).split(list(segments))
    shards = [torch.cat([take_shard(piece, 0, parts, part) for piece in pieces]) for part in range(parts)]
    assert torch.equal(torch.cat(shards), layout.order())
    assert tuple(len(shard) for shard in shards) == layout.lengths
    assert len(segments) > 1 or torch.equal(layout.order(), torch.arange(layout.total))


def test_gather_refuses_another_length() -> None:
    with pytest.raises(ValueError, match=r"part 3 of 143 tokens over 4 ranks has 35, but dim 1 .* has 36"):
        gather_shards(torch.zeros(2, 36, 8), 1, 143, 4, 3, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_local_attention(dtype: torch.dtype, kv_heads: int, masked: bool) -> None:
    torch.manual_seed(0)
    query = random_heads(3, 37, 6, dtype=dtype)
    key, value = (random_heads(3, 41, kv_heads, dtype=dtype) for _ in range(2))
    keep = torch.rand(3, 41) < 0.5
    keep[1] = False
    bias = bool_bias(keep).to(dtype) if masked else None
    expected, expected_lse = softmax_attention(query, key, value, bias)
    limit = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    out, lse = attention_with_lse(query, key, value, bias, HEAD_DIM**-0.5)
    assert lse.dtype == torch.float32
    assert difference(out, expected) < limit
    assert difference(attention(query, key, value, bias, HEAD_DIM**-0.5), expected) < limit
    if masked:
        assert (lse[1] == -torch.inf).all()
        lse, expected_lse = lse[::2], expected_lse[::2]
    assert difference(lse, expected_lse) < max(limit, 1e-4 if dtype != torch.float32 else 2e-6)


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (2, 4, 3, 0), (2, 4, 0, 4), (0, 4, 3, 4)], ids=str)
def test_local_attention_of_nothing(shape: tuple[int, int, int, int]) -> None:
    """The CPU kernel dies of a division by zero on empty inputs; a rank without tokens has such ones."""
    batch, seq, heads, keys = shape
    query, key = random_heads(batch, seq, heads), random_heads(batch, keys, heads)
    out, lse = attention_with_lse(query, key, key, torch.zeros(batch, keys), 1.0)
    assert difference(out, torch.zeros(query.shape)) == 0.0
    assert torch.equal(lse, torch.full((batch, heads, seq), -torch.inf))
    assert difference(attention(query, key, key, None, 1.0), out) == 0.0


@pytest.mark.parametrize("shape", [(3, 1, 37, 41), (3, 6, 37, 41), (3, 6, 1, 41)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_local_attention_with_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Some rows have no key: 0 and -inf there."""
    torch.manual_seed(0)
    query, key, value = (random_heads(3, tokens, 6, dtype=dtype) for tokens in (37, 41, 41))
    keep = torch.rand(shape) < 0.5
    keep[1, 0, -1] = False
    bias = bool_bias(keep).to(dtype)
    expected, expected_lse = softmax_attention(query, key, value, bias)
    limit = 1e-6 if dtype == torch.float32 else 2e-2
    out, lse = attention_with_lse(query, key, value, bias, HEAD_DIM**-0.5)
    assert difference(out, expected) < limit
    assert difference(attention(query, key, value, bias, HEAD_DIM**-0.5), expected) < limit
    nothing = expected_lse == -torch.inf
    assert nothing.any()
    assert torch.equal(lse == -torch.inf, nothing)
    assert difference(lse[~nothing], expected_lse[~nothing]) < max(limit, 2e-6)


def test_merge_of_parts_is_attention_to_all() -> None:
    """Item 1 has no key in the first two parts, item 2 none in two others, item 3 none at all."""
    torch.manual_seed(1)
    query = random_heads(4, 9, 3)
    key, value = random_heads(4, 40, 3) * 3, random_heads(4, 40, 3)
    keep = torch.ones(4, 40, dtype=torch.bool)
    keep[1, :20], keep[2, 10:20], keep[2, 30:], keep[3] = False, False, False, False
    bias = bool_bias(keep)
    merged = None
    for part in range(4):
        own = slice(part * 10, part * 10 + 10)
        out, lse = attention_with_lse(query, key[:, own], value[:, own], bias[:, own], 0.25)
        merged = (out, lse) if merged is None else merge(*merged, out, lse)
    assert merged is not None
    expected, expected_lse = softmax_attention(query, key, value, bias, 0.25)
    assert difference(merged[0], expected) < 2e-6
    assert difference(merged[1][:3], expected_lse[:3]) < 4e-6
    assert (merged[0][3] == 0).all()
    assert (merged[1][3] == -torch.inf).all()


def lone_attention() -> SequenceParallelAttention:
    return SequenceParallelAttention(
        ulysses_group=None, ulysses_rank=0, ulysses_degree=1, ring_group=None, ring_rank=0, ring_degree=1
    )


def attend_lone(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    layout = options.pop("layout", SequenceLayout((8,), 1))
    return lone_attention().attend(query, key, key, layout=layout, **options)


@pytest.mark.parametrize(
    ("key_shape", "options", "message"),
    [
        ((2, 8, 4), {"is_causal": True}, "is_causal=True is not possible"),
        ((2, 7, 4), {}, r"key .* has 7 tokens, but part 0 .* has 8; .* must be named in the region's cross"),
        ((2, 8, 4), {"key_layout": SequenceLayout((7,), 1)}, r"key .* has 8 tokens, but part 0 .*\(7,\).* has 7"),
        ((1, 8, 4), {}, "possible is one batch size"),
        ((2, 8, 2), {}, "possible are 4 key heads, or a divisor of it with enable_gqa=True"),
        ((2, 8, 3), {"enable_gqa": True}, "possible are 4 key heads"),
        ((2, 8, 4), {"mask": torch.ones(2, 8, 8)}, r"mask of shape \(2, 8, 8\) .* possible: \[2, 8\]"),
        ((2, 8, 4), {"mask": torch.ones(2, 1, 7, 8)}, r"mask of shape \(2, 1, 7, 8\)"),
        ((2, 8, 4), {"mask": torch.ones(2, 3, 8, 8)}, r"mask of shape \(2, 3, 8, 8\) .* \[2, 1 or 4, 8, 8\]"),
        ((2, 8, 4), {"mask": torch.ones(3, 1, 8, 8)}, r"mask of shape \(3, 1, 8, 8\)"),
        ((2, 8, 4), {"mask": torch.ones(2, 7)}, r"mask of shape \(2, 7\)"),
        ((2, 8, 4), {"mask": torch.ones(3, 8)}, r"mask of shape \(3, 8\)"),
        ((2, 8, 4), {"mask": torch.ones(2, 8, dtype=torch.int64)}, "mask of torch.int64; possible: bool"),
        ((2, 8, 4), {"layout": SequenceLayout((9,), 1)}, r"has 8 tokens, but part 0 of .*\(9,\).* has 9"),
        ((2, 8, 4), {"layout": SequenceLayout((16,), 2)}, "layout has 2 parts, but .* over 1 ranks"),
    ],
)
def test_attend_refuses(key_shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend_lone(random_heads(2, 8, 4), random_heads(*key_shape), **dict(options))


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_a_degree_needs_a_group(axis: str) -> None:
    degrees = {"ulysses_degree": 1, "ring_degree": 1, f"{axis}_degree": 2}
    with pytest.raises(ValueError, match=f"{axis}_degree is 2, but {axis}_group is None"):
        SequenceParallelAttention(ulysses_group=None, ulysses_rank=0, ring_group=None, ring_rank=0, **degrees)


def test_one_rank_is_plain_attention() -> None:
    torch.manual_seed(2)
    query = random_heads(2, 8, 4)
    keep = torch.rand(2, 8) < 0.6
    expected, _ = softmax_attention(query, query, query, bool_bias(keep))
    assert difference(attend_lone(query, query, mask=keep), expected) < 1e-6


# -- on four processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What every rank wrote down: name of the check -> largest error."""
    return run_ranks(__file__, tmp_path_factory.mktemp("gang"), RANKS, TIME_LIMIT_S)


def worst(measured: list[dict[str, float]], check: str) -> float:
    return max(of_rank[check] for of_rank in measured)


@not_quick
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attend(measured: list[dict[str, float]], layout: str, case: str) -> None:
    error = worst(measured, f"{layout}: {case}")
    print(f"{layout}: {case}: {error:.1e}")
    assert error < CASES[case].limit


@not_quick
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_calls_are_bit_identical(measured: list[dict[str, float]], layout: str) -> None:
    assert all(worst(measured, f"{layout}: {case}, again") == 0.0 for case in CASES)


@not_quick
def test_gather_is_the_inverse_of_take(measured: list[dict[str, float]]) -> None:
    assert all(worst(measured, f"gather {gather}") == 0.0 for gather in GATHERS)


@not_quick
@pytest.mark.parametrize("layout", ["ulysses 4", "ring 4"])
def test_agrees_with_yunchang(measured: list[dict[str, float]], layout: str) -> None:
    """Where yunchang 0.6.4 is right: no mask, one segment, everything divides."""
    pytest.importorskip("yunchang")
    assert worst(measured, f"{layout}: yunchang") < 2e-6


@dataclass(frozen=True)
class Place:
    """A rank in one of the `LAYOUTS`; ring outside, Ulysses inside."""

    rank: int
    ulysses: int
    ring: int
    ulysses_group: Group | None
    ring_group: Group | None

    @classmethod
    def connect(cls, rank: int, ulysses: int, ring: int) -> Place:
        inner = [list(range(start, start + ulysses)) for start in range(0, RANKS, ulysses)]
        outer = [list(range(start, RANKS, ulysses)) for start in range(ulysses)]
        groups = []
        for sets in (inner, outer):
            made = [dist.new_group(ranks, timeout=timedelta(seconds=30)) for ranks in sets if len(ranks) > 1]
            groups.append(next((Group(group) for group in made if dist.get_rank(group) >= 0), None))
        return cls(rank, ulysses, ring, *groups)

    def attention(self, kind: Callable[..., Attention]) -> Attention:
        ring_rank, ulysses_rank = divmod(self.rank, self.ulysses)
        return kind(
            ulysses_group=self.ulysses_group,
            ulysses_rank=ulysses_rank,
            ulysses_degree=self.ulysses,
            ring_group=self.ring_group,
            ring_rank=ring_rank,
            ring_degree=self.ring,
        )

    def local(self, tensor: Tensor, layout: SequenceLayout) -> Tensor:
        """`[batch, total, ...]` in the model's order -> this rank's tokens."""
        pieces = tensor.split(list(layout.segments), dim=1)
        return torch.cat([take_shard(piece, 1, layout.parts, self.rank) for piece in pieces], dim=1)


def make_bias(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """The bias `[batch, total]`, or with rows, for the reference, and the mask in the form that the case asks for.

    Of the last item, "tail" leaves the first 45 % of every segment: nothing on the sequence's last ranks.
    """
    if not case.mask:
        return None, None
    kind, form, dims = case.mask.split()
    segments = case.keys or case.segments
    if kind in ("rows", "heads"):
        return make_rows(case, kind, form)
    rows = 1 if kind == "shared" else case.batch
    kept = [torch.arange(size) < max(1, round(0.45 * size)) for size in segments]
    keep = torch.ones(rows, sum(segments), dtype=torch.bool)
    keep[-1] = torch.cat(kept) if kind != "keyless" else False
    bias = bool_bias(keep)
    if kind == "bias":
        bias += torch.randn(bias.shape)
    mask = keep if form == "bool" else bias
    return bias.expand(case.batch, -1), mask if dims == "2" else mask[:, None, None, :]


def make_rows(case: Case, kind: str, form: str) -> tuple[Tensor, Tensor]:
    """Half of all pairs, none in the last row; a float mask adds something to each and serves the whole batch."""
    batch, heads = 1 if form == "float" else case.batch, case.heads if kind == "heads" else 1
    keep = torch.rand(batch, heads, sum(case.segments), sum(case.keys or case.segments)) < 0.5
    keep[:, :, -1] = len(case.segments) == 1 and case.segments[0] == 1
    bias = bool_bias(keep)
    if form == "float":
        bias += torch.randn(bias.shape)
    return bias.expand(case.batch, case.heads, -1, -1), keep if form == "bool" else bias


def attend_case(place: Place, attention: SequenceParallelAttention, case: Case) -> tuple[float, float]:
    """Error against the reference; difference between two calls."""
    torch.manual_seed(3)
    layout = SequenceLayout(case.segments, RANKS)
    key_layout = SequenceLayout(case.keys, RANKS) if case.keys else layout
    kv_heads = case.kv_heads or case.heads
    # heads before tokens, as some processors have it: the local tensors are not contiguous
    query, key, value = (
        random_heads(case.batch, heads, of.total, dtype=case.dtype).transpose(1, 2)
        for heads, of in ((case.heads, layout), (kv_heads, key_layout), (kv_heads, key_layout))
    )
    bias, mask = make_bias(case)
    local = [place.local(query, layout), place.local(key, key_layout), place.local(value, key_layout)]
    options = {"layout": layout, "mask": mask, "scale": case.scale, "enable_gqa": kv_heads != case.heads}
    if case.keys:
        options["key_layout"] = key_layout
    attend = partial(attention.attend, *local, **options)
    first, second = attend(), attend()
    assert first.dtype == case.dtype
    expected, _ = softmax_attention(query, key, value, bias, case.scale)
    return difference(first, place.local(expected, layout)), difference(first, second)


def gather_error(rank: int, total: int, dim: int, dtype: str) -> float:
    torch.manual_seed(4)
    shape = [2, 3, 5]
    shape[dim] = total
    full = torch.randn(shape).to(getattr(torch, dtype))
    shard = take_shard(full, dim, RANKS, rank)
    gathered = gather_shards(shard, dim, total, RANKS, rank, Group(dist.group.WORLD))
    assert gathered.is_contiguous()
    return difference(gathered, full)


def yunchang_error(place: Place, attention: SequenceParallelAttention) -> float:
    """Against its all-to-all around local attention (Ulysses), and against its ring around our local kernel."""
    from yunchang.comm.all_to_all import SeqAllToAll4D
    from yunchang.ring import ring_flash_attn_func

    def kernel(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, **_: Any) -> tuple[Tensor, Tensor]:
        return attention_with_lse(q, k, v, None, softmax_scale)

    torch.manual_seed(5)
    layout = SequenceLayout((160,), RANKS)
    local = [place.local(random_heads(2, 160, 8), layout) for _ in range(3)]
    if place.ring_group is not None:
        options = {"group": place.ring_group.handle, "attn_type": None, "attn_processor": kernel}
        theirs = ring_flash_attn_func(*local, **options)
    else:
        assert place.ulysses_group is not None
        handle = place.ulysses_group.handle
        heads = [SeqAllToAll4D.apply(handle, tensor, 2, 1) for tensor in local]
        out, _ = softmax_attention(*heads)
        theirs = SeqAllToAll4D.apply(handle, out.float(), 1, 2)
    return difference(attention.attend(*local, layout=layout), theirs)


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timeout)
    errors = {f"gather {gather}": gather_error(rank, *gather) for gather in GATHERS}
    for name, degrees in LAYOUTS.items():
        place = Place.connect(rank, *degrees)
        attention = place.attention(SequenceParallelAttention)
        for case in CASES:
            print(f"{name}: {case}", flush=True)
            errors[f"{name}: {case}"], errors[f"{name}: {case}, again"] = attend_case(place, attention, CASES[case])
        if 1 in degrees and importlib.util.find_spec("yunchang"):
            errors[f"{name}: yunchang"] = yunchang_error(place, attention)
    (folder / f"rank{rank}.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
