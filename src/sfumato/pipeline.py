"""A trained model ready to make pictures: what `sfumato.load` gives."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.conditioners import Joint
from sfumato.diffusion import (
    Angle,
    ClassifierFree,
    Denoiser,
    Flow,
    InputScaleConfig,
    Linear,
    NetworkDenoiser,
    NoiseInputConfig,
    ParameterizationConfig,
    ScheduleConfig,
    UnitVariance,
)
from sfumato.errors import ConfigError, ShapeError
from sfumato.sampling import SAMPLERS, DPMSolverPP2M, KeyedNoise, Progress, SamplerConfig, grid, sample


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """How the network's output and inputs are read.

    Attributes:
        parameterization: what it predicts.
        input_scale: factor on the noisy picture; by default its own standard deviation is divided out.
        noise_input: how it is told the noise level.
    """

    parameterization: ParameterizationConfig = Flow()
    input_scale: InputScaleConfig = UnitVariance(0.5)
    noise_input: NoiseInputConfig = Angle()


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How pictures are made unless the call says otherwise.

    Attributes:
        sampler: the solver.
        schedule: where its grid of levels comes from; need not be the one trained on.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 is off.
    """

    sampler: SamplerConfig = DPMSolverPP2M()
    schedule: ScheduleConfig = Linear()
    steps: int = 25
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not math.isfinite(self.guidance):
            raise ConfigError(
                f"steps = {self.steps}, guidance = {self.guidance}",
                where="sampling",
                mend="at least 1 step, and a finite guidance (1 is off)",
            )


class Model(nn.Module):
    """All that is learned: the network and its conditioner, and how the network is read as a denoiser."""

    network: nn.Module
    conditioner: Joint

    def __init__(self, network: nn.Module, conditioner: Joint, config: DenoiserConfig) -> None:
        super().__init__()
        self.network, self.conditioner, self.config = network, conditioner, config

    def denoiser(self, compute_dtype: torch.dtype = torch.float32) -> NetworkDenoiser:
        """The network as a denoiser, its inside computed in `compute_dtype`."""
        return NetworkDenoiser(
            network=self.network,
            parameterization=self.config.parameterization,
            input_scale=self.config.input_scale,
            noise_input=self.config.noise_input,
            compute_dtype=compute_dtype,
        )


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Makes pictures. Image i of a seed is the same whatever the number or the batch size asked for.

    Attributes:
        model: in evaluation mode, on the device that will run it.
        sampling: defaults of `sample`.
        categories: names that `category` may take; () for an unconditional model.
        image_shape: (C, H, W).
        compute_dtype: precision inside the network; bfloat16 is faster and rounds, so pictures then depend on the batch a little.
    """

    model: Model
    sampling: SamplingConfig
    categories: tuple[str, ...]
    image_shape: tuple[int, int, int]
    compute_dtype: torch.dtype = torch.float32

    def sample(
        self,
        num: int,
        *,
        category: str | int | Sequence[str | int] | None = None,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | SamplerConfig | None = None,
        guidance: float | None = None,
        batch_size: int = 64,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """Generate pictures, (num, C, H, W) in [0, 1].

        Args:
            category: a name for all pictures, or several to cycle through; None leaves the choice to the model.
            seed: picture i depends on (seed, i) only: its noise exactly, its pixels to float rounding.
            steps, sampler, guidance: instead of the model's defaults; samplers by name: see `sfumato.sampling.SAMPLERS`.
            batch_size: pictures made at once; a matter of memory, not of the result.
            on_step: told of each denoising step of each batch.
        Raises:
            ConfigError: for a category or sampler that does not exist.
        """
        if num < 1 or batch_size < 1:
            raise ShapeError(f"{num} pictures in batches of {batch_size}", where="sample", mend="ask for at least 1")
        solver = find_sampler(sampler) if isinstance(sampler, str) else sampler or self.sampling.sampler
        levels = grid(self.sampling.schedule, self.sampling.steps if steps is None else steps)
        labels = self._labels(category, num)
        scale = self.sampling.guidance if guidance is None else guidance
        if not math.isfinite(scale):
            raise ConfigError(f"guidance {scale}", where="sample", mend="use a finite number; 1 is off")
        denoiser = self._guided(scale if category is not None else 1.0)
        device = next(self.model.parameters()).device
        pictures = []
        for first in range(0, num, batch_size):
            count = min(batch_size, num - first)
            noise = KeyedNoise(seed, first)
            x = levels.at(0).sigma * noise(torch.empty(count, *self.image_shape, device=device))
            with torch.no_grad():
                condition = self.model.conditioner({"category": labels[first : first + count].to(device)}, count)
            x = sample(solver, denoiser, x, levels, condition=condition, noise=noise, on_step=on_step)
            pictures.append(to_unit(x).cpu())
        return torch.cat(pictures)

    def _guided(self, scale: float) -> Denoiser:
        denoiser = self.model.denoiser(self.compute_dtype)
        if scale == 1:
            return denoiser
        with torch.no_grad():
            return ClassifierFree(denoiser=denoiser, negative=self.model.conditioner.null(1), scale=scale)

    def _labels(self, category: str | int | Sequence[str | int] | None, num: int) -> Tensor:
        if category is None:
            return torch.full((num,), -1)
        names = [str(category)] if isinstance(category, str | int) else [str(name) for name in category]
        if not names:
            raise ConfigError("an empty list of categories", where="sample", mend="name at least one, or None for none")
        for name in names:
            if name not in self.categories:
                close = difflib.get_close_matches(name, self.categories, n=1)
                listed = ", ".join(self.categories[:20]) or "none: it was trained without categories"
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ConfigError(f"no category {name!r}", where="sample", mend=f"{hint}the model knows {listed}")
        numbers = torch.tensor([self.categories.index(name) for name in names])
        return numbers.repeat(-(-num // len(names)))[:num]


def find_sampler(name: str) -> SamplerConfig:
    """The sampler of that name.

    Raises:
        ConfigError: naming the nearest, if there is none.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    close = difflib.get_close_matches(name, SAMPLERS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"no sampler {name!r}", where="sample", mend=f"{hint}there are {', '.join(SAMPLERS)}")


def to_unit(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped."""
    return ((x + 1) / 2).clamp(0, 1)
