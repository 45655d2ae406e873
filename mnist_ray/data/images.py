"""Images in files or in bytes: which formats are accepted, and how they are decoded."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mnist_ray.errors import UsageError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the accepted formats. For some others, it would start a program: Ghostscript for PostScript."""


def open_picture(file: str | Path | io.BytesIO) -> Image.Image:
    """Decode an image in one of FORMATS, as it is displayed. A damaged file may raise anything."""
    with Image.open(file, formats=FORMATS) as picture:
        picture.load()
        return as_displayed(picture)


def as_displayed(picture: Image.Image) -> Image.Image:
    """Return an image upright, as its EXIF data state, with 8 bits if it is grey with 16, and on white if it has alpha.

    Pillow's ``convert`` would make nearly all 16-bit values white, and most transparent pixels black. Raises UsageError
    for 32 bits, whose white is unknown.
    """
    has_more = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if picture.mode in ("I", "F") and not has_more:
        raise UsageError("a grey of 32 bits, whose white is unknown; save it with 8 or 16 bits")
    with contextlib.suppress(Exception):  # damaged EXIF data may raise anything; a damaged picture raises later
        picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("L" if picture.mode == "LA" else "RGB")
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)) if has_more else picture
