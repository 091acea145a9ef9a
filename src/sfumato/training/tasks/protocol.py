"""What is trained: all that the training loop does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sfumato.data import Batch, Part
from sfumato.nn.accelerable import Accelerable
from sfumato.sampling import StepInfo
from sfumato.training.config import TrainingConfig
from sfumato.training.optimizers import AdamWConfig
from sfumato.training.parameters import trainable

M = TypeVar("M", bound=nn.Module)


class SampleLosses(NamedTuple):
    """Of some samples: the loss of each, whose mean is minimized, and what else is logged of each,
    by name; shapes (n,).
    """

    per_sample: Tensor
    notes: Mapping[str, Tensor]

    def on_host(self) -> SampleLosses:
        """Copied from the device."""
        return SampleLosses(
            self.per_sample.cpu(), {name: value.cpu() for name, value in self.notes.items()}
        )


@dataclass
class OptimizedPart:
    """A part of the model that has its own optimizer, clipping and learning rate.

    Attributes:
        name: in metrics.
        module: whose parameters it steps.
        optimizers: that share them.
    """

    name: str
    module: nn.Module
    config: AdamWConfig
    optimizers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self.optimizers = self.config.build(self.module)

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def clip(self) -> Tensor:
        """Scale down a gradient that is too large; its norm before, not read from the device
        yet.
        """
        return torch.nn.utils.clip_grad_norm_(trainable(self.module), self.config.max_grad_norm)

    def step(self, updates: int, spent: float) -> None:
        """Update the weights, after `updates` updates and a share `spent` of the budget."""
        rate = self.config.rate(updates, spent)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("share", 1.0)
            optimizer.step()


class Task(Protocol[M]):
    """A model and what it learns. Only the task knows the class M of the model.

    Attributes:
        model: untrained.
        facts: plain data kept in checkpoints, from which the model is built again.
    """

    model: M
    facts: Any

    def learners(self, model: M) -> list[OptimizedPart]:
        """The parts of the model that are stepped; together they hold all its trained parameters,
        each once.
        """
        ...

    def loss(
        self,
        model: M,
        batch: Batch,
        part: Part,
        chosen: slice,
        *,
        spent: float,
        dtype: torch.dtype,
    ) -> SampleLosses:
        """The loss of the chosen samples of a part of a batch; one backward pass through its sum
        reaches every learner.

        All randomness is keyed by the samples' numbers.
        """
        ...

    def record(self, outcome: SampleLosses) -> dict[str, float]:
        """What metrics.jsonl keeps of a step's samples, beside their mean loss."""
        ...

    def validate(self, model: M, average: M) -> dict[str, Any]:
        """Errors on held-out images, for metrics.jsonl."""
        ...

    def summary(self, figures: Mapping[str, Any]) -> str:
        """The same for a person, in a line."""
        ...

    def preview(self, average: M, step: int, on_step: Callable[[StepInfo], None]) -> None:
        """Draw what the averaged model makes."""
        ...

    def passes(self, config: TrainingConfig) -> tuple[int, int]:
        """Images that go forward through the model in one `preview`, each as often as it does, and
        in one `validate`.
        """
        ...

    def compiled_part(self, model: M) -> Accelerable:
        """The part that most of the time goes into, and that may be compiled."""
        ...
