"""The lossless code: bit for bit what it was, at three quarters of the bytes, in every layout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crossdock.launch.engine.engine import Engine
from crossdock.offload.codecs import on_cuda, on_host
from crossdock.offload.codecs import part_format as formats
from crossdock.offload.codecs.codec import decode_all
from crossdock.offload.codecs.lossless import Lossless
from crossdock.offload.codecs.part_format import BF16, FP16, WINDOW, IncompressibleError, part_formats
from crossdock.offload.memory.layout import BlockLayout
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import ConfigError
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.watch.gang import Gang
from reference import ODD_SIZE, PROMPT
from tiers import not_quick, some

NONE: frozenset[str] = frozenset()
LOSSLESS = Lossless()
SPECIAL = (0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0x7BFF, 0x7C00, 0x7E01)
"""Zeros, subnormals, infinities and NaN with payloads, of bf16 or fp16."""


def _block(*tensors: Tensor) -> tuple[BlockLayout, Tensor]:
    """A block with these buffers, `t0`, `t1`, ..., and its bytes."""
    module = nn.Module()
    for number, tensor in enumerate(tensors):
        module.register_buffer(f"t{number}", tensor)
    return _packed(module, 1)


def _packed(module: nn.Module, parts: int) -> tuple[BlockLayout, Tensor]:
    layout = BlockLayout.of(module, multiple=parts)
    memory = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    layout.pack(module, memory)
    return layout, memory


def _through(layout: BlockLayout, memory: Tensor, parts: int = 1, codec: Lossless = LOSSLESS) -> tuple[Tensor, Tensor]:
    """What travels, and what is made of it, in memory that was something else."""
    travelled = torch.cat([codec.encode(layout, parts, index, raw) for index, raw in enumerate(memory.chunk(parts))])
    assert len(travelled) == parts * codec.travel_bytes(layout, parts)
    slot = torch.full_like(memory, 0xA5)
    decode_all(codec, layout, parts, travelled, slot)
    return travelled, slot


def _with_padding(layout: BlockLayout, slot: Tensor) -> Tensor:
    """Zero behind the last tensor: what belongs to none is nobody's."""
    last = max((entry.offset + entry.nbytes for entry in layout.entries), default=0)
    return torch.cat([slot[:last], torch.zeros_like(slot[last:])])


def _bits(values: object, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.uint16).view(np.int16).copy()).view(dtype)


