"""The families as data: real shapes, and the table that `crossdock models` and the README have of them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffusers
import pytest
from torch import nn
from typer.testing import CliRunner

from crossdock.launch.cli import app
from crossdock.launch.commands.builtin_configs import builtin_configs
from crossdock.launch.commands.models import HEADINGS, held_layouts, model_rows, models_markdown
from crossdock.parallel.regions import SequenceParallelism
from crossdock.parallel.tensor import TensorParallelism, tensor_slices
from crossdock.runtime.models.families import SPECS
from crossdock.runtime.models.families.published import real_model, shape_of
from crossdock.runtime.models.spec import ModelSpec, Published
from crossdock.runtime.models.tiny.recipes import TINY
from layouts import LAYOUTS, ROWS
from tiers import not_quick

README = Path(__file__).resolve().parents[1] / "README.md"
CHECKPOINTS = [(spec, published) for spec in SPECS.values() for published in spec.published]
Real = tuple[ModelSpec, Published, nn.Module]


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=lambda case: case[1].name)
def real(request: pytest.FixtureRequest) -> Real:
    """Each published transformer, built once; a test leaves it as it was."""
    spec, published = request.param
    return spec, published, real_model(spec, published)


def test_the_real_shape_is_the_published_one(real: Real) -> None:
    """Every block stack is there, and all tensors together have as many elements as the publisher says."""
    spec, published, model = real
    shape = shape_of(spec, published, model)
    assert tuple(shape.stacks) == spec.block_stacks
    assert shape.parameters == pytest.approx(published.parameters, rel=0.02)


@not_quick
def test_the_real_shape_can_be_cut(real: Real) -> None:
    """Every planned linear exists and divides in two; what is cut is most of the blocks, and the model takes it."""
    spec, published, model = real
    slices = tensor_slices(model, spec.tensor_plan, 1, 2)
    cut = sum(model.get_parameter(fqn).numel() for fqn in slices)
    in_blocks = sum(p.numel() for stack in spec.block_stacks for p in model.get_submodule(stack).parameters())
    print(f"{published.name}: {cut / in_blocks:.0%} of the blocks' parameters are cut")
    assert cut > 0.5 * in_blocks
    assert model.config[spec.tensor_plan.head_count] % 2 == 0
    before = {name: type(module) for name, module in model.named_modules()}
    handle = TensorParallelism.apply(model, spec.tensor_plan, 1, 2, group=None)
    for fqn, part in slices.items():
        assert model.get_parameter(fqn).shape[part.dim] == part.size
    handle.remove()
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_the_real_shape_has_the_sequence_regions(real: Real) -> None:
    """Every module and argument at which tokens are cut or put together exists; `remove` leaves no hook."""
    spec, _, model = real
    sequence = SequenceParallelism(None, 0, 2, None)  # type: ignore[arg-type]
    sequence.apply(model, spec.regions)
    assert _hooks(model) > 0
    sequence.remove()
    assert _hooks(model) == 0


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.family)
def test_negative_prompts_are_taken_where_they_do_something(spec: ModelSpec) -> None:
    """A pipeline may have the argument and one branch of guidance: then it says nothing, and ignores it."""
    pipeline = getattr(diffusers, spec.pipeline)
    made_of_blocks = issubclass(pipeline, diffusers.ModularPipeline)
    arguments = pipeline().blocks.input_names if made_of_blocks else inspect.signature(pipeline.__call__).parameters
    assert spec.negative_prompt == ("negative_prompt" in arguments and spec.branches is not None)


def test_steps_are_passes_through_the_transformer() -> None:
    """Where a scheduler counts the end as a step, the pipeline is asked for one more."""
    scheduler, spec = diffusers.MiniMaxH3Scheduler(), SPECS["minimax-h3"]
    for steps in (1, 4, 50):
        scheduler.set_timesteps(steps + spec.more_steps)
        assert len(scheduler.timesteps) == steps


def test_every_family_has_a_row_of_the_matrix() -> None:
    """And every recipe; so what the table says of layouts is what tests hold."""
    assert {row.recipe for row in ROWS} == set(TINY)
    assert {layout.name for layout in LAYOUTS} == set(builtin_configs())
    for row in ROWS:
        assert row.tested
    assert {layout for row in ROWS for layout in row.tested} == set(builtin_configs())


def test_refusals_name_builtin_configs() -> None:
    for spec in SPECS.values():
        assert set(spec.refused) <= set(builtin_configs())
        assert held_layouts(spec), "a family that no layout can run"


def test_the_readme_has_the_table() -> None:
    """Made by `crossdock models --markdown`."""
    assert models_markdown(list(model_rows())) in README.read_text(encoding="utf-8")


def test_the_command_prints_the_same_data() -> None:
    shown = CliRunner().invoke(app, ["models", "--json"])
    assert shown.exit_code == 0
    rows = json.loads(shown.stdout)
    assert [row["checkpoint"] for row in rows] == [published.name for _, published in CHECKPOINTS]
    assert all(row["bytes"] == 2 * row["parameters"] for row in rows)
    assert HEADINGS[0] in CliRunner().invoke(app, ["models"], env={"COLUMNS": "200"}).stdout
