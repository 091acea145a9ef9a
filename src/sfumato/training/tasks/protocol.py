"""The protocol of a training task: all that the training loop does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sfumato.data import Batch, ShapeGroup
from sfumato.distributed.sharding import by_kind, gradient_norm
from sfumato.nn.accelerable import Accelerable
from sfumato.sampling import StepInfo
from sfumato.training.config import TrainingConfig
from sfumato.training.optimizers import OptimizerConfig
from sfumato.training.parameters import trainable

M = TypeVar("M", bound=nn.Module)


class SampleLosses(NamedTuple):
    """Losses of some samples, and what else is logged of each, by name; all of shape (n,).

    The mean of `per_sample` is minimized.
    """

    per_sample: Tensor
    notes: Mapping[str, Tensor]

    def on_host(self) -> SampleLosses:
        """Return a copy on the CPU."""
        return SampleLosses(
            self.per_sample.cpu(), {name: value.cpu() for name, value in self.notes.items()}
        )


@dataclass
class OptimizedPart:
    """A part of the model that has its own optimizer, clipping and learning rate.

    Attributes:
        name: prefix of its metrics.
        module: the module that holds its parameters.
        optimizers: optimizers of these parameters, each of its own share of them.
        parameters: those that are trained.
    """

    name: str
    module: nn.Module
    config: OptimizerConfig
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.optimizers = self.config.build(self.module)
        self.parameters = trainable(self.module)

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def clip(self) -> Tensor:
        """Scale down a gradient that is too large; return its former norm, still on the device."""
        norm = gradient_norm(self.parameters)
        for parameters in by_kind(self.parameters):
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        return norm

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, updates: int, progress: float) -> None:
        """Update the weights, after `updates` updates, at the fraction `progress` of the budget."""
        rate = self.config.rate(updates, progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            optimizer.step()


class Task(Protocol[M]):
    """A model and what it learns. Only the task knows the class M of the model.

    Attributes:
        model: the untrained model.
        facts: plain data kept in checkpoints, from which the model is rebuilt.
    """

    model: M
    facts: Any

    def optimized_parts(self, model: M) -> list[OptimizedPart]:
        """Return the parts of the model, which together hold each trained parameter once."""
        ...

    def loss(
        self,
        model: M,
        batch: Batch,
        group: ShapeGroup,
        chosen: slice,
        *,
        progress: float,
        dtype: torch.dtype,
    ) -> SampleLosses:
        """Return the losses of the chosen samples of a group of a batch.

        One backward pass through their sum reaches every optimized part. All randomness is keyed by
        the samples' numbers.
        """
        ...

    def log_metrics(self, losses: SampleLosses) -> dict[str, float]:
        """Return the metrics of a step for metrics.jsonl, besides the mean loss."""
        ...

    def validate(self, model: M, average: M) -> dict[str, Any]:
        """Return the errors on held-out images, for metrics.jsonl."""
        ...

    def summary(self, figures: Mapping[str, Any]) -> str:
        """Format the figures of a validation in one line."""
        ...

    def preview(self, average: M, step: int, on_step: Callable[[StepInfo], None]) -> None:
        """Write images that the averaged model makes."""
        ...

    def forward_images(self, config: TrainingConfig) -> tuple[int, int]:
        """Return how many images pass through the model in one `preview` and in one `validate`.

        An image counts once for each forward pass.
        """
        ...

    def compiled_part(self, model: M) -> Accelerable:
        """Return the part that takes most of the time, and that may be compiled."""
        ...
