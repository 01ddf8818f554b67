"""Draws the card's contact sheet, and measures the pictures: `python -m emoji_model.sheet MODEL` in `tests/`.

Plain diffusers draws them. A picture's similarity to an emoji is their correlation over all pixels and channels, 1 for
the same picture; "found" are pictures that are more similar to their own emoji, on its own background, than to any
other emoji on that background.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from emoji_model import emoji

STEPS, GUIDANCE = 16, 3.0
KINDS = ("trained on", "kept out")
SHOWN = 10
SHEET = Path(__file__).with_name("sheet.png")
"""For each of `KINDS` a row of emoji and one of what the model draws; their prompts are in the JSON file beside it."""


def drawn(pipeline: Flux2KleinPipeline, prompts: Sequence[str], seed: int = 0) -> np.ndarray:
    """[prompts, SIZE, SIZE, 3], uint8."""
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    size = {"height": emoji.SIZE, "width": emoji.SIZE}
    made = pipeline(
        prompt=list(prompts),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=generators,
        output_type="np",
        **size,
    )
    return (made.images * 255).round().astype(np.uint8)


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1])


def measured(scenes: Sequence[emoji.Scene], pictures: np.ndarray) -> tuple[float, float, int]:
    """Mean similarity to the own emoji and to all others on that background, and how many are found."""
    own, others, found = [], [], 0
    for scene, picture in zip(scenes, pictures, strict=True):
        near = {c: similarity(picture, emoji.Scene(c, scene.background).picture()) for c in emoji.CHARACTERS}
        own.append(near.pop(scene.character))
        others.append(np.mean(list(near.values())))
        found += own[-1] > max(near.values())
    return float(np.mean(own)), float(np.mean(others)), found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sample", type=int, default=60, help="of the training's pictures, and of those held out")
    chosen = parser.parse_args(arguments)
    pipeline = Flux2KleinPipeline.from_pretrained(chosen.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rows, prompts = [], {}
    for what in KINDS:
        scenes = emoji.scenes(held_out=what != KINDS[0])
        scenes = scenes[:: max(1, len(scenes) // chosen.sample)][: chosen.sample]
        parts = [scenes[first : first + 20] for first in range(0, len(scenes), 20)]
        pictures = np.concatenate([drawn(pipeline, [scene.prompt for scene in part]) for part in parts])
        own, others, found = measured(scenes, pictures)
        print(f"{len(scenes)} {what}: similarity {own:.2f} to the own emoji, {others:.2f} to others; {found} found")
        shown = range(0, len(scenes), len(scenes) // SHOWN)[:SHOWN]
        prompts[what] = [scenes[i].prompt for i in shown]
        rows += [
            np.concatenate([scenes[i].picture() for i in shown], 1),
            np.concatenate([pictures[i] for i in shown], 1),
        ]
    Image.fromarray(np.concatenate(rows)).save(SHEET)
    SHEET.with_suffix(".json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
