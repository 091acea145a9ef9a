"""A loss weighting and a noise schedule of your own, each a dataclass of a few lines.

    python examples/own_weighting_and_schedule.py

Both become choices in configurations: in the run's config.yaml they are `objective.weighting.kind:
middle` and `objective.schedule.kind: power`, with their fields beside them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import sfumato
from sfumato.config.bounds import Positive
from sfumato.diffusion import NoiseLevel, Objective, Parameterization, Schedule, Weighting
from sfumato.networks import UNetConfig
from sfumato.training import Budget, PreviewConfig, ValidationConfig


@dataclass(frozen=True, kw_only=True)
class Middle(Weighting):
    """Errors count most where image and noise are about as strong: w = exp(-(log-SNR / width)^2).

    w weighs the error of the noise, whatever the network predicts. Alpha^2 w is returned: it is
    finite at both ends, where the log-SNR is not.
    """

    width: Positive = 4.0  # bounds are checked when a configuration is read

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Tensor:
        return level.alpha**2 * torch.exp(-((level.logsnr() / self.width) ** 2))


@dataclass(frozen=True, kw_only=True)
class Power(Schedule):
    """alpha = 1 - t^power, sigma = t^power: with a power above 1, more times have little noise.

    Training draws uniform times t, and samplers walk an even grid of them: a schedule is also the
    density of noise levels in training, and the spacing of the steps in sampling.
    """

    power: Positive = 1.5

    def __call__(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel(1 - t**self.power, t**self.power)


digits = sfumato.recipe("digits")
run = replace(
    digits,
    name="own-schedule",
    network=UNetConfig(channels=16, multipliers=(1,), blocks=1, attention_depths=()),
    objective=Objective(schedule=Power(), weighting=Middle(width=5.0)),
    sampling=replace(digits.sampling, schedule=Power(power=2.0)),  # need not be that of training
    batch_size=16,
    budget=Budget(steps=30),
    preview=PreviewConfig(num=4),
    validation=ValidationConfig(samples=20),
)
path = sfumato.train(run)  # runs/own-schedule
sfumato.resume(path, overrides=["budget.steps=60"])

pipeline = sfumato.load(path)
levels = []
images = pipeline.sample(10, steps=5, on_step=lambda info: levels.append(float(info.start.sigma)))
print(f"{len(images)} samples; sigma at each step: {', '.join(f'{level:.2f}' for level in levels)}")

# Overrides reach the fields, here and on the command line.
changed = sfumato.resolve(path, ["objective.weighting.width=3", "objective.schedule.power=1"])
print(f"changed: {changed.objective.weighting}, {changed.objective.schedule}")
