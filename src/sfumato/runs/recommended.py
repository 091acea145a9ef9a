"""What is used of a run unless a call says otherwise: the weights that the verdict names, and the
setting of sampling that a sweep recommends.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from sfumato.evaluation.sweep_result import Setting, SweepAdvice
from sfumato.generation.diffusion_model import SamplingConfig
from sfumato.observability.progress import console
from sfumato.recipes.resolver import resolve
from sfumato.runs.weights import Weights
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.best_weights import Recommendation, step_of


def own_setting(directory: RunDirectory, sampling: SamplingConfig) -> Setting:
    """Return the setting of a run before any sweep."""
    return Setting(
        weights=verdict_weights(directory), guidance=sampling.guidance, steps=sampling.steps
    )


def verdict_weights(directory: RunDirectory) -> Literal["best", "ema"]:
    """Return the weights that the verdict of a run names."""
    return "best" if Recommendation.read(directory.verdict).use_best else "ema"


def own_step(directory: RunDirectory) -> int:
    """Return the step of these weights; 0 without a checkpoint."""
    advice = Recommendation.read(directory.verdict)
    if advice.use_best and advice.best_step is not None:
        return advice.best_step
    return max(map(step_of, checkpoint.paths(directory.checkpoints)), default=0)


def resolved_weights(path: Path, weights: str) -> str:
    """Return the name of the weights that "auto" stands for in a run or a model's folder."""
    directory = RunDirectory(path)
    if weights != "auto":
        return weights
    advice = SweepAdvice.read(directory.sweep)
    if advice is not None and _fits(advice, directory, resolve(path).sampling):
        return str(advice.recommended.weights)
    return verdict_weights(directory)


def recommended(
    directory: RunDirectory, sampling: SamplingConfig, weights: Weights
) -> tuple[Weights, SamplingConfig]:
    """Return weights and defaults of sampling with what a sweep recommends; what changes is printed.

    Nothing changes for weights other than those that the sweep recommends: guidance and steps were
    chosen for these. A sweep of other weights, such as those before training went on, is not used.
    """
    advice = SweepAdvice.read(directory.sweep)
    if advice is None or weights not in ("auto", advice.recommended.weights):
        return weights, sampling
    if not _fits(advice, directory, sampling):
        console().print(
            f"the recommendation in {directory.sweep} is not used: it is of other weights or "
            f"settings; `sfumato sweep {directory.path}` compares again",
            markup=False,
        )
        return weights, sampling
    console().print(
        f"by default {advice.recommended.instead_of(advice.own)} (sfumato sweep: {advice.reason})",
        markup=False,
    )
    chosen = advice.recommended
    used: Weights = chosen.weights if isinstance(chosen.weights, float) else weights
    return used, replace(sampling, guidance=chosen.guidance, steps=chosen.steps)


def _fits(advice: SweepAdvice, directory: RunDirectory, sampling: SamplingConfig) -> bool:
    """Return whether a sweep compared the run's present weights and its own setting."""
    return advice.own == own_setting(directory, sampling) and advice.step == own_step(directory)
