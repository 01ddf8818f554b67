"""Videos as MP4 files: H.264, which every player and browser takes."""

from __future__ import annotations

from pathlib import Path

import av

from crossdock.runtime.media import Video

CRF = "12"
"""Constant rate factor of H.264: 0 is lossless, 18 looks it, 23 is the encoder's default."""


def write_video(video: Video, path: Path) -> None:
    """Write `video`; its sides are even, as 4:2:0 chroma asks for."""
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=video.fps, options={"crf": CRF})
        stream.width, stream.height = video.size
        stream.pix_fmt = "yuv420p"
        for pixels in video.frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
