"""Videos as files: decoded again, they are what was written; what cannot be written leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from crossdock.launch import video_file
from crossdock.launch.commands.options import Outputs
from crossdock.launch.commands.outputs import write_outputs
from crossdock.launch.video_file import write_video
from crossdock.runtime.errors import RequestError
from crossdock.runtime.reports.media import Audio, Video
from layouts import CONFIGS
from reference import PROMPT, reference
from tiers import thorough

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 30, 90), (10, 200, 220))
SIDE = 16
"""Of a patch of one colour, in pixels."""


def patches(frames: int) -> Any:
    """Every frame has the colours in another order: uint8 `[frames, height, width, 3]`."""
    rows = [np.roll(np.array(COLOURS, np.uint8), number, 0) for number in range(frames)]
    return np.stack(rows)[:, None].repeat(2 * SIDE, 1).repeat(SIDE, 2)


def decoded(path: Path) -> tuple[Any, SimpleNamespace]:
    """The frames as uint8 `[frames, height, width, 3]`, and what the file says of them."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        codec = stream.codec_context
        says = SimpleNamespace(
            rate=stream.average_rate,
            seconds=(stream.duration or 0) * (stream.time_base or 0),
            kind=(codec.name, codec.pix_fmt),
            colours=(codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range),
        )
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]), says


def luma(frames: Any) -> Any:
    """Of BT.709, 0 to 255. Chroma has a quarter of the pixels in the file, so noise loses its colours."""
    return frames.astype(float) @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("frames", [1, 9])
def test_what_is_read_is_what_was_written(frames: int, tmp_path: Path) -> None:
    """The order of the frames, their number, size, rate and colours, away from the patches' edges."""
    video, path = Video(patches(frames), fps=24), tmp_path / "out.mp4"
    write_video(video, path)
    found, says = decoded(path)
    assert found.shape == video.frames.shape == (frames, 2 * SIDE, len(COLOURS) * SIDE, 3)
    assert (says.rate, says.seconds, says.kind) == (24, Fraction(frames, 24), ("h264", "yuv420p"))
    inside = [place for place in range(found.shape[2]) if 3 <= place % SIDE < SIDE - 3]
    difference = np.abs(found.astype(int) - video.frames.astype(int))[:, :, inside]
    assert difference.max() <= 4


def test_the_file_says_how_its_colours_are_meant(tmp_path: Path) -> None:
    """A player guesses by the size where it does not: the same video would look different large and small."""
    write_video(Video(patches(2), fps=16), tmp_path / "out.mp4")
    assert decoded(tmp_path / "out.mp4")[1].colours == (*[Colorspace.ITU709.value] * 3, ColorRange.MPEG.value)


@pytest.mark.parametrize(("height", "width"), [(31, 48), (32, 47)])
def test_odd_sides_are_refused(height: int, width: int, tmp_path: Path) -> None:
    made = SimpleNamespace(images=[Video(np.zeros((2, height, width, 3), np.uint8), 16)])
    with pytest.raises(RequestError, match=rf"video of {width} x {height} pixels; allowed in an MP4: even sides"):
        write_outputs(made, Outputs(tmp_path / "out.mp4"))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder fails in the middle: the file of an earlier run is still there, and no other."""
    path, made = tmp_path / "out.mp4", SimpleNamespace(images=[Video(patches(5), 16)])
    write_outputs(made, Outputs(path))  # type: ignore[arg-type]
    before, make = path.read_bytes(), video_file._frame
    calls: list[Any] = []

    def failing(pixels: Any) -> Any:
        calls.append(pixels)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return make(pixels)

    monkeypatch.setattr(video_file, "_frame", failing)
    with pytest.raises(OSError, match="No space left"):
        write_outputs(made, Outputs(path))  # type: ignore[arg-type]
    assert [found.name for found in tmp_path.iterdir()] == ["out.mp4"]
    assert path.read_bytes() == before


@thorough
def test_generate_writes_a_video(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """From the command line to the file: as many frames as asked for, each of the size asked for, the model's own."""
    directory, out = checkpoint_of("wan2.1"), tmp_path / "out.mp4"
    command = [sys.executable, "-m", "crossdock.launch.cli", "generate", str(directory), "--prompt", PROMPT]
    command += ["--config", str(CONFIGS / "single.yaml"), "--height", "64", "--width", "128", "--frames", "9"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [found.name for found in tmp_path.iterdir()] == ["out.mp4"]
    found, says = decoded(out)
    expected = (reference(directory, size=(64, 128), frames=9).media[0] * 255).round()
    assert found.shape == expected.shape == (9, 64, 128, 3)
    assert says.rate == 16
    difference = np.abs(luma(found) - luma(expected))
    assert difference.mean() < 3
    wrong = [np.abs(luma(found) - np.roll(luma(expected), turn, 0)).mean() for turn in range(1, 9)]
    assert difference.mean() < min(wrong) / 5


def test_audio_is_heard_as_it_was_made(tmp_path: Path) -> None:
    """Two channels of different tones: AAC loses little of a tone, and begins 1024 samples late."""
    rate, path = 24_000, tmp_path / "out.mp4"
    seconds = np.arange(rate // 2) / rate
    tones = np.stack([0.5 * np.sin(2 * np.pi * hertz * seconds) for hertz in (440, 220)]).astype(np.float32)
    write_video(Video(patches(12), fps=24, audio=Audio(tones, rate)), path)
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        heard = np.concatenate([frame.to_ndarray() for frame in file.decode(stream)], axis=1)
        assert (stream.codec_context.name, stream.rate, stream.channels) == ("aac", rate, 2)
    late = heard[:, 1024 : 1024 + tones.shape[1]]
    middle = slice(2048, -2048)
    assert abs(late[:, middle] - tones[:, middle]).max() < 0.05
    assert len(decoded(path)[0]) == 12
