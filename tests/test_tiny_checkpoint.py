"""The tiny checkpoints: diffusers' format, one seed, one set of bytes, every part shows in the picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from crossdock.runtime.errors import CheckpointError, RequestError
from crossdock.runtime.models.checkpoint import read_model_index
from crossdock.runtime.models.families import spec_of_pipeline
from crossdock.runtime.models.latents import latent_pixels
from crossdock.runtime.models.spec import ModelSpec
from crossdock.runtime.models.tiny import make_checkpoint as tiny_checkpoint
from crossdock.runtime.models.tiny.make_checkpoint import make_checkpoint
from crossdock.runtime.models.tiny.recipes import TINY
from layouts import FAMILIES
from reference import pipeline_of
from tiers import ALL, not_quick, thorough

THOROUGH = list(TINY) if ALL else list(FAMILIES)
"""Recipes that are drawn with, again and again; `make test-all` does that with all."""
SIZE_LIMIT_BYTES = 20_000_000
LARGER = {"hunyuan-video-1.5": 26_000_000}
"""Its class has a projection of 2048 x 2048, whatever its config says."""
FLUX3_STACKS = {
    "txt_mode_blocks": 2,
    "mode_blocks.image": 2,
    "mode_blocks.image_cond": 2,
    "single_transformer_blocks": 4,
}
STACKS = {
    "flux1": {"transformer_blocks": 3, "single_transformer_blocks": 5},
    "flux2": {"transformer_blocks": 2, "single_transformer_blocks": 6},
    "flux2-klein": {"transformer_blocks": 3, "single_transformer_blocks": 5},
    "longcat-image": {"transformer_blocks": 2, "single_transformer_blocks": 4},
    "ovis-image": {"transformer_blocks": 2, "single_transformer_blocks": 5},
    "z-image": {"noise_refiner": 2, "context_refiner": 2, "layers": 5},
    "wan2.1": {"blocks": 5},
    "wan2.2-ti2v-5b": {"blocks": 5},
    "wan2.2-a14b": {"blocks": 5},
    "hunyuan-video-1.5": {"transformer_blocks": 3},
    "qwen-image": {"transformer_blocks": 5},
    "qwen-image-2.1": {"transformer_blocks": 6},
    "sd3.5": {"transformer_blocks": 5},
    "krea2": {"text_fusion.layerwise_blocks": 2, "text_fusion.refiner_blocks": 2, "transformer_blocks": 5},
    "ltx2": {"transformer_blocks": 4},
    "helios": {"blocks": 5},
    "minimax-h3": {"token_refiner.refiner_blocks": 2, "transformer_blocks": 5},
    "flux3": FLUX3_STACKS,
    "flux3-distilled": FLUX3_STACKS,
}
FLUX3 = {
    "transformer": ["diffusers", "Flux3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
    "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
}
WAN = {
    "_class_name": "WanPipeline",
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
}
CLASSES: dict[str, dict[str, Any]] = {
    "flux1": {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5Tokenizer"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "flux2": {
        "_class_name": "Flux2Pipeline",
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
        "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "flux2-klein": {
        "_class_name": "Flux2KleinPipeline",
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "longcat-image": {
        "_class_name": "LongCatImagePipeline",
        "transformer": ["diffusers", "LongCatImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "ovis-image": {
        "_class_name": "OvisImagePipeline",
        "transformer": ["diffusers", "OvisImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "z-image": {
        "_class_name": "ZImagePipeline",
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "wan2.1": {**WAN, "transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False},
    "wan2.2-ti2v-5b": {**WAN, "transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": True},
    "wan2.2-a14b": {**WAN, "transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875},
    "hunyuan-video-1.5": {
        "_class_name": "HunyuanVideo15Pipeline",
        "transformer": ["diffusers", "HunyuanVideo15Transformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLHunyuanVideo15"],
        "text_encoder": ["transformers", "Qwen2_5_VLTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer_2": ["transformers", "ByT5Tokenizer"],
        "guider": ["diffusers", "ClassifierFreeGuidance"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "qwen-image": {
        "_class_name": "QwenImagePipeline",
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "qwen-image-2.1": {
        "_class_name": "QwenImage21Pipeline",
        "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage21"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "sd3.5": {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "krea2": {
        "_class_name": "Krea2Pipeline",
        "transformer": ["diffusers", "Krea2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
        "text_encoder": ["transformers", "Qwen3VLModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "ltx2": {
        "_class_name": "LTX2Pipeline",
        "transformer": ["diffusers", "LTX2VideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLLTX2Video"],
        "audio_vae": ["diffusers", "AutoencoderKLLTX2Audio"],
        "vocoder": ["ltx2", "LTX2Vocoder"],
        "connectors": ["ltx2", "LTX2TextConnectors"],
        "text_encoder": ["transformers", "Gemma3ForConditionalGeneration"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    },
    "minimax-h3": {
        "_class_name": "MiniMaxH3ModularPipeline",
        "transformer": ["diffusers", "MiniMaxH3Transformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLMiniMaxH3"],
        "audio_vae": ["diffusers", "AutoencoderKLMiniMaxH3Audio"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "scheduler": ["diffusers", "MiniMaxH3Scheduler"],
        "audio_scheduler": ["diffusers", "MiniMaxH3Scheduler"],
    },
    "flux3": {"_class_name": "Flux3ModularPipeline", **FLUX3},
    "flux3-distilled": {"_class_name": "Flux3DistilledModularPipeline", **FLUX3},
    "helios": {
        "_class_name": "HeliosPipeline",
        "transformer": ["diffusers", "HeliosTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "scheduler": ["diffusers", "HeliosScheduler"],
    },
}
PROMPT = 'a red fox in the snow, a sign that says "hello"'
"""Some pipelines encode once more what is in quotes."""
NO_REFERENCE = r"(mode_blocks|(early|single)_stream_modulations|x_embedders)\.image_cond\..*"
UNUSED = {
    "Flux3ModularPipeline": NO_REFERENCE,
    "Flux3DistilledModularPipeline": NO_REFERENCE,
    "QwenImagePipeline": r"transformer_blocks\.4\.(txt_mlp|attn\.(add_q_proj|to_add_out|norm_added_q))\..*",
    "StableDiffusion3Pipeline": r"transformer_blocks\.4\.attn\.(add_q_proj|norm_added_q)\..*",
    "HunyuanVideo15Pipeline": "|".join(
        (
            r"transformer_blocks\.2\.(ff_context|attn\.(add_q_proj|to_add_out|norm_added_q))\..*",
            r"image_embedder\..*",  # there is no first frame
            r".*\.refiner_blocks\.\d+\.attn\.to_k\.bias",  # softmax does not see what all keys have in common
        )
    ),
}
"""Pipeline -> tensors of which nothing comes into the picture, in the published model too: mostly the last text."""
FRAMES = 9
"""Of a video: three latent frames, of which the first stands for one."""
RELATIVE_NOISE = 1e-6
VISIBLE = 5e-4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each family's checkpoint with seed 0, made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        directory: Path = root / family
        if not directory.exists():
            make_checkpoint(family, directory)
        return directory

    return get


@pytest.fixture(scope="module", params=THOROUGH)
def pipeline(request: pytest.FixtureRequest, checkpoints: Callable[[str], Path]) -> Any:
    return pipeline_of(checkpoints(request.param))


def spec_of(pipe: Any) -> ModelSpec:
    spec = spec_of_pipeline(type(getattr(pipe, "modular", pipe)).__name__)
    assert spec is not None
    return spec


def frames_of(spec: ModelSpec) -> int:
    return spec.frame_counts[0] if spec.frame_counts else spec.chunk_frames or FRAMES


def run(pipe: Any, prompt: str, tokens: tuple[int, int], steps: int, output_type: str, chunks: int = 1) -> Any:
    """The first picture or video; `tokens` along its height and width."""
    spec = spec_of(pipe)
    pixels = spec.patch * latent_pixels(pipe.vae.config)
    frames = {} if spec.fps is None else {"num_frames": chunks * frames_of(spec)}
    return pipe(
        prompt=prompt,
        height=tokens[0] * pixels,
        width=tokens[1] * pixels,
        num_inference_steps=steps + spec.more_steps,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type=output_type,
        return_dict=False,
        **frames,
    )[0]


def latents_of(pipe: Any, prompt: str = PROMPT, chunks: int = 1) -> torch.Tensor:
    latents: torch.Tensor = run(pipe, prompt, (8, 7), 2, "latent", chunks)
    return latents


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("family", list(TINY))
def test_format(family: str, checkpoints: Callable[[str], Path]) -> None:
    directory = checkpoints(family)
    index = read_model_index(directory)
    assert CLASSES[family].items() <= index.items()
    for name in (
        "transformer/config.json",
        "vae/config.json",
        "text_encoder/config.json",
    ):
        assert (directory / name).is_file()
    assert any((directory / name / "tokenizer.json").is_file() for name in ("tokenizer", "processor"))
    assert sum(len(data) for data in files_of(directory).values()) < LARGER.get(family, SIZE_LIMIT_BYTES)


@pytest.mark.parametrize("family", list(TINY))
def test_the_transformer_is_sharded(family: str, checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints(family) / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) >= 2
    assert shards == {path.name for path in folder.glob("*.safetensors")}
    blocks: dict[str, set[str]] = {stack: set() for stack in STACKS[family]}
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as tensors:
            names = list(tensors.keys())
            assert {tensors.get_tensor(name).dtype for name in names} == {torch.float32}
        assert all(index["weight_map"][name] == shard for name in names)
        for name in names:
            for stack, numbers in blocks.items():
                if name.startswith(f"{stack}."):
                    numbers.add(name.removeprefix(f"{stack}.").partition(".")[0])
    assert {stack: len(numbers) for stack, numbers in blocks.items()} == STACKS[family]


@pytest.mark.parametrize("family", THOROUGH)
def test_bytes_follow_from_the_seed(family: str, tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    torch.rand(3)  # the global generator is neither read nor moved
    state = torch.random.get_rng_state()
    make_checkpoint(family, tmp_path / "same")
    assert torch.equal(torch.random.get_rng_state(), state)
    make_checkpoint(family, tmp_path / "other", seed=1)
    first, same, other = (files_of(d) for d in (checkpoints(family), tmp_path / "same", tmp_path / "other"))
    assert same == first
    assert {name for name in first if other[name] != first[name]} == {n for n in first if n.endswith(".safetensors")}


@not_quick
@pytest.mark.parametrize("tokens", [(8, 8), (7, 5)])
def test_diffusers_draws_a_picture(pipeline: Any, tokens: tuple[int, int]) -> None:
    pixels = torch.tensor(np.array(run(pipeline, "a boat", tokens, 4, "np")[0]))
    *frames, height, width, channels = pixels.shape
    assert height * tokens[1] == width * tokens[0]
    assert channels == (4 if getattr(pipeline.vae.config, "out_channels", 3) == 4 else 3)  # with alpha, for one
    spec = spec_of(pipeline)
    assert frames == ([] if spec.fps is None else [frames_of(spec)])
    assert (pixels.flatten(0, -2).amax(0) - pixels.flatten(0, -2).amin(0)).min() > 0.4


@not_quick
def test_one_word_changes_the_latents(pipeline: Any) -> None:
    fox = latents_of(pipeline)
    assert torch.equal(latents_of(pipeline), fox)
    assert 0.5 < fox.std() < 2.0
    assert (latents_of(pipeline, PROMPT.replace("fox", "box")) - fox).abs().max() > 0.05


@thorough
@torch.no_grad()
def test_every_tensor_shows(pipeline: Any) -> None:
    """Half of a tensor drawn anew moves one unguided velocity by more than two runs may differ (1e-4)."""
    transformer = pipeline.transformer
    calls: list[tuple[Any, Any]] = []
    hook = transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    chunks = 1 if spec_of(pipeline).chunk_frames is None else 2
    latents_of(pipeline, chunks=chunks)
    hook.remove()
    args, kwargs = calls[len(calls) * (chunks - 1) // chunks]  # in the first chunk there are no frames before

    def velocity() -> torch.Tensor:
        outputs = transformer(*args, **kwargs)  # of audio, too, where there is any
        return torch.cat([outputs[number][0].flatten() for number in range(len(outputs))])

    expected = velocity()
    generator = torch.Generator().manual_seed(1)
    unseen = {}
    for name, parameter in transformer.named_parameters():
        kept = parameter.data
        parameter.data = kept + 0.5 * kept.std(correction=0) * torch.randn(kept.shape, generator=generator)
        moved = float((velocity() - expected).abs().max())
        parameter.data = kept
        if moved < VISIBLE:
            unseen[name] = moved
    unused = UNUSED.get(spec_of(pipeline).pipeline, "")
    assert {name for name in unseen if not re.fullmatch(unused, name)} == set()
    assert not unused or unseen


def test_pad_tokens_and_norms_are_not_trivial(pipeline: Any) -> None:
    for name, parameter in pipeline.transformer.named_parameters():
        assert parameter.std(correction=0) > 0, name
    if hasattr(pipeline.vae, "bn"):
        assert pipeline.vae.bn.running_mean.std() > 0.1
        assert 0.5 <= pipeline.vae.bn.running_var.min() < pipeline.vae.bn.running_var.max() <= 1.5


@not_quick
def test_rounding_of_the_noise_is_not_amplified(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, draw = latents_of(pipeline), torch.randn

    def drawn(*shape: Any, **options: Any) -> torch.Tensor:
        noise = draw(*shape, **options)
        relative = 2 * torch.rand(noise.shape, generator=torch.Generator().manual_seed(3)) - 1
        return noise * (1 + RELATIVE_NOISE * relative)

    monkeypatch.setattr(torch, "randn", drawn)
    moved = (latents_of(pipeline) - expected).abs().max()
    assert 0 < moved < 1e-5


def test_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=rf"found 'zimage'; did you mean z-image\? allowed: {', '.join(TINY)}$"):
        make_checkpoint("zimage", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_directories_that_cannot_take_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(CheckpointError, match="is not empty"):
        make_checkpoint("z-image", tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        make_checkpoint("z-image", file)
    with pytest.raises(CheckpointError, match="cannot write here: Not a directory"):
        make_checkpoint("z-image", file / "new")
    with pytest.raises(CheckpointError, match="cannot write here: No such file"):
        make_checkpoint("z-image", tmp_path / "no" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "kept"


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipeline:
        def save_pretrained(self, directory: Path, max_shard_size: str) -> None:
            (directory / "model_index.json").write_text("{}")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_checkpoint, "_build", lambda recipe, seed: Pipeline())
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        make_checkpoint("z-image", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_an_empty_directory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipeline:
        def save_pretrained(self, directory: Path, max_shard_size: str) -> None:
            (directory / "model_index.json").write_text("{}")

    monkeypatch.setattr(tiny_checkpoint, "_build", lambda recipe, seed: Pipeline())
    make_checkpoint("z-image", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model_index.json"]
