"""The settings of a training run, apart from the model and the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sfumato.config.bounds import Count, CountOrZero, InnerFraction, NonNegative, Positive, Seed
from sfumato.errors import ConfigError
from sfumato.observability.sinks import SinkName
from sfumato.training.ema import EMAConfig, PowerEMA
from sfumato.training.optimizers import OptimizerConfig

# seconds of training before the first validation and preview, so that both are there within a
# minute
FIRST_EVALUATION_S = 45.0
# Least interval between two runs of an action, over the seconds that its last run took. With 19, an
# action takes at most 1 / (1 + 19) = 5 % of the time.
INTERVAL_PER_COST = 19


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When to stop: the first limit reached ends the run. Minutes count the training loop, previews
    and validation included.

    Attributes:
        steps: optimizer steps.
        samples: training images, repeats included.
        epochs: passes over the training set.
        minutes: minutes of training on this machine.
    """

    steps: Count | None = None
    samples: Count | None = None
    epochs: Positive | None = None
    minutes: Positive | None = None

    def __post_init__(self) -> None:
        limits = (self.steps, self.samples, self.epochs, self.minutes)
        if all(limit is None for limit in limits) or not all(
            limit is None or limit > 0 for limit in limits
        ):
            raise ConfigError(
                f"{self} is not a valid budget",
                where="budget",
                hint="set budget.minutes (or steps, samples, epochs) above 0",
            )

    def progress(self, *, steps: int, samples: int, epochs: float, seconds: float) -> float:
        """Return the fraction of the budget that is used; training stops at 1."""
        pairs = (
            (steps, self.steps),
            (samples, self.samples),
            (epochs, self.epochs),
            (seconds / 60, self.minutes),
        )
        return max(used / limit for used, limit in pairs if limit is not None)

    def steps_of(self, seconds: float, *, batch_size: int, images: int) -> int:
        """Return how many steps of `seconds` each the budget allows on a set of `images` images."""
        per_step = self.progress(
            steps=1, samples=batch_size, epochs=batch_size / images, seconds=seconds
        )
        return math.ceil(1 / per_step - 1e-9)


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """How often an action is run during training, by steps or by time, whichever comes first.

    Attributes:
        every_steps: optimizer steps from one run to the next; None for time alone.
        every_minutes: minutes of training from one run to the next; None for steps alone. It runs
            at most 5 % of the time: waits 19 times its last duration.
    """

    every_steps: Count | None = None
    every_minutes: Positive | None = 5.0

    def due(self, *, step: int, seconds: float, last_s: float, cost_s: float = 0.0) -> bool:
        """Return whether the action is due at `step`, after `seconds` of training.

        Args:
            last_s: the second of training at which it was last run; 0 before the first run.
            cost_s: the seconds that its last run took.
        """
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        return seconds - last_s >= self.wait_s(first=last_s == 0, cost_s=cost_s)

    def wait_s(self, *, first: bool, cost_s: float) -> float:
        """Return the seconds of training between two runs, apart from `every_steps`.

        They are max(60 every_minutes, INTERVAL_PER_COST cost_s), and infinite if `every_minutes` is
        None.
        """
        return (
            math.inf
            if self.every_minutes is None
            else max(60 * self.every_minutes, INTERVAL_PER_COST * cost_s)
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Cadence):
    """Checkpoints are saved at step 0, every `every_minutes` or `every_steps`, on interruption and
    at the end; the newest `keep` are kept.

    Attributes:
        keep: checkpoints that are kept, the newest ones.
        mirror: address that the run is copied to after each checkpoint, such as s3://bucket/run
            or a folder; "" for none.
    """

    keep: Count = 2
    mirror: str = ""


@dataclass(frozen=True, kw_only=True)
class EvaluationCadence(Cadence):
    """A cadence that is first due within a minute of training."""

    def wait_s(self, *, first: bool, cost_s: float) -> float:
        """Return the wait of `Cadence`, but at most FIRST_EVALUATION_S + cost_s the first time.

        `cost_s` is then the duration of the run before the first step.
        """
        wait_s = super().wait_s(first=first, cost_s=cost_s)
        return (
            min(wait_s, FIRST_EVALUATION_S + cost_s)
            if first and self.every_minutes is not None
            else wait_s
        )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(EvaluationCadence):
    """The error on held-out images is measured within the first minute, and every `every_minutes`
    or `every_steps`: each image at every level, with noises that stay the same.

    Attributes:
        samples: triples (image, noise, level) of held-out images, and as many of training images;
            with 500 and 10 ranges, 50 images. Fewer images have several noises at each level.
        bins: equal ranges of log-SNR that the error is reported in.
        copy_samples: images that are sampled at the end to search them for copies of training
            images, and a third as many each time the views double; 0 for none.
    """

    samples: Count = 500
    bins: Count = 10
    copy_samples: CountOrZero = 200


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(EvaluationCadence):
    """A grid of samples from the averaged weights is drawn at step 0, within the first minute, and
    every `every_minutes` or `every_steps`, with the same noise and categories each time.

    Attributes:
        num: images in a preview.
    """

    num: Count = 20


