"""What a pipeline makes: pictures and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Audio:
    """`samples`: float32 `[channels, samples]` in -1..1; `rate`: samples per second."""

    samples: NDArray[np.float32]
    rate: int


@dataclass(frozen=True)
class Video:
    """`frames`: uint8 `[frames, height, width, 3]`; `fps`: frames per second."""

    frames: NDArray[np.uint8]
    fps: int
    audio: Audio | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as PIL has it."""
        return self.frames.shape[2], self.frames.shape[1]


Media = Image.Image | Video


def media_of(output: Sequence[Any], fps: int | None, sampling_rate: int | None = None) -> list[Media]:
    """What a diffusers pipeline returned, one for each prompt.

    Args:
        output: pictures as PIL's, or videos as float `[batch, frames, height, width, 3]` in 0..1, come first in it;
            audio as a tensor `[batch, channels, samples]` comes second.
        fps: of videos; None: these are pictures.
        sampling_rate: of the audio; None: there is none.
    """
    if fps is None:
        return list(output[0])
    frames = [(np.asarray(video) * 255).round().clip(0, 255).astype(np.uint8) for video in output[0]]
    if sampling_rate is None:
        return [Video(video, fps) for video in frames]
    waves = output[1].float().cpu().numpy()
    return [Video(video, fps, Audio(wave, sampling_rate)) for video, wave in zip(frames, waves, strict=True)]
