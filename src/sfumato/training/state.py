"""Everything that changes during training, and nothing else: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.distributed.sharding import gathered, like
from sfumato.errors import CheckpointError
from sfumato.training import guard
from sfumato.training.ema import Pairs, PowerEMA
from sfumato.training.optimizers import load_optimizer_tensors, optimizer_tensors
from sfumato.training.parameters import copy_sharing_frozen, frozen_names, without
from sfumato.training.tasks.protocol import OptimizedPart

LOSS_RATE = 0.1  # of the moving average of losses: about ten steps
# loss, over the least loss of a run, above which its weights may have diverged
DIVERGED_RATIO = 10.0


@dataclass
class Counters:
    """Progress of a run, and what was decided at its start.

    `step` counts the batches drawn, and `updates` those that changed the weights. `watched` is the
    last step at which the hooks were run, `kept` the fraction of the budget at which averages were
    last saved, and `done_s` the second at which each action of the timetable was last run.

    `precision`, and `pass_s`, the seconds of a pass, are determined at the start, so that a run
    continues as it began. `loss` is the moving average of the steps' losses, and `least_loss` the
    smallest value that it has had since the first step. `looks_s` counts the seconds that looks
    took, and `stopped` is the state of the verdict that ended the run, if one did.

    `losses` are the newest values of that moving average. `trouble` is the number of updates at the
    last return to an earlier checkpoint, or when several steps in a row were skipped; -1 if there
    was none. `rollbacks` is how often training went back since it was last settled, and
    `passed_over` the steps whose batches are not trained on, as pairs of the first and the last.

    `micro_batch` is the size to which micro-batches were halved for lack of memory; 0 if they were
    not.
    """

    step: int = 0
    updates: int = 0
    samples_seen: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    watched: int = -1
    kept: float = 0.0
    precision: str = "auto"
    pass_s: float = 0.0
    loss: float = 0.0
    least_loss: float = 0.0
    looks_s: float = 0.0
    stopped: str = ""
    done_s: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    trouble: int = -1
    rollbacks: int = 0
    passed_over: list[list[int]] = field(default_factory=list)
    micro_batch: int = 0

    @property
    def sound(self) -> bool:
        """Whether the last trouble is long past and the loss is not far above its smallest value.

        If not, the weights may have diverged.
        """
        settled = self.trouble < 0 or self.updates - self.trouble >= guard.SETTLED
        usual = self.least_loss <= 0 or self.loss <= DIVERGED_RATIO * self.least_loss
        return settled and usual and not self.skipped_in_a_row

    @property
    def is_passed_over(self) -> bool:
        """Whether the next batch is not trained on."""
        return any(first <= self.step <= last for first, last in self.passed_over)

    def record_skip(self) -> None:
        """Count a step that was not applied."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= guard.SERIOUS:
            self.trouble = self.updates

    def record_rollback(self, before: Counters, first: int, last: int) -> None:
        """Count a return to the checkpoint that these counters are of.

        Args:
            before: the counters until now; the time that was in vain was spent, too.
            first, last: steps that are passed over from now on.
        """
        self.trouble, self.rollbacks = self.updates, before.rollbacks + 1
        self.seconds = max(self.seconds, before.seconds)
        self.passed_over = [*before.passed_over, [first, last]]

    def forget_losses(self) -> None:
        """Forget what losses were usual, since others may be from now on."""
        self.losses, self.least_loss = [], self.loss

    def record_update(self, loss: float) -> None:
        """Count an update, and add the loss of its step to the moving average."""
        self.loss = self.loss + LOSS_RATE * (loss - self.loss) if self.updates else loss
        self.least_loss = min(self.loss, self.least_loss) if self.updates else loss
        self.losses = [*self.losses[1 - guard.HISTORY :], self.loss]
        self.updates += 1
        self.skipped_in_a_row = 0
        if self.updates - self.trouble >= guard.FORGIVEN:
            self.rollbacks = 0


