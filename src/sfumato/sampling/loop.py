"""The one sampling loop, and the grid of levels that it walks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.condition import NO_CONDITION, Condition
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.noise_level import Denoised, NoiseLevel
from sfumato.diffusion.schedules import Schedule
from sfumato.errors import ScheduleError
from sfumato.sampling.multistep import HISTORY
from sfumato.sampling.noise import KeyedNoise
from sfumato.sampling.protocol import History, Noise, Sampler
from sfumato.sampling.spacing import Even, Spacing


class StepInfo(NamedTuple):
    """What `on_step` receives after each step.

    Attributes:
        step, steps: how many steps are done, of how many.
        start: the level the step began at.
        level: the level reached.
        before, x: the noisy sample before the step and after it, (B, ...).
        x0: the guess of the clean image that the step began with, (B, ...).
    """

    step: int
    steps: int
    start: NoiseLevel
    level: NoiseLevel
    before: Tensor
    x: Tensor
    x0: Tensor


def grid(
    schedule: Schedule, steps: int, *, strength: float = 1.0, spacing: Spacing = Even()
) -> NoiseLevel:
    """Return the `steps + 1` levels of a trajectory, noisiest first and clean last.

    They are float64 on the host. Some spacings end at a noisy level, or a step earlier.

    Args:
        strength: how much of the way to pure noise it starts at, in (0, 1], and the share of the
            steps that are taken.
        spacing: where on the schedule the levels lie.
    Raises:
        ScheduleError: for fewer than one step, or a strength out of range.
    """
    if steps < 1 or not 0 < strength <= 1:
        raise ScheduleError(
            f"{steps} steps, strength {strength}",
            where="grid",
            hint="take at least 1 step, and a strength above 0, up to 1",
        )
    return spacing.levels(schedule, steps, strength=strength)


def sample(
    sampler: Sampler,
    denoiser: Denoiser,
    x: Tensor,
    levels: NoiseLevel,
    *,
    condition: Condition | None = None,
    noise: Noise | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
) -> Tensor:
    """Walk `x` down the grid of `levels`, step by step.

    A step onto clean data (sigma = 0) is the same for every sampler, x = alpha' x0, and is taken
    here.

    Args:
        x: noisy samples at the first level, (B, ...): for a full trajectory, noise times its sigma.
        levels: NoiseLevel of tensors (steps + 1,) whose log-SNR strictly rises.
        condition: what the denoiser is steered by.
        noise: draws for stochastic samplers; `KeyedNoise(seed=0)` if none is given.
        on_step: called after each step; raise in it to stop.
    Returns:
        The samples at the last level, (B, ...).
    Raises:
        ScheduleError: if the levels are not a descending grid.
    """
    _check_grid(levels)
    levels = NoiseLevel(levels.alpha.detach().cpu(), levels.sigma.detach().cpu())
    condition = NO_CONDITION if condition is None else condition
    noise = KeyedNoise(seed=0) if noise is None else noise
    history: History = deque(maxlen=HISTORY)
    first: list[Denoised] = []

    def denoise(x: Tensor, level: NoiseLevel) -> Denoised:
        denoised = denoiser(x, level, condition)
        if not first:
            first.append(denoised)
        return denoised

    with torch.no_grad():
        for index, (start, stop) in enumerate(levels.steps()):
            first.clear()
            before = x
            if stop.sigma == 0:
                x = stop.alpha * denoise(x, start).x0
            else:
                x = sampler.step(denoise, x, start, stop, history, noise)
            if on_step is not None:
                on_step(
                    StepInfo(index + 1, len(levels.alpha) - 1, start, stop, before, x, first[0].x0)
                )
    return x


def count_evaluations(sampler: Sampler, levels: NoiseLevel) -> int:
    """Return how often a trajectory over `levels` calls its denoiser."""
    count = 0

    def denoiser(x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        nonlocal count
        count += 1
        return Denoised(torch.zeros_like(x), x / level.sigma)

    sample(sampler, denoiser, torch.zeros(1, 1, 1, 1), levels)
    return count


def _check_grid(levels: NoiseLevel) -> None:
    alpha, sigma = levels.alpha, levels.sigma
    if alpha.ndim != 1 or alpha.shape != sigma.shape or len(alpha) < 2:
        raise ScheduleError(
            f"levels of shapes {tuple(alpha.shape)} and {tuple(sigma.shape)} are not a grid",
            where="sample",
            hint="pass a NoiseLevel of two tensors (steps + 1,), e.g. grid(Linear(), 50)",
        )
    if not bool(
        torch.isfinite(alpha).all()
        & torch.isfinite(sigma).all()
        & (alpha >= 0).all()
        & (sigma >= 0).all()
    ):
        raise ScheduleError(
            "levels hold negative or non-finite values",
            where="sample",
            hint="build them with grid(schedule, steps)",
        )
    # alpha' sigma > alpha sigma' is "the log-SNR rises", with infinite ends allowed.
    rising = alpha[1:] * sigma[:-1] > alpha[:-1] * sigma[1:]
    if not bool(rising.all()):
        bad = int(torch.nonzero(~rising)[0])
        raise ScheduleError(
            f"level {bad + 1} is not less noisy than level {bad}",
            where="sample",
            hint="order the levels from noise to data, strictly: schedule(torch.linspace(1, 0, "
            "steps + 1))",
        )
