"""A transformer in one file, in its publisher's or ComfyUI's names, with the rest of a checkpoint: `--transformer`.

Files are made of tiny checkpoints by turning diffusers' names back; what they have to hold says diffusers' own
`from_single_file`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from one_rank import admitted, rank_request
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import CheckpointError, ConfigError
from crossdock.runtime.models.checkpoint import Rows, weight_files
from crossdock.runtime.models.meta import build_config_on_meta
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.single_file import single_file
from crossdock.runtime.rank.weights.source import WeightSource

CheckpointOf = Callable[[str], Path]
Tensors = dict[str, Tensor]
SMALL = {"steps": 2, "height": 64, "width": 64}

RENAMED: Mapping[str, list[tuple[str, str]]] = {
    "flux2-klein": [
        (r"^x_embedder", "img_in"),
        (r"^context_embedder", "txt_in"),
        (r"^time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
        (r"^time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
        (r"_modulation(_img|_txt|)\.linear", r"_modulation\1.lin"),
        (r"^proj_out", "final_layer.linear"),
        (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        (r"^transformer_blocks", "double_blocks"),
        (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
        (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
        (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
        (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
        (r"attn\.to_out\.0", "img_attn.proj"),
        (r"attn\.to_add_out", "txt_attn.proj"),
        (r"attn\.to_([qkv])", r"img_attn.\1"),
        (r"attn\.add_([qkv])_proj", r"txt_attn.\1"),
        (r"ff\.linear_in", "img_mlp.0"),
        (r"ff\.linear_out", "img_mlp.2"),
        (r"ff_context\.linear_in", "txt_mlp.0"),
        (r"ff_context\.linear_out", "txt_mlp.2"),
    ],
    "z-image": [
        (r"^all_final_layer\.2-1\.", "final_layer."),
        (r"^all_x_embedder\.2-1\.", "x_embedder."),
        (r"attention\.to_out\.0", "attention.out"),
        (r"attention\.norm_([qk])", r"attention.\1_norm"),
        (r"attention\.to_([qkv])", r"attention.\1"),
        (r"^", "model.diffusion_model."),
    ],
    "wan2.1": [
        (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"^condition_embedder\.time_proj", "time_projection.1"),
        (r"attn1", "self_attn"),
        (r"attn2", "cross_attn"),
        (r"\.to_out\.0\.", ".o."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"^scale_shift_table", "head.modulation"),
        (r"scale_shift_table", "modulation"),
        (r"^proj_out", "head.head"),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
        (r"norm2", "norm_swapped"),
        (r"norm3", "norm2"),
        (r"norm_swapped", "norm3"),
    ],
    "qwen-image": [(r"^", "model.diffusion_model.")],
}
CLASSES = {
    "flux2-klein": "Flux2Transformer2DModel",
    "z-image": "ZImageTransformer2DModel",
    "wan2.1": "WanTransformer3DModel",
    "qwen-image": "QwenImageTransformer2DModel",
}
JOINED = re.compile(r"(.*(?:img_attn|txt_attn|attention))\.[qkv]\.weight")
"""What these two publishers keep in one tensor."""


def renamed(names: list[tuple[str, str]], tensors: Mapping[str, Tensor]) -> Tensors:
    found: Tensors = {}
    for fqn, tensor in tensors.items():
        for pattern, name in names:
            fqn = re.sub(pattern, name, fqn)
        found[fqn] = tensor
    return found


def published(family: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """A checkpoint's transformer in its publisher's names."""
    named = renamed(RENAMED[family], tensors)
    if family == "flux2-klein":
        scale, shift = named["final_layer.adaLN_modulation.1.weight"].chunk(2)
        named["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    for stem in {found[1] for fqn in named if (found := JOINED.fullmatch(fqn))}:
        named[f"{stem}.qkv.weight"] = torch.cat([named.pop(f"{stem}.{each}.weight") for each in "qkv"])
    return {fqn: tensor.contiguous() for fqn, tensor in named.items()}


def tensors_of(directory: Path) -> Tensors:
    return {fqn: t for file in weight_files(directory / "transformer") for fqn, t in load_file(file).items()}


def plan_with(file: Path, directory: Path, **config: Any) -> RunPlan:
    run = RunConfig.parse({"offload": {"layerwise": True}, "transformer": str(file), **config})
    return make_plan(run, directory, "cpu")


@pytest.fixture(scope="module")
def file_of(checkpoint_of: CheckpointOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "published.safetensors"
            save_file(published(family, tensors_of(checkpoint_of(family))), made[family])
        return made[family]

    return make


@pytest.mark.parametrize("family", RENAMED)
def test_every_row_is_the_one_that_diffusers_reads(
    family: str, checkpoint_of: CheckpointOf, file_of: Callable[[str], Path]
) -> None:
    directory, file = checkpoint_of(family), file_of(family)
    assert load_file(file).keys().isdisjoint(tensors_of(directory)) or family == "wan2.1"  # which keeps some names
    source = WeightSource(plan_with(file, directory).layout.stored)
    oracle: Any = getattr(diffusers, CLASSES[family])
    if family == "qwen-image":  # of which diffusers reads no file of ComfyUI's
        expected = oracle.from_pretrained(directory, subfolder="transformer").state_dict()
    else:
        expected = oracle.from_single_file(str(file), config=str(directory), subfolder="transformer").state_dict()
    assert {"flux2-klein": 60, "z-image": 100, "wan2.1": 60, "qwen-image": 60}[family] < len(expected)
    for fqn, tensor in expected.items():
        assert torch.equal(source.rows(fqn).to(tensor.dtype), tensor), fqn
        if tensor.dim() == 2:  # as two tensor-parallel ranks cut it
            for dim, size in enumerate(tensor.shape):
                part = TensorSlice(dim, ((size // 2, size),), size)
                assert torch.equal(
                    source.rows(fqn, part).to(tensor.dtype), tensor.narrow(dim, size // 2, size - size // 2)
                )


@pytest.mark.parametrize("home", ["shared", "mmap"])
def test_the_picture_is_that_of_the_same_weights_saved_by_diffusers(
    home: str, checkpoint_of: CheckpointOf, file_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The checkpoint's own transformer is not needed: only its config is there."""
    directory = Path(shutil.copytree(checkpoint_of("z-image"), tmp_path / "rest"))
    offload = {"offload": {"layerwise": True, "host": home}}
    with admitted(make_plan(RunConfig.parse(offload), directory, "cpu")) as worker:
        expected = worker.generate(rank_request("a fox", **SMALL)).latents
    for file in (directory / "transformer").glob("*.safetensors*"):
        file.unlink()
    with admitted(plan_with(file_of("z-image"), directory, **offload)) as worker:
        made = worker.generate(rank_request("a fox", **SMALL)).latents
    assert made is not None
    assert torch.equal(made, expected)


