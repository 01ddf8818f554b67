"""Videos as MP4 files: H.264, which every player and browser takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from crossdock.runtime.errors import RequestError
from crossdock.runtime.media import Video

CRF = "12"
"""Constant rate factor of H.264: 0 is lossless, 18 looks it, 23 is the encoder's default."""
_BT709 = 1
"""Of ITU-T H.273's tables. Players take a large video that does not say its colours for it, a small one for another."""


def write_video(video: Video, path: Path) -> None:
    """Write `video`, frame by frame.

    Raises:
        RequestError: a side is odd, which 4:2:0 chroma cannot be.
    """
    if any(side % 2 for side in video.size):
        width, height = video.size
        raise RequestError(f"{path.name}: found a video of {width} x {height} pixels; allowed in an MP4: even sides")
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=video.fps, options={"crf": CRF})
        _tell_colours(stream.codec_context)
        stream.width, stream.height = video.size
        stream.pix_fmt = "yuv420p"
        for pixels in video.frames:
            file.mux(stream.encode(_frame(pixels)))
        file.mux(stream.encode())


def _tell_colours(codec: Any) -> None:
    codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
    codec.color_range = ColorRange.MPEG.value


def _frame(pixels: NDArray[np.uint8]) -> av.VideoFrame:
    """pixels: `[height, width, 3]`."""
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
