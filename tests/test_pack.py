"""A packed checkpoint: every run from it is bit for bit the one from the original, and nothing is encoded at load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged_run import HereGang, Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crossdock.launch import cli
from crossdock.launch.commands.options import run_app
from crossdock.launch.engine.engine import Engine
from crossdock.offload.codecs.codec import decode_all
from crossdock.offload.codecs.lossless import Lossless
from crossdock.offload.codecs.packed import PACKED, PackedTensor, pack, put_together
from crossdock.offload.codecs.part_format import part_formats
from crossdock.offload.memory.layout import BlockLayout
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import CheckpointError, ConfigError
from crossdock.runtime.models.checkpoint import stored_tensors
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.rank.weights import load
from crossdock.runtime.rank.weights import pack_checkpoint as packing
from crossdock.runtime.rank.weights.source import WeightSource
from crossdock.runtime.watch.gang import Gang
from tiers import not_quick, some

DEMO = Path(__file__).parent / "emoji_model" / "model"
REQUEST: dict[str, Any] = {"height": 48, "width": 32, "steps": 2, "guidance_scale": 3.0}
LOSSLESS: dict[str, Any] = {"layerwise": True, "codec": "lossless"}
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed") / "model"
    assert run_app(cli.app, ["pack", str(DEMO), str(directory)]) == 0
    return directory


def _weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int, outliers: int = 9) -> Tensor:
    """Normal, with zeros, and with values that are escapes."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator) * 0.05
    flat = tensor.view(-1)
    places = torch.randperm(len(flat), generator=generator)
    special = [6e4, -6e4, 6e-8, float("inf"), float("nan"), -0.0, 0.0, 1e-38, 3e3]
    flat[places[:outliers]] = torch.tensor(special[:outliers])
    return tensor.to(dtype)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


