"""The error of a denoiser on images it has not seen, level by level.

Every image is met at every level, with noises that are the same at every call with the same seed,
so that the errors of two models, or of one model at two steps, can be compared image by image. The
levels are spread evenly over the log-SNR range that training covers.

Intervals are over images, never over (image, noise, level): the errors of one image at several
levels are much alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.condition import Condition
from sfumato.diffusion import Denoiser, NoiseLevel, Schedule, weighted_mean
from sfumato.distributed import current
from sfumato.process.signals import poll

FEW_IMAGES = 12  # held out, below which they stand for themselves alone


@dataclass(frozen=True, kw_only=True)
class Triples:
    """Every image, `draws` times at every level, each time with another noise.

    The n = P x bins x draws triples (image, noise, level) are numbered in this order.

    Attributes:
        x0: images (P, C, H, W).
        levels: (n,).
        edges: ends of the ranges of log-SNR, (bins + 1,); the levels of a range lie evenly in it.
        draws: triples of an image in a range.
        seed: of the noises.
        weights: where errors count, (P, 1, H, W); everywhere by default.
    """

    x0: Tensor
    levels: NoiseLevel
    edges: Tensor
    draws: int
    seed: int
    weights: Tensor | None = None

    @property
    def bins(self) -> int:
        """The number of ranges of log-SNR."""
        return len(self.edges) - 1

    def __len__(self) -> int:
        return len(self.x0) * self.bins * self.draws

    @property
    def image(self) -> Tensor:
        """The number of the image of each triple, (n,)."""
        return torch.arange(len(self)) // (self.bins * self.draws)

    def part(self, part: slice) -> tuple[Tensor, Tensor, NoiseLevel]:
        """Return images, noises and levels of some triples."""
        x0 = self.x0[self.image[part].to(self.x0.device)]
        noise = randomness.normal(
            self.seed, "validation/noise", first=part.start, shape=tuple(x0.shape)
        )
        return x0, noise.to(x0), self.levels.at(part)

    def table(self, values: Tensor) -> Tensor:
        """Return the means of values of the triples, (n,), for each image and range, (P, bins)."""
        return values.view(len(self.x0), self.bins, self.draws).mean(2)

    def ranges(self) -> list[dict[str, float]]:
        """Return the ends of the ranges of log-SNR."""
        edges = self.edges.tolist()
        return [{"logsnr_low": low, "logsnr_high": high} for low, high in itertools.pairwise(edges)]

    def mean(self, values: Tensor, part: slice) -> Tensor:
        """Return the mean of each triple's values (m, C, H, W) where errors count, (m,).

        Args:
            part: the triples that the values are of.
        """
        if self.weights is None:
            return values.flatten(1).mean(1)
        return weighted_mean(
            values, self.weights[self.image[part].to(self.weights.device)].to(values)
        )


def make_triples(
    x0: Tensor, schedule: Schedule, *, seed: int, bins: int, draws: int = 1
) -> Triples:
    """Make the triples of images (P, C, H, W).

    The range is the one that 98 % of the training levels cover. Levels are variance-preserving,
    which makes no difference to a denoiser.
    """
    ends = schedule(torch.tensor([0.01, 0.99], dtype=torch.float64)).logsnr()
    edges = torch.linspace(float(ends[1]), float(ends[0]), bins + 1, dtype=torch.float64)
    within = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    logsnr = (edges[:-1, None] + within * (edges[1] - edges[0])).flatten().repeat(len(x0))
    levels = NoiseLevel(torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt())
    return Triples(x0=x0, levels=levels, edges=edges, draws=draws, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Squared and absolute errors of the predicted noise and of x0.

    They are averaged over the elements of an image that count and over its draws, (P, bins).
    """

    eps_square: Tensor
    eps_absolute: Tensor
    x0_square: Tensor
    x0_absolute: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Errors:
        """Return the errors after a change of each of their tables."""
        return Errors(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def by_image(self) -> Tensor:
        """Return the squared error of the noise on each image, averaged over levels, (P,)."""
        return self.eps_square.mean(1)


@torch.no_grad()
def measure(
    denoiser: Denoiser, triples: Triples, condition: Condition, *, batch_size: int
) -> Errors:
    """Run the denoiser on all triples, and return its errors.

    Args:
        condition: of the images, (P, ...); or one of all.
    """
    parts: list[list[Tensor]] = [[], [], [], []]
    world, total = current(), len(triples)
    for part in _parts(world.span(total), batch_size):
        poll()
        x0, noise, level = triples.part(part)
        rows = triples.image[part]
        denoised = denoiser(level.mix(x0, noise), level, condition.map(_rows(rows)))
        for offset, error in enumerate((denoised.eps - noise, denoised.x0 - x0)):
            parts[offset].append(triples.mean(error.double().square(), part).cpu())
            parts[offset + 2].append(triples.mean(error.double().abs(), part).cpu())
    own = torch.stack([torch.cat(part) for part in parts], dim=1)
    eps_square, x0_square, eps_absolute, x0_absolute = (
        triples.table(values) for values in world.join_spans(own, total).unbind(1)
    )
    return Errors(
        eps_square=eps_square,
        eps_absolute=eps_absolute,
        x0_square=x0_square,
        x0_absolute=x0_absolute,
    )


@torch.no_grad()
def predicted_noise(
    denoiser: Denoiser, triples: Triples, condition: Condition, *, batch_size: int
) -> Tensor:
    """Run the denoiser on all triples, and return the predicted noise on the CPU, (n, C, H, W)."""
    predictions = []
    for part in _parts(slice(0, len(triples)), batch_size):
        poll()
        x0, noise, level = triples.part(part)
        rows = triples.image[part]
        denoised = denoiser(level.mix(x0, noise), level, condition.map(_rows(rows)))
        predictions.append(denoised.eps.float().cpu())
    return torch.cat(predictions)


def _parts(span: slice, batch_size: int) -> list[slice]:
    begins = range(span.start, span.stop, batch_size)
    return [slice(begin, min(begin + batch_size, span.stop)) for begin in begins]


def _rows(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that takes rows of a tensor, whatever its device."""
    return lambda tensor: tensor[rows.to(tensor.device)]


def summarize(
    errors: Errors, triples: Triples, mean_guess: Errors, linear: Errors, memory: Errors
) -> dict[str, Any]:
    """Return MSE, RMSE and MAE of the noise and of x0, R^2 and skill, overall and by log-SNR.

    `intervals`, also of each level, has the 95 % intervals over images of those of the noise.

    R^2 = 1 - MSE / MSE of the best guess that knows the mean image and one variance; skill is the
    same beside the best linear denoiser of the training images: above 0, the model has learned
    what no filter knows. All three are measured on the same triples. (Against the mean of eps,
    merely copying the input would score near 1 at high noise.) Both are the same for eps and x0,
    whose errors are proportional.

    Args:
        mean_guess, linear: errors of `LinearDenoiser.of_mean` and `LinearDenoiser.of`.
        memory: errors of `EmpiricalDenoiser`, which only knows the training images; its MSE is
            `memory_mse`, what a model that memorizes comes to.
    """

    def figures(at: Callable[[Tensor], Tensor]) -> dict[str, float]:
        chosen, guess, filtered = errors.each(at), mean_guess.each(at), linear.each(at)
        eps, x0 = float(chosen.eps_square.mean()), float(chosen.x0_square.mean())
        return {
            "eps_mse": eps,
            "eps_rmse": math.sqrt(eps),
            "eps_mae": float(chosen.eps_absolute.mean()),
            "x0_mse": x0,
            "x0_rmse": math.sqrt(x0),
            "x0_mae": float(chosen.x0_absolute.mean()),
            "r2": 1 - eps / float(guess.eps_square.mean()),
            "skill": 1 - eps / float(filtered.eps_square.mean()),
            "memory_mse": float(memory.each(at).eps_square.mean()),
        }

    rows = [
        {
            **ends,
            "n": len(triples.x0),
            **figures(_column(number)),
            "intervals": _intervals(
                *(each.each(_column(number)) for each in (errors, mean_guess, linear))
            ),
        }
        for number, ends in enumerate(triples.ranges())
    ]
    intervals = _intervals(errors, mean_guess, linear)
    overall = figures(lambda table: table)
    return {**overall, "n": len(triples.x0), "intervals": intervals, "bins": rows}


def _intervals(errors: Errors, mean_guess: Errors, linear: Errors) -> dict[str, Any]:
    """Return the 95 % intervals over images of figures, each over the levels of an image."""
    square = mean_interval(errors.by_image())
    return {
        name: estimate.plain()
        for name, estimate in (
            ("eps_mse", square),
            ("eps_rmse", Estimate(*(math.sqrt(max(0.0, value)) for value in square))),
            ("eps_mae", mean_interval(errors.eps_absolute.mean(1))),
            ("r2", score_interval(errors.by_image(), mean_guess.by_image())),
            ("skill", score_interval(errors.by_image(), linear.by_image())),
        )
    }


def _column(number: int) -> Callable[[Tensor], Tensor]:
    return lambda table: table[:, number : number + 1]


class Estimate(NamedTuple):
    """A mean over images with the ends of its interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def read(cls, plain: Mapping[str, float | None]) -> Estimate:
        """Return the estimate that `plain` was made of."""
        mean, low, high = (plain[name] for name in cls._fields)
        return cls(
            math.nan if mean is None else mean,
            -math.inf if low is None else low,
            math.inf if high is None else high,
        )

    def plain(self) -> dict[str, float | None]:
        """Return the values by name; None for those that are not finite, which JSON lacks."""
        return {
            name: value if math.isfinite(value) else None for name, value in self._asdict().items()
        }

    def percent(self) -> str:
        """Format the estimate as +12.3% [+10.1%, +14.5%]."""
        return f"{self.mean:+.1%} [{self.low:+.1%}, {self.high:+.1%}]"


def mean_interval(values: Tensor, *, level: float = 0.95) -> Estimate:
    """Return the mean of values (P,) with Student's interval that covers it with `level`."""
    mean, half = float(values.mean()), math.inf
    if len(values) > 1:
        half = t_quantile(level, len(values) - 1) * float(values.std()) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def score_interval(errors: Tensor, reference: Tensor, *, level: float = 0.95) -> Estimate:
    """Return 1 - mean(errors) / mean(reference) of paired values (P,), with its interval.

    The ratio is linearized about its value: the interval is that of the mean of
    (errors - ratio x reference) / mean(reference).

    Source: Cochran 1977, "Sampling Techniques", sec. 6.3.
    """
    ratio = float(errors.mean() / reference.mean())
    deviations = mean_interval((errors - ratio * reference) / reference.mean(), level=level)
    return Estimate(1 - ratio, 1 - ratio - deviations.high, 1 - ratio - deviations.low)


def t_quantile(level: float, freedom: float) -> float:
    """Return the half-width of the central interval of Student's distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + level) / 2))


def difference(first: Errors, second: Errors, triples: Triples) -> dict[str, Any]:
    """Return the squared noise error of `first` minus that of `second`, overall and by log-SNR.

    Both are measured on the same triples; each figure has its 95 % interval over images. Of fewer
    than `FEW_IMAGES`, which say little about others, the overall interval is over images and
    levels: how sure the difference is on these very images.
    """
    values = first.eps_square - second.eps_square
    overall = values.mean(1) if len(values) >= FEW_IMAGES else values.flatten()
    rows = [
        {**ends, **mean_interval(values[:, number])._asdict()}
        for number, ends in enumerate(triples.ranges())
    ]
    return {**mean_interval(overall)._asdict(), "bins": rows}