def _with_escapes(dtype: torch.dtype, values: int, special: tuple[int, ...], seed: int) -> Tensor:
    """Normal weights, but for these bit patterns somewhere."""
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(values, generator=generator) * 0.02).to(dtype)
    places = torch.randperm(values, generator=generator)[: len(special)]
    tensor[places] = _bits(special, dtype)
    return tensor


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_pattern(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 65,536: each in a window, and all together, most of them as escapes."""
    format_ = BF16 if dtype is torch.bfloat16 else FP16
    patterns = np.arange(65_536)
    exponents = patterns >> format_.mantissa & (format_.exponents - 1)
    windows = [
        patterns[(exponents >= least) & (exponents < least + WINDOW)] for least in range(0, format_.exponents, 5)
    ]
    layout, memory = _block(*(_bits(window, dtype) for window in windows))
    _, slot = _through(layout, memory)
    assert torch.equal(slot, memory)
    monkeypatch.setattr(formats, "_PER_ESCAPE", 1)
    part_formats.cache_clear()
    layout, memory = _block(_bits(np.random.default_rng(0).permutation(patterns), dtype))
    travelled, slot = _through(layout, memory)
    part_formats.cache_clear()
    assert torch.equal(slot, memory)
    assert travelled[:4].view(torch.int32) > 2_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", [1, 127, 128, 129, 255, 256, 257, 4_095, 4_097, 131_071, 300_001])
def test_every_length(dtype: torch.dtype, values: int) -> None:
    """Also of what is too short for a window, or longer than what is encoded at once."""
    special = SPECIAL[: values // 100]
    layout, memory = _block(_with_escapes(dtype, values, special, values), torch.arange(5))
    _, slot = _through(layout, memory)
    assert torch.equal(_with_padding(layout, slot), memory)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_every_part_alone(parts: int) -> None:
    """A block of all dtypes, transposed and strided tensors and tied ones; each part is encoded by who has it."""
    torch.manual_seed(parts)
    module = nn.Module()
    module.linear = nn.Linear(96, 257, dtype=torch.bfloat16)
    module.tied = module.linear
    module.norm = nn.LayerNorm(96)
    module.fp16 = nn.Linear(64, 130, dtype=torch.float16)
    module.register_buffer("transposed", torch.randn(130, 70).bfloat16().t())
    module.register_buffer("strided", torch.randn(40, 64).bfloat16()[:, ::2])
    module.register_buffer("count", torch.arange(77))
    module.register_buffer("fp8", torch.randn(64, 64).to(torch.float8_e4m3fn))
    module.register_buffer("zero", torch.zeros(999, dtype=torch.bfloat16))
    module.register_buffer("empty", torch.zeros(0, dtype=torch.bfloat16))
    layout, memory = _packed(module.requires_grad_(False), parts)
    travelled, slot = _through(layout, memory, parts)
    for entry in layout.entries:
        assert torch.equal(
            entry.view(slot).contiguous().view(torch.uint8), entry.view(memory).contiguous().view(torch.uint8)
        )
    assert len(travelled) % (256 * parts) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda shape: torch.randn(shape) * 0.02,
        lambda shape: torch.empty(shape).uniform_(-0.03, 0.03),
        lambda shape: nn.init.kaiming_uniform_(torch.empty(shape)),
        lambda shape: nn.init.xavier_normal_(torch.empty(shape)),
        lambda shape: nn.init.trunc_normal_(torch.empty(shape), std=1e-4),
        lambda shape: torch.ones(shape),
        lambda shape: torch.zeros(shape),
        lambda shape: torch.nn.functional.dropout(torch.randn(shape), 0.9),
    ],
)
def test_real_weights_are_three_quarters(make: Callable[[Any], Tensor]) -> None:
    torch.manual_seed(0)
    layout, memory = _block(make((1024, 1031)).bfloat16(), torch.randn(1024))
    travelled, slot = _through(layout, memory)
    assert torch.equal(slot, memory)
    print(f"{len(travelled) / len(memory):.4f} of the bytes")
    assert len(travelled) <= 0.76 * len(memory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_encodes_the_same_bytes(dtype: torch.dtype) -> None:
    """What encodes there, run here."""
    layout, memory = _block(_with_escapes(dtype, 300_000, SPECIAL, 1), torch.randn(100), torch.zeros(3, dtype=dtype))
    (form,) = part_formats(layout, 1, NONE)
    here, there = (torch.zeros(form.nbytes, dtype=torch.uint8) for _ in range(2))
    on_host.encode(form, memory.numpy(), here.numpy(), threads=3)
    on_cuda.encode(form, memory, there)
    assert torch.equal(here, there)
    slot = torch.full_like(memory, 0xA5)
    on_host.decode(form, there.numpy(), slot.numpy())
    assert torch.equal(_with_padding(layout, slot), memory)


def test_what_has_no_window_travels_as_it_is() -> None:
    """Bits of no pattern: the tensors are named, and the rest is encoded without them."""
    generator = np.random.default_rng(0)
    noise = _bits(generator.integers(0, 65_536, 50_000), torch.bfloat16)
    layout, memory = _block(torch.randn(100_000).bfloat16(), noise, torch.randn(100_000).bfloat16())
    with pytest.raises(IncompressibleError) as caught:
        _through(layout, memory)
    assert caught.value.tensors == {"t1"}
    codec = Lossless(caught.value.tensors)
    assert codec.name != Lossless().name
    travelled, slot = _through(layout, memory, codec=codec)
    assert torch.equal(slot, memory)
    assert len(travelled) < 0.83 * len(memory)


def test_as_many_escapes_as_there_is_room_for() -> None:
    layout, memory = _block(torch.ones(100_352).bfloat16())
    capacity = part_formats(layout, 1, NONE)[0].capacity
    words = memory.view(torch.int16)
    words[torch.arange(capacity) * 64] = 0x0101
    _, slot = _through(layout, memory)
    assert torch.equal(slot, memory)
    words[7] = 0x0101
    with pytest.raises(IncompressibleError, match="t0"):
        _through(layout, memory)


# -- a run -----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "layerwise_hsdp": {
        "parallel": {"ring_degree": 2, "hsdp": {"replicate": 1, "shard": 2}},
        "offload": {"layerwise": True},
    },
    "layerwise_tp2": {"parallel": {"tp_degree": 2}, "offload": {"layerwise": True}},
    "layerwise": {"offload": {"layerwise": True}},
    "hsdp": {"parallel": {"ring_degree": 2, "hsdp": {"replicate": 1, "shard": 2}}},
    "layerwise_ulysses2": {"parallel": {"ulysses_degree": 2}, "offload": {"layerwise": True}},
}
REQUEST = {"height": ODD_SIZE[0], "width": ODD_SIZE[1], "steps": 3}


def _config(layout: str, codec: str, **offload: Any) -> RunConfig:
    found = LAYOUTS[layout]
    return RunConfig.parse(
        found | {"dtype": "bfloat16", "offload": found.get("offload", {}) | {"codec": codec} | offload}
    )


@not_quick
@pytest.mark.parametrize("layout", some(list(LAYOUTS), 2))
def test_no_bit_of_a_picture_changes(layout: str, gang_of: Callable[[int], Gang], flux2_dir: Path) -> None:
    """Encoded and not: the same bits from at most 0.76 of the bytes, at rest, on the link and in shards."""
    made = {}
    for codec in ("none", "lossless"):
        config = _config(layout, codec)
        with Engine.start(config, flux2_dir, gang_of(config.world_size)) as engine:
            made[codec] = engine.generate([PROMPT], **REQUEST), engine.plan.memory
    (plain, _), (encoded, memory) = made["none"], made["lossless"]
    assert torch.equal(encoded.latents[0], plain.latents[0])
    assert not any(block.codec.in_place for block in memory.blocks)
    for one, other in zip(plain.report["ranks"], encoded.report["ranks"], strict=True):
        for figure in ("host_bytes", "shard_bytes", "h2d_bytes_per_step", "gathered_bytes_per_step"):
            if one[figure]:
                share = other[figure] / one[figure]
                print(f"rank {one['rank']}: {figure} {share:.3f} of plain")
                assert share <= 0.76
        for name, plain_bytes in one["components"].items():
            coded = other["components"][name]
            shares = [coded[each] / plain_bytes[each] for each in ("held_bytes", "h2d_bytes")]
            print(f"rank {one['rank']}: {name} at rest {shares[0]:.3f}, copied {shares[1]:.3f} of plain")
            assert coded["slot_bytes"] == plain_bytes["slot_bytes"]
            assert max(shares) < 1 if name == "text_encoder" else shares == [1, 1]  # VAEs rest as they compute


def _with_noise(checkpoint: Path, copy: Path) -> tuple[Path, str, str]:
    """A copy of which one tensor of one block has values of all magnitudes; its block, and its name there."""
    shutil.copytree(checkpoint, copy)
    block, name = "single_transformer_blocks.1", "attn.to_out.weight"
    for file in (copy / "transformer").glob("*.safetensors"):
        tensors = load_file(file)
        if (weight := tensors.get(f"{block}.{name}")) is not None:
            exponents = torch.randint(-30, 0, weight.shape, generator=torch.Generator().manual_seed(0))
            tensors[f"{block}.{name}"] = weight.sign() * torch.pow(2.0, exponents)
            save_file(tensors, file, {"format": "pt"})
    return copy, block, name


@not_quick
@pytest.mark.parametrize("layout", some(["layerwise_hsdp", "layerwise"], 1))
def test_a_tensor_that_would_not_get_smaller_travels_as_it_is(
    layout: str, gang_of: Callable[[int], Gang], flux2_dir: Path, tmp_path: Path
) -> None:
    """Found at load; the run is planned again without it, on all ranks, and holds."""
    directory, block, name = _with_noise(flux2_dir, tmp_path / "noise")
    made = []
    for codec in ("none", "lossless"):
        config = _config(layout, codec)
        with Engine.start(config, directory, gang_of(config.world_size)) as engine:
            made.append(engine.generate([PROMPT], **REQUEST).latents[0])
            plan = engine.plan
    assert torch.equal(*made)
    assert plan.plain == {block: {name}}
    (changed,) = [each for each in plan.memory.blocks if each.name == block]
    others = [each for each in plan.memory.blocks if each.name.startswith("single_") and each is not changed]
    assert all(each.held_bytes < changed.held_bytes < changed.layout.slot_bytes for each in others)
    encoded: Any = plan.memory.schedule_report("")["encoded"]
    assert encoded["held_bytes"] == sum(each.held_bytes for each in plan.memory.blocks if not each.codec.in_place)
    assert 0.74 < encoded["held_bytes"] / encoded["plain_bytes"] < 0.80


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"offload": {"layerwise": True, "codec": "lossless"}}, "in float32 it makes nothing much smaller; set dtype"),
        ({"dtype": "bfloat16", "offload": {"codec": "lossless"}}, "nothing rests elsewhere or travels; set offload"),
    ],
)
def test_a_codec_that_would_do_nothing_is_refused(config: dict[str, Any], reason: str, flux2_dir: Path) -> None:
    with pytest.raises(ConfigError, match=rf"offload\.codec: found lossless, but {reason}.*, or codec: none"):
        make_plan(RunConfig.parse(config), flux2_dir, "cpu")


def test_what_is_not_worth_it_is_not_encoded(flux2_dir: Path) -> None:
    """fp32 as it is; and nothing without being asked for."""
    for config in (
        {"offload": {"layerwise": True, "codec": "auto"}},
        {"dtype": "bfloat16", "offload": {"layerwise": True, "codec": "auto"}},
        {"dtype": "bfloat16", "offload": {"layerwise": True}},
    ):
        plan = make_plan(RunConfig.parse(config), flux2_dir, "cpu")
        assert all(block.codec.in_place for block in plan.memory.blocks)
    auto = RunConfig.parse({"dtype": "bfloat16", "offload": {"layerwise": True, "codec": "auto"}})
    plan = make_plan(auto, flux2_dir, "cuda")
    assert not any(block.codec.in_place for block in plan.memory.blocks)


def test_files_have_no_codec() -> None:
    with pytest.raises(ConfigError, match=r"offload\.codec: found \"lossless\", but with offload\.host: mmap"):
        RunConfig.parse({"offload": {"layerwise": True, "host": "mmap", "codec": "lossless"}})


_EMULATED = """
import torch
from crossdock.offload.codecs import on_cuda, on_host
from crossdock.offload.codecs.part_format import part_formats
from test_lossless import NONE, SPECIAL, _block, _with_escapes

for dtype in (torch.bfloat16, torch.float16):
    rest = torch.randn(3000), torch.zeros(300, dtype=dtype), torch.randn(70, 90).to(dtype)
    layout, memory = _block(_with_escapes(dtype, 50_001, SPECIAL, 1), *rest)
    (form,) = part_formats(layout, 1, NONE)
    held = torch.zeros(form.nbytes, dtype=torch.uint8)
    on_host.encode(form, memory.numpy(), held.numpy())
    found, expected = (torch.full_like(memory, 0xA5) for _ in range(2))
    on_cuda.decode(form, held, found)
    on_host.decode(form, held.numpy(), expected.numpy())
    assert torch.equal(found, expected)
"""


def test_what_a_gpu_decodes() -> None:
    """Its kernels, in Triton's interpreter."""
    pytest.importorskip("triton", reason="torch for the CPU comes without Triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _EMULATED]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
