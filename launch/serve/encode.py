"""Pictures as files in memory, with what made them written into them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

ImageFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4"}


def encode_image(image: Image.Image, form: ImageFormat, quality: int | None, made: Mapping[str, Any]) -> bytes:
    """
    Args:
        quality: 0 to 100, of what loses something; None: 100.
        made: what made it: PNG's text chunks (ISO 15948, 11.3.3: Latin-1, or UTF-8 in iTXt).
    """
    file = io.BytesIO()
    if form == "png":
        chunks = PngInfo()
        for name, value in made.items():
            if value is not None:
                chunks.add_itxt(name, str(value))
        image.save(file, "png", pnginfo=chunks)
    else:
        image.convert("RGB").save(file, form, quality=100 if quality is None else quality)
    return file.getvalue()
