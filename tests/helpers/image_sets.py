"""Datasets made of arrays, and images with the statistics of photographs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sfumato.data import DataConfig, Dataset, Entry, Inline
from sfumato.data.annotations import Annotations
from sfumato.data.dataset import DatasetParts
from sfumato.data.ledger import Ledger


def photographs(count: int, *, seed: int = 0, side: int = 32) -> NDArray[np.uint8]:
    """Images (n, 3, side, side) whose spectrum falls as that of photographs, with two flat shapes
    each.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)) * side
    result = np.empty((count, 3, side, side), np.uint8)
    y, x = np.mgrid[:side, :side] / side
    for part in np.array_split(np.arange(count), count // 1000 + 1):
        spectrum = rng.standard_normal((len(part), 4, side, side // 2 + 1, 2)) @ [1, 1j]
        layers = np.fft.irfft2(spectrum / np.maximum(frequency, 1), s=(side, side))
        colours = layers[:, :1] + 0.4 * layers[:, 1:]  # mostly gray, as in photographs
        colours /= colours.std((1, 2, 3), keepdims=True)
        for image in colours:
            for _ in range(2):
                (cy, cx), (ry, rx) = rng.uniform(0.1, 0.9, 2), rng.uniform(0.1, 0.35, 2)
                inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
                image[:, inside] = rng.normal(0, 1.2, (3, 1)) + 0.3 * image[:, inside]
        contrast, brightness = rng.uniform(25, 50, (2, len(part), 1, 1, 1))
        result[part] = (colours * contrast + 75 + brightness).round().clip(0, 255)
    return result


def dataset_of(
    training: NDArray[np.uint8],
    held_out: NDArray[np.uint8] | None = None,
    *,
    labels: Sequence[int] | None = None,
    groups: NDArray[np.int64] | None = None,
    categories: tuple[str, ...] = (),
    calls: list[int] | None = None,
) -> Dataset:
    """A dataset of pixels (n, C, H, W), of which those held out are chosen.

    Args:
        labels, groups: of all images, the held-out ones last; by default no labels, and a group for
            each image.
        calls: receives the number of images of each reading.
    """
    held_out = training[:0] if held_out is None else held_out
    pixels = np.concatenate([training, held_out])
    count = len(pixels)
    ids = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
    entries = [Entry(name=f"{i}.png", image=Inline(b"")) for i in range(count)]
    shape = pixels.shape[2:]
    config = DataConfig(size=shape, channels=pixels.shape[1], bits=8 * pixels.dtype.itemsize)
    shapes = np.zeros(count, np.int64)

    def read(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        if calls is not None:
            calls.append(len(positions))
        return pixels[positions]

    dataset = Dataset(
        config=config,
        entries=entries,
        ids=ids,
        labels=torch.full((count,), -1) if labels is None else torch.tensor(labels),
        categories=categories,
        shapes=shapes,
        read_rows=read,
        clusters=np.arange(count) if groups is None else groups,
        remarks=(),
        rejects=(),
        ledger=Ledger(unit="files", total=count, used=count, sidecars={}, left_out={}),
        notes={},
        crop_loss=0.0,
        annotations=Annotations(
            entries=entries,
            form=config.pixel_format(),
            shapes=shapes,
            resizing=np.zeros((count, 4), np.float32),
            names=frozenset(),
        ),
    )
    # nothing but the images that were given as held out is held out
    whole = np.arange(len(training))
    dataset.__dict__["parts"] = DatasetParts(
        whole=whole, training=whole, holdout=np.arange(len(training), count), named={}
    )
    return dataset


def zoomed(images: Tensor, share: float = 0.12) -> Tensor:
    """The middle of images, enlarged to their size."""
    margin = share / (1 + share) / 2
    side = images.shape[-1]
    theta = torch.tensor([[1 - 2 * margin, 0.0, 0.0], [0.0, 1 - 2 * margin, 0.0]])
    grid = F.affine_grid(
        theta.expand(len(images), 2, 3), [*images.shape[:2], side, side], align_corners=False
    )
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


def blurred(images: Tensor, side: int) -> Tensor:
    """Images reduced to a side and enlarged again."""
    small = F.interpolate(images, size=(side, side), mode="area")
    return F.interpolate(small, size=images.shape[2:], mode="bicubic").clamp(-1, 1)


def noisy(images: Tensor, deviation: float, *, seed: int = 0) -> Tensor:
    """Images with normal noise."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + deviation * noise).clamp(-1, 1)


# what a generator may do to the images that it copies
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda x: x,
    "noise 0.1": lambda x: noisy(x, 0.1),
    "mirrored": lambda x: x.flip(3),
    "contrast 0.7": lambda x: 0.7 * x,
    "brighter": lambda x: (x + 0.2).clamp(-1, 1),
    "blurred to 16 pixels": lambda x: blurred(x, 16),
    "zoomed by 12 %": zoomed,
}


def encoded_again(pixels: NDArray[np.uint8], quality: int = 85) -> NDArray[np.uint8]:
    """Images (n, 3, H, W) as a JPEG file has them."""
    import io

    result = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "JPEG", quality=quality)
        result.append(np.asarray(Image.open(buffer)).transpose(2, 0, 1))
    return np.stack(result)
