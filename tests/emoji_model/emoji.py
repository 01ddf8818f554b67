"""The pictures and prompts that the demo model is trained on: Noto Color Emoji, each on six backgrounds.

The font (SIL Open Font License 1.1) is Debian's package `fonts-noto-color-emoji`; a picture's prompt is made of its
Unicode name. Of every emoji one coloured background is kept out of the training: what the model makes of those
prompts shows whether it puts together what it has seen apart.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109
"""The one size in which the font has bitmaps, in points."""
SIZE = 48
"""Height and width of a picture, in pixels."""
DRAWN = 44
"""Of which an emoji takes this much."""

BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (214, 60, 60),
    "yellow": (245, 220, 90),
    "green": (90, 170, 90),
    "blue": (80, 130, 220),
    "purple": (150, 100, 190),
}

CHARACTERS = (
    "🍎🍏🍌🍇🍉🍊🍋🍍🍐🍑🍒🍓🥑🥕🍅🍆🌽🥦🍄🌵🌷🌹🌻🍀🍁🌲🌴🎃"
    "🍔🍕🍟🍦🍩🍪🍭🎂🍿🥐🥨🧀🥚🍞🧁🍯☕🍷"
    "🐌🐍🐘🐙🐝🐞🐟🐠🐢🐧🐨🐬🐭🐮🐯🐰🐱🐳🐵🐶🐷🐸🐺🐻🐼🦀🦁🦄🦆🦇🦉🦊🦋🦌🦒🦩"
    "⭐🌈🌙👑👻👽💎💙💚💛💜🧡💡💣📗📘📙🔑🔥🔒🚀🚌🚒🚕🚗🚲🚜🎈🎁🎸🏀🏆🏠🎩⛄🤖🛸"
)


_LEFT_OUT = ("white medium ", "extraterrestrial ", "electric ", "spouting ", "wrapped ", " without snow", " face")


@dataclass(frozen=True)
class Scene:
    """One emoji on one background."""

    character: str
    background: str

    @property
    def name(self) -> str:
        name = unicodedata.name(self.character).lower().replace("-", " ")
        for part in (
            "white medium ",
            "extraterrestrial ",
            "electric ",
            "spouting ",
            "wrapped ",
            " without snow",
            " face",
        ):
            name = name.replace(part, "")
        return name

    @property
    def prompt(self) -> str:
        plain = with_article(self.name)
        return plain if self.background == "white" else f"{plain} on {with_article(self.background)} background"

    def picture(self) -> np.ndarray:
        """RGB, [SIZE, SIZE, 3], uint8."""
        drawn = _glyph(self.character)
        picture = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[self.background])
        picture.paste(drawn, ((SIZE - drawn.width) // 2, (SIZE - drawn.height) // 2), drawn)
        return np.asarray(picture)


def with_article(words: str) -> str:
    if words.endswith("s") and not words.endswith(("us", "ss")):
        return words
    return f"{'an' if words[0] in 'aeiou' and not words.startswith(('eu', 'uni')) else 'a'} {words}"


def _glyph(character: str) -> Image.Image:
    font = ImageFont.truetype(FONT, STRIKE)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("RGBA", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(canvas).text((-left, -top), character, font=font, embedded_color=True)
    return canvas.resize((DRAWN, DRAWN * canvas.height // canvas.width), Image.Resampling.LANCZOS)


def scenes(held_out: bool) -> list[Scene]:
    """Those of the training, or those kept out of it."""
    colors = list(BACKGROUNDS)[1:]
    found = []
    for index, character in enumerate(CHARACTERS):
        kept_out = colors[index % len(colors)]
        found += [Scene(character, color) for color in BACKGROUNDS if (color == kept_out) is held_out]
    return found
