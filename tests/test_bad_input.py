"""Bad model directories and configs that do not fit them: one message each, found before any rank exists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossdock.launch.gangs.choose import choose_device
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import CheckpointError, ConfigError, LaunchError, RequestError, UserError
from crossdock.runtime.models.checkpoint import MODULAR_INDEX, read_model_index
from crossdock.runtime.models.families import SPECS
from crossdock.runtime.models.tiny.make_checkpoint import make_checkpoint
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.request_checks import check_request
from crossdock.runtime.request import GenerateRequest

INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def damaged(flux2_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(flux2_dir, tmp_path / "model"))


def _plan(directory: Path, **config: Any) -> RunPlan:
    return make_plan(RunConfig.parse(config), directory, "cpu")


def _plan_as(directory: Path, family: str) -> RunPlan:
    """As if the model were one of that family."""
    plan = _plan(directory)
    return replace(plan, layout=replace(plan.layout, spec=SPECS[family]))


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def _edit_tensors(folder: Path, fqn: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Change the file that holds `fqn`."""
    file = folder / json.loads((folder / Path(INDEX).name).read_text())["weight_map"][fqn]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    return file


def _truncate(path: Path, nbytes: int = 1000) -> None:
    path.write_bytes(path.read_bytes()[:-nbytes])


def _refused(kind: type[UserError], directory: Path, *texts: str, **config: Any) -> None:
    with pytest.raises(kind) as caught:
        _plan(directory, **config)
    assert caught.value.exit_code == 2
    for text in texts:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_healthy_directory_is_planned(damaged: Path) -> None:
    """The other tests of this file fail for what they damage, and not for something else."""
    assert len(_plan(damaged).memory.blocks) == 8


def test_missing_directory(tmp_path: Path) -> None:
    _refused(CheckpointError, tmp_path / "nowhere", "nowhere: no such directory")


