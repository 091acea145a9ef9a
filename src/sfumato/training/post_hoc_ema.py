"""Averages of the weights that were not stored, reconstructed from some that were.

An average over a power-function profile is nearly a weighted sum of other such averages, taken at
other steps and with other widths. The weights are those whose weighted sum of profiles comes
closest to the target profile.

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

UPDATES = "updates"  # key in a file's metadata: number of updates of the weights


class Profile(NamedTuple):
    """An average over (0, step] whose weight at t is proportional to t^gamma."""

    step: float
    gamma: float


def solve_weights(stored: Sequence[Profile], target: Profile) -> NDArray[np.float64]:
    """Return the weight of each stored average in the target average, (n,); they sum to 1.

    They are a least-squares fit over all t: the solution of A x = b, where A holds the overlaps of
    the stored profiles, and b their overlaps with the target profile. If few averages are stored,
    the best fit has another sum, which would scale all parameters of the model, so it is divided by
    that sum.
    """
    matrix = np.array([[overlap(a, b) for b in stored] for a in stored])
    overlaps = np.array([overlap(a, target) for a in stored])
    solution: NDArray[np.float64] = np.linalg.lstsq(matrix, overlaps, rcond=1e-14)[0]
    result: NDArray[np.float64] = solution / solution.sum()
    return result


def overlap(a: Profile, b: Profile) -> float:
    """Integrate the product of two profiles over t, each of integral 1 (eqs. 143 to 150)."""
    both = a.gamma + b.gamma + 1
    first, last = min(a.step, b.step), max(a.step, b.step)
    exponent = (b if a.step == first else a).gamma + 1
    result: float = (a.gamma + 1) * (b.gamma + 1) / both * (first / last) ** exponent / first
    return result


def reconstruct(averages: Path, *, width: float) -> dict[str, Tensor]:
    """Reconstruct the average of a width at the last stored step, from all that a run stored.

    Raises:
        CheckpointError: if none are stored, or they cannot be read.
        ConfigError: for an impossible width.
    """
    target, stored = PowerEMA(width), _stored_profiles(averages)
    if not stored:
        raise CheckpointError(
            "holds no averages to reconstruct from",
            where=str(averages),
            hint="train with post_hoc_ema.widths=[0.1,0.25]; a run's own average is there in any "
            "case",
        )
    profiles = list(stored.values())
    last_step = max(profile.step for profile in profiles)
    weights = solve_weights(profiles, Profile(last_step, target.gamma))
    total: dict[str, Tensor] = {}
    for path, weight in zip(stored, weights.tolist(), strict=True):
        for name, tensor in _read(path).items():
            total[name] = (
                total.get(name, torch.zeros((), dtype=torch.float64)) + weight * tensor.double()
            )
    return {name: tensor.float() for name, tensor in total.items()}


def forget(averages: Path, *, after: int) -> None:
    """Remove the averages of steps after `after`, since training repeats those steps."""
    for path in averages.glob("ema-*/step-*.safetensors"):
        if int(path.stem[5:]) > after:
            path.unlink()


def _stored_profiles(averages: Path) -> dict[Path, Profile]:
    """Return the averages in a folder, each with its profile over updates of the weights.

    They are the files ema-WIDTH/step-N.safetensors.
    """
    profiles = {}
    for folder in sorted(averages.glob("ema-*")):
        gamma = PowerEMA(float(folder.name[4:])).gamma
        for path in sorted(folder.glob("step-*.safetensors")):
            profiles[path] = Profile(_updates(path), gamma)
    return profiles


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
