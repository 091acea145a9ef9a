"""Which planted copies are found, and how many unseen images are taken for copies: CIFAR-10 at 32
pixels.

    PYTHONPATH=. python benchmarks/copies.py cifar10-train.parquet [--learned 1000] [--features auto]

Copies are of `--planted` training images, changed in several ways; a fifth of them stand in the
training set as JPEG too. It takes minutes on one core.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch
from numpy.typing import NDArray

from sfumato.data import DataConfig, Dataset, Parquet, index, to_float
from sfumato.data.copies import NO_COPY, CopyIndex
from sfumato.evaluation.extractors import extractor
from sfumato.evaluation.memorization import CopyMeter
from tests.helpers.image_sets import CHANGES, blurred, dataset_of, encoded_again, noisy

FURTHER = {
    "noise 0.3": lambda x: noisy(x, 0.3),
    "blurred to 8 pixels": lambda x: blurred(x, 8),
    "shifted by 2 pixels": lambda x: x.roll(2, 3),
    "mean of two": lambda x: (x + x.roll(1, 0)) / 2,
}


def with_siblings(pixels: NDArray[np.uint8], planted: int) -> Dataset:
    """A set in which a fifth of the images that are copied stand as JPEG too."""
    siblings = encoded_again(pixels[: planted // 5])
    groups = np.concatenate([np.arange(len(pixels)), np.arange(len(siblings))])
    return dataset_of(np.concatenate([pixels, siblings]), groups=groups)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parquet")
    parser.add_argument("--learned", type=int, default=1000)
    parser.add_argument("--planted", type=int, default=150)
    parser.add_argument("--unseen", type=int, default=300)
    parser.add_argument("--features", default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    everything = index(DataConfig(source=Parquet(arguments.parquet), resolution=32))
    count = arguments.learned + arguments.unseen
    pixels = everything.images(everything.training[:count]).pixels
    dataset = with_siblings(pixels[: arguments.learned].numpy(), arguments.planted)
    meter = CopyMeter(CopyIndex.of(dataset), features=extractor(arguments.features))
    print("images | copies | close by 8 x 8 | close by feature maps | authentic | C_T")
    originals = to_float(pixels[: arguments.planted])
    sets = {name: change(originals) for name, change in {**CHANGES, **FURTHER}.items()}
    sets["unseen images"] = to_float(pixels[arguments.learned :])
    for name, images in sets.items():
        figures = meter.measure(images).figures()
        shares = [figures[key].value for key in ("copies", "close", "close_in_features")]
        authentic, test = figures["authentic"].value, figures["distance_test"].value
        words = " | ".join(f"{share:.1%}" for share in shares)
        print(f"{name} | {words} | {authentic:.0%} | {test:+.1f}", flush=True)
    in_all(everything)


def in_all(everything: Dataset) -> None:
    """Search 200 unseen images, one of which is a copy, among all training images."""
    start = time.perf_counter()
    searched = CopyIndex.of(everything)
    built = time.perf_counter() - start
    position = int(everything.training[int(0.9 * len(everything.training))])
    queries = to_float(everything.images(everything.holdout[:200]).pixels)
    queries[7] = noisy(to_float(everything.images([position]).pixels), 0.1)[0].flip(2)
    start = time.perf_counter()
    found = searched.find(queries)
    seconds = time.perf_counter() - start
    others = int((np.delete(found, 7) != NO_COPY).sum())
    print(
        f"among {len(searched.positions):,} training images, read in {built:.0f} s: 200 searched "
        f"in {seconds:.1f} s; the copy is {'' if found[7] == position else 'NOT '}found; {others} "
        "of 199 held-out images count as copies"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the process: {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
