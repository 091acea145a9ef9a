"""Keyed randomness: every draw is a function of (seed, purpose, index), from a counter-based
generator.

Nothing in sfumato draws from a global stream. So previews and validation cannot change the
randomness of training, a resumed run draws what the interrupted one would have drawn, and item i is
the same whichever batch, worker or rank draws it.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GOLDEN = 0x9E3779B9 - 2**32  # 2^32 over the golden ratio, as a signed number
WORDS_PER_BLOCK = 4  # Philox4x64 makes four 64-bit words for each value of its counter
MOST_PERMUTED = 1 << 16  # places of an order that is held as a whole
ROUNDS = 8  # of a keyed bijection; with 4, places are not uniform


def _words(
    seed: int | str, purpose: str, first: int, count: int, words_per_item: int
) -> NDArray[np.uint64]:
    """Return the raw words of items [first, first + count); item g always owns the same blocks.

    The blocks are those of the counter. Their number is part of the key: items of different sizes,
    whose blocks would overlap, have separate streams.
    """
    blocks = -(-words_per_item // WORDS_PER_BLOCK)
    key = int.from_bytes(
        hashlib.sha256(f"{seed}/{purpose}/{blocks}".encode()).digest()[:16], "little"
    )
    generator = np.random.Philox(key=key, counter=first * blocks)
    return generator.random_raw(count * blocks * WORDS_PER_BLOCK).reshape(
        count, blocks * WORDS_PER_BLOCK
    )


def uniform(seed: int | str, purpose: str, *, first: int, count: int, per_item: int = 1) -> Tensor:
    """Draw uniformly from [0, 1) for `count` items from `first` on: (count, per_item), float64."""
    words = _words(seed, purpose, first, count, per_item)[:, :per_item]
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)


def normal(
    seed: int,
    purpose: str,
    *,
    first: int,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw standard normal values for `shape[0]` items from `first` on, float32.

    The Box-Muller transform is used. Item `first + i` has the same values whatever `shape[0]` is;
    on another kind of device, up to its rounding of logarithms and cosines.
    """
    count, size = shape[0], math.prod(shape[1:])
    words = _words(seed, purpose, first, count, -(-size // 2))
    halves = torch.from_numpy(words.view(np.int32)).to(device).view(count, -1, 2).to(torch.float64)
    unit = (halves + 0.5) * 2.0**-32 + 0.5
    radius = torch.sqrt(-2 * torch.log(unit[..., 0]))
    angle = (2 * math.pi) * unit[..., 1]
    draws = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return draws.view(count, -1)[:, :size].to(torch.float32).reshape(shape)


_samples: Tensor | None = None  # two words for each sample of training that passes through, (n, 2)


def key_layers(seed: int, *, first: int, count: int, device: torch.device | str = "cpu") -> None:
    """Say which samples of training pass through the network next, for layers that draw.

    Layers of other libraries draw from torch's stream, which is seeded.
    """
    global _samples
    words = _words(seed, "layers", first, count, 1)[:, :1]
    _samples = torch.from_numpy(words.view(np.int32)).to(device)
    _seed_stream(((seed << 40) + first) % 2**63)


def layer_key(name: str) -> tuple[int, int]:
    """Return two numbers that stand for a layer, for `layer_uniform`."""
    digest = hashlib.sha256(f"layer {name}".encode()).digest()
    first, second = (int.from_bytes(digest[at : at + 4], "little", signed=True) for at in (0, 4))
    return first, second


def layer_uniform(layer: tuple[int, int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw uniformly from [0, 1) in a layer, in 2^24 steps, float32; shape[0] is that of the batch.

    The draws of a sample are a function of (seed, layer, number of the sample), whatever the
    micro-batch, the process or the order of memory, and the same when activations are recomputed. A
    network that is called with several rows for each sample has them one batch after another.
    Where `key_layers` was not called for this device, torch's stream is drawn from.

    Source: the hash of element numbers is C. Wellons's "lowbias32" (nullprogram.com/blog/2018/07/31).
    """
    if _samples is None or _samples.device.type != device.type:
        return torch.rand(shape, device=device)
    words = _samples
    if shape[0] != len(words):
        rounds = torch.arange(-(-shape[0] // len(words)), dtype=torch.int32, device=device)
        salt = (rounds * GOLDEN)[:, None, None]
        words = (words + salt).flatten(0, 1)[: shape[0]]
    bits = torch.arange(math.prod(shape[1:]), dtype=torch.int32, device=device)
    factor, offset = (words[:, :1] ^ layer[0]) | 1, words[:, 1:] ^ layer[1]
    bits = factor * bits + offset  # other numbers for each sample
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * 0x7FEB352D
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * (0x846CA68B - 2**32)
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    return ((bits >> 8) & 0xFFFFFF).to(torch.float32).mul(2.0**-24).view(shape)


def _seed_stream(seed: int) -> None:
    """Seed the stream that layers of other libraries draw from: they take no generator."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed takes 300 times as long, to remember this for devices that never come
        torch.default_generator.manual_seed(seed)


def permutation(seed: int, purpose: str, *, index: int, size: int) -> NDArray[np.int64]:
    """Return the `index`-th random order of range(size)."""
    return np.random.Generator(_philox(seed, purpose, index)).permutation(size)


def shuffled(
    places: NDArray[np.int64], seed: int, purpose: str, *, index: int, size: int
) -> NDArray[np.int64]:
    """Return what is at `places` of the `index`-th random order of range(size).

    Up to MOST_PERMUTED it is `permutation`. Beyond, it is a keyed bijection, which costs the same for any
    size, and no memory.
    """
    if size <= MOST_PERMUTED:
        return _held_permutation(seed, purpose, index, size)[places]
    return bijection(places, _philox(seed, purpose, index).random_raw(ROUNDS), size)


def bijection(places: NDArray[np.int64], keys: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
    """Map distinct places in range(size) to distinct numbers in range(size), as keys say.

    Sources: a balanced Feistel network with one round for each key (Luby and Rackoff 1988), walked until it is
    inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"); the round function is the
    finalizer of SplitMix64 (Steele, Lea and Flood 2014).
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    result = places.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        left, right = result[outside] >> half, result[outside] & low
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & low)
        walked = (left << half) | right
        result[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return result.astype(np.int64)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@lru_cache(maxsize=32)
def _held_permutation(seed: int, purpose: str, index: int, size: int) -> NDArray[np.int64]:
    return permutation(seed, purpose, index=index, size=size)


def _philox(seed: int, purpose: str, index: int) -> np.random.Philox:
    key = int.from_bytes(
        hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()[:16], "little"
    )
    return np.random.Philox(key=key)
