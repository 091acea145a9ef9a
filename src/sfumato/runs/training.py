"""Training: a new run from its configuration, or an interrupted one from its newest checkpoint."""

from __future__ import annotations

import itertools
from pathlib import Path

from sfumato import __version__
from sfumato import config as configuration
from sfumato.observability.progress import console
from sfumato.recipes.caption_statistics import cut_captions
from sfumato.recipes.paths import FROM_RUN, from_run, with_whole_paths
from sfumato.recipes.resolver import Overrides, resolve, resolved
from sfumato.recipes.run import Run
from sfumato.runs.assembly import diffusion_trainer
from sfumato.runs.cost import predict
from sfumato.runs.plan_check import Machine, findings
from sfumato.runs.preparation import PreparedRun, prepare, say_margins
from sfumato.storage.run_directory import RunDirectory, commit
from sfumato.training import Trainer
from sfumato.training.parameters import describe


def train(
    source: str | Path | Run, *, overrides: Overrides = (), run: str | Path | None = None
) -> Path:
    """Train from a recipe, a YAML file or a folder of images; return the run directory.

    Args:
        overrides: settings as a mapping or as "a.b=c" strings.
        run: the new run's directory; by default runs/<name>, numbered if taken.
    """
    if run is not None:
        RunDirectory.require_free(Path(run))
    chosen = resolved(source, overrides)
    settings = with_whole_paths(chosen.run)
    if run is None:
        RunDirectory.require_free(_free(Path("runs") / settings.name))
    for line in chosen.notes:
        console().print(line, markup=False)
    prepared = prepare(settings, listing=chosen.listing_of(settings))
    if chosen.choice is not None:
        lines = [
            *chosen.reasons,
            *_predicted(prepared),
            f"for a data report: sfumato data check {source}",
        ]
        console().print("\n".join(lines), markup=False)
    directory = RunDirectory.create(
        Path(run) if run is not None else _free(Path("runs") / settings.name)
    )
    with directory.locked():
        directory.write_status("preparing", 0)
        _describe(prepared, directory)
        trainer_of(prepared, directory).run()
    return directory.path


def resume(path: str | Path, *, overrides: Overrides = ()) -> Path:
    """Resume a run from its newest whole checkpoint, bit for bit; return the run directory.

    What the overrides change is printed.
    """
    directory = RunDirectory.existing(Path(path))
    with directory.locked():
        trainer = _resumed(directory, overrides)
        step = trainer.state.counters.step
        if trainer.finished and directory.status().get("state") == "finished":
            console().print(
                f"finished already, at step {step}; to go on, raise its budget: sfumato resume "
                f"{path} budget.minutes=..."
            )
            return directory.path
        console().print(f"resuming at step {step}")
        trainer.run()
    return directory.path


def _resumed(directory: RunDirectory, overrides: Overrides) -> Trainer:
    """Return the trainer as its newest checkpoint left it.

    What cannot go on is refused before the run's description is touched.
    """
    before = with_whole_paths(resolve(directory.path))
    settings = with_whole_paths(resolve(directory.path, overrides))
    screen = console()
    for line in configuration.differences(
        configuration.plain(before), configuration.plain(settings)
    ):
        screen.print(f"changed on resume: {line}", markup=False)
    prepared = prepare(settings, place=directory.path)
    if directory.status().get("state") == "preparing":
        with directory.unchanged_if_refused():
            _describe(prepared, directory)
            return trainer_of(prepared, directory)
    trainer = trainer_of(prepared, directory)
    for warning in trainer.resume():
        screen.print(f"warning: {warning}", markup=False)
    directory.require_space(trainer.disk_bytes())
    _describe(prepared, directory)
    return trainer


def _predicted(prepared: PreparedRun) -> list[str]:
    stages, images = predict(prepared), len(prepared.dataset.training)
    verdict = [
        finding.line() for finding in findings(stages, images=images, machine=Machine.here())
    ]
    return [*(line for stage in stages for line in stage.lines()), *verdict]


def _describe(prepared: PreparedRun, directory: RunDirectory) -> None:
    """Write the run's configuration, data record and environment into its directory."""
    directory.config.write_text(configuration.dump_yaml(configuration.plain(prepared.run)))
    directory.write_json(
        "data.json",
        {**prepared.dataset.summary(), FROM_RUN: from_run(prepared.run, directory.path)},
    )
    directory.write_environment(sfumato=__version__, commit=commit())


def trainer_of(prepared: PreparedRun, directory: RunDirectory) -> Trainer:
    """Build the diffusion model's trainer, once there is an autoencoder to work with.

    Finished stages are not repeated.
    """
    run, screen = prepared.run, console()
    say_margins(prepared.model.network, prepared.dataset, prepared.info.factor)
    for line in cut_captions(prepared.dataset, prepared.model.conditioner):
        screen.print(line, markup=False)
    model = prepared.trainable_model()
    autoencoder, dataset = run.autoencoder.prepare(
        prepared.dataset, directory, pixels=run.needs_images
    )
    screen.print(
        f"{directory.path}: {len(dataset.training)} training images, {len(dataset.holdout)} held "
        "out, "
        f"{len(dataset.categories) or 'no'} categories, {dataset.image_shape[1]} px; "
        f"{describe(model)}",
        markup=False,
    )
    return diffusion_trainer(
        run,
        model=model,
        autoencoder=autoencoder,
        dataset=dataset,
        directory=directory,
        info=prepared.info,
        saved_config=configuration.plain(run),
    )


def _free(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(
        candidate for candidate in itertools.chain([path], numbered) if not candidate.exists()
    )
