"""Videos as MP4 files: H.264 and AAC, which every player and browser takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from crossdock.runtime.errors import RequestError
from crossdock.runtime.reports.media import Audio, Video

CRF = "12"
"""Constant rate factor of H.264: 0 is lossless, 18 looks it, 23 is the encoder's default."""
AUDIO_BITS_PER_S = 192_000
_BT709 = 1
"""Of ITU-T H.273's tables. Players take a large video that does not say its colours for it, a small one for another."""


def write_video(video: Video, path: Path) -> None:
    """Write `video`, frame by frame. Audio has one channel or two.

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
        sound = _add_audio_stream(file, video.audio)
        for pixels in video.frames:
            file.mux(stream.encode(_frame(pixels)))
        file.mux(stream.encode())
        if video.audio is not None:
            file.mux(sound.encode(_audio_frame(video.audio)))
            file.mux(sound.encode())


def _tell_colours(codec: Any) -> None:
    codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
    codec.color_range = ColorRange.MPEG.value


def _frame(pixels: NDArray[np.uint8]) -> av.VideoFrame:
    """pixels: `[height, width, 3]`."""
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)


def _add_audio_stream(file: Any, audio: Audio | None) -> Any:
    """Before the first frame is written: the file's header lists all streams."""
    if audio is None:
        return None
    stream = file.add_stream("aac", rate=audio.rate, layout=_layout(audio))
    stream.bit_rate = AUDIO_BITS_PER_S
    return stream


def _audio_frame(audio: Audio) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(audio.samples.clip(-1, 1), format="fltp", layout=_layout(audio))
    frame.sample_rate = audio.rate
    return frame


def _layout(audio: Audio) -> str:
    return "mono" if len(audio.samples) == 1 else "stereo"
