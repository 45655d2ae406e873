"""Images in files or in bytes: which formats are accepted, and how they are decoded."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the accepted formats. For some others, it would start a program: Ghostscript for PostScript."""


def open_picture(file: str | Path | io.BytesIO) -> Image.Image:
    """Decode an image in one of FORMATS, as it is displayed. A damaged file may raise anything."""
    with Image.open(file, formats=FORMATS) as picture:
        picture.load()
        return as_displayed(picture)


def as_displayed(picture: Image.Image) -> Image.Image:
    """Return an image upright, as its EXIF data state, with 8 bits if it is grey with 16.

    Pillow's ``convert`` would make nearly all 16-bit values white.
    """
    has_more = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM")
    with contextlib.suppress(Exception):  # damaged EXIF data may raise anything; a damaged picture raises later
        picture = ImageOps.exif_transpose(picture)
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)) if has_more else picture
