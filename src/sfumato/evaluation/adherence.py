"""Does the condition work? Figures of samples against what was asked for, beside the same figures for what others were asked for.

Every figure is taken three times: for samples and their own condition, for the same samples and another sample's condition
(the shuffled baseline: what a model that ignores its condition would get), and for the real pictures that the conditions belong
to (the ceiling). Conditions come from held-out pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sfumato.conditioners import ImageConditioner
from sfumato.conditioners.doodle import lines
from sfumato.data import Dataset, to_float
from sfumato.evaluation.classifier import Classifier
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import Request
from sfumato.observability.tables import aligned

LARGEST = 500  # samples of each context
INK = 0.25  # above which a pixel of a drawing counts as drawn
FIELD_DRAWS = 51  # uniform draws that `lines` takes for each picture


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    z = 1.96
    centre = (successes + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(successes * (1 - successes) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A mean with its 95 % interval: normal, or of a proportion (Wilson's)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Figure:
        """Of one value for each sample; values that are all 0 or 1 are a proportion."""
        known = values[~values.isnan()].double()
        if len(known) and bool(((known == 0) | (known == 1)).all()):
            low, high = wilson(float(known.mean()), len(known))
            return cls(mean=float(known.mean()), low=low, high=high)
        mean = float(known.mean()) if len(known) else math.nan
        half = 1.96 * float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else math.inf
        return cls(mean=mean, low=mean - half, high=mean + half)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Adherence:
    """One figure of one context.

    Attributes:
        context: that alone was asked for; "all" for all that the model reads together.
        figure: what was measured; `better` says whether higher or lower is.
        own, shuffled, real: see the module.
        works: whether samples follow their condition: the intervals of own and shuffled do not overlap.
    """

    context: str
    figure: str
    better: str
    n: int
    own: Figure
    shuffled: Figure
    real: Figure

    @property
    def works(self) -> bool:
        """Whether the intervals stand apart on the right side."""
        if self.better == "higher":
            return self.own.low > self.shuffled.high
        return self.own.high < self.shuffled.low


Metric = Callable[
    [Tensor, Tensor], Tensor
]  # pictures (n, C, H, W) and which condition each is held against (n,) -> values (n,)


def measure_adherence(
    pipeline: Pipeline,
    dataset: Dataset,
    *,
    classifier: Classifier | None,
    num: int = 200,
    seed: int = 1,
    guidance: float | None = None,
    keep: Callable[[str, Mapping[str, Any], Tensor, Tensor], object] | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> list[Adherence]:
    """Figures of each context that the model reads, on conditions of held-out pictures; each alone, then all together.

    Args:
        keep: handed each context's name, what was asked for, the samples and the real pictures (n, C, H, W) in [-1, 1].
    """
    tell = on_progress or (lambda fraction, text: None)
    positions = spread(dataset.usual(dataset.holdout), min(num, LARGEST))
    pixels, _, positions = dataset.images(positions)
    real = to_float(pixels)
    context = pipeline.model.conditioner.derive(real, dataset.context(positions), seed=seed, first=0)
    reads = [name for name in pipeline.reads if name in context]
    asked = {name: {name: context[name]} for name in reads}
    if len(reads) > 1:
        asked["all"] = {name: context[name] for name in reads}
    rows = []
    for number, (name, part) in enumerate(asked.items()):
        tell(number / len(asked), f"{len(real)} samples by {name}")
        request = Request.of(part, pipeline.image_shape, len(real))
        samples = pipeline.sample(len(real), request=request, seed=seed, guidance=guidance) * 2 - 1
        if keep is not None:
            keep(name, part, samples, real)
        for figure, (better, metric) in _metrics(name, context, real, pipeline, classifier).items():
            rows.append(_row(name, figure, better, metric, samples, real))
    return rows


def spread(positions: NDArray[np.int64], num: int) -> NDArray[np.int64]:
    """At most `num` of the positions, evenly chosen."""
    return positions[np.linspace(0, len(positions) - 1, min(num, len(positions))).round().astype(np.int64)]


def _row(context: str, figure: str, better: str, metric: Metric, samples: Tensor, real: Tensor) -> Adherence:
    own = torch.arange(len(samples))
    others = (own + len(own) // 2) % len(own)
    return Adherence(
        context=context, figure=figure, better=better, n=len(samples),
        own=Figure.of(metric(samples, own)), shuffled=Figure.of(metric(samples, others)), real=Figure.of(metric(real, own)),
    )  # fmt: skip


def _metrics(
    name: str, context: Mapping[str, Any], real: Tensor, pipeline: Pipeline, classifier: Classifier | None
) -> dict[str, tuple[str, Metric]]:
    """What can be measured of a context, with the direction that is better."""
    image = dict(pipeline.model.conditioner.parts.items()).get("image")
    found: dict[str, tuple[str, Metric]] = {"rank of its own picture": ("higher", lambda x, i: own_rank(x, real, i))}
    if name in ("category", "all") and "category" in context and classifier is not None:
        labels = context["category"]
        found["read as its category"] = ("higher", lambda x, i: (classifier.read(x)[0] == labels[i]).double())
    if name in ("doodle", "all") and "doodle" in context:
        ink = (1 - context["doodle"]) / 2
        found["F1 of lines"] = ("higher", lambda x, i: line_f1(x, ink[i]))
    if name in ("points", "all") and "points" in context:
        found["chamfer distance, pixels"] = ("lower", lambda x, i: chamfer(x, context["points"][i]))
    if name in ("doodle", "points", "all"):
        found["IoU of silhouettes"] = ("higher", lambda x, i: silhouette_iou(x, real[i]))
    if name in ("image", "all") and isinstance(image, ImageConditioner):
        lost = image.config.lost
        found["error where it is known"] = ("lower", lambda x, i: _known_error(lost.given(x), context["image"][i]))
    return found


def own_rank(pictures: Tensor, real: Tensor, own: Tensor) -> Tensor:
    """Of each picture (n): share of the other real pictures that are less like it than the one numbered `own`; 1 best, 1/2 chance.

    Alike: by the distance between pictures averaged to 8 x 8, in which colours and masses count and small shifts do not.
    """
    small, others = (F.adaptive_avg_pool2d(x, min(8, x.shape[-1])).flatten(1) for x in (pictures, real))
    distances = torch.cdist(small, others)
    mine = distances.gather(1, own[:, None])
    farther = (distances > mine).sum(1) + 0.5 * ((distances == mine).sum(1) - 1)
    return farther.double() / max(1, len(real) - 1)


def drawn(pictures: Tensor) -> Tensor:
    """Where a picture's lines are, (n, 1, H, W) bool: the line drawing that doodles are made with, nothing bent and nothing dropped."""
    draws = torch.full((len(pictures), FIELD_DRAWS), 0.5, dtype=pictures.dtype)
    return (1 - lines(pictures, draws, wobble=0.0, dropped=0.0)) / 2 > INK