# -- a tensor alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [257, 4_096, 100_003])
def test_any_range_is_read(dtype: torch.dtype, values: int) -> None:
    tensor = _weights((values,), dtype, 0)
    held = PackedTensor(dtype, values, pack(tensor))
    rng = np.random.default_rng(0)
    ranges = [(0, values), (0, 1), (values - 1, values), (values // 2 - 1, values // 2 + 1), (7, 7)]
    for start, stop in [*ranges, *(sorted(rng.integers(0, values + 1, 2)) for _ in range(40))]:
        assert torch.equal(_bits(held.read(int(start), int(stop))), _bits(tensor[start:stop])), (start, stop)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_are_put_together_of_packed_tensors(dtype: torch.dtype, parts: int) -> None:
    """They decode to the block; whole, they have the very bytes that encoding makes."""
    module = nn.Module()
    shapes = ((300, 70), (5,), (64, 64), (1,), (999,))
    for number, shape in enumerate(shapes):
        module.register_buffer(f"t{number}", _weights(shape, dtype, number, min(9, torch.Size(shape).numel() // 200)))
    module.register_buffer("plain", torch.randn(77))
    layout = BlockLayout.of(module, multiple=parts)
    memory = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    layout.pack(module, memory)
    codec, travelled = Lossless(), []
    for index, raw in enumerate(memory.chunk(parts)):
        form = part_formats(layout, parts, frozenset())[index]
        pieces = {}
        for span in form.coded:
            entry = next(entry for entry in layout.entries if entry.name == span.name)
            tensor = module.get_buffer(span.name)
            first = (index * len(raw) + span.start - entry.offset) // 2
            held = PackedTensor(dtype, tensor.numel(), pack(tensor))
            pieces[span] = held, held.fields(first, min(first + span.values, tensor.numel()))
        travelled.append(raw.new_zeros(codec.travel_bytes(layout, parts)))
        put_together(form, pieces, raw, travelled[-1])
        if parts == 1:
            assert torch.equal(travelled[-1], codec.encode(layout, 1, 0, raw))
            as_they_lie = torch.zeros_like(travelled[-1])
            put_together(form, {span: (held, None) for span, (held, _) in pieces.items()}, raw, as_they_lie)
            assert torch.equal(as_they_lie, travelled[-1])
    slot = torch.zeros_like(memory)
    decode_all(codec, layout, parts, torch.cat(travelled), slot)
    assert torch.equal(slot, memory)


# -- a checkpoint ----------------------------------------------------------------------------------------------------


def test_all_is_there_and_smaller(packed: Path) -> None:
    """What is no transformer is copied; each tensor is the original's, however it is cut."""
    folders = [path.name for path in packed.iterdir()]
    assert sorted(folders) == sorted(path.name for path in DEMO.iterdir())
    for path in DEMO.rglob("*"):
        if path.is_file() and not path.match("transformer/*.safetensors*"):
            assert (packed / path.relative_to(DEMO)).read_bytes() == path.read_bytes()
    sizes = [sum(file.stat().st_size for file in (each / "transformer").iterdir()) for each in (packed, DEMO)]
    print(f"transformer: {sizes[0] / sizes[1]:.3f} of the bytes")
    assert sizes[0] / sizes[1] <= 0.765
    original, stored = stored_tensors(DEMO / "transformer"), stored_tensors(packed / "transformer")
    assert {name: (each.dtype, each.shape) for name, each in stored.items()} == {
        name: (each.dtype, each.shape) for name, each in original.items()
    }
    assert sum(bool(each.packed) for each in stored.values()) > 20
    one, other = WeightSource(stored), WeightSource(original)
    for name, each in stored.items():
        rows = each.shape[0]
        cuts = [None, TensorSlice(0, ((0, rows // 2),), rows), TensorSlice(0, ((1, 3), (rows - 2, rows)), rows)]
        if len(each.shape) > 1:
            columns = each.shape[1]
            cuts += [TensorSlice(1, ((columns // 2, columns),), columns), TensorSlice(1, ((0, 2), (5, 6)), columns)]
        for part in cuts:
            found = one.rows(name, part)
            assert torch.equal(found, other.rows(name, part)), (name, part)
            start, stop = found.numel() // 3, found.numel() - 1
            assert torch.equal(one.flat(name, part, start, stop), other.flat(name, part, start, stop))
            if each.packed:
                held, fields = one.fields(name, part, start, stop)
                assert fields is not None, "it is not whole"
                words = torch.from_numpy(held.composed(fields).view(np.int16))
                assert torch.equal(words, _bits(other.flat(name, part, start, stop))), (name, part)


def _generated(directory: Path, parsed: dict[str, Any], gang: Gang) -> Tensor:
    with Engine.start(RunConfig.parse({"dtype": "bfloat16"} | parsed), directory, gang) as engine:
        return engine.generate(["a red apple"], **REQUEST).latents[0]


LAYOUTS: dict[str, dict[str, Any]] = {
    "layerwise_tp2": {"parallel": {"tp_degree": 2}, "offload": LOSSLESS},
    "layerwise_hsdp": {"parallel": {"dp_degree": 2, "hsdp": {"replicate": 1, "shard": 2}}, "offload": LOSSLESS},
    "not encoded, tp2": {"parallel": {"tp_degree": 2}, "offload": {"layerwise": True}},
    "hsdp": {"parallel": {"dp_degree": 2, "hsdp": {"replicate": 1, "shard": 2}}, "offload": {"codec": "lossless"}},
    "as float32": {"dtype": "float32", "parallel": {"tp_degree": 2}},
}


@not_quick
@pytest.mark.parametrize("layout", some(list(LAYOUTS), 3))
def test_a_run_is_that_of_the_original(layout: str, packed: Path, gang_of: Callable[[int], Gang]) -> None:
    made = [_generated(directory, LAYOUTS[layout], gang_of(2)) for directory in (DEMO, packed)]
    assert torch.equal(*made)


def test_nothing_is_encoded_at_load(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte that arrives is compared with the file, in every step."""

    def encode(*_: Any) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(load, "encoded", encode)
    config = {"dtype": "bfloat16", "offload": LOSSLESS, "verify": {"arrivals": "every"}}
    with Run(make_plan(RunConfig.parse(config), packed, "cpu"), HereGang(), all_rows=True) as run:
        found, _ = run.judged()
        assert found == []
        assert not any(block.codec.in_place for block in run.gang.worker.loaded.weights.blocks)


def test_files_cannot_be_streamed_from_it(packed: Path) -> None:
    with pytest.raises(ConfigError, match=r"found mmap, but .* is packed"):
        make_plan(RunConfig.parse({"dtype": "bfloat16", "offload": {"layerwise": True, "host": "mmap"}}), packed, "cpu")


# -- what is wrong ---------------------------------------------------------------------------------------------------


def _changed(packed: Path, copy: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A copy with other tensors or metadata in the file."""
    shutil.copytree(packed, copy)
    (file,) = (copy / "transformer").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()[PACKED])
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, {"format": "pt", PACKED: json.dumps(metadata)})
    return copy


LINEAR = "single_transformer_blocks.1.attn.to_out.weight"


@pytest.mark.parametrize("place", ["window", "low", "number", "escape"])
def test_a_changed_byte_is_found_at_load(place: str, packed: Path, tmp_path: Path) -> None:
    """The tensor and its file are named."""

    def flip(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        part = tensors[LINEAR]
        part[{"window": 4, "low": 256 + 77, "number": 256 + len(part) * 7 // 10, "escape": 0}[place]] ^= 1

    directory = _changed(packed, tmp_path / "model", flip)
    config = RunConfig.parse({"dtype": "bfloat16", "offload": LOSSLESS})
    with pytest.raises(CheckpointError, match=rf"\.safetensors: {LINEAR} does not decode to what was packed"):
        HereGang().worker.setup(make_plan(config, directory, "cpu"))


GARBAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "another dtype": lambda told: told[LINEAR].update(dtype="float8"),
    "no dtype": lambda told: told[LINEAR].pop("dtype"),
    "a list for a dtype": lambda told: told[LINEAR].update(dtype=["bfloat16"]),
    "another shape": lambda told: told[LINEAR].update(shape=[3, 5]),
    "a huge shape": lambda told: told[LINEAR].update(shape=[2**39, 2**39]),
    "a negative shape": lambda told: told[LINEAR].update(shape=[-4, -4]),
    "no numbers": lambda told: told[LINEAR].update(shape="ab"),
    "true": lambda told: told[LINEAR].update(shape=[True, 8]),
    "no digest": lambda told: told[LINEAR].update(digest=""),
    "a number for a digest": lambda told: told[LINEAR].update(digest=3),
    "a tensor that is not there": lambda told: told.update({"nobody.weight": dict(told[LINEAR])}),
    "no tensor": lambda told: told.clear(),
    "no mapping": lambda told: told.update({LINEAR: [1, 2]}),
}


@pytest.mark.parametrize("what", list(GARBAGE))
def test_what_pack_did_not_write_is_refused(what: str, packed: Path, tmp_path: Path) -> None:
    directory = _changed(packed, tmp_path / "model", lambda tensors, told: GARBAGE[what](told) and None)
    config = RunConfig.parse({"dtype": "bfloat16", "offload": LOSSLESS})
    with pytest.raises(CheckpointError, match=r"\.safetensors: not what pack writes: .*; pack it again"):
        make_plan(config, directory, "cpu")


def test_what_cannot_be_packed(
    packed: Path, flux2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says why, and nothing is left behind."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    for model, out, told in (
        (packed, tmp_path / "again", "is packed already"),
        (
            flux2_dir,
            tmp_path / "fp32",
            "its transformer is in float32, which does not get smaller; pack",
        ),
        (tmp_path / "nobody", tmp_path / "none", "no such directory"),
        (DEMO, full, "is not empty; give a new directory"),
        (DEMO, tmp_path / "no" / "where", "cannot write here"),
    ):
        assert run_app(cli.app, ["pack", str(model), str(out)]) == 2
        assert told in (said := capsys.readouterr().err)
        assert said.count("\n") == 1

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "save_file", no_space)
    assert run_app(cli.app, ["pack", str(DEMO), str(tmp_path / "disk")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_several_files_and_what_does_not_get_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of all magnitudes is stored as it is."""
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    exponents = torch.randint(-60, 60, tensors[LINEAR].shape, generator=torch.Generator().manual_seed(0))
    tensors[LINEAR] = torch.pow(2.0, exponents).to(torch.bfloat16)
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr(packing, "_FILE_BYTES", 2**20)
    assert run_app(cli.app, ["pack", str(model), str(tmp_path / "packed")]) == 0
    assert len(list((tmp_path / "packed" / "transformer").glob("*.safetensors"))) > 3
    stored = stored_tensors(tmp_path / "packed" / "transformer")
    assert stored[LINEAR].packed == ""
    source = WeightSource(stored)
    assert all(torch.equal(source.rows(name), tensor) for name, tensor in tensors.items())
