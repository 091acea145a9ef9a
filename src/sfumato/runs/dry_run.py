"""The plan that `train --dry-run` prints.

It says what would be trained and why, what it takes on this machine, and whether that is long
enough.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfumato import config as configuration
from sfumato.data import Dataset
from sfumato.observability.progress import duration
from sfumato.recipes.caption_statistics import cut_captions
from sfumato.recipes.resolver import Overrides, resolved
from sfumato.recipes.run import Run
from sfumato.runs.cost import Prediction, predict
from sfumato.runs.plan_check import Finding, Machine, findings
from sfumato.runs.preparation import prepare
from sfumato.training.parameters import describe


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A training that has not begun.

    Attributes:
        notes: why it is so, and what it is of, a sentence a line.
        stages: what each will take, the diffusion model's last.
        findings: what speaks against it; () for a plan that is long enough and fits.
    """

    run: Run
    images: int
    notes: tuple[str, ...]
    stages: tuple[Prediction, ...]
    findings: tuple[Finding, ...]

    @property
    def total_s(self) -> float:
        """Seconds of all stages, and of what comes before and between them."""
        return sum(stage.seconds + stage.encoding_s + stage.trial_s for stage in self.stages)

    def lines(self) -> list[str]:
        """Return the plan as lines of text; the summary and the verdict come last."""
        predicted = [line for stage in self.stages for line in stage.lines()]
        return [*self.notes, *predicted, self._summary(), *self._verdict()]

    def _summary(self) -> str:
        model, size = self.stages[-1], self.run.data.resolution
        looks, encoding = (
            sum(stage.looks_s for stage in self.stages),
            sum(stage.encoding_s for stage in self.stages),
        )
        parts = [
            f"{duration(looks)} previews and validation",
            *([f"{duration(encoding)} encoding"] if encoding else []),
            f"{duration(sum(stage.trial_s for stage in self.stages))} for this prediction",
        ]
        return (
            f"summary: {self.images} images at {size} px, {model.precision}, {model.steps} steps; "
            f"about {duration(self.total_s)} in all, of it {', '.join(parts)}"
        )

    def _verdict(self) -> list[str]:
        if self.findings:
            return [finding.line() for finding in self.findings]
        return ["verdict: long enough for this set and size on this machine"]

    def as_yaml(self) -> str:
        """Return the configuration as YAML for `sfumato train FILE`, and all else as comments."""
        comments = (f"# {line}" for line in self.lines())
        return "\n".join([*comments, configuration.dump_yaml(configuration.plain(self.run))])

    def plain(self) -> dict[str, Any]:
        """Return the plan as plain data, for JSON."""
        return {
            "name": self.run.name,
            "images": self.images,
            "notes": list(self.notes),
            "stages": [asdict(stage) for stage in self.stages],
            "total_s": self.total_s,
            "long_enough": not self.findings,
            "findings": [asdict(finding) for finding in self.findings],
            "config": configuration.plain(self.run),
        }


def plan(source: str | Path | Run, *, overrides: Overrides = ()) -> TrainingPlan:
    """Plan a training from a few real steps of it; nothing is kept."""
    chosen = resolved(source, overrides)
    run = chosen.run
    prepared = prepare(run, listing=chosen.listing_of(run))
    dataset, images = prepared.dataset, len(prepared.dataset.training)
    said = [
        *_of(dataset, describe(prepared.model)),
        *cut_captions(dataset, prepared.model.conditioner),
    ]
    stages = predict(prepared)
    return TrainingPlan(
        run=run,
        images=images,
        notes=(*chosen.reasons, *chosen.notes, *said),
        stages=tuple(stages),
        findings=tuple(findings(stages, images=images, machine=Machine.here())),
    )


def _of(dataset: Dataset, parameters: str) -> list[str]:
    return [
        f"{len(dataset.training)} training images, {len(dataset.holdout)} held out, "
        f"{len(dataset.rejects)} left out",
        f"{len(dataset.categories) or 'no'} categories; {parameters}",
    ]
