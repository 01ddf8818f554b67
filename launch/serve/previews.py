"""What a picture will look like, from the latents of a finished step.

The way from latents to colours is nearly linear, one place at a time (the VAE adds detail). It is learned from the
pictures that a server makes: least squares from the last step's latents to the picture's mean colours in their places.
So it takes no component of the ranks, and fits whatever family is served; before the first picture there is none.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crossdock.launch.engine.generation import Generation

_FORGET = 0.8
"""How much of what was learned stays when another picture comes."""
_RIDGE = 1e-3
_LONGEST = 256
"""Pixels along the longer side of a preview."""


class Previews:
    """Of one model. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._squares = self._products = torch.zeros(0, 0, dtype=torch.float64)
        self._weights: Tensor | None = None

    def learn_from(self, made: Generation) -> None:
        """The first of what was made."""
        if made.latents and made.images and isinstance(made.images[0], Image.Image):
            self.learn(made.latents[0], made.images[0])

    def learn(self, latents: Tensor, image: Image.Image) -> None:
        """latents: of one picture, `[1, ...]`, from which it was decoded."""
        places = _places(latents, *image.size)
        if places is None:
            return
        height, width, _ = places.shape
        small = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
        colours = torch.from_numpy(np.asarray(small).copy()).reshape(-1, 3).double() / 255
        inputs = _with_one(places)
        with self._lock:
            squares, products = inputs.T @ inputs, inputs.T @ colours
            if self._squares.shape == squares.shape:
                squares, products = squares + _FORGET * self._squares, products + _FORGET * self._products
            self._squares, self._products = squares, products
            ridge = _RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
            self._weights = torch.linalg.solve(squares + ridge, products)

    def draw(self, latents: Tensor, width: int, height: int) -> Image.Image | None:
        """latents: of one picture, `[1, ...]`. None: nothing was learned yet that fits them."""
        places, weights = _places(latents, width, height), self._weights
        if places is None or weights is None or len(weights) != places.shape[2] + 1:
            return None
        colours = (_with_one(places) @ weights).clamp(0, 1) * 255
        pixels = colours.round().to(torch.uint8).reshape(*places.shape[:2], 3).numpy()
        scale = _LONGEST / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def _with_one(places: Tensor) -> Tensor:
    flat = places.reshape(-1, places.shape[2])
    return torch.cat([flat, torch.ones(len(flat), 1, dtype=flat.dtype)], 1)


def _places(latents: Tensor, width: int, height: int) -> Tensor | None:
    """float64 `[height, width, channels]`. None: the latents are nothing of what is known.

    latents: `[1, channels, height, width]`, or tokens `[1, places, channels]`, row by row.
    """
    latents = latents.double()
    if latents.dim() == 4:
        return latents[0].permute(1, 2, 0)
    if latents.dim() != 3:
        return None
    rows = round((latents.shape[1] * height / width) ** 0.5)
    if rows < 1 or latents.shape[1] % rows:
        return None
    return latents[0].reshape(rows, -1, latents.shape[2])
