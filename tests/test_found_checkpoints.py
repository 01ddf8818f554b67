"""Checkpoints as people have them: what diffusers and transformers make of them is what runs here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from one_rank import admitted, rank_request
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import read_json, weight_files
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from tiers import not_quick, some

CheckpointOf = Callable[[str], Path]
Tensors = dict[str, Tensor]
SMALL = {"steps": 2, "height": 64, "width": 64}


@pytest.fixture
def found(flux2_dir: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(flux2_dir, tmp_path / "found"))


def _plan(directory: Path, **config: Any) -> RunPlan:
    return make_plan(RunConfig.parse({"offload": {"layerwise": True}, **config}), directory, "cpu")


def _latents(directory: Path) -> Tensor:
    with admitted(_plan(directory)) as worker:
        latents = worker.generate(rank_request("a fox", **SMALL)).latents
    assert latents is not None
    return latents


@pytest.fixture(scope="module")
def expected(flux2_dir: Path) -> Tensor:
    """Of the checkpoint as it was."""
    return _latents(flux2_dir)


def _rewritten(folder: Path, change: Callable[[Tensors], Tensors], name: str = "diffusion_pytorch_model") -> None:
    """All files of a component in one, with other tensors."""
    tensors: Tensors = {}
    for file in weight_files(folder):
        tensors |= load_file(file)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    save_file(change(tensors), folder / f"{name}.safetensors", metadata={"format": "pt"})


def _in(dtype: torch.dtype, where: Callable[[str, Tensor], bool] = lambda name, tensor: True) -> Any:
    return lambda tensors: {name: t.to(dtype) if where(name, t) else t for name, t in tensors.items()}


# -- which files ----------------------------------------------------------------------------------------------------

ONE, INDEX = "diffusion_pytorch_model{}.safetensors", "diffusion_pytorch_model.safetensors.index{}.json"
FILES = {
    "backup beside": ([ONE, "diffusion_pytorch_model_old.safetensors"], None, [ONE]),
    "backup that comes first": ([ONE, "a.safetensors"], None, [ONE]),
    "variant beside": ([ONE, ONE.format(".fp16")], None, [ONE]),
    "index and one": ([ONE, INDEX, "shard.safetensors"], None, ["shard.safetensors"]),
    "transformers' index and one": (
        ["model.safetensors", "model.safetensors.index.json", "shard.safetensors"],
        None,
        ["model.safetensors"],
    ),
    "variant asked for": ([ONE, ONE.format(".fp16")], "fp16", [ONE.format(".fp16")]),
    "shards of a variant": ([ONE, INDEX.format(".bf16"), "shard.safetensors"], "bf16", ["shard.safetensors"]),
    "no such variant": ([ONE], "fp16", [ONE]),
    "alone": (["flux.safetensors"], None, ["flux.safetensors"]),
}


@pytest.mark.parametrize(("there", "variant", "read"), FILES.values(), ids=FILES)
def test_the_files_that_diffusers_reads(there: list[str], variant: str | None, read: list[str], tmp_path: Path) -> None:
    """A backup, a fine-tune or another precision in the same folder: its weights instead, or both mixed."""
    for name in there:
        content = {"weight_map": {"a": "shard.safetensors"}} if name.endswith(".json") else {}
        (tmp_path / name.format("")).write_text(json.dumps(content))
    assert [file.name for file in weight_files(tmp_path, variant)] == [name.format("") for name in read]


def test_several_files_of_which_none_has_the_name(found: Path) -> None:
    _rewritten(found / "transformer", lambda tensors: tensors, "a")
    save_file({}, found / "transformer" / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer: found a\.safetensors, b\.safetensors, no index and no"):
        _plan(found)


@not_quick
def test_a_stray_file_is_not_read(found: Path, expected: Tensor) -> None:
    """Not even if it is damaged; by text encoder and VAE neither."""
    for component, name in (("transformer", "a_old"), ("vae", "a"), ("text_encoder", "a")):
        (found / component / f"{name}.safetensors").write_bytes(b"half a file")
    _rewritten(found / "transformer", lambda tensors: tensors)
    tensors = load_file(found / "transformer" / "diffusion_pytorch_model.safetensors")
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(other, found / "transformer" / "diffusion_pytorch_model_old.safetensors")
    assert torch.equal(_latents(found), expected)


@not_quick
def test_a_variant_where_there_is_nothing_else(found: Path, expected: Tensor) -> None:
    """Downloaded with variant="fp16"; the VAE has both, and the text encoder has none."""
    folder = found / "transformer"
    for file in sorted(folder.glob("*.safetensors")):
        file.rename(folder / file.name.replace("model-", "model.fp16-"))
    index = (folder / "diffusion_pytorch_model.safetensors.index.json").read_text().replace("model-", "model.fp16-")
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(index)
    vae = found / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(vae, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    vae.write_bytes(b"not read")
    assert _plan(found).layout.variant == "fp16"
    assert torch.equal(_latents(found), expected)


def test_two_variants_are_a_question(found: Path) -> None:
    _rewritten(found / "transformer", lambda tensors: tensors, "diffusion_pytorch_model.fp16")
    _rewritten(found / "vae", lambda tensors: tensors, "diffusion_pytorch_model.bf16")
    with pytest.raises(CheckpointError, match=r"has variants of its files \(bf16, fp16\); leave one"):
        _plan(found)


@not_quick
def test_more_than_the_model_uses(found: Path, expected: Tensor) -> None:
    """Tensors of newer or older classes, also of a dtype that is not known here, and keys of configs."""
    extra = {"ids": torch.arange(5).to(torch.uint16), "more.weight": torch.ones(3, dtype=torch.float8_e8m0fnu)}
    for component, name in (
        ("transformer", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        _rewritten(found / component, lambda tensors: tensors | extra, name)
        config = found / component / "config.json"
        config.write_text(json.dumps(read_json(config) | {"a_key_of_tomorrow": 3}))
    assert torch.equal(_latents(found), expected)


def test_a_tensor_that_is_used_is_of_a_known_dtype(found: Path) -> None:
    _rewritten(found / "transformer", lambda tensors: tensors | {"proj_out.weight": torch.ones(3).to(torch.uint16)})
    with pytest.raises(CheckpointError, match=r"proj_out\.weight is missing, or of an unknown dtype; is the download"):
        _plan(found)


# -- which dtypes ---------------------------------------------------------------------------------------------------

STORED = {
    "fp32 vectors in bf16": ("flux2-klein", _in(torch.bfloat16, lambda _, t: t.dim() == 2), torch.bfloat16),
    "unscaled fp8": ("flux2-klein", _in(torch.float8_e4m3fn, lambda n, t: t.dim() == 2 and "blocks" in n), None),
    "fp64": ("flux2-klein", _in(torch.float64, lambda n, _: n.startswith("proj_out")), None),
    "all bf16": ("wan2.1", _in(torch.bfloat16), torch.bfloat16),
    "all fp16": ("wan2.1", _in(torch.float16), torch.float16),
    "half of it kept": ("krea2", _in(torch.bfloat16, lambda n, t: t.dim() == 2), torch.bfloat16),
}


@pytest.mark.parametrize(("recipe", "change", "dtype"), STORED.values(), ids=STORED)
def test_dtypes_are_those_that_diffusers_makes(
    recipe: str, change: Any, dtype: torch.dtype | None, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    """What a class keeps in fp32, and what was stored in another dtype than most of it; `dtype` None: float32."""
    directory = Path(shutil.copytree(checkpoint_of(recipe), tmp_path / recipe))
    _rewritten(directory / "transformer", change)
    dtype = dtype or torch.float32
    kind: type[ModelMixin] = getattr(diffusers, read_json(directory / "transformer" / "config.json")["_class_name"])
    model = kind.from_pretrained(directory / "transformer", dtype=dtype)
    layout = _plan(directory).layout
    assert layout.pipeline_dtype == dtype
    assert {name: layout.dtypes[name] for name, _ in model.named_parameters()} == {
        name: parameter.dtype for name, parameter in model.named_parameters()
    }


@not_quick
def test_unscaled_fp8_is_what_it_is_in_float32(found: Path, tmp_path: Path) -> None:
    as_fp8 = _in(torch.float8_e4m3fn, lambda name, tensor: tensor.dim() == 2 and "blocks" in name)
    _rewritten(found / "transformer", as_fp8)
    wide = Path(shutil.copytree(found, tmp_path / "wide"))
    _rewritten(wide / "transformer", _in(torch.float32))
    assert torch.equal(_latents(found), _latents(wide))


# -- tied weights ---------------------------------------------------------------------------------------------------


@not_quick
@pytest.mark.parametrize("other", some([True, False], 1))
def test_an_output_embedding_that_the_config_ties(other: bool, found: Path) -> None:
    """transformers unties them where the files have two; the plan had room for one."""
    folder = found / "text_encoder"
    config = read_json(folder / "config.json") | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))

    def both(tensors: Mapping[str, Tensor]) -> Tensors:
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1] += other
        return {**tensors, "lm_head.weight": head}

    _rewritten(folder, both, "model")
    with admitted(_plan(found)) as worker:
        encoder = worker.loaded.pipeline.on_device[0]
        assert (encoder.lm_head.weight is encoder.model.embed_tokens.weight) is not other
        assert worker.generate(rank_request("a fox", **SMALL)).latents is not None
