"""Videos as MP4 files: H.264 and AAC, which every player and browser takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av

from crossdock.runtime.media import Audio, Video

CRF = "12"
"""Constant rate factor of H.264: 0 is lossless, 18 looks it, 23 is the encoder's default."""
AUDIO_BITS_PER_S = 192_000


def write_video(video: Video, path: Path) -> None:
    """Write `video`; its sides are even, as 4:2:0 chroma asks for. Audio has one channel or two."""
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=video.fps, options={"crf": CRF})
        stream.width, stream.height = video.size
        stream.pix_fmt = "yuv420p"
        sound = _add_audio_stream(file, video.audio)
        for pixels in video.frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
        if video.audio is not None:
            file.mux(sound.encode(_audio_frame(video.audio)))
            file.mux(sound.encode())


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
