"""A training that leaves its course goes back, passes over what it met trouble with, and says so; a
healthy one is left alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sfumato.training import Trainer, guard
from sfumato.training.guard import MAX_ROLLBACKS, SKIPS_IN_A_ROW, has_jumped
from tests.faults.conftest import STEPS, Case
from tests.faults.injector import counters, newest

LONG = ("budget.steps=80", "validation.every_steps=99999", "preview.every_steps=99999")


def poisoned(is_bad: Callable[[int], bool], value: float = math.nan) -> Callable[[], None]:
    """Return a patch that multiplies the losses of some steps."""

    def patch() -> None:
        real = Trainer._backward

        def backward(self: Trainer, batch: Any, dtype: torch.dtype) -> Any:
            losses = real(self, batch, dtype)
            if not is_bad(self.state.counters.step):
                return losses
            return losses._replace(per_sample=losses.per_sample * value)

        Trainer._backward = backward  # type: ignore[method-assign]

    return patch


def incidents(run: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((run / "incidents").glob("*.json"))]


def largest_weights(run: Path) -> list[float]:
    """Return the largest weight of each checkpoint that is kept, infinite if one is not finite."""
    largest = []
    for path in (run / "checkpoints").glob("step-*"):
        if path.name[-1].isdigit():
            tensors = [*load_file(path / "model.safetensors").values()]
            tensors += load_file(path / "ema.safetensors").values()
            finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
            largest.append(max(float(t.abs().max()) for t in tensors) if finite else math.inf)
    return largest


def test_one_step_that_is_not_finite_is_skipped_and_said(pixel: Case) -> None:
    run = pixel.lab.new("nan")
    code, said = pixel.lab.call(
        "train", pixel.recipe, "--run", run, patch=poisoned(lambda step: step == 7)
    )
    assert code == 0, said
    assert (counters(run)["skipped"], counters(run)["updates"]) == (1, STEPS - 1)
    assert "step 7 is skipped: its loss or gradient is not finite; its images: " in said
    assert ".png" in said.partition("its images: ")[2].partition("\n")[0]
    assert incidents(run) == []


def test_a_poisoned_window_is_passed_over(pixel: Case) -> None:
    """Its images are named, the checkpoint from before is used, and a resumed run does the same."""
    window = range(30, 30 + SKIPS_IN_A_ROW)
    patch = poisoned(lambda step: step in window)
    run = pixel.lab.new("window")
    code, said = pixel.lab.call("train", pixel.recipe, "--run", run, *LONG, patch=patch)
    assert code == 0, said
    assert "training goes back to step 28" in said
    (incident,) = incidents(run)
    assert (incident["first_step"], incident["last_step"]) == (30, 49)
    assert [row["step"] for row in incident["steps"]] == list(window)
    assert all(len(row["images"]) == 8 for row in incident["steps"])
    assert all(row["loss"] is None for row in incident["steps"])
    assert incident["weight_norms"]
    state = counters(run)
    assert (state["step"], state["updates"], state["rollbacks"]) == (80, 60, 1)
    assert state["passed_over"] == [[30, 49]]
    assert max(largest_weights(run)) < 1e3
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    recorded = [line["step"] for line in lines if "train/loss" in line]
    assert recorded == sorted(set(recorded))

    other = pixel.lab.new("window-killed")
    child = pixel.lab.start("train", pixel.recipe, "--run", other, *LONG, patch=patch)
    child.until(lambda: (other / "checkpoints").exists() and newest_step(other) >= 60)
    child.kill()
    code, said = pixel.lab.call("resume", other, patch=patch)
    assert code == 0, said
    assert weights(other) == weights(run)


def newest_step(run: Path) -> int:
    found = sorted((run / "checkpoints").glob("step-?????????"))
    return int(found[-1].name[5:]) if found else -1


def weights(run: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(newest(run).glob("*.safetensors"))]


def test_a_training_that_never_recovers_ends_with_what_is_known(pixel: Case) -> None:
    run = pixel.lab.new("forever")
    patch = poisoned(lambda step: step >= 9)
    code, said = pixel.lab.call(
        "train", pixel.recipe, "--run", run, *LONG, "budget.steps=1000", patch=patch
    )
    assert code == 3, said
    assert f"after going back {MAX_ROLLBACKS} times" in said
    assert newest_step(run) == 8
    assert len(incidents(run)) == MAX_ROLLBACKS + 1
    assert max(largest_weights(run)) < 1e3


@pytest.mark.parametrize("rate", ["1e3", pytest.param("1e8", marks=pytest.mark.slow)])
def test_a_rate_that_is_too_high_leaves_good_checkpoints(pixel: Case, rate: str) -> None:
    run = pixel.lab.new("rate")
    code, said = pixel.lab.call(
        "train", pixel.recipe, "--run", run, *LONG, f"optimizer.learning_rate={rate}",
        "optimizer.muon=null", "budget.steps=400",
    )  # fmt: skip
    assert code == 3, said
    assert "lower optimizer.learning_rate" in said
    assert largest_weights(run)
    assert max(largest_weights(run)) < 1e3


def test_an_average_that_is_not_finite_is_never_saved(pixel: Case) -> None:
    """Loss and gradient are finite; only what is saved is not."""

    def patch() -> None:
        real = Trainer.train_step

        def step(self: Trainer, batch: Any) -> Any:
            result = real(self, batch)
            if self.state.counters.step == 22 and not self.state.counters.rollbacks:
                next(iter(self.state.average.parameters())).data.fill_(math.nan)
            return result

        Trainer.train_step = step  # type: ignore[method-assign]

    run = pixel.lab.new("average")
    code, said = pixel.lab.call("train", pixel.recipe, "--run", run, *LONG, patch=patch)
    assert code == 0, said
    assert "has values that are not finite" in said
    assert "training goes back to step 20" in said
    assert max(largest_weights(run)) < 1e3


def averages(losses: np.ndarray) -> list[float]:
    """Return the moving averages of losses, as counters record them."""
    result, value = [], float(losses[0])
    for loss in losses:
        value += 0.1 * (float(loss) - value)
        result.append(value)
    return result


def jumps(losses: np.ndarray) -> list[int]:
    moving = averages(losses)
    return [
        step
        for step in range(1, len(moving))
        if has_jumped(moving[max(0, step + 1 - guard.HISTORY) : step + 1])
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0, 1.5])
def test_a_loss_that_varies_from_batch_to_batch_has_not_jumped(seed: int, spread: float) -> None:
    """Log-normal losses, a batch of one image included, that fall as in a training."""
    noise = np.random.default_rng(seed).lognormal(0.0, spread, 4000)
    fall = 0.03 + np.exp(-np.arange(4000) / 100)
    assert jumps(fall * noise) == []


@pytest.mark.parametrize("height", [1.0, 1e3, 1e30])
def test_a_collapse_is_noticed_within_its_window(height: float) -> None:
    losses = 0.03 * np.random.default_rng(0).lognormal(0.0, 0.2, 1000)
    losses[600:] = height
    assert jumps(losses)[0] - 600 <= guard.WINDOW
    early = np.full(40, height)
    early[:3] = 0.01
    assert jumps(early)[0] <= guard.WINDOW


def test_losses_below_zero_never_jump() -> None:
    assert jumps(np.linspace(-1.0, 50.0, 300)) == []
