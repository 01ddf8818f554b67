"""Writing what a generation gave: pictures, latents, report, trace."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from crossdock.launch.commands.options import Outputs
from crossdock.launch.engine.generation import Generation
from crossdock.launch.video_file import write_video
from crossdock.runtime.reports.media import Video
from crossdock.runtime.reports.trace_file import chrome_trace


def write_outputs(generation: Generation, outputs: Outputs) -> list[Path]:
    """Write the pictures or videos, and what else is asked for; each file appears whole or not at all."""
    paths = outputs.image_paths(len(generation.images))
    for made, path in zip(generation.images, paths, strict=True):
        if isinstance(made, Video):
            _write(path, partial(write_video, made))
        else:
            _write(path, partial(made.save, format=_format(path)))
    if outputs.latents is not None:
        both = {"latents": generation.returned_latents, "loop_latents": generation.latents}
        tensors = {name: torch.cat(latents).contiguous() for name, latents in both.items()}
        _write(outputs.latents, lambda part: save_file(tensors, part))
    if outputs.report is not None:
        text = json.dumps(generation.report, indent=2) + "\n"
        _write(outputs.report, lambda part: part.write_text(text, encoding="utf-8"))
    if outputs.trace is not None:
        content = json.dumps(chrome_trace(generation.trace))
        _write(outputs.trace, lambda part: part.write_text(content, encoding="utf-8"))
    return paths


def _write(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _format(path: Path) -> str:
    return Image.registered_extensions()[path.suffix.lower()]