@dataclass
class TrainingState:
    """The model, its averages, its parts with their optimizers, and the counters.

    Frozen parameters are the same tensors in the model and in all averages, and are not written
    into checkpoints.

    Attributes:
        average: the averaged weights that samples are generated with.
        optimized_parts: parts of `model`, each with its own optimizers.
        tracked_averages: averages from which others are reconstructed after training.
        frozen: names of the parameters that are not trained.
    """

    model: nn.Module
    average: nn.Module
    optimized_parts: list[OptimizedPart]
    tracked_averages: dict[PowerEMA, nn.Module] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    frozen: frozenset[str] = frozenset()

    @classmethod
    def new(
        cls,
        model: nn.Module,
        optimized_parts: Callable[[nn.Module], list[OptimizedPart]],
        profiles: Sequence[PowerEMA] = (),
        place: Callable[[nn.Module], None] = lambda module: None,
    ) -> TrainingState:
        """Create the state before the first step.

        Args:
            place: shares the model, or a copy of it, among processes.
        """
        copies = []
        for _ in range(1 + len(profiles)):  # one whole copy at a time
            copies.append(_average(model))
            place(copies[-1])
        average, *tracked = copies
        place(model)
        return cls(
            model=model,
            average=average,
            optimized_parts=optimized_parts(model),
            tracked_averages=dict(zip(profiles, tracked, strict=True)),
            frozen=frozen_names(model),
        )

    @cached_property
    def pairs(self) -> Pairs:
        """The tensors of the average beside the model's."""
        return Pairs(self.average, self.model)

    @cached_property
    def tracked_pairs(self) -> dict[PowerEMA, Pairs]:
        """The tensors of the tracked averages beside the model's."""
        return {
            profile: Pairs(average, self.model)
            for profile, average in self.tracked_averages.items()
        }

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of all parts."""
        return [optimizer for part in self.optimized_parts for optimizer in part.optimizers]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors except frozen parameters, by checkpoint file; of several processes, only
        the first one gets them.
        """
        return {
            "model": self.trained(self.model),
            "ema": self.trained(self.average),
            "optimizer": gathered(optimizer_tensors(self.optimizers, self.model)),
            **{
                average_name(profile): self.trained(module)
                for profile, module in self.tracked_averages.items()
            },
        }

    def trained(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the state dict of the model or of an average, without frozen parameters; of several
        processes, only the first one gets it.
        """
        return gathered(without(module.state_dict(), self.frozen))

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Return the frozen parameters by name."""
        return {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if name in self.frozen
        }

    def restore(self, tensors: dict[str, dict[str, Tensor]], counters: dict[str, Any]) -> None:
        """Load tensors and counters from a checkpoint.

        Raises:
            CheckpointError: if they do not fit the model.
        """
        try:
            self._load(self.model, tensors["model"])
            self._load(self.average, tensors["ema"])
            load_optimizer_tensors(self.optimizers, self.model, tensors.get("optimizer", {}))
            for profile, module in self.tracked_averages.items():
                self._load(module, tensors[average_name(profile)])
            self.counters = Counters(**counters)
        except (RuntimeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"does not fit the model: {' '.join(str(error).split())[:300]}",
                hint="resume with the configuration it was trained with (config.yaml beside it)",
            ) from None

    def _load(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load all that is trained into the model or an average."""
        own = module.state_dict()
        frozen = {name: value for name, value in own.items() if name in self.frozen}
        module.load_state_dict(
            {
                **frozen,
                **{n: like(v, own[n]) if n in own else v for n, v in tensors.items()},
            }
        )


def _average(model: nn.Module) -> nn.Module:
    """Copy a model; the copy is never trained and shares the frozen parameters."""
    return copy_sharing_frozen(model).eval().requires_grad_(False)


def average_name(profile: PowerEMA) -> str:
    """Return the name of an average's files, ema-WIDTH."""
    return f"ema-{profile.sigma_rel:g}"
