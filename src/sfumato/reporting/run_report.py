"""The report of a run: report.html, from the run's files alone."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from sfumato.errors import RunError
from sfumato.evaluation.figures import wilson
from sfumato.observability.progress import duration
from sfumato.reporting.half_run import FILE as HALF_RUN
from sfumato.reporting.page_images import evaluation_images, image_url, sample_sheets
from sfumato.reporting.run_charts import run_charts
from sfumato.reporting.run_files import RunFiles
from sfumato.reporting.sweep_table import sweep_rows, sweep_tables
from sfumato.storage.atomic import write_text
from sfumato.training.denoising_error import Estimate
from sfumato.training.enough import after_training
from sfumato.training.evidence import Copies, Look
from sfumato.training.stopping import StoppingVerdict

TEMPLATE = Path(__file__).with_name("report.html")
EVALUATED = "evaluation"
EVALUATION = f"{EVALUATED}/evaluation.json"
# what each state means, in a word or two and in a sentence for the head of the page
HEADLINES = {
    "too early": "Too early to say",
    "cannot tell": "Too few held-out images to say",
    "learning": "Still learning: train on",
    "leans": "Begins to memorize: stop soon",
    "overfitting": "Stop: it overfits",
    "copying": "Stop: it copies its training images",
    "forgetting": "Stop: it forgets what its base knew",
    "converged": "Stop: nothing more is learned",
}


@dataclass(frozen=True)
class Answer:
    """A question that the report answers.

    Attributes:
        text: the answer, with its figure.
        basis: how that is known.
    """

    question: str
    text: str
    basis: str


def write_report(path: Path, out: Path | None = None) -> Path:
    """Write the report of a run to RUN/report.html, or to another file, and return its path.

    Raises:
        RunError: if this is not a run, or the file cannot be written.
    """
    target = out or path / "report.html"
    page = report_page(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, page)
    except OSError as error:
        raise RunError(
            f"cannot be written: {error}", where=str(target), hint="name another file with --out"
        ) from None
    return target


def report_page(path: Path) -> str:
    """Return the report of a run as HTML."""
    files = RunFiles(path)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    script = TEMPLATE.with_suffix(".js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = files.verdicts[-1] if files.verdicts else None
    return template.render(
        name=path.resolve().name,
        state=found.state if found else "none",
        headline=HEADLINES[found.state] if found else "No verdict",
        answers=_answers(files, found),
        sheets=sample_sheets(files),
        real=image_url(files.directory.samples / "real.png"),
        charts=run_charts(files),
        pairs=evaluation_images(files, EVALUATED),
        data=files.json("data.json"),
        facts=_facts(files),
        sweep=files.json(files.directory.sweep.name),
        sweep_tables=sweep_tables(files.json(files.directory.sweep.name)),
        figures=_figures(files),
        environment=files.json("environment.json"),
        script=script,
        digest=digest,
    )


def _answers(files: RunFiles, found: StoppingVerdict | None) -> list[Answer]:
    if found is None:
        return []
    held_out, seen = found.n
    copies = found.copies
    newest, evaluation = files.newest("validation/ema/skill"), files.json(EVALUATION)
    answers = [
        Answer(
            "When do I stop?",
            found.sentence,
            f"the errors of the averaged model on {held_out} held-out and {seen} training images, "
            f"each at several noise levels, at {len(files.looks)} steps; intervals of 98 % over "
            + ("images" if found.base is None else "images, ratios beside those of the base"),
        ),
        _what_next(files, found),
        *_beside_base(found),
        Answer(
            "Does it copy?",
            "not searched yet" if copies is None else _copies_text(files.looks, copies),
            "samples are searched for copies each time the views double, from 8 on, and at the end, "
            "as far as time allows; each sample and its mirror image is compared with all training "
            "images, and so are held-out and other training images",
        ),
    ]
    if newest:
        skill, r2 = newest["validation/ema/skill"], newest["validation/ema/r2"]
        answers.append(
            Answer(
                "Is it good?",
                f"at step {newest['step']} its error of the noise is {1 - skill:.2f} times that of the "
                "best linear filter" + ("" if skill > 0 else ", so that the filter is better"),
                f"squared error on held-out images beside the best linear denoiser of the training "
                f"images, on the same noisy images (R² {r2:.3f} beside the mean image); `sfumato "
                "evaluate` compares samples with real images",
            )
        )
    answers += _enough_images(files, found)
    answers += [
        Answer("What does the evaluation say?", text.rstrip("."), _evaluated(evaluation))
        for text in evaluation.get("sentences", ())
    ]
    return answers


def _beside_base(found: StoppingVerdict) -> list[Answer]:
    """Return what a fine-tuning gained and lost, at the step to use."""
    figures = [] if found.best_base is None else found.best_base.figures()
    if not figures:
        return []
    return [
        Answer(
            "Is it better than its base?",
            f"at step {found.best_step}: {'; '.join(figures)}",
            "squared errors of the noise on held-out new images, and the change of the predicted "
            "noise on images that the base makes, both over the error of the base",
        )
    ]


def _copies_text(looks: Sequence[Look], copies: Copies) -> str:
    """Return what the newest search for copies found, and at which step."""
    look = next(look for look in reversed(looks) if look.copies is copies)
    _, high = wilson(copies.count / copies.samples, copies.samples)
    return (
        f"at step {look.step}, {copies.count} of {copies.samples} samples were near-duplicates of "
        f"training images (at most {high:.0%} of all samples, 95 %); of real images, "
        f"{copies.real_count} of {copies.real}{_distances_text(look.samples)}"
    )


def _distances_text(samples: Mapping[str, Any]) -> str:
    """Return whether samples are nearer to the training images than images that were not learned."""
    test = samples.get("distance_test")
    if test is None:
        return ""
    if test["high"] < 0:
        place = "nearer to training images than"
    elif test["low"] > 0:
        place = "farther from training images than"
    else:
        place = "as far from training images as"
    return f"; samples are {place} unseen images are (C_T {test['value']:+.1f}, usually -2 to 2)"


def _what_next(files: RunFiles, found: StoppingVerdict) -> Answer:
    """Return which command to run now."""
    run = files.directory.path.name
    if found.harmful:
        text = f"use step {found.best_step}: sfumato sample {run} takes its weights from best/"
    elif found.stop:
        text = f"make images: sfumato sample {run}"
    else:
        text = f"train for as long again: sfumato resume {run} budget.steps={2 * found.step}"
    return Answer("What next?", text, "the verdict above")


def _enough_images(files: RunFiles, found: StoppingVerdict) -> list[Answer]:
    """Return whether the images were enough, and whether more would help, if that was measured."""
    images, half = files.json("data.json").get("training"), files.json(HALF_RUN)
    if images is None:
        return []
    held_out, seen = found.n
    basis = f"the errors on {held_out} held-out and {seen} training images at the last look"
    if not half:
        basis += (
            "; whether more images would help is told by a run with data.half=first and `sfumato "
            "report RUN --half HALF`"
        )
    answers = [Answer(f"Are {images:,} images enough?", after_training(found, images), basis)]
    if half:
        answers.append(Answer("Would more images help?", half["sentence"], half["basis"]))
    return answers


def _evaluated(evaluation: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{row['name']} {row['n']}" for row in evaluation["rows"])
    return f"features of {evaluation['extractor']}; images: {sizes}"


def _facts(files: RunFiles) -> list[tuple[str, str]]:
    """Return what was trained, on what, for how long."""
    data, status = files.json("data.json"), files.json("status.json")
    last = files.metrics[-1] if files.metrics else {}
    seconds = files.newest("time").get("time")
    pairs = [
        ("state", status.get("state")),
        ("step", status.get("step")),
        ("views of each image", f"{files.looks[-1].views:.3g}" if files.looks else None),
        ("training time", None if seconds is None else duration(seconds)),
        ("training images", data.get("training")),
        ("images, from each step on", _seen(data.get("seen", []))),
        ("held-out images", data.get("holdout")),
        ("categories", len(data.get("categories", {})) or None),
        ("samples seen", last.get("samples_seen")),
    ]
    return [(name, str(value)) for name, value in pairs if value is not None]


def _seen(rows: Sequence[Mapping[str, int]]) -> str | None:
    """Return how many images a run had from which step on; None if they never changed."""
    lines = [f"step {row['step']:,}: {row['images']:,}" for row in rows]
    return "; ".join(lines) if len(lines) > 1 else None


def _figures(files: RunFiles) -> list[tuple[str, str, str, str, str]]:
    """Return every figure of the page as (name, value, interval, n, compared with)."""
    rows = []
    if files.verdicts:
        found = files.verdicts[-1]
        held_out, seen = found.n
        for name, estimate, note in (
            ("held-out error / training error", found.ratio, f"{seen} training images"),
            ("change since the least error", found.rise, "the same images, paired"),
            ("change in the last fifth", found.fall, "the same images, paired"),
        ):
            if estimate.low == estimate.high:  # a look beside itself
                continue
            rows.append(
                (name, f"{estimate.mean:.4g}", _interval(estimate, 98), str(held_out), note)
            )
    newest = files.newest("validation/ema/eps_mse")
    for key, name, note in (
        ("eps_mse", "MSE of the noise", "the true noise"),
        ("eps_rmse", "RMSE of the noise", "the true noise"),
        ("eps_mae", "MAE of the noise", "the true noise"),
        ("r2", "R²", "the mean image and one variance"),
        ("skill", "skill", "the best linear denoiser of the training images"),
    ):
        value = newest.get(f"validation/ema/{key}")
        if value is not None:
            count = str(newest.get("validation/ema/n", "-"))
            known = newest.get("validation/ema/intervals", {}).get(key)
            interval = "-" if known is None else _interval(Estimate.read(known), 95)
            rows.append((name, f"{value:.4g}", interval, count, note))
    sampled = [look for look in files.looks if look.samples]
    looked = [{"name": f"samples of step {look.step}", **look.samples} for look in sampled[-1:]]
    swept = {"rows": list(sweep_rows(files.json(files.directory.sweep.name)))}
    return [
        *rows,
        *_evaluation_figures({"rows": looked}),
        *_evaluation_figures(swept),
        *_evaluation_figures(files.json(EVALUATION)),
    ]


def _evaluation_figures(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Return the figures of samples and real images, as `_figures` does."""
    rows = []
    for row in evaluation.get("rows", ()):
        for figure in row.values():
            if isinstance(figure, Mapping):
                low, high = figure["low"], figure["high"]
                interval = "-" if low is None else f"[{low:.4g}, {high:.4g}], 95 %"
                rows.append(
                    (
                        f"{row['name']}: {figure['metric']}",
                        f"{figure['value']:.4g}",
                        interval,
                        str(figure["n"]),
                        f"{figure['reference']} ({figure['extractor']})",
                    )
                )
    return rows


def _interval(estimate: Estimate, level: int) -> str:
    return f"[{estimate.low:.4g}, {estimate.high:.4g}], {level} %"
