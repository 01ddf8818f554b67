"""The matrix: every built-in layout, for every family, against a plain single-process diffusers run.

On gangs that are shared by all tests; the layouts named in the mission through torchrun as well.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crossdock.launch.commands.models import why_refused
from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import OffloadConfig, RunConfig
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.errors import UserError
from crossdock.runtime.models.families import spec_for
from crossdock.runtime.watch.gang import Gang
from emoji_model import MODEL, emoji
from emoji_model.sheet import GUIDANCE
from layouts import COMBINED, FAMILIES, LAYOUTS, PARTLY_RESIDENT, ROWS, Layout, Row
from reference import (
    EVEN_SIZE,
    ODD_SIZE,
    OTHER_PROMPT,
    PROMPT,
    TOLERANCE,
    audio_error,
    max_error,
    max_levels,
    pipeline_of,
    reference,
    reference_latents,
)
from tiers import ALL, pairs, quick, some, thorough

GangOf = Callable[[int], Gang]
Checkpoints = dict[str, Path]
TRAINED = ("layerwise_ulysses2_ring2", "layerwise_tp2")
OF_ONE_GANG = {("layerwise_tp2", "flux2-klein"), ("layerwise_tp2", "z-image")}
"""What `make quick` has."""


def _cells() -> list[Any]:
    """Every family in every layout; outside of `make test-all`, those that are quick."""
    chosen = [(layout, row) for row in ROWS for layout in LAYOUTS if ALL or layout.name in row.tested]
    return [
        pytest.param(
            layout, row, id=f"{layout.name}-{row.recipe}", marks=[quick] * ((layout.name, row.recipe) in OF_ONE_GANG)
        )
        for layout, row in chosen
    ]


def _torchrun_cells() -> list[Any]:
    """The layouts of the mission."""
    cells = pairs([layout for layout in LAYOUTS if layout.through_torchrun], FAMILIES)
    return [pytest.param(layout, family, id=f"{layout.name}-{family}") for layout, family in cells]


@pytest.mark.parametrize(("layout", "row"), _cells())
def test_latents_equal_diffusers(
    layout: Layout, row: Row, gang_of: GangOf, checkpoint_of: Callable[[str], Path]
) -> None:
    """Within 1e-4 of diffusers, at a token count that divides by the ranks and at one that does not.

    And streamed or resident, bit-identical: offloading must not change a single bit at the same layout. Nothing is
    found in a healthy gang: by the rehearsal, by the probe, or in a request.
    """
    config, directory, prompt = load_config(layout.config), checkpoint_of(row.recipe), PROMPT + row.also
    gang = gang_of(config.world_size)
    reason = why_refused(spec_for(directory), layout.name)
    if reason is not None:
        with pytest.raises(UserError, match=re.escape(reason)):
            Engine.start(config, directory, gang)
        return
    found = {}
    with Engine.start(config, directory, gang, probe=True) as engine:
        print(f"{layout.name} {row.recipe} same-as-one: {engine.contract_result.composition[-1]['detail']}")
        for size in row.sizes if row.recipe in FAMILIES else some(row.sizes[::-1], 1):
            generation = engine.generate(prompt, steps=row.steps, height=size[0], width=size[1], **row.wishes)
            found[size] = generation.latents[0]
            expected = reference(directory, prompt, size, steps=row.steps, frames=row.frames, guided=row.guided)
            error = max_error(found[size], expected.latents)
            levels = max_levels(generation.images[0], expected.media[0])
            print(f"{layout.name} {row.recipe} {size[0]}x{size[1]}: max error {error:.2e}, {levels} of 256 levels")
            assert error <= TOLERANCE
            assert levels <= 1
            assert audio_error(generation.images[0], expected.audio) <= TOLERANCE
    if config.offload.layerwise and (ALL or row.recipe in FAMILIES):
        resident = config.model_copy(update={"offload": OffloadConfig()})
        with Engine.start(resident, directory, gang) as engine:
            for size, streamed in found.items():
                again = engine.generate(prompt, steps=row.steps, height=size[0], width=size[1], **row.wishes)
                assert torch.equal(streamed, again.latents[0]), "layerwise on and off differ"


@pytest.mark.parametrize("layout", some([*TRAINED, *(each.name for each in LAYOUTS if each.name not in TRAINED)], 2))
def test_the_trained_model_draws_what_diffusers_draws(layout: str, gang_of: GangOf) -> None:
    """In fp32; `make demo` draws in bf16."""
    config = load_config(next(each.config for each in LAYOUTS if each.name == layout))
    config = config.model_copy(update={"dtype": "float32"})
    wishes = {"steps": 8, "height": emoji.SIZE, "width": emoji.SIZE, "guidance_scale": GUIDANCE}
    with Engine.start(config, MODEL, gang_of(config.world_size)) as engine:
        made = engine.generate("a red apple", **wishes)
    expected = (
        pipeline_of(MODEL)
        .to(torch.float32)(
            prompt="a red apple",
            num_inference_steps=8,
            height=emoji.SIZE,
            width=emoji.SIZE,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
        )
        .images[0]
    )
    levels = max_levels(made.images[0], expected)
    print(f"{layout}: {levels} of 256 levels")
    assert levels <= 1


@thorough  # of torchrun, `make test` has a recovery: test_torchrun_faults
@pytest.mark.parametrize(("layout", "family"), _torchrun_cells())
def test_torchrun_equals_diffusers(layout: Layout, family: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The same command line under torchrun, in an environment where ray cannot be imported."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('no ray here')\n")
    config, latents = load_config(layout.config), tmp_path / "latents.safetensors"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.world_size)),
        *("-m", "crossdock.launch.torchrun", "generate", str(checkpoints[family])),
        *(
            "--config",
            str(layout.config),
            "--prompt",
            PROMPT,
            "--height",
            str(ODD_SIZE[0]),
            "--width",
            str(ODD_SIZE[1]),
        ),
        *("--out", str(tmp_path / "out.png"), "--latents", str(latents), "--report", str(tmp_path / "report.json")),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 4/4" in done.stdout
    assert done.stdout.count("step 4/4") == 1, "more than one rank prints"
    error = max_error(load_file(latents)["loop_latents"], reference_latents(checkpoints[family], size=ODD_SIZE))
    print(f"torchrun {layout.name} {family}: max error {error:.2e}")
    assert error <= TOLERANCE


@thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_three_generations_in_one_engine(family: str, gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """Two, then one of another size and step count: no state of a request reaches the next one."""
    config = load_config(next(layout for layout in LAYOUTS if layout.name == "layerwise_ulysses2_ring2").config)
    directory = checkpoints[family]
    with Engine.start(config, directory, gang_of(config.world_size)) as engine:
        for prompt, size, seed, steps in (
            (PROMPT, EVEN_SIZE, 0, 4),
            (OTHER_PROMPT, EVEN_SIZE, 7, 4),
            (PROMPT, ODD_SIZE, 1, 3),
        ):
            generation = engine.generate(prompt, seed=seed, steps=steps, height=size[0], width=size[1])
            error = max_error(generation.latents[0], reference_latents(directory, prompt, size, seed, steps))
            print(f"{family} {prompt[:12]}... {size} seed {seed}: max error {error:.2e}")
            assert error <= TOLERANCE
            assert [len(row["step_ms"]) for row in generation.report["ranks"]] == [steps] * 4


@pytest.mark.parametrize(
    "prompts", some([(PROMPT, OTHER_PROMPT, PROMPT, OTHER_PROMPT, PROMPT), (PROMPT, OTHER_PROMPT, PROMPT)], 1)
)
def test_prompts_are_spread_over_replicas(prompts: tuple[str, ...], gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """Four replicas, three prompts: the fourth computes a copy that is dropped. Five: a second round of one."""
    config = load_config(next(layout for layout in LAYOUTS if layout.name == "layerwise_hsdp").config)
    directory = checkpoints["z-image"]
    with Engine.start(config, directory, gang_of(config.world_size)) as engine:
        generation = engine.generate(prompts, seed=3, height=ODD_SIZE[0], width=ODD_SIZE[1])
    assert len(generation.images) == len(generation.latents) == len(prompts)
    for number, (prompt, latents) in enumerate(zip(prompts, generation.latents, strict=True)):
        assert max_error(latents, reference_latents(directory, prompt, ODD_SIZE, 3 + number)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "recipe"),
    some(
        pairs(
            ["layerwise_hsdp_ulysses2", "layerwise_cfg2", "layerwise_ulysses2_ring2"],
            ["qwen-image", *FAMILIES],  # the first has a mask where text is padded
        ),
        1,
    ),
)
def test_a_batch_of_prompts_of_different_lengths(
    name: str, recipe: str, gang_of: GangOf, checkpoint_of: Callable[[str], Path]
) -> None:
    """Several pictures at once, two of each prompt: as diffusers computes the same batches, on each replica its own."""
    config = load_config(next(layout for layout in LAYOUTS if layout.name == name).config)
    row = next(row for row in ROWS if row.recipe == recipe)
    directory, given = checkpoint_of(recipe), (PROMPT, "a fox")
    with Engine.start(config, directory, gang_of(config.world_size)) as engine:
        generation = engine.generate(
            given, seed=3, height=ODD_SIZE[0], width=ODD_SIZE[1], images_per_prompt=2, batch_size=3, **row.wishes
        )
    prompts = tuple(prompt for prompt in given for _ in range(2))
    rounds = [prompts[:2], prompts[2:]] if config.parallel.dp_degree == 2 else [prompts[:3], prompts[3:]]
    assert len(generation.images) == len(generation.latents) == 4
    first = 0
    for batch in rounds:
        expected = reference(directory, batch, ODD_SIZE, 3 + first, guided=row.guided)
        for number in range(len(batch)):
            error = max_error(generation.latents[first + number][0], expected.latents[number])
            print(f"{name} {recipe} picture {first + number} in a batch of {len(batch)}: max error {error:.2e}")
            assert error <= TOLERANCE
            assert max_levels(generation.images[first + number], expected.media[number]) <= 1
        first += len(batch)


@pytest.mark.parametrize(("name", "family"), some(pairs(COMBINED, FAMILIES), 2))
def test_combinations_layerwise(name: str, family: str, gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """HSDP on the ranks of a sequence group, TP inside of both: every mechanism at once, with part of it resident."""
    config = RunConfig.parse({**COMBINED[name], "offload": PARTLY_RESIDENT})
    with Engine.start(config, checkpoints[family], gang_of(config.world_size), probe=True) as engine:
        latents = engine.generate(PROMPT, height=ODD_SIZE[0], width=ODD_SIZE[1]).latents[0]
    error = max_error(latents, reference_latents(checkpoints[family], size=ODD_SIZE))
    print(f"{name} {family}: max error {error:.2e}")
    assert error <= TOLERANCE