FLUX1 = [
    (r"^time_text_embed\.timestep_embedder", "time_in"),
    (r"^time_text_embed\.text_embedder", "vector_in"),
    (r"^time_text_embed\.guidance_embedder", "guidance_in"),
    (r"_in\.linear_1", "_in.in_layer"),
    (r"_in\.linear_2", "_in.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"single_blocks.\1.linear1.\2"),
    (r"^single_transformer_blocks\.(\d+)\.proj_mlp", r"single_blocks.\1.linear1.mlp"),
    (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"norm1\.linear", "img_mod.lin"),
    (r"norm1_context\.linear", "txt_mod.lin"),
    (r"ff\.net\.0\.proj", "img_mlp.0"),
    (r"ff\.net\.2", "img_mlp.2"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.0"),
    (r"ff_context\.net\.2", "txt_mlp.2"),
    *RENAMED["flux2-klein"][11:19],
]
WIDTH = 3072


def test_a_file_of_the_published_width_is_mapped_by_its_header(tmp_path: Path) -> None:
    """FLUX.1's converter knows one width only; the file, of 700 MB, is a hole behind its header."""
    config = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    wanted = build_config_on_meta("FluxTransformer2DModel", config).state_dict()
    named = {
        name: tensor for name, tensor in renamed(FLUX1, wanted).items() if not re.search(r"\.[qkv]\.|\.mlp\.", name)
    }
    for kind, inner in (("weight", [WIDTH]), ("bias", [])):
        for stream in ("img", "txt"):
            named[f"double_blocks.0.{stream}_attn.qkv.{kind}"] = torch.empty(3 * WIDTH, *inner, device="meta")
        named[f"single_blocks.0.linear1.{kind}"] = torch.empty(7 * WIDTH, *inner, device="meta")
    stored = single_file(hole(tmp_path / "flux1.safetensors", named), "FluxTransformer2DModel", config, list(wanted))
    assert {fqn: each.shape for fqn, each in stored.items()} == {fqn: tuple(t.shape) for fqn, t in wanted.items()}
    linear1, modulation = "single_blocks.0.linear1.weight", "final_layer.adaLN_modulation.1.bias"
    block = "single_transformer_blocks.0"
    assert stored[f"{block}.attn.to_k.weight"].rows == (Rows(linear1, WIDTH, 2 * WIDTH, 7 * WIDTH),)
    assert stored[f"{block}.proj_mlp.weight"].rows == (Rows(linear1, 3 * WIDTH, 7 * WIDTH, 7 * WIDTH),)
    halves = [(WIDTH, 2 * WIDTH), (0, WIDTH)]  # shift and scale change places
    assert stored["norm_out.linear.bias"].rows == tuple(Rows(modulation, *half, 2 * WIDTH) for half in halves)


def hole(file: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A safetensors file of that shape, whose zeros take no room."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    return file


# -- what is refused --------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_say_how_they_can(flux2_dir: Path, tmp_path: Path) -> None:
    pickled, gguf = tmp_path / "flux.ckpt", tmp_path / "flux-Q4.gguf"
    for file in (pickled, gguf):
        file.write_bytes(b"x")
    with pytest.raises(
        CheckpointError,
        match=r"flux\.ckpt: .*trust its publisher.*Flux2Transformer2DModel.from_single_file.*save_pretrained",
    ):
        plan_with(pickled, flux2_dir)
    with pytest.raises(CheckpointError, match=r"flux-Q4\.gguf: .*GGUFQuantizationConfig.*dequantize"):
        plan_with(gguf, flux2_dir)
    with pytest.raises(CheckpointError, match=r"there\.safetensors: no such file"):
        plan_with(tmp_path / "there.safetensors", flux2_dir)


def test_another_model_is_no_transformer_of_this_one(file_of: Callable[[str], Path], flux2_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"published\.safetensors: .*Flux2Transformer2DModel|is missing"):
        plan_with(file_of("wan2.1"), flux2_dir)


def test_scaled_fp8_is_not_taken_for_weights(flux2_dir: Path, tmp_path: Path) -> None:
    """ComfyUI keeps a weight's scale beside it: without it every number would be another."""
    tensors = published("flux2-klein", tensors_of(flux2_dir))
    save_file(tensors | {"img_in.scale_weight": torch.ones(1)}, tmp_path / "fp8.safetensors")
    with pytest.raises(CheckpointError, match=r"img_in\.scale_weight: .*scaled FP8.*bf16 file"):
        plan_with(tmp_path / "fp8.safetensors", flux2_dir)


def test_a_converter_that_computes_is_not_followed(
    file_of: Callable[[str], Path], checkpoint_of: CheckpointOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows' numbers would be those of other rows."""
    entry = SINGLE_FILE_LOADABLE_CLASSES["ZImageTransformer2DModel"]
    convert = entry["checkpoint_mapping_fn"]

    def computing(checkpoint: Tensors, **more: Any) -> Tensors:
        return {fqn: tensor + 1 if "norm" in fqn else tensor for fqn, tensor in convert(checkpoint, **more).items()}

    monkeypatch.setitem(entry, "checkpoint_mapping_fn", computing)
    with pytest.raises(CheckpointError, match=r"computes with its weights .*add.*from_single_file"):
        plan_with(file_of("z-image"), checkpoint_of("z-image"))


def test_what_does_not_lie_together_cannot_be_streamed_from_the_page_cache(
    file_of: Callable[[str], Path], checkpoint_of: CheckpointOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = SINGLE_FILE_LOADABLE_CLASSES["ZImageTransformer2DModel"]
    convert = entry["checkpoint_mapping_fn"]

    def swapping(checkpoint: Tensors, **more: Any) -> Tensors:
        found = convert(checkpoint, **more)
        name = "layers.0.feed_forward.w1.weight"
        return {**found, name: torch.cat(found[name].chunk(2)[::-1])}

    monkeypatch.setitem(entry, "checkpoint_mapping_fn", swapping)
    with pytest.raises(ConfigError, match=r"layers\.0\.feed_forward\.w1\.weight is put together of 2 parts"):
        plan_with(file_of("z-image"), checkpoint_of("z-image"), offload={"layerwise": True, "host": "mmap"})


def test_more_files_than_transformers(file_of: Callable[[str], Path], checkpoint_of: CheckpointOf) -> None:
    with pytest.raises(ConfigError, match=r"published\.safetensors; the checkpoint has only transformer") as refused:
        make_plan(RunConfig(transformer_2=str(file_of("z-image"))), checkpoint_of("z-image"), "cpu")
    assert refused.value.key == "transformer_2"


def test_a_file_that_changes_after_planning_is_noticed(
    file_of: Callable[[str], Path], checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    file = Path(shutil.copy(file_of("z-image"), tmp_path))
    stored = plan_with(file, checkpoint_of("z-image")).layout.stored
    tensors = load_file(file)
    joined = next(name for name in tensors if name.endswith("qkv.weight"))
    save_file(tensors | {joined: tensors[joined][:-3].clone()}, file)
    with pytest.raises(CheckpointError, match="is not what it was when the run was planned"):
        WeightSource(stored).rows("x_pad_token")
