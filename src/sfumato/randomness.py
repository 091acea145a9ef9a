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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORDS_PER_BLOCK = 4  # Philox4x64 makes four 64-bit words for each value of its counter


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


def seed_layers(seed: int) -> None:
    """Seed the stream that layers such as dropout draw from: they take no generator."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed takes 300 times as long, to remember this for devices that never come
        torch.default_generator.manual_seed(seed)


def permutation(seed: int, purpose: str, *, index: int, size: int) -> NDArray[np.int64]:
    """Return the `index`-th random order of range(size)."""
    key = int.from_bytes(
        hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()[:16], "little"
    )
    return np.random.Generator(np.random.Philox(key=key)).permutation(size)
