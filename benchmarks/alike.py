"""Which near-duplicates a search in cells finds, beside one that compares each image with its exact
neighbours.

    python benchmarks/alike.py --images PHOTOS.parquet [--size 50000] [--planted 2500] [--json FILE]

Photographs at 32 pixels and changed copies of some of them; five kinds of change, in turn.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from growth import photographs
from machine import machine, options, report
from numpy.typing import NDArray
from PIL import Image

from sfumato.data import neighbours
from sfumato.data.duplicates import components, near_pairs

Images = NDArray[np.uint8]


def encoded_again(image: Images, rng: np.random.Generator) -> Images:
    """A JPEG of middling quality."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def enlarged(image: Images, rng: np.random.Generator) -> Images:
    """The middle of an image, enlarged by 7 %."""
    return np.asarray(Image.fromarray(image).resize((32, 32), box=(1, 1, 31, 31)))


def toned(image: Images, rng: np.random.Generator) -> Images:
    """Another contrast and brightness."""
    changed = (image - 128.0) * rng.uniform(0.8, 1.1) + 128 + rng.uniform(-15, 15)
    return changed.clip(0, 255).astype(np.uint8)


def noisy(image: Images, rng: np.random.Generator) -> Images:
    """Noise of a deviation of 4 of 255."""
    return (image + rng.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)


def moved(image: Images, rng: np.random.Generator) -> Images:
    """One pixel to the side."""
    result = image.copy()
    result[:, 1:] = image[:, :-1]
    return result


CHANGES: dict[str, Callable[[Images, np.random.Generator], Images]] = {
    "JPEG": encoded_again, "enlarged": enlarged, "toned": toned, "noisy": noisy, "moved": moved,
}  # fmt: skip


def found(images: Images, most_exact: int) -> tuple[NDArray[np.int64], float]:
    """The group of each image, and how long it took to find them."""
    neighbours.MOST_EXACT, begun = most_exact, time.perf_counter()
    groups = components(len(images), near_pairs(images))
    return groups, time.perf_counter() - begun


def together(groups: NDArray[np.int64], pairs: NDArray[np.int64]) -> float:
    """The share of pairs whose images are in one group."""
    return float((groups[pairs[:, 0]] == groups[pairs[:, 1]]).mean())


def linked(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs of each image that is not the first of its group with that."""
    firsts = np.unique(groups, return_index=True)[1][groups]
    others = np.flatnonzero(firsts != np.arange(len(groups)))
    return np.stack([firsts[others], others], axis=1)


def main() -> None:
    """Compare both searches on one set."""
    asked = options(__doc__.splitlines()[0], images="", size=50_000, planted=2500)
    rng = np.random.default_rng(0)
    photos = photographs(asked.images)[: 25_000 if asked.quick else asked.size]
    originals = rng.choice(len(photos), asked.planted, replace=False)
    kinds = [*CHANGES] * (asked.planted // len(CHANGES))
    copies = [
        CHANGES[kind](photos[place], rng) for kind, place in zip(kinds, originals, strict=True)
    ]
    images = np.concatenate([photos, np.stack(copies)])
    planted = np.stack([originals, len(photos) + np.arange(len(copies))], axis=1)
    groups: dict[str, NDArray[np.int64]] = {}
    rows: dict[str, Any] = {}
    for name, most in (("exact", len(images)), ("cells", 0)):
        groups[name], taken = found(images, most)
        rows[name] = {
            "seconds": taken,
            "alike": len(linked(groups[name])),
            "planted": {
                kind: together(groups[name], planted[np.array(kinds) == kind]) for kind in CHANGES
            },
        }
    recall = together(groups["cells"], linked(groups["exact"]))
    false = 1 - together(groups["exact"], linked(groups["cells"]))
    sizes = {"images": len(images), "planted": len(copies)}
    report(
        {"machine": machine(), **sizes, **rows, "recall": recall, "not in exact": false}, asked.json
    )


if __name__ == "__main__":
    main()