def test_missing_model_index(damaged: Path) -> None:
    (damaged / "model_index.json").unlink()
    _refused(CheckpointError, damaged, "model_index.json: no such file")


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_broken_json(damaged: Path, text: str) -> None:
    (damaged / "model_index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    _refused(CheckpointError, damaged, "model_index.json: ")


def test_unknown_model_class(damaged: Path) -> None:
    _edit_json(damaged / "model_index.json", lambda index: index.update(_class_name="UnheardOfPipeline"))
    _refused(CheckpointError, damaged, "unknown model class 'UnheardOfPipeline'", "Flux2KleinPipeline (flux2-klein)")


def test_config_of_another_class(damaged: Path) -> None:
    _edit_json(damaged / "transformer/config.json", lambda config: config.update(_class_name="UNet2DModel"))
    _refused(CheckpointError, damaged, "transformer/config.json: _class_name is 'UNet2DModel'")


def test_config_that_cannot_be_built(damaged: Path) -> None:
    _edit_json(damaged / "transformer/config.json", lambda config: config.update(num_layers="three"))
    _refused(CheckpointError, damaged, "transformer/config.json: num_layers: Flux2Transformer2DModel cannot be built: ")


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_missing_component(damaged: Path, component: str) -> None:
    shutil.rmtree(damaged / component)
    _refused(CheckpointError, damaged, f"{component}: no such folder, but model_index.json lists")


def _add_component(directory: Path, name: str, library: str | None, class_name: str | None) -> None:
    _edit_json(directory / "model_index.json", lambda index: index.update({name: [library, class_name]}))
    if library is not None:
        (directory / name).mkdir()
        (directory / name / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("name", "library", "class_name"),
    [
        ("transformer_2", "diffusers", "Flux2Transformer2DModel"),
        ("text_encoder_2", "transformers", "CLIPTextModel"),
        ("adapter", "somebodys_code", "Adapter"),
    ],
)
def test_a_module_without_a_place_on_the_device(damaged: Path, name: str, library: str, class_name: str) -> None:
    """Pitfall 13: diffusers would load it whole, and neither the budget nor the streaming would know of it."""
    _add_component(damaged, name, library, class_name)
    save_file({"weight": torch.zeros(1)}, damaged / name / "model.safetensors")
    _refused(
        CheckpointError, damaged, f"{name}: the component '{name}' ({class_name})", "transformer, text_encoder, vae"
    )


@pytest.mark.parametrize(
    ("library", "class_name"),
    [
        ("transformers", "CLIPImageProcessor"),
        ("transformers", "CLIPTokenizer"),
        ("diffusers", "EulerDiscreteScheduler"),
        (None, None),
    ],
)
def test_components_that_are_no_modules_are_let_through(
    damaged: Path, library: str | None, class_name: str | None
) -> None:
    _add_component(damaged, "another", library, class_name)
    _plan(damaged)


def test_missing_file_of_the_index(damaged: Path) -> None:
    sorted((damaged / "transformer").glob("*.safetensors"))[0].unlink()
    _refused(CheckpointError, damaged, "no such file; where an index lists it")


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("left", ["most", "header", "nothing"])
def test_truncated_safetensors(damaged: Path, component: str, left: str) -> None:
    file = sorted((damaged / component).glob("*.safetensors"))[0]
    size = file.stat().st_size
    _truncate(file, {"most": 1000, "header": size - 64, "nothing": size}[left])
    _refused(CheckpointError, damaged, f"{file.name}: not a whole safetensors file", "download the file again")


def test_a_file_of_too_many_tensors(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs time; a header of 16 MB can have 400,000."""
    monkeypatch.setattr("crossdock.runtime.models.checkpoint.MAX_TENSORS", 3)
    _refused(CheckpointError, flux2_dir, ".safetensors: holds ", "tensors; no file of a model has more than 3")


def test_tensor_of_the_wrong_shape(damaged: Path) -> None:
    fqn = "transformer_blocks.1.attn.to_q.weight"
    file = _edit_tensors(damaged / "transformer", fqn, lambda t: t.update({fqn: torch.zeros(5, 7)}))
    _refused(CheckpointError, damaged, file.name, f"{fqn} has shape [5, 7], but config.json asks for [96, 96]")


def test_missing_tensor(damaged: Path) -> None:
    fqn = "single_transformer_blocks.4.attn.to_out.weight"
    _edit_tensors(damaged / "transformer", fqn, lambda tensors: tensors.pop(fqn))
    _refused(CheckpointError, damaged, f"the tensor {fqn} is missing")


def test_heads_not_divisible(flux2_dir: Path) -> None:
    parallel = {"tp_degree": 4}
    _refused(
        ConfigError, flux2_dir, "parallel.tp_degree: found 4", "6 attention heads", "1, 2, 3, 6", parallel=parallel
    )


def test_heads_divide_but_the_feed_forward_does_not(z_image_dir: Path) -> None:
    """256 features over 3 ranks: the message names the tensor, and 3 is not among what is allowed."""
    parallel = {"tp_degree": 3}
    _refused(ConfigError, z_image_dir, "feed_forward.w1.weight: a part of 256", "allowed: 1, 2", parallel=parallel)


def test_budget_below_the_minimum_names_it(flux2_dir: Path) -> None:
    """The named minimum is enough, and one byte less is not."""
    offload = {"layerwise": True, "device_budget": "1MiB"}
    with pytest.raises(ConfigError) as caught:
        _plan(flux2_dir, offload=offload)
    minimum = int(str(caught.value).split("at least ")[1].split(" ")[0])
    _plan(flux2_dir, offload={**offload, "device_budget": f"{minimum}B"})
    with pytest.raises(ConfigError):
        _plan(flux2_dir, offload={**offload, "device_budget": f"{minimum - 1}B"})


@pytest.mark.parametrize("gpus", [0, 1])
def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = RunConfig.parse({"parallel": {"ulysses_degree": 2}, "launch": {"device": "cuda"}})
    with pytest.raises(LaunchError, match=f"launch.device: 2 ranks need 2 GPUs, but this machine has {gpus}"):
        choose_device(config)
    assert choose_device(RunConfig.parse({"launch": {"device": "cpu"}})) == "cpu"


def test_xfuser_says_why_not(flux2_dir: Path) -> None:
    """Before anything is loaded."""
    parallel = {"ulysses_degree": 2, "attention": "xfuser"}
    _refused(
        ConfigError, flux2_dir, "parallel.attention: xfuser cannot work here", "attention: native", parallel=parallel
    )


def test_a_negative_prompt_that_would_do_nothing(flux2_dir: Path) -> None:
    with pytest.raises(RequestError, match="negative_prompt: found 'blurred'; the guidance of flux2-klein takes none"):
        check_request(_plan(flux2_dir), GenerateRequest.of("x", negative_prompt="blurred"))


def test_guidance_that_a_distilled_model_lacks(flux2_dir: Path) -> None:
    plan = _plan_as(flux2_dir, "flux3-distilled")
    with pytest.raises(RequestError, match="guidance_scale: found 4; flux3-distilled has no guidance: leave it out"):
        check_request(plan, GenerateRequest.of("x", guidance_scale=4.0))


@pytest.mark.parametrize("family", ["qwen-image", "qwen-image-2.1"])
def test_guidance_that_waits_for_a_negative_prompt(family: str, flux2_dir: Path) -> None:
    """diffusers leaves it out, and only logs that."""
    plan = _plan_as(flux2_dir, family)
    with pytest.raises(RequestError, match=f"guidance_scale: found 4; {family} guides only where .* may be empty"):
        check_request(plan, GenerateRequest.of("x", guidance_scale=4.0))
    check_request(plan, GenerateRequest.of("x", guidance_scale=4.0, negative_prompt=""))
    check_request(plan, GenerateRequest.of("x", guidance_scale=1.0))


@pytest.mark.parametrize(
    ("recipe", "file", "key"),
    [("flux2-klein", "model_index.json", "is_distilled"), ("flux1", "transformer/config.json", "guidance_embeds")],
)
def test_guidance_that_a_distilled_checkpoint_ignores(
    recipe: str, file: str, key: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """FLUX.2 [klein] with four steps, FLUX.1 [schnell]: of the same pipelines as those that it guides."""
    directory = Path(shutil.copytree(checkpoint_of(recipe), tmp_path / "distilled"))
    asked = GenerateRequest.of("x", guidance_scale=4.0)
    check_request(_plan(directory), asked)
    _edit_json(directory / file, lambda content: content.update({key: not content[key]}))
    with pytest.raises(RequestError, match=f"guidance_scale: found 4; this checkpoint of {recipe} is distilled"):
        check_request(_plan(directory), asked)
    check_request(_plan(directory), replace(asked, guidance_scale=1.0))


@pytest.mark.parametrize("family", ["flux3", "hunyuan-video-1.5"])
def test_a_pipeline_that_takes_one_prompt_at_a_time(family: str, flux2_dir: Path) -> None:
    plan = _plan_as(flux2_dir, family)
    check_request(plan, GenerateRequest.of("x", images_per_prompt=3))
    with pytest.raises(RequestError, match=f"batch_size: found 2; {family} takes one prompt at a time: leave it out"):
        check_request(plan, GenerateRequest.of("x", images_per_prompt=3, batch_size=2))


@pytest.mark.parametrize(("frames", "near"), [(None, 0), (124, 0), (345, 0), (9, 124), (130, 124), (1000, 345)])
def test_frames_of_which_a_model_has_a_few_counts(flux2_dir: Path, frames: int | None, near: int) -> None:
    plan, request = _plan_as(flux2_dir, "minimax-h3"), GenerateRequest.of("x", frames=frames)
    if not near:
        check_request(plan, request)
        return
    allowed = f"allowed for minimax-h3: from 124 to 345 in steps of 17, such as {near}"
    with pytest.raises(RequestError, match=f"frames: found {frames}; {allowed}"):
        check_request(plan, request)


def test_a_component_of_another_workflow_is_left_out(flux2_dir: Path, tmp_path: Path) -> None:
    """A checkpoint may hold a transformer more, and need not: it is neither placed nor asked for."""
    model = tmp_path / "model"
    make_checkpoint("minimax-h3", model)
    expected = _plan(model)
    assert expected.layout.pixel_multiple == 32
    assert expected.layout.decoders == ("vae", "audio_vae")
    for name in ("transformer_ref", "another"):
        shutil.copytree(model / "transformer", model / name)
    _edit_json(model / MODULAR_INDEX, lambda index: index.update(transformer_ref=index["transformer"]))
    assert "transformer_ref" in read_model_index(model)
    assert _plan(model) == expected
    _edit_json(model / MODULAR_INDEX, lambda index: index.update(another=index["transformer"]))
    _refused(CheckpointError, model, "the component 'another' (MiniMaxH3Transformer3DModel) has weights")


@pytest.mark.parametrize(("size", "text"), [((250, 256), "height: found 250"), ((256, 8), "width: found 8")])
def test_size_that_does_not_divide(flux2_dir: Path, size: tuple[int, int], text: str) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        check_request(_plan(flux2_dir), GenerateRequest.of("x", height=size[0], width=size[1]))
    assert "a multiple of 16" in str(caught.value)
