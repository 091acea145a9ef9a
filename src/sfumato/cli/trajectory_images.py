"""Images of a trajectory, shared by the commands that draw one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sfumato.diffusion import NoiseLevel
    from sfumato.observability.images import Alpha
    from sfumato.sampling import StepInfo


def evenly(count: int, at_most: int) -> list[int]:
    """Choose up to `at_most` numbers of range(count) evenly, the first and the last included."""
    if count <= at_most:
        return list(range(count))
    return [round(i * (count - 1) / (at_most - 1)) for i in range(at_most)]


def dimmed(x: Tensor, level: NoiseLevel) -> Tensor:
    """Scale a noisy image to what it would be with alpha^2 + sigma^2 = 1, whatever the schedule."""
    return x / float((level.alpha**2 + level.sigma**2).sqrt())


def trajectory_image(
    recorded: Sequence[StepInfo],
    *,
    images: int,
    columns: int,
    decode: Callable[[Tensor], Tensor],
    alpha: Alpha = "straight",
) -> Image.Image:
    """Draw two rows for each image: noisy states, and the guess of the clean image from each.

    The result comes last in both rows.

    Args:
        decode: returns the images of latents.
        alpha: what the last of 2 or 4 channels is.
    """
    import torch

    from sfumato.generation.pipeline import to_unit
    from sfumato.observability.images import grid_image

    shown = [recorded[i] for i in evenly(len(recorded), columns)]
    count = min(images, len(recorded[-1].x))

    def drawn(latents: Tensor) -> Tensor:
        return to_unit(decode(latents[:count])).cpu()

    result = drawn(recorded[-1].x)
    noisy, guesses = (
        [drawn(dimmed(step.before, step.start)) for step in shown],
        [drawn(step.x0) for step in shown],
    )
    rows, labels = [], []
    for number in range(count):
        for states in (noisy, guesses):
            rows += [state[number] for state in states] + [result[number]]
        labels += ["noisy x", "guess of x0"]
    columns_labels = [f"step {step.step}" for step in shown] + ["result"]
    return grid_image(
        torch.stack(rows),
        columns=len(shown) + 1,
        row_labels=labels,
        labels=columns_labels,
        alpha=alpha,
    )
