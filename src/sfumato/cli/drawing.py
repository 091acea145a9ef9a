"""Pictures of a trajectory, shared by the verbs that draw one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sfumato.diffusion import NoiseLevel
    from sfumato.sampling import Progress


def evenly(count: int, at_most: int) -> list[int]:
    """Up to `at_most` of range(count), first and last included."""
    if count <= at_most:
        return list(range(count))
    return [round(i * (count - 1) / (at_most - 1)) for i in range(at_most)]


def visible(x: Tensor, level: NoiseLevel) -> Tensor:
    """A noisy picture in [0, 1], brought to the brightness of the data where its level amplifies it."""
    from sfumato.pipeline import to_unit

    size = float((level.alpha**2 + level.sigma**2).sqrt())
    return to_unit(x / max(1.0, size)).cpu()


def trajectory_image(recorded: Sequence[Progress], *, pictures: int, columns: int) -> Image.Image:
    """For each picture a row of noisy states and, under it, the guess of the clean picture made from each; the result last."""
    import torch

    from sfumato.observability.pictures import grid_image
    from sfumato.pipeline import to_unit

    shown = [recorded[i] for i in evenly(len(recorded), columns)]
    result = to_unit(recorded[-1].x).cpu()
    rows, labels = [], []
    for number in range(min(pictures, len(result))):
        rows += [visible(step.before, step.start)[number] for step in shown] + [result[number]]
        rows += [to_unit(step.x0).cpu()[number] for step in shown] + [result[number]]
        labels += ["noisy x", "guess of x0"]
    columns_labels = [f"step {step.step}" for step in shown] + ["result"]
    return grid_image(torch.stack(rows), columns=len(shown) + 1, row_labels=labels, labels=columns_labels)
