"""Pipelines of diffusers that no family describes: they run from what is inferred, as diffusers runs them, or are refused.

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
from tiers import some, thorough

GangOf = Callable[[int], Gang]
CheckpointOf = Callable[[str], Path]
PROMPT = "a lighthouse on a cliff above a stormy sea"
LAYERWISE: dict[str, Any] = {"offload": {"layerwise": True}}
QUICKEST = (
    "AuraFlowPipeline",
    "PixArtSigmaPipeline",
    "Lumina2Pipeline",
    "CogView3PlusPipeline",
    "CogView4Pipeline",
    "SanaPipeline",
    "LTXPipeline",
    "PRXPipeline",
    "HunyuanDiTPipeline",
    "HiDreamImagePipeline",
    "ChromaPipeline",
    "BriaPipeline",
    "FluxKontextPipeline",
    "Kandinsky5T2VPipeline",
    "MochiPipeline",
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
    assert len(QUICKEST) >= 15


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
    first = {"AuraFlowPipeline", "FluxKontextPipeline"}
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
