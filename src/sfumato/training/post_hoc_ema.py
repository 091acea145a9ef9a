"""Averages of the weights that were not stored, reconstructed from some that were.

An average over a power-function profile is nearly a weighted sum of other such averages, taken at
other times and with other widths. The shares are those whose summed profiles come closest to the
wanted profile.

Source: Karras et al. 2024 (arXiv:2312.02696), appendix C.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.training.ema import PowerEMA

UPDATES = "updates"  # how many had changed the weights, in a file's head


class Profile(NamedTuple):
    """An average over (0, step] whose weight at t is proportional to t^gamma."""

    step: float
    gamma: float


def shares(kept: Sequence[Profile], wanted: Profile) -> NDArray[np.float64]:
    """Return the share of each kept average in the wanted one, (n,); they sum to 1.

    They are a least-squares fit over all t: the solution of A x = b, where A holds the overlaps of
    the kept profiles, and b their overlaps with the wanted one. If little was kept, the best fit
    has another sum, which would make all weights larger or smaller, so it is divided by that sum.
    """
    matrix = np.array([[overlap(a, b) for b in kept] for a in kept])
    target = np.array([overlap(a, wanted) for a in kept])
    found: NDArray[np.float64] = np.linalg.lstsq(matrix, target, rcond=1e-14)[0]
    result: NDArray[np.float64] = found / found.sum()
    return result


def overlap(a: Profile, b: Profile) -> float:
    """Integrate the product of two profiles over t, each of integral 1 (eqs. 143 to 150)."""
    both = a.gamma + b.gamma + 1
    first, last = min(a.step, b.step), max(a.step, b.step)
    exponent = (b if a.step == first else a).gamma + 1
    result: float = (a.gamma + 1) * (b.gamma + 1) / both * (first / last) ** exponent / first
    return result


def reconstructed(averages: Path, *, width: float) -> dict[str, Tensor]:
    """Reconstruct the average of a width at the last kept step, from all averages that a run kept.

    Raises:
        CheckpointError: if none were kept, or they cannot be read.
        ConfigError: for an impossible width.
    """
    wanted, kept = PowerEMA(width), _kept(averages)
    if not kept:
        raise CheckpointError(
            "holds no averages to reconstruct from",
            where=str(averages),
            hint="train with post_hoc_ema.widths=[0.1,0.25]; a run's own average is there in any "
            "case",
        )
    profiles = list(kept.values())
    amounts = shares(profiles, Profile(max(profile.step for profile in profiles), wanted.gamma))
    total: dict[str, Tensor] = {}
    for path, amount in zip(kept, amounts.tolist(), strict=True):
        for name, tensor in _read(path).items():
            total[name] = (
                total.get(name, torch.zeros((), dtype=torch.float64)) + amount * tensor.double()
            )
    return {name: tensor.float() for name, tensor in total.items()}


def forget(averages: Path, *, after: int) -> None:
    """Remove the averages of steps after `after`, which are about to be taken again."""
    for path in averages.glob("ema-*/step-*.safetensors"):
        if int(path.stem[5:]) > after:
            path.unlink()


def _kept(averages: Path) -> dict[Path, Profile]:
    """Return the averages in a folder, each with its profile over updates of the weights.

    They are the files ema-WIDTH/step-N.safetensors.
    """
    found = {}
    for folder in sorted(averages.glob("ema-*")):
        gamma = PowerEMA(float(folder.name[4:])).gamma
        for path in sorted(folder.glob("step-*.safetensors")):
            found[path] = Profile(_updates(path), gamma)
    return found


def _updates(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()[UPDATES])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from None
