"""The charts of a run's report: errors and copies over views, errors by noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfumato.reporting.charts import Curve, Mark, Stretch, chart
from sfumato.reporting.run_files import RunFiles
from sfumato.training.denoising_error import mean_interval
from sfumato.training.evidence import Look

BINS = "validation/ema/bins"  # of metrics.jsonl


def run_charts(files: RunFiles) -> dict[str, str]:
    """Return the charts as SVG by name; "" for those that nothing is known of."""
    looks = files.looks
    others = {
        "copies": _copies_chart(looks),
        "distances": _distances_chart(looks),
        "levels": _levels_chart(files),
    }
    if not looks or not looks[-1].held_out:
        return {"errors": "", **others}
    views = [look.views for look in looks]

    def curve(name: str, label: str, values: Sequence[Sequence[float]]) -> Curve:
        estimates = [mean_interval(torch.tensor(each).double()) for each in values]
        return Curve(
            name,
            label,
            views,
            [estimate.mean for estimate in estimates],
            [estimate.low for estimate in estimates],
            [estimate.high for estimate in estimates],
        )

    best = next(look for look in looks if look.step == files.verdicts[-1].best_step)
    ends = [*views[1:], views[-1]]
    errors = chart(
        [
            curve("held-out", "held-out images", [look.held_out for look in looks]),
            curve("seen", "training images", [look.seen for look in looks]),
        ],
        x_label="views of each training image",
        y_label="squared error of the noise",
        log_x=True,
        marks=[Mark(best.views, f"best: step {best.step}")],
        states=[
            Stretch(start, stop, found.state)
            for start, stop, found in zip(views, ends, files.verdicts, strict=True)
        ],
    )
    return {"errors": errors, **others}


def _copies_chart(looks: Sequence[Look]) -> str:
    counted = [(look.views, look.copies) for look in looks if look.copies is not None]
    if len(counted) < 2:
        return ""
    shares = [100 * copies.count / copies.samples for _, copies in counted]
    curve = Curve("copies", "samples that are copies", [views for views, _ in counted], shares)
    return chart([curve], x_label="views of each training image", y_label="%", log_x=True)


def _distances_chart(looks: Sequence[Look]) -> str:
    """Draw the kernel distances of samples to held-out and to training images."""
    names = {"kid_held_out": "held-out", "kid_training": "seen"}
    measured = [look for look in looks if names.keys() <= look.samples.keys()]
    if len(measured) < 2:
        return ""
    labels = {"kid_held_out": "to held-out images", "kid_training": "to training images"}
    curves = [
        Curve(
            name,
            labels[key],
            [look.views for look in measured],
            *([look.samples[key][end] for look in measured] for end in ("value", "low", "high")),
        )
        for key, name in names.items()
    ]
    return chart(
        curves, x_label="views of each training image", y_label="kernel distance (KID)", log_x=True
    )


def _levels_chart(files: RunFiles) -> str:
    """Draw the error by noise level between those of three denoisers that learn nothing."""
    newest = files.newest(BINS)
    if not newest:
        return ""
    bins = newest[BINS]
    xs = [(row["logsnr_low"] + row["logsnr_high"]) / 2 for row in bins]
    errors = [row["eps_mse"] for row in bins]
    known_ends = [row["intervals"]["eps_mse"] for row in bins if "intervals" in row]
    band = (
        [[ends[name] for ends in known_ends] for name in ("low", "high")]
        if len(known_ends) == len(bins) and None not in (e["low"] for e in known_ends)
        else []
    )
    curves = [Curve("held-out", "this model", xs, errors, *band)]
    if "skill" in bins[0]:  # runs of earlier versions compared with another guess
        curves += [
            Curve("linear", "best linear filter", xs, _reference(bins, "skill")),
            Curve("mean", "mean image", xs, _reference(bins, "r2")),
        ]
    if "memory_mse" in bins[0]:
        # where it is far above all others, its exact value says nothing more
        highest = 1.5 * max(max(curve.ys) for curve in curves)
        known = [
            (x, row["memory_mse"])
            for x, row in zip(xs, bins, strict=True)
            if row["memory_mse"] <= highest
        ]
        if known:
            curves.append(
                Curve("memory", "memory of the training images", *zip(*known, strict=True))
            )
    return chart(curves, x_label="log-SNR (left: noise)", y_label="squared error of the noise")


def _reference(bins: Sequence[dict[str, float]], score: str) -> list[float]:
    """Return the errors that a score compares with: score = 1 - error / reference."""
    return [row["eps_mse"] / max(1e-12, 1 - row[score]) for row in bins]
