"""What becomes of bytes that may or may not be an image."""

from __future__ import annotations

import numpy as np

from sfumato.data.decoding import Decoded, PixelFormat, RejectedImage, decode


def pixels_or_reason(data: bytes, form: PixelFormat) -> Decoded | str:
    """The image, decoded as when a set is indexed, or why it is refused; any other error is a
    failure.
    """
    try:
        return decode(data, form, identify=True)
    except RejectedImage as rejected:
        return str(rejected)


def assert_pixels_or_reason(data: bytes, form: PixelFormat) -> bool:
    """Fails unless `data` are pixels of the format, or refused with a reason of a sentence; says
    which.
    """
    found = pixels_or_reason(data, form)
    if isinstance(found, str):
        assert 0 < len(found) < 300
        return False
    assert found.pixels.shape == (form.channels, *form.shapes[found.shape])
    assert found.pixels.dtype == (np.uint8 if form.bits == 8 else np.uint16)
    assert all(isinstance(note, str) for note in found.notes)
    assert len(found.id) == 32
    assert min(found.size) >= 1
    return True
