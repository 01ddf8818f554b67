"""Pipelines of diffusers that no family describes: they run from what is inferred, as in diffusers, or are refused.

On one rank, layer by layer: all of them. On two ranks: HSDP, tensor parallelism and Ulysses, where they can.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
from one_rank import admitted, rank_request

from crossdock.launch.engine.engine import Engine
from crossdock.offload.live.discovery import discover_blocks
from crossdock.parallel.tensor import LinearStyle
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.errors import CheckpointError, ConfigError, RequestRefused
from crossdock.runtime.models.families import SPECS, spec_for
from crossdock.runtime.models.inferred.spec import InferredSpec
from crossdock.runtime.models.transformers import build_transformers
from crossdock.runtime.plan import complete_spec
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.watch.gang import Gang
from inferred_recipes import RECIPES, make_pipeline
from reference import TOLERANCE, max_error, max_levels, reference
from tiers import thorough

GangOf = Callable[[int], Gang]
CheckpointOf = Callable[[str], Path]
PROMPT = "a lighthouse on a cliff above a stormy sea"
LAYERWISE: dict[str, Any] = {"offload": {"layerwise": True}}
QUICKEST = (
    "AuraFlowPipeline",
    "PixArtSigmaPipeline",
    "Lumina2Pipeline",
    "CogView3PlusPipeline",
    "LTXPipeline",
    "PRXPipeline",
    "BriaPipeline",
    "Flux2KleinKVPipeline",
)
"""Outside of `make test-all`."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "layerwise_hsdp": {"parallel": {"dp_degree": 2, "hsdp": {"shard": 2}}, **LAYERWISE},
    "tp2": {"parallel": {"tp_degree": 2}},
    "ulysses2": {"parallel": {"ulysses_degree": 2}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckpointOf]:
    """Pipeline class -> its tiny checkpoint, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("inferred")

    def made(name: str) -> Path:
        return folder / name if (folder / name).exists() else make_pipeline(name, folder / name)

    yield made
    shutil.rmtree(folder)


def _plan(directory: Path, **config: Any) -> RunPlan:
    return make_plan(RunConfig.parse(config), directory, "cpu")


def _wishes(name: str) -> dict[str, Any]:
    recipe = RECIPES[name]
    return {"steps": 2, "height": recipe.size[0], "width": recipe.size[1], "frames": recipe.frames}


def _reference(name: str, directory: Path) -> Any:
    return reference(directory, PROMPT, RECIPES[name].size, 0, 2, RECIPES[name].frames)


def _names() -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICKEST else thorough) for name in RECIPES]


def test_none_is_of_a_family() -> None:
    assert not {spec.pipeline for spec in SPECS.values()} & RECIPES.keys()
    assert len(RECIPES) >= 15


@pytest.mark.parametrize("name", _names())
def test_it_runs_layer_by_layer_as_in_diffusers(name: str, made: CheckpointOf) -> None:
    """And what is streamed is nearly all of the transformer: no stack was left out."""
    directory = made(name)
    plan = _plan(directory, **LAYERWISE)
    assert isinstance(plan.layout.spec, InferredSpec)
    with admitted(plan) as worker:
        result = worker.generate(rank_request(PROMPT, **_wishes(name)))
    assert result.latents is not None
    expected = _reference(name, directory)
    error = max_error(result.latents, expected.latents)
    print(f"layerwise {name}: max error {error:.1e}; stacks {', '.join(plan.layout.spec.block_stacks)}")
    assert error <= TOLERANCE
    assert max_levels(result.media[0], expected.media[0]) <= 1
    assert _lists_outside(plan) == []


def _lists_outside(plan: RunPlan) -> list[str]:
    """Module lists of several equal modules with attention in them that are not streamed."""
    layout = plan.layout
    model = build_transformers(layout.spec.transformer, layout.model_dir, layout.transformers)
    inside = {block.name for block in discover_blocks(model, layout.spec.block_stacks)}
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "ModuleList"
        and not any(block.startswith(f"{name}.") or name.startswith(f"{block}.") for block in inside)
        and any("attn" in part or "attention" in part for part, _ in module.named_modules())
    ]


def _cells() -> list[Any]:
    """Two of them in each layout; the rest in `make test-all`."""
    first = {"AuraFlowPipeline", "Flux2KleinKVPipeline"}
    return [
        pytest.param(layout, name, id=f"{layout}-{name}", marks=() if name in first else thorough)
        for name in RECIPES
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("layout", "name"), _cells())
def test_on_two_ranks_it_is_the_same_or_refused(layout: str, name: str, gang_of: GangOf, made: CheckpointOf) -> None:
    recipe, directory, lines = RECIPES[name], made(name), list[str]()
    reason = {"tp2": recipe.tp, "ulysses2": recipe.ulysses}.get(layout)
    config, gang = RunConfig.parse(LAYOUTS[layout]), gang_of(2)
    if reason is not None:
        with pytest.raises((ConfigError, CompositionError), match=re.escape(reason)) as refused:
            Engine.start(config, directory, gang)
        print(f"{layout} {name}: refused: {refused.value}")
        return
    with Engine.start(config, directory, gang, notify=lines.append) as engine:
        probed = {row["check"]: row for row in engine.contract_result.composition}["same-as-one"]
        generation = engine.generate(PROMPT, **_wishes(name))
    error = max_error(generation.latents[0], _reference(name, directory).latents)
    print(f"{layout} {name}: max error {error:.1e}; same-as-one: {probed['status']} {probed['detail']}")
    assert error <= TOLERANCE
    assert probed["status"] == ("not probed" if layout == "layerwise_hsdp" else "holds")
    assert "no family describes it" in lines[0]
    assert generation.report["inferred"][0] == lines[0]


# What is refused, with one message


def _index(folder: Path, name: str, **components: list[str]) -> Path:
    content = {"_class_name": name, "_diffusers_version": diffusers.__version__, **components}
    (folder / "model_index.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "components", "why"),
    [
        (
            "OwnPipeline",
            {},
            r"unknown model class 'OwnPipeline'; diffusers \S+ has no such pipeline",
        ),
        (
            "StableDiffusionXLPipeline",
            {"unet": ["diffusers", "UNet2DConditionModel"]},
            r"its model is unet \(UNet2DConditionModel\), which has no stack of transformer blocks",
        ),
        ("WanImageToVideoPipeline", {}, "it also requires image, and requests have a prompt only"),
        ("StableAudioPipeline", {}, "it takes no height, width; does it make pictures or videos"),
        ("LattePipeline", {}, "it makes videos, and takes no num_frames"),
        ("DiTPipeline", {}, "it takes no prompt"),
        (
            "LTX2HDRPipeline",
            {
                "transformer": ["diffusers", "LTX2VideoTransformer3DModel"],
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                "audio_scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            },
            "its schedulers are scheduler, audio_scheduler; steps are counted with one",
        ),
        (
            "PRXPixelPipeline",
            {
                "transformer": ["diffusers", "PRXTransformer2DModel"],
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            },
            "no component of it decodes",
        ),
    ],
)
def test_what_cannot_run_is_refused(name: str, components: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=why):
        spec_for(_index(tmp_path, name, **components))


def test_a_component_that_nobody_places_is_refused_by_name(made: CheckpointOf, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = made("AuraFlowPipeline")
    spec = replace(spec_for(directory), encoders=())
    monkeypatch.setattr("crossdock.runtime.plan.make_plan.spec_for", lambda _: spec)
    with pytest.raises(CheckpointError, match=r"component 'text_encoder' .UMT5EncoderModel. has weights, and"):
        _plan(directory)


def test_a_scheduler_that_makes_other_steps_is_refused(made: CheckpointOf, tmp_path: Path) -> None:
    """Heun's calls the transformer twice for each step but one."""
    directory = tmp_path / "heun"
    shutil.copytree(made("AuraFlowPipeline"), directory)
    diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0).save_pretrained(directory / "scheduler")
    index = json.loads((directory / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchHeunDiscreteScheduler"]
    (directory / "model_index.json").write_text(json.dumps(index))
    with admitted(_plan(directory)) as worker:
        for _ in range(2):  # the rank takes the next one
            with pytest.raises(RequestRefused, match="of 2 steps that were asked for, its loop was heard to make 3"):
                worker.generate(rank_request(PROMPT, **_wishes("AuraFlowPipeline")))


def test_a_picture_of_another_size_is_refused(made: CheckpointOf, gang_of: GangOf) -> None:
    """Chroma rounds a side to whole tokens, and only warns."""
    with admitted(_plan(made("ChromaPipeline"))) as worker:
        result = worker.generate(rank_request(PROMPT, steps=1, height=72, width=64))
    assert "it made 64 x 64 pixels where 64 x 72 were asked for" in str(result.refused)


def test_how_guidance_is_split_is_not_inferred(made: CheckpointOf) -> None:
    with pytest.raises(ConfigError, match=r"cfg_degree: found 2: no family describes Aura.*branches of guidance"):
        _plan(made("AuraFlowPipeline"), parallel={"cfg_degree": 2})


def test_encoders_that_are_read_outside_of_encoding_are_noticed(
    made: CheckpointOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that shares a picture has none: the rehearsal has none either, and says so before ranks start."""
    directory = made("AuraFlowPipeline")
    monkeypatch.setattr("crossdock.runtime.models.families.spec_of_pipeline", lambda _: None)
    spec = replace(spec_for(directory), encode=())
    monkeypatch.setattr("crossdock.runtime.plan.make_plan.spec_for", lambda _: spec)
    with pytest.raises(ConfigError, match=r"tp_degree: found 2: .*Ranks that share one picture: AuraFlow"):
        _plan(directory, parallel={"tp_degree": 2})
    assert _plan(directory).layout.spec.block_stacks


# Wrong inference


def _planting(monkeypatch: pytest.MonkeyPatch, change: Callable[[InferredSpec], InferredSpec]) -> None:
    inferred = complete_spec.infer_spec
    monkeypatch.setattr(complete_spec, "infer_spec", lambda *args: change(inferred(*args)))


def _heads_whole(spec: InferredSpec) -> InferredSpec:
    """Every rank believes that it has all heads, each half as wide."""
    return replace(spec, tensor_plan=replace(spec.tensor_plan, heads={}))


def _other_values(spec: InferredSpec) -> InferredSpec:
    """Values are cut as if two projections were in one: they are those of other heads than the keys."""
    linears = {
        name: LinearStyle("column", (1, 1)) if name.endswith("to_v") else style
        for name, style in spec.tensor_plan.linears.items()
    }
    return replace(spec, tensor_plan=replace(spec.tensor_plan, linears=linears))


@pytest.mark.parametrize("change", [_heads_whole, _other_values])
def test_a_wrong_plan_is_refused_before_the_first_picture(
    change: Callable[[InferredSpec], InferredSpec], made: CheckpointOf, gang_of: GangOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    _planting(monkeypatch, change)
    with pytest.raises(CompositionError, match=r"same-as-one: rank \d: transformer_blocks.0"):
        Engine.start(RunConfig.parse(LAYOUTS["tp2"]), made("PixArtSigmaPipeline"), gang_of(2))


def test_a_stack_that_is_left_out_is_seen(made: CheckpointOf, monkeypatch: pytest.MonkeyPatch) -> None:
    _planting(monkeypatch, lambda spec: replace(spec, block_stacks=spec.block_stacks[:1]))
    assert _lists_outside(_plan(made("AuraFlowPipeline"))) == ["single_transformer_blocks"]
