"""Requests of the wrong types, with text that is none, or larger than any device: one message says what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from one_rank import admitted

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import RequestError
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.request_checks import MOST_DEVICE_BYTES, check_request
from crossdock.runtime.request import (
    MAX_CHARACTERS,
    MAX_PICTURES,
    MAX_SEED,
    GenerateRequest,
    RankRequest,
    RequestItem,
    RequestOptions,
    as_prompts,
)
from layouts import ROWS
from tiers import some

NEGATIVE = ("z-image", "sd3.5", "longcat-image", "ovis-image", "wan2.1", "qwen-image", "krea2", "helios", "ltx2")
"""Whose guidance takes a negative prompt, in a batch."""
GOOD = GenerateRequest.of("a fox")

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": ()}, "prompts: found none; give at least one"),
    "None for a prompt": ({"prompt": None}, "prompts: prompt 0: found None (NoneType); allowed: a text"),
    "int as a prompt": ({"prompt": ("a", 3)}, "prompts: prompt 1: found 3 (int); allowed: a text"),
    "bytes as a prompt": ({"prompt": (b"a",)}, "prompts: prompt 0: found b'a' (bytes); allowed: a text"),
    "None as a prompt": ({"prompt": (None,)}, "prompts: prompt 0: found None (NoneType); allowed: a text"),
    "an empty prompt": ({"prompt": (" \n",)}, "prompts: prompt 0 is empty; describe the picture"),
    "half a pair": ({"prompt": ("fox \ud83d",)}, "prompts: prompt 0: character 4 is half of a pair (U+D83D)"),
    "not UTF-8 on a command line": ({"prompt": ("\udcff",)}, "prompts: prompt 0: character 0 is half of a pair"),
    "NUL": ({"prompt": ("a\0b",)}, "prompts: prompt 0: character 1 is NUL"),
    "a book": (
        {"prompt": ("x" * (MAX_CHARACTERS + 1),)},
        "prompts: prompt 0: has 100001 characters; allowed: at most",
    ),
    "negative prompt of bytes": ({"negative_prompt": b"x"}, "negative_prompt: found b'x' (bytes); allowed: a text"),
    "NUL in a negative prompt": ({"negative_prompt": "\0"}, "negative_prompt: character 0 is NUL"),
    "a string for a size": ({"height": "256"}, "height: found '256' (str); allowed: an integer from 1 to 2147483647"),
    "None for a size": ({"width": None}, "width: found None (NoneType); allowed: an integer from 1 to 2147483647"),
    "a float for a size": ({"width": 256.0}, "width: found 256.0 (float); allowed: an integer from 1 to 2147483647"),
    "a boolean for a size": ({"height": True}, "height: found True (bool); allowed: an integer from 1 to 2147483647"),
    "a list for a size": ({"height": [256]}, "height: found [256] (list); allowed: an integer from 1 to 2147483647"),
    "steps": ({"steps": 10_001}, "steps: found 10001; allowed: an integer from 1 to 10000"),
    "steps of a Decimal": ({"steps": Decimal("NaN")}, "steps: found Decimal('NaN') (Decimal); allowed: an integer"),
    "a boolean as a seed": ({"seed": True}, "seed: found True (bool); allowed: an integer from 0"),
    "a string as a seed": ({"seed": "0"}, "seed: found '0' (str); allowed: an integer from 0"),
    "None as a seed": ({"seed": None}, "seed: found None (NoneType); allowed: an integer from 0"),
    "the last seed is too large": (
        {"prompt": ("a", "b"), "seed": MAX_SEED},
        f"seed: found {MAX_SEED}; allowed: an integer from 0 to {MAX_SEED - 1}",
    ),
    "frames of a float": ({"frames": 9.5}, "frames: found 9.5 (float); allowed: an integer from 1 to 2147483647"),
    "guidance of a string": ({"guidance_scale": "4"}, "guidance_scale: found '4' (str); allowed: a finite number >= 0"),
    "guidance that is no number": ({"guidance_scale": float("nan")}, "guidance_scale: found nan; allowed: a finite"),
    "a time limit that is no number": ({"time_limit_s": float("nan")}, "time_limit_s: found nan; allowed: a finite"),
    "a boolean for a time": ({"time_limit_s": True}, "time_limit_s: found True (bool); allowed: a finite number > 0"),
    "guidance of a boolean": ({"guidance_scale": False}, "guidance_scale: found False (bool)"),
    "guidance of a complex number": ({"guidance_scale": 1j}, "guidance_scale: found 1j (complex)"),
    "guidance beyond floats": ({"guidance_scale": 10**400}, "guidance_scale: found inf; allowed: a finite number >= 0"),
    "a time limit of a list": ({"time_limit_s": []}, "time_limit_s: found [] (list); allowed: a finite number > 0"),
    "no time": ({"time_limit_s": 0}, "time_limit_s: found 0.0; allowed: a finite number > 0"),
    "a batch of a dict": ({"batch_size": {}}, "batch_size: found {} (dict); allowed: an integer from 1"),
    "a long value": (
        {"height": "x" * 5000},
        f"height: found '{'x' * 59}... (str); allowed: an integer from 1 to 2147483647",
    ),
}


@pytest.mark.parametrize(("changes", "text"), WRONG.values(), ids=WRONG)
def test_what_no_pipeline_takes(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError) as caught:
        GenerateRequest.of(**{"prompt": "a fox"} | changes).validate()
    assert str(caught.value).startswith(text)
    assert len(str(caught.value)) < 300
    str(caught.value).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": MAX_SEED},
        {"height": np.int64(256), "seed": np.uint32(7)},
        {"guidance_scale": Fraction(7, 2)},
        {"guidance_scale": np.float32(3.5)},
        {"negative_prompt": ""},
        {"prompt": ("猫 🦊 ñ\ttab\nline",)},
    ],
)
def test_what_only_looks_odd(changes: dict[str, Any]) -> None:
    GenerateRequest.of(**{"prompt": "a fox"} | changes).validate()


def _items(*negatives: Any, seed: Any = 0) -> GenerateRequest:
    return GenerateRequest(tuple(RequestItem("a fox", negative, seed) for negative in negatives))


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (GenerateRequest("a fox"), "items: found 'a fox' (str); allowed: a tuple of RequestItem"),  # type: ignore[arg-type]
        (GenerateRequest(("a fox",)), "items: found ('a fox',) (tuple); allowed"),  # type: ignore[arg-type]
        (GenerateRequest(()), "prompts: found none; give at least one"),
        (_items("", b"x"), "negative_prompt of prompt 1: found b'x' (bytes); allowed: a text"),
        (_items("", None), "negative_prompt of prompt 1: found none, but prompt 0 has one; give each one"),
        (_items(None, "a", "a"), "negative_prompt of prompt 1: found one, but prompt 0 has none; give each one"),
        (_items(None, seed=True), "seed: found True (bool); allowed: an integer from 0"),
        (replace(_items(None, seed=MAX_SEED), images_per_prompt=2), f"seed: found {MAX_SEED}; allowed: an integer"),
    ],
)
def test_items_that_no_pipeline_takes(request_: GenerateRequest, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        request_.validate()
    assert str(caught.value).startswith(text)


def test_items_may_differ() -> None:
    _items("a", "").validate()
    _items("", "").validate()
    replace(_items(None, seed=MAX_SEED - 1), images_per_prompt=2).validate()


def test_every_picture_has_its_seed() -> None:
    """Picture i of the whole request is drawn with `seed + i`: other seeds, and no saved picture can be made again."""
    request = GenerateRequest.of(["a", "b"], seed=7, negative_prompt="c", images_per_prompt=3)
    assert [(item.prompt, item.negative_prompt, item.seed) for item in request.pictures] == [
        *(("a", "c", 7 + n) for n in range(3)),
        *(("b", "c", 10 + n) for n in range(3)),
    ]


def test_the_keywords_are_those_of_the_request() -> None:
    """A field that type checkers or the command line do not know, or the other way round."""
    hints = get_type_hints(RequestItem) | get_type_hints(GenerateRequest)
    assert get_type_hints(RequestOptions) == {name: hints[name] for name in hints.keys() - {"prompt", "items"}}


@pytest.mark.parametrize(("given", "prompts"), [("a", ("a",)), (["a", "b"], ("a", "b")), (3, (3,)), (None, (None,))])
def test_one_text_or_several(given: Any, prompts: tuple[Any, ...]) -> None:
    assert as_prompts(given) == prompts


@pytest.fixture(scope="module")
def plan(flux2_dir: Path) -> RunPlan:
    return make_plan(RunConfig(), flux2_dir, "cpu")


def test_a_picture_that_no_device_could_hold(plan: RunPlan) -> None:
    """12 features of 4 bytes for each pixel, in the tiny decoder's last layer; the device is this machine's memory."""
    check_request(plan, replace(GOOD, height=1024, width=1024))
    with pytest.raises(RequestError) as caught:
        check_request(plan, replace(GOOD, height=16 * 10**6, width=16 * 10**6))
    assert str(caught.value).startswith(
        "height x width: 16000000 x 16000000 pixels with 12 features of 4 bytes each take 1.144e+07 GiB to decode, "
        "and a device has "
    )


def test_ranks_elsewhere_may_have_more(plan: RunPlan) -> None:
    """This machine's memory says nothing of a cluster's devices."""
    there = replace(plan, config=RunConfig.parse({"launch": {"ray_address": "head:6379"}}))
    side = 96 * 1024
    assert 12 * 4 * side * side < MOST_DEVICE_BYTES
    check_request(there, replace(GOOD, height=side, width=side))
    with pytest.raises(RequestError, match="and a device has 1024 GiB; ask for less"):
        check_request(there, replace(GOOD, height=2 * side, width=2 * side))


def test_the_frames_of_a_video_count(plan: RunPlan) -> None:
    layout = replace(plan.layout, spec=replace(plan.layout.spec, fps=16), frame_multiple=4)
    video = replace(plan, layout=layout)
    check_request(video, replace(GOOD, frames=81))
    with pytest.raises(RequestError, match="pixels with 6000000003 values of 4 bytes each take"):
        check_request(video, replace(GOOD, frames=2 * 10**9 + 1))


@pytest.mark.parametrize("value", [True, "2", 2.0, None, 0, MAX_PICTURES + 1])
@pytest.mark.parametrize("name", ["images_per_prompt", "batch_size"])
def test_amounts(name: str, value: Any, plan: RunPlan) -> None:
    with pytest.raises(RequestError, match=f"{name}: found .*; allowed: an integer from 1 to {MAX_PICTURES}"):
        check_request(plan, GenerateRequest.of("a fox", **{name: value}))


class NoGang:
    """Ranks that nobody may ask for anything."""

    world_size = 1
    can_restart = False
    own_rank = None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompt": 7}, "prompts: prompt 0: found 7 (int)"),
        ({"prompt": None}, "prompts: prompt 0: found None (NoneType)"),
        ({"prompt": ["a", b"b"]}, "prompts: prompt 1: found b'b' (bytes)"),
        ({"prompt": []}, "prompts: found none; give at least one"),
        ({"prompt": ["a"] * 1000, "images_per_prompt": 101}, "prompts x images_per_prompt: found 101000; allowed"),
        ({"prompt": "a", "seed": True}, "seed: found True (bool)"),
        ({"prompt": "a", "height": "64"}, "height: found '64' (str)"),
    ],
)
def test_an_engine_refuses_before_it_asks_its_ranks(arguments: dict[str, Any], text: str, plan: RunPlan) -> None:
    engine = Engine(plan, NoGang(), owns_gang=False)  # type: ignore[arg-type]
    with pytest.raises(RequestError) as caught:
        engine.generate(**arguments)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("recipe", some(NEGATIVE, 1))
def test_every_picture_has_its_negative_prompt(recipe: str, checkpoint_of: Callable[[str], Path]) -> None:
    """In a batch, of other lengths: each is as it is where both have its own, and as it is alone."""
    plan = make_plan(RunConfig.parse({"offload": {"layerwise": True}}), checkpoint_of(recipe), "cpu")
    row = next(row for row in ROWS if row.recipe == recipe)
    height, width = row.sizes[0]
    scale, negative = row.guided or (None, "grey, blurred, out of focus")

    def latents(*negatives: str, seed: int = 3) -> torch.Tensor:
        items = tuple(RequestItem("a fox in snow", text, seed + n) for n, text in enumerate(negatives))
        asked = GenerateRequest(items, 2, height, width, scale, row.frames, batch_size=2)
        check_request(plan, asked)
        found = worker.generate(RankRequest(asked)).latents
        assert found is not None
        return found

    with admitted(plan) as worker:
        mixed, first, second = latents(negative, "red"), latents(negative, negative), latents("red", "red")
        alone = torch.cat([latents(negative), latents("red", seed=4)])
    expected = torch.stack([first[0], second[1]])
    print(f"{recipe}: {(mixed - expected).abs().max():.1e} in a batch, {(mixed - alone).abs().max():.1e} alone")
    assert torch.allclose(mixed, expected, rtol=0, atol=1e-5)
    assert torch.allclose(mixed, alone, rtol=0, atol=1e-4)
    assert (mixed - first)[1].abs().max() > 1e-2, "the second one's has no effect"
