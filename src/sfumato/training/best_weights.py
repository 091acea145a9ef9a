"""The weights of the step that a verdict recommends, kept in the run's folder `best/`."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sfumato.distributed import current
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from sfumato.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What verdict.json says about the weights to use.

    Attributes:
        best_step: step of the weights in `best/`; None without any.
        use_best: whether they are better than those of the last step.
        stop: whether longer training is of no use.
        sentence: the verdict in words.
    """

    best_step: int | None = None
    use_best: bool = False
    stop: bool = False
    sentence: str = ""

    @classmethod
    def read(cls, path: Path) -> Recommendation:
        """Read the verdict of a run; nothing is recommended where there is none."""
        try:
            plain = json.loads(path.read_text())
        except OSError:
            return cls()
        return cls(**{name: plain[name] for name in ("best_step", "use_best", "stop", "sentence")})


def keep_best(trainer: Trainer, directory: RunDirectory, *, also: Collection[int] = ()) -> None:
    """Keep the averaged weights of this step, and remove those kept before.

    Args:
        also: steps whose weights are not removed.
    """
    weights = trainer.state.trained(trainer.state.average)
    current().on_first(lambda: _replace(trainer, directory, weights, also))


def _replace(
    trainer: Trainer, directory: RunDirectory, weights: dict[str, Tensor], also: Collection[int]
) -> None:
    before = {step_of(path): path for path in directory.best.glob("step-*.safetensors")}
    written = checkpoint.save_snapshot(
        directory.best,
        step=trainer.state.counters.step,
        weights=weights,
    )
    for step, path in before.items():
        if path != written and step not in also:
            path.unlink()


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint or a snapshot, step-000000128."""
    return int(path.stem.removeprefix("step-"))
