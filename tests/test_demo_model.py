"""The trained demo model draws what its prompts say: what it has seen, and what it has seen apart only."""

from __future__ import annotations

import json

import numpy as np
import pytest
from one_rank import admitted, rank_request
from PIL import Image

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.plan.make_plan import make_plan
from emoji_model import MODEL, emoji
from emoji_model.sheet import GUIDANCE, KINDS, SHEET, SHOWN, STEPS, similarity
from tiers import not_quick, some

MOST_BYTES = 12_000_000


@not_quick
@pytest.mark.parametrize("kind", some(KINDS[::-1], 1))
def test_each_picture_is_most_like_its_own_emoji(kind: str) -> None:
    """Of the ten of the card's sheet, on their backgrounds; on one rank, streamed, in the dtype in which it is kept."""
    prompts = json.loads(SHEET.with_suffix(".json").read_text(encoding="utf-8"))[kind][:4]
    row = 2 * KINDS.index(kind) * emoji.SIZE
    sheet = np.asarray(Image.open(SHEET))[row : row + emoji.SIZE]
    true = np.split(sheet, SHOWN, axis=1)
    plan = make_plan(RunConfig.parse({"offload": {"layerwise": True}}), MODEL, "cpu")
    wishes = {"steps": STEPS, "height": emoji.SIZE, "width": emoji.SIZE, "guidance_scale": GUIDANCE}
    with admitted(plan) as worker:
        for number, prompt in enumerate(prompts):
            picture = np.asarray(worker.generate(rank_request(prompt, **wishes)).media[0])
            alike = [similarity(picture, other) for other in true]
            print(
                f"{prompt}: {alike[number]:.2f} to its own emoji, at most {max(np.delete(alike, number)):.2f} to others"
            )
            assert alike[number] == max(alike), prompt
            assert alike[number] > 0.7, prompt


def test_the_checkpoint_is_small_and_holds_no_code() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".txt"}
