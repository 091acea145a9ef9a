"""Adherence: whether samples follow their condition.

Every metric is computed three times: for samples and their own condition; for the same samples and
another sample's condition (the shuffled baseline, which a model that ignores its condition gets);
and for the real images that the conditions belong to (the upper bound). Conditions come from
held-out images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.contexts import CONTEXTS, Metric, MetricInputs
from sfumato.contexts.adherence_metrics import silhouette_iou
from sfumato.data import Dataset, to_float
from sfumato.data.choice import choose_evenly
from sfumato.evaluation.classifier import Classifier
from sfumato.evaluation.figures import Estimate
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest
from sfumato.observability.tables import format_table

FEWEST, MAX_SAMPLES = 2, 500  # of each context


@dataclass(frozen=True, kw_only=True)
class Adherence:
    """One metric of one context.

    Attributes:
        context: name of the only context of the condition; "all" for all contexts together.
        figure: name of the metric; `better` is `higher` or `lower`.
        n: samples for which there is a value.
        own, shuffled, real: estimates for samples with their own and with shuffled conditions, and
            for real images; see the module.
        difference: own less shuffled, of the same samples.
    """

    context: str
    figure: str
    better: str
    n: int
    own: Estimate
    shuffled: Estimate
    real: Estimate
    difference: Estimate

    @property
    def works(self) -> bool:
        """Whether samples follow their condition: own is surely better than shuffled."""
        if self.better == "higher":
            return self.difference.low > 0
        return self.difference.high < 0

    def plain(self) -> dict[str, Any]:
        """Return the row as plain data."""
        reference = f"conditions of {self.real.n} held-out images"
        figures = {
            name: getattr(self, name).figure(f"{self.figure}, {words}", reference)
            for name, words in (
                ("own", "own condition"),
                ("shuffled", "shuffled conditions"),
                ("real", "real images"),
                ("difference", "own less shuffled"),
            )
        }
        return {
            "context": self.context,
            "figure": self.figure,
            "better": self.better,
            "n": self.n,
            "follows": self.works,
            **{name: None if each is None else each.plain() for name, each in figures.items()},
        }


def measure_adherence(
    pipeline: Pipeline,
    dataset: Dataset,
    *,
    classifier: Classifier | None,
    num: int = 200,
    seed: int = 1,
    guidance: float | None = None,
    on_samples: Callable[[str, Mapping[str, Any], Tensor, Tensor], object] | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> list[Adherence]:
    """Measure each context that the model reads, then all together, on held-out conditions.

    Args:
        num: samples of each context, at most MAX_SAMPLES.
        on_samples: called with each context's name, the condition, the samples and the real images
            (n, C, H, W) in [-1, 1].
        on_progress: called with the fraction that is done, and a description of the current part.
    Returns:
        The figures; nothing if fewer than two images are held out.
    """
    report = on_progress or (lambda fraction, text: None)
    positions = choose_evenly(dataset.with_common_shape(dataset.holdout), min(num, MAX_SAMPLES))
    if len(positions) < FEWEST:
        return []
    pixels, _, positions = dataset.images(positions)
    real = to_float(pixels)
    context = pipeline.model.conditioner.training_context(
        real, dataset.context(positions), seed=seed, first=0
    )
    reads = [name for name in pipeline.reads if name in context]
    conditions = {name: [name] for name in reads}
    if len(reads) > 1:
        conditions["all"] = reads
    rows = []
    for number, (name, together) in enumerate(conditions.items()):
        part = {read: context[read] for read in together}
        report(number / len(conditions), f"{len(real)} samples by {name}")
        request = ResolvedRequest.of(part, pipeline.image_shape, len(real))
        samples = pipeline.sample_request(request, seed=seed, guidance=guidance) * 2 - 1
        if on_samples is not None:
            on_samples(name, part, samples, real)
        for figure, (better, metric) in _metrics(
            together, context, real, pipeline, classifier
        ).items():
            rows.append(_adherence(name, figure, better, metric, samples, real))
    return rows


def _adherence(
    context: str, figure: str, better: str, metric: Metric, samples: Tensor, real: Tensor
) -> Adherence:
    own = torch.arange(len(samples))
    others = (own + len(own) // 2) % len(own)
    by_own, by_others = metric(samples, own).double(), metric(samples, others).double()
    most = 1.0 if better == "higher" else math.inf  # ranks, accuracies, F1, IoU; or distances
    estimate = Estimate.of(by_own).bounded(most)
    return Adherence(
        context=context,
        figure=figure,
        better=better,
        n=estimate.n,
        own=estimate,
        shuffled=Estimate.of(by_others).bounded(most),
        real=Estimate.of(metric(real, own)).bounded(most),
        difference=Estimate.of_mean(by_own - by_others),
    )


def _metrics(
    names: Sequence[str],
    context: Mapping[str, Any],
    real: Tensor,
    pipeline: Pipeline,
    classifier: Classifier | None,
) -> dict[str, tuple[str, Metric]]:
    """Return the metrics of some contexts together, each with the direction that is better."""
    metrics: dict[str, tuple[str, Metric]] = {
        "rank of its own image": ("higher", lambda x, i: retrieval_rank(x, real, i))
    }
    if len(names) > 1:
        metrics["IoU of silhouettes"] = ("higher", lambda x, i: silhouette_iou(x, real[i]))
    for name in names:
        inputs = MetricInputs(
            values=context[name], real=real, conditioner=pipeline.model.conditioner.parts[name],
            classify=None if classifier is None else lambda x: classifier.predict(x)[0],
        )  # fmt: skip
        metrics |= CONTEXTS[name].metrics(inputs)
    return metrics


def retrieval_rank(images: Tensor, real: Tensor, own: Tensor) -> Tensor:
    """Return the fraction of other real images that are farther from each image than its own, (n,).

    `own` is the index of the real image that belongs to each; 1 is best, 1/2 is chance. Images are
    compared by the L2 distance between their averages to 8 x 8, which depends on colours and masses
    but not on small shifts.
    """
    small, others = (
        F.adaptive_avg_pool2d(x, min(8, x.shape[-1])).flatten(1) for x in (images, real)
    )
    distances = torch.cdist(small, others)
    own_distances = distances.gather(1, own[:, None])
    farther = (distances > own_distances).sum(1) + 0.5 * ((distances == own_distances).sum(1) - 1)
    return farther.double() / max(1, len(real) - 1)


def adherence_table(rows: list[Adherence]) -> str:
    """Format adherence as a table."""
    head = ("context", "metric", "n", "samples", "shuffled conditions", "real images", "follows")
    return format_table(
        [
            head,
            *(
                (
                    row.context,
                    f"{row.figure} ({row.better} is better)",
                    str(row.n),
                    str(row.own),
                    str(row.shuffled),
                    str(row.real),
                    "yes" if row.works else "no",
                )
                for row in rows
            ),
        ]
    )
