"""The plan that `train --dry-run` prints: the configuration and the reasons for it, the estimated
cost on this machine, and whether training would be long enough.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sfumato import config as configuration
from sfumato.data import Dataset
from sfumato.observability.progress import duration
from sfumato.recipes.caption_statistics import truncated_captions
from sfumato.recipes.resolver import Overrides, ResolvedConfig, resolve_config
from sfumato.recipes.run import Run
from sfumato.runs.cost import CostEstimate, estimate_cost
from sfumato.runs.finetuning import choose_finetuning
from sfumato.runs.plan_check import Finding, check_plan
from sfumato.runs.preparation import prepare
from sfumato.runs.reading_ahead import with_first_sample
from sfumato.runs.world_plan import world_lines
from sfumato.training.parameters import describe


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A training that has not begun.

    Attributes:
        notes: the reasons for the configuration, and remarks on the dataset, one sentence a line.
        stages: the estimated cost of each stage, the diffusion model's last.
        findings: problems of the plan; () for a plan that is long enough and fits.
        views: what the number of views of each image says; "" where a finding says it.
    """

    run: Run
    images: int
    notes: tuple[str, ...]
    stages: tuple[CostEstimate, ...]
    findings: tuple[Finding, ...]
    views: str = ""

    @property
    def total_s(self) -> float:
        """Seconds of all stages, with the estimates before them and encoding between them."""
        return sum(stage.seconds + stage.encoding_s + stage.trial_s for stage in self.stages)

    def lines(self) -> list[str]:
        """Return the plan as lines of text; the summary and the verdict come last."""
        estimates = [line for stage in self.stages for line in stage.lines()]
        views = [self.views] if self.views else []
        return [*self.notes, *estimates, *views, self._summary(), *self._verdict()]

    def _summary(self) -> str:
        model, size = self.stages[-1], self.run.data.resolution
        evaluation_s, encoding_s = (
            sum(stage.looks_s for stage in self.stages),
            sum(stage.encoding_s for stage in self.stages),
        )
        parts = [
            f"{duration(evaluation_s)} for previews and validation",
            *([f"{duration(encoding_s)} for encoding"] if encoding_s else []),
            f"{duration(sum(stage.trial_s for stage in self.stages))} for this prediction",
        ]
        return (
            f"summary: {self.images} images at {size} px, {model.precision}, {model.steps} steps; "
            f"about {duration(self.total_s)} total, including {', '.join(parts)}"
        )

    def _verdict(self) -> list[str]:
        if self.findings:
            return [finding.line() for finding in self.findings]
        if self.run.has_base:
            return ["verdict: fits this machine; comparisons with the base will say when to stop"]
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
            "views": self.views,
            "findings": [asdict(finding) for finding in self.findings],
            "config": configuration.plain(self.run),
        }


def plan(
    source: str | Path | Run, *, overrides: Overrides = (), world: int | None = None
) -> TrainingPlan:
    """Plan a training from a few real steps of it, which leave no files.

    Args:
        world: the number of processes that it is planned for; the steps are still those of one.
    """
    return _plan(resolve_config(source, overrides), world)


def _plan(chosen: ResolvedConfig, world: int | None = None) -> TrainingPlan:
    listing = chosen.listing_of(chosen.run)
    run = with_first_sample(chosen.run, listing)
    prepared = prepare(run, listing=listing)
    several = [] if world is None else world_lines(prepared, world)
    dataset, images = prepared.dataset, len(prepared.dataset.training)
    dataset_notes = [
        *_dataset_lines(dataset, describe(prepared.model)),
        *truncated_captions(dataset, prepared.model.conditioner),
    ]
    stages = estimate_cost(prepared)
    problems, views = check_plan(prepared, stages)
    return TrainingPlan(
        run=run,
        images=images,
        notes=(*chosen.reasons, *chosen.notes, *dataset_notes, *several),
        stages=tuple(stages),
        findings=tuple(problems),
        views=views,
    )


def plan_finetuning(
    model: str | Path,
    source: str,
    *,
    overrides: Overrides = (),
    lora: str | Path | None = None,
    partial: bool = False,
    variant: str = "",
    like: str | Path | None = None,
) -> TrainingPlan:
    """Plan a fine-tuning as `plan` does; see `sfumato.finetune` for the arguments."""
    finetuning = choose_finetuning(
        model, source, overrides, lora=lora, partial=partial, variant=variant, like=like
    )
    planned = _plan(finetuning.resolved(overrides))
    return replace(planned, notes=(*finetuning.lines, *planned.notes))


def _dataset_lines(dataset: Dataset, parameters: str) -> list[str]:
    return [
        f"{len(dataset.training)} training images, {len(dataset.holdout)} held out, "
        f"{len(dataset.rejects)} left out",
        f"{len(dataset.categories) or 'no'} categories; {parameters}",
    ]
