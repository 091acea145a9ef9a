"""What decoding has found about the images of a set, in columns."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.data.decoding import PixelFormat
from sfumato.data.index_store import HexIds
from sfumato.data.resizing import resizing


@dataclass(frozen=True)
class ImageFacts:
    """What decoding found, a row an image: hashes of the contents, indices of shapes, sizes (width,
    height), numbers of frames; and the positions of the images with a note, by note.
    """

    ids: HexIds
    shapes: NDArray[np.int64]
    sizes: NDArray[np.int64]
    frames: NDArray[np.int64]
    notes: dict[str, array[int]]

    @classmethod
    def of(cls, facts: Iterable[Mapping[str, Any]]) -> ImageFacts:
        """Return those that the store of the pixels keeps, image by image."""
        ids = bytearray()
        shapes, sizes, frames = (array("q") for _ in range(3))
        notes: dict[str, array[int]] = {}
        for place, fact in enumerate(facts):
            ids += bytes.fromhex(fact["id"])
            shapes.append(fact["shape"])
            sizes.extend(fact["size"])
            frames.append(fact.get("frames", 1))
            for note in fact["notes"]:
                notes.setdefault(note, array("q")).append(place)
        return cls(
            ids=HexIds(np.frombuffer(bytes(ids), np.uint8).reshape(-1, 16)),
            shapes=np.array(shapes, np.int64),
            sizes=np.array(sizes, np.int64).reshape(-1, 2),
            frames=np.array(frames, np.int64),
            notes=notes,
        )

    def resizing_and_losses(
        self, form: PixelFormat
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Return how each image was resized, (n, 4), and the share of its area that was cropped, (n,).

        Sizes are few, where images are many.
        """
        pairs = np.column_stack([self.sizes, self.shapes])
        kinds, places = np.unique(pairs, axis=0, return_inverse=True)
        sizes = [((width, height), form.shapes[shape]) for width, height, shape in kinds.tolist()]
        resized = np.array([resizing(*each) for each in sizes], np.float32).reshape(-1, 4)
        losses = np.array([_crop_loss(*each) for each in sizes])
        places = places.reshape(-1)
        return resized[places], losses[places]


def _crop_loss(size: Sequence[int], target: tuple[int, int]) -> float:
    """Return the share of an image's area that cropping to the target's aspect ratio cuts away."""
    ratio = (size[0] / size[1]) / (target[1] / target[0])
    return 1 - min(ratio, 1 / ratio)
