"""scikit-learn's handwritten digits."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sfumato.data.listing import Entry, Inline, Listing, Source


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 in 17 grays, ten categories; they come with
    the package.
    """

    def listing(self) -> Listing:
        """List the digits as PNGs in memory, with the names of their numbers as categories."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        pairs = enumerate(zip(digits.images, digits.target, strict=True))
        entries = [
            Entry(name=f"digit-{i:04d}", image=Inline(_png(image)), category=str(label))
            for i, (image, label) in pairs
        ]
        return Listing(entries=entries, unit="images")


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()
