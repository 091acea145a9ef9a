"""Latents of a whole dataset, encoded once and kept on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sfumato.autoencoders import LatentAutoencoder
from sfumato.data import Dataset, PrecomputedLatents, to_float
from sfumato.data.array_cache import ArrayCache, RowReader, Writer
from sfumato.data.augment import augment
from sfumato.data.loader import variant_draws
from sfumato.data.pixel_store import DECODER
from sfumato.data.segment_records import stored_keys
from sfumato.distributed import current
from sfumato.errors import DataError

# images encoded together; fixed, since rounding depends on it and a resumed run must get the same
# latents
CHUNK = 64
COMMIT_S = 60.0


def with_latents(
    dataset: Dataset,
    autoencoder: LatentAutoencoder,
    *,
    identity: str,
    variants: int,
    pixels: bool,
    on_progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Return the dataset with the latent moments of every training image, cached on disk.

    The cache holds mean and log-variance in float16, so that training draws a new latent each time
    it sees an image. If an image was edited, only the chunk that holds it is encoded again; another
    autoencoder, resolution or augmentation finds nothing in the cache.

    Args:
        identity: hash of the autoencoder.
        variants: number of augmented variants of each image; only one is made if nothing is
            augmented.
        pixels: whether batches also hold the images.
        on_progress: called with the number of finished chunks and of all chunks.
    Raises:
        DataError: if an image can no longer be read.
    """
    cache, count = _cache(dataset, identity), _variants(dataset, variants)
    world, chunks = current(), list(_chunks(dataset, count))
    for share in world.shares:
        world.together(partial(_fill, cache, dataset, autoencoder, chunks[share], on_progress))
        cache.refresh()  # what the others have encoded
    keys = stored_keys(
        [
            _key(dataset, position, variant)
            for position in dataset.training
            for variant in range(count)
        ]
    )
    return replace(
        dataset,
        latents=PrecomputedLatents(
            read_rows=RowReader.of(cache, keys, "moments"),
            numbers=dataset.training_numbers,
            variants=count,
            pixels=pixels,
        ),
    )


def encode_part(
    dataset: Dataset,
    autoencoder: LatentAutoencoder,
    *,
    identity: str,
    variants: int,
    part: slice,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Encode a part of what `with_latents` needs into the cache, and return how many chunks it has.

    Args:
        part: of the chunks.
    """
    chunks = list(_chunks(dataset, _variants(dataset, variants)))[part]
    _fill(_cache(dataset, identity), dataset, autoencoder, chunks, on_progress)
    return len(chunks)


def latents_kept(dataset: Dataset, identity: str) -> int:
    """Return how many latents of an autoencoder are in the cache, of any images of this shape."""
    return len(_cache(dataset, identity).records)


def _cache(dataset: Dataset, identity: str) -> ArrayCache:
    form, augmented = dataset.pixel_format, dataset.config.augment
    return ArrayCache.open("latents", f"decoder {DECODER} {identity} {form!r} {augmented!r}")


def _variants(dataset: Dataset, variants: int) -> int:
    return 1 if dataset.config.augment.is_off else variants


def _fill(
    cache: ArrayCache,
    dataset: Dataset,
    autoencoder: LatentAutoencoder,
    chunks: Sequence[list[tuple[int, int]]],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Encode the chunks that are not in the cache yet."""
    writer, begun = Writer(cache), time.monotonic()
    try:
        for number, chunk in enumerate(chunks):
            if any(_key(dataset, *item) not in cache.records for item in chunk):
                for item, moments in zip(chunk, _moments(dataset, autoencoder, chunk), strict=True):
                    if _key(dataset, *item) not in cache.records:
                        writer.add(
                            _key(dataset, *item),
                            {},
                            {"moments": moments.numpy().astype(np.float16)},
                        )
            if time.monotonic() - begun > COMMIT_S:
                writer.commit()
                writer, begun = Writer(cache), time.monotonic()
            if on_progress is not None:
                on_progress(number + 1, len(chunks))
    finally:
        writer.commit()


def _key(dataset: Dataset, position: int, variant: int) -> str:
    return f"{dataset.ids[position]}/{variant}"


def _chunks(dataset: Dataset, variants: int) -> Iterator[list[tuple[int, int]]]:
    """Yield positions and variants in groups of one shape, every distinct training image once."""
    _, places = np.unique(np.array(dataset.ids)[dataset.training], return_index=True)
    first = np.sort(dataset.training[places])
    for shape in np.unique(dataset.shapes):
        items = [(int(p), v) for p in first if dataset.shapes[p] == shape for v in range(variants)]
        for begin in range(0, len(items), CHUNK):
            yield items[begin : begin + CHUNK]


@torch.no_grad()
def _moments(
    dataset: Dataset, autoencoder: LatentAutoencoder, chunk: list[tuple[int, int]]
) -> Tensor:
    pixels, bad, _ = dataset.images([position for position, _ in chunk])
    if bad:
        raise DataError(
            f"can no longer be read: {bad[0].reason}",
            where=bad[0].name,
            hint="restore it, or leave it out (data.exclude)",
        )
    images = to_float(pixels)
    draws = torch.cat(
        [variant_draws(dataset.ids[position], variant) for position, variant in chunk]
    )
    changed = augment(dataset.config.augment, images, draws).images
    return autoencoder.moments(changed.to(autoencoder.mean.device)).float().cpu()
