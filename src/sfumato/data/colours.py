"""Conversion of an image's colours from its ICC profile to sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 << 20


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the transform from a profile to sRGB; None if its colours are those of sRGB already."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
    if mode != "RGB":
        return transform
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    converted = ImageCms.applyTransform(Image.fromarray(colours), transform)
    changed = np.abs(np.asarray(converted).astype(int) - colours).max()
    return transform if changed > 2 else None  # 2: what rounding in a profile's tables comes to


def to_srgb(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """Convert an image to sRGB; `notes` says if its colours change or its profile is ignored."""
    colours, alpha = (
        (image.convert("RGB"), image.getchannel("A")) if image.mode == "RGBA" else (image, None)
    )
    if colours.mode not in ("L", "RGB", "CMYK") or len(profile) > MAX_PROFILE_BYTES:
        notes.append("icc_profile_ignored")
        return image
    try:
        transform = _transform(profile, colours.mode)
        if transform is None:
            return image
        converted = ImageCms.applyTransform(colours, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.append("icc_profile_ignored")
        return image
    if converted is None:
        return image
    notes.append("icc_converted_to_srgb")
    if alpha is not None:
        converted.putalpha(alpha)
    return converted