def line_f1(pictures: Tensor, ink: Tensor) -> Tensor:
    """F1 of a picture's lines against a drawing's, one pixel of slack: harmonic mean of the shares of each that lie on the other."""
    mine, asked = drawn(pictures), ink.nan_to_num(0.0) > INK

    def share(of: Tensor, on: Tensor) -> Tensor:
        near = F.max_pool2d(on.float(), 3, stride=1, padding=1) > 0
        return (of & near).flatten(1).sum(1) / of.flatten(1).sum(1).clamp(min=1)

    precision, recall = share(mine, asked), share(asked, mine)
    return (2 * precision * recall / (precision + recall).clamp(min=1e-9)).double()


def chamfer(pictures: Tensor, points: Tensor) -> Tensor:
    """Mean distance in pixels from points (n, N, D) to the nearest line of a picture and back; its side if it has no lines."""
    height, width = pictures.shape[-2:]
    scale = points.new_tensor([width / 2, -height / 2])
    values = []
    for lined, cloud in zip(drawn(pictures)[:, 0], points, strict=True):
        at = torch.nonzero(lined).flip(1).float() + 0.5
        wanted = cloud[~cloud.isnan().any(1)][:, :2] * scale + points.new_tensor([width / 2, height / 2])
        if not len(wanted):
            values.append(math.nan)
        elif not len(at):
            values.append(float(max(height, width)))
        else:
            away = torch.cdist(wanted, at)
            values.append(float(away.amin(0).mean() + away.amin(1).mean()) / 2)
    return torch.tensor(values, dtype=torch.float64)


def silhouette(pictures: Tensor) -> Tensor:
    """What is not background, (n, H, W) bool: pixels unlike the picture's corners."""
    corners = torch.stack([pictures[..., y, x] for y in (0, -1) for x in (0, -1)]).median(0).values
    return (pictures - corners[..., None, None]).abs().amax(1) > 0.25


def silhouette_iou(pictures: Tensor, real: Tensor) -> Tensor:
    """Overlap of the silhouettes over their union."""
    mine, theirs = silhouette(pictures), silhouette(real)
    union = (mine | theirs).flatten(1).sum(1)
    return ((mine & theirs).flatten(1).sum(1) / union.clamp(min=1)).double()


def _known_error(pictures: Tensor, shown: Tensor) -> Tensor:
    return (pictures - shown).abs().flatten(1).nanmean(1).double()


def adherence_table(rows: list[Adherence]) -> str:
    """The figures for a person."""
    head = ("context", "figure", "n", "samples", "shuffled conditions", "real pictures", "follows")
    return aligned([head, *(
        (r.context, f"{r.figure} ({r.better} is better)", str(r.n), str(r.own), str(r.shuffled), str(r.real), "yes" if r.works else "no")
        for r in rows
    )])  # fmt: skip