@dataclass(frozen=True, kw_only=True)
class PostHocEMAConfig:
    """Averages that are tracked beside `ema` and stored during training. From them, `sfumato ema
    RUN` reconstructs averages of any width afterwards.

    Attributes:
        widths: of the tracked averages, as `ema.sigma_rel`; [] tracks none. Each takes as much
            memory as the weights.
        num: how often they are saved, evenly over the budget; each time takes as much disk as the
            weights, for each width.

    Source: Karras et al. 2024 (arXiv:2312.02696), sec. 3.1.
    """

    widths: tuple[InnerFraction, ...] = ()
    num: Count = 32

    def __post_init__(self) -> None:
        if self.num < 1 or len(set(self.profiles)) != len(self.widths):
            raise ConfigError(
                f"widths = {self.widths}, num = {self.num}",
                where="post_hoc_ema",
                hint="use different widths and num of at least 1; [0.1, 0.25] is best",
            )

    @property
    def profiles(self) -> list[PowerEMA]:
        """The profiles of the tracked averages, in the order of `widths`."""
        return [PowerEMA(width) for width in self.widths]


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How often metrics are recorded, and where they go.

    Attributes:
        every_steps: steps from one record of metrics to the next.
        sinks: where records go besides metrics.jsonl: `tensorboard`, `wandb`, `trackio`, each an
            extra of the same name.
    """

    every_steps: Count = 10
    sinks: tuple[SinkName, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """When a run is trained, weights, guidance and steps of sampling are compared on held-out
    images.

    Attributes:
        minutes: of the comparison; null is 5 % of the training time, if that suffices, and 0 is off.
    """

    minutes: NonNegative | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train.

    Attributes:
        seed: seed of every random draw.
        batch_size: images for each optimizer step, over all processes and micro-batches.
        micro_batch: images for each forward and backward pass; None is the whole batch. Lowers
            memory, not the result; but what compares
            a batch's images with one another (optimal-transport coupling, contrast, dispersive
            loss) sees those of a pass only.
        precision: precision inside the network; `auto` is bfloat16 where the machine multiplies it
            faster, else float32. `float8` is bfloat16
            with matrix products in eight bits, for transformers on GPUs that have such products
            (Ada, Hopper and later). Weights and
            optimizer are always float32.
        compile: `auto` compiles the network where it pays: on a GPU from ten minutes on, on a CPU
            transformers from 20 minutes on; not
            without a C++ compiler.
        budget: when training ends.
        optimizer: AdamW or Muon, and the learning rate.
        ema: average of the weights that samples are made with.
        post_hoc_ema: averages that are stored for reconstructing others after training.
        log: metrics.
        checkpoint: when checkpoints are saved, and how many are kept.
        validation: when the error on held-out images is measured.
        preview: when preview images are sampled.
        stall_minutes: minutes in which nothing moves, neither a step nor a batch, after which the run
            saves what it can and ends with exit code 75.
        stop: verdict that ends the run before its budget does: `overfitting` (or copying, or
            forgetting), `converged` (or any of these), or `never`.
    """

    seed: Seed = 0
    batch_size: Count = 64
    micro_batch: Count | None = None
    budget: Budget = Budget(minutes=10)
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = PowerEMA()
    post_hoc_ema: PostHocEMAConfig = PostHocEMAConfig()
    precision: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    preview: PreviewConfig = PreviewConfig()
    stall_minutes: Positive = 30.0
    stop: Literal["never", "overfitting", "converged"] = "never"

    @property
    def effective_micro_batch(self) -> int:
        """Images in one pass through the network, in training and in validation: `micro_batch`, or
        else `batch_size`.
        """
        return self.batch_size if self.micro_batch is None else self.micro_batch

    def __post_init__(self) -> None:
        cadences = {
            "checkpoint": self.checkpoint,
            "validation": self.validation,
            "preview": self.preview,
        }
        counts = {
            "batch_size": self.batch_size,
            "micro_batch": self.effective_micro_batch,
            "log.every_steps": self.log.every_steps,
            "checkpoint.keep": self.checkpoint.keep,
            "validation.samples": self.validation.samples,
            "validation.bins": self.validation.bins,
            "preview.num": self.preview.num,
            **{
                f"{name}.every_steps": cadence.every_steps
                for name, cadence in cadences.items()
                if cadence.every_steps is not None
            },
        }
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"{name} = {count}", where="configuration", hint="use 1 or more")
        for name, cadence in cadences.items():
            minutes = cadence.every_minutes
            if minutes is not None and not (0 < minutes < math.inf):
                raise ConfigError(
                    f"{name}.every_minutes = {minutes}",
                    where="configuration",
                    hint="use a number above 0, or null for steps alone",
                )
