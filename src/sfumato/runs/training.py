"""Training: a new run from its configuration, or an interrupted one from its newest checkpoint."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import cast

from sfumato import __version__
from sfumato import config as configuration
from sfumato.data.batch_plan import share_of
from sfumato.data.recorded_names import shortened, write_names
from sfumato.distributed import World, current, joined
from sfumato.errors import (
    CheckpointError,
    RunError,
    SfumatoError,
    redact_secrets,
    without_secrets,
)
from sfumato.observability.progress import console
from sfumato.process.signals import Interrupted, handled
from sfumato.process.watchdog import watching
from sfumato.recipes.caption_statistics import truncated_captions
from sfumato.recipes.paths import FROM_RUN, paths_relative_to_run, with_absolute_paths
from sfumato.recipes.resolver import Overrides, ResolvedConfig, resolve, resolve_config
from sfumato.recipes.run import Run
from sfumato.recipes.run_config import write_run_config
from sfumato.recipes.run_origin import require_leave, require_own_mirror
from sfumato.recipes.trigger_words import split_words
from sfumato.reporting import write_report
from sfumato.runs.changed_data import Continued
from sfumato.runs.cost import estimate_cost
from sfumato.runs.finetuning import choose_finetuning
from sfumato.runs.finetuning_report import FOLDER as REPORT
from sfumato.runs.finetuning_report import finetuning_report, with_parity
from sfumato.runs.plan_check import check_plan
from sfumato.runs.preparation import PreparedRun, prepare_in_turn, print_padding_costs
from sfumato.runs.reading_ahead import free_memory, train_while_reading, with_first_sample
from sfumato.runs.sweep import sweep_after_training
from sfumato.runs.text_encoders import release_encoders
from sfumato.runs.trainer_assembly import diffusion_trainer
from sfumato.storage import checkpoint
from sfumato.storage.output_paths import safe_name
from sfumato.storage.run_directory import RunDirectory, commit
from sfumato.training import Trainer
from sfumato.training.mirror import Mirror, restore
from sfumato.training.parameters import describe

PREPARING_STALL_MINUTES = 120.0  # in which neither an image nor anything else is read


def train(
    source: str | Path | Run,
    *,
    overrides: Overrides = (),
    run: str | Path | None = None,
    resumes: bool = False,
) -> Path:
    """Train from a recipe, a YAML file or a folder of images; return the run directory.

    Args:
        overrides: settings as a mapping or as "a.b=c" strings.
        run: the new run's directory; by default runs/<name>, numbered if taken.
        resumes: whether a run that is there is resumed; the same call then begins it, goes on, and
            does nothing once it is finished.
    """
    if resumes:
        if run is None:
            raise RunError(
                "which run is to be resumed?",
                where="resume",
                hint="name its directory with --run, also the first time",
            )
        if os.path.lexists(Path(run) / "config.yaml"):
            return resume(run, overrides=_with_address(source, overrides))
    if run is not None:
        RunDirectory.require_free(Path(run))
    with _supervised():
        return _train(source, resolve_config(source, overrides), run)


def _of_first(world: World, run: Run) -> Run:
    """Return the configuration of the first process: what is chosen by speed or time may differ."""
    plain = world.on_first(lambda: configuration.plain(run))
    return run if world.is_first else configuration.parse(Run, plain)


def _with_address(source: str | Path | Run, overrides: Overrides) -> Overrides:
    """Return the overrides of a resumed run with the address of its images, whose secrets it does not
    store.
    """
    if isinstance(source, Run) or redact_secrets(str(source)) == str(source):
        return overrides
    given = {"data.source.path": str(source)}
    if isinstance(overrides, Mapping):
        return {**given, **overrides}
    return [*(f"{key}={value}" for key, value in given.items()), *overrides]


@contextmanager
def _supervised() -> Iterator[World]:
    """Join other processes, and handle signals and hangs, also while data are read and images
    encoded.
    """
    with handled(), watching(PREPARING_STALL_MINUTES), joined() as world:
        try:
            yield world
        except Interrupted as signal:
            if not signal.is_said:
                console().print(
                    f"{signal}: stopped before training; what was read and encoded so far is kept",
                    markup=False,
                )
            raise


def _train(source: str | Path | Run, chosen: ResolvedConfig, run: str | Path | None) -> Path:
    world = current()
    settings = with_absolute_paths(_of_first(world, chosen.run))
    if mirror := settings.checkpoint.mirror:
        world.on_first(lambda: Mirror(mirror, Path()).require_free())
    share_of(settings.batch_size, world.size)
    if run is None:
        RunDirectory.require_free(_unused_path(Path("runs") / safe_name(settings.name)))
    for line in chosen.notes:
        console().print(line, markup=False)
    listing = chosen.listing_of(settings)
    settings = with_first_sample(settings, listing)
    prepared = prepare_in_turn(settings, listing=listing)
    if chosen.choice is not None:
        lines = [
            *chosen.reasons,
            *world.on_first(partial(_cost_lines, prepared)),
            f"for a data report: sfumato data check {source}",
        ]
        console().print("\n".join(lines), markup=False)
    place = world.on_first(
        lambda: str(
            run if run is not None else _unused_path(Path("runs") / safe_name(settings.name))
        )
    )
    directory = RunDirectory.create(Path(place))
    with directory.locked():
        directory.write_status("preparing", 0)
        _write_description(prepared, directory, begins=0)
        once = [prepared]  # so that nothing but the trainer holds its model
        del prepared
        _run_to_the_end(lambda: build_trainer(once.pop(), directory), directory)
    return directory.path


def finetune(
    model: str | Path,
    source: str,
    *,
    overrides: Overrides = (),
    run: str | Path | None = None,
    lora: str | Path | None = None,
    partial: bool = False,
    variant: str = "",
    like: str | Path | None = None,
) -> Path:
    """Fine-tune a run, or a model folder of diffusers, on images; return the run directory.

    A run with a LoRA is continued: its base stays the base, and its LoRA's values are the first
    ones. All comparisons, also with `lora`, are with the base without any LoRA.

    Args:
        model: directory of a run, a folder with model_index.json, the name of a model on the
            Hugging Face hub, "owner/name", or a single file of Stable Diffusion's layout. It is
            only read.
        overrides: settings as a mapping or as "a.b=c" strings.
        run: the new run's directory; by default runs/<source>-<model>, numbered if taken.
        lora: a LoRA file of diffusers, kohya or peft to go on from: its values are the first ones,
            and rank, alpha and layers are the file's. After the first checkpoint it is not needed.
        partial: whether tensors of that file that fit no layer of the network are left out.
        variant: which weights of a model folder, where it has several: "fp16" for *.fp16.safetensors.
        like: for a single file, a pipeline's folder of the same family.
    """
    if run is not None:
        RunDirectory.require_free(Path(run))
    planned = choose_finetuning(
        model, source, overrides, lora=lora, partial=partial, variant=variant, like=like
    )
    console().print("\n".join(planned.lines), markup=False)
    with _supervised() as world:
        path = _train(source, planned.resolved(overrides), run)
        if not world.is_first:
            return path
    report = finetuning_report(path)
    report.save(path / REPORT)
    console().print(report.table(), markup=False)
    report = with_parity(report, path)
    report.save(path / REPORT)
    if report.parity is not None:
        console().print(report.parity.sentence(), markup=False)
    console().print(f"report and images: {path / REPORT}", markup=False)
    return path


def resume(
    path: str | Path,
    *,
    overrides: Overrides = (),
    step: int | None = None,
    accepts_data: bool = False,
    mirror: str | None = None,
) -> Path:
    """Resume a run from its newest whole checkpoint, bit for bit; return the run directory.

    What the overrides change is printed.

    Args:
        step: the checkpoint to go on from, by default the newest; newer ones are set aside.
        accepts_data: whether the run goes on if its data have changed: images were added, for
            example. A new epoch of them then begins.
        mirror: address of a copy of the run (`checkpoint.mirror`), from which it is fetched to a
            machine that has none.
    """
    with _supervised() as world:
        if mirror is not None:
            fetched = world.on_first(lambda: str(restore(mirror, Path(path))))
            console().print(f"fetched from the mirror: {fetched}", markup=False)
        directory = RunDirectory.existing(Path(path))
        directory.require_trainable()
        with directory.locked():
            continued = partial(
                _continued,
                directory,
                overrides,
                step=step,
                accepts_data=accepts_data,
                mirror=mirror,
            )
            _run_to_the_end(continued, directory)
    return directory.path


def _continued(
    directory: RunDirectory,
    overrides: Overrides,
    *,
    step: int | None,
    accepts_data: bool,
    mirror: str | None,
) -> Trainer | None:
    """Return the trainer of a run as it goes on; None, and a line, if the run is finished."""
    if step is not None:
        for aside in current().on_first(
            lambda: list(map(str, checkpoint.set_newer_aside(directory.checkpoints, step=step)))
        ):
            console().print(f"set aside: {aside}", markup=False)
    trainer = _restore_trainer(directory, overrides, accepts_data=accepts_data, mirror=mirror)
    reached = trainer.state.counters.step
    if trainer.finished and directory.status().get("state") == "finished":
        console().print(_why_finished(trainer), markup=False)
        return None
    console().print(f"resuming at step {reached}")
    return trainer


def _why_finished(trainer: Trainer) -> str:
    """Return a line that says why the run has ended, and the command that continues it."""
    counters, command = trainer.state.counters, f"sfumato resume {trainer.directory.path}"
    if trainer.progress < 1:
        return (
            f"stopped already, at step {counters.step}, as {counters.stopped}; to go on all the same: "
            f"{command} stop=never"
        )
    limits = [name for name, most in asdict(trainer.config.budget).items() if most is not None]
    return (
        f"finished already, at step {counters.step}; to go on, raise its budget: {command} "
        f"budget.{limits[0]}=..."
    )


def _run_to_the_end(begin: Callable[[], Trainer | None], directory: RunDirectory) -> None:
    """Train; then compare settings of sampling, and write the report, in the first process.

    Args:
        begin: returns the trainer; None if the run is finished.
    """
    trainer = begin()
    grows = True
    while (
        trainer is not None
        and grows
        and (more := train_while_reading(trainer, directory)) is not None
    ):
        trainer = None
        free_memory()  # there is some for one trainer
        trainer, grows = _with_more_images(directory, more)
    if trainer is not None and not grows:
        trainer.run()
    if trainer is None:
        return
    run = cast(Run, trainer.config)
    dataset, seconds, mirror = trainer.dataset, trainer.state.counters.seconds, trainer.saver.mirror
    if beyond := dataset.ledger.beyond:
        count = len(dataset.entries)
        console().print(
            f"trained with {count:,} of {count + beyond:,} images, an even sample", markup=False
        )

    def finish() -> None:
        sweep_after_training(directory.path, run, dataset, seconds=seconds)
        _report(directory.path)
        if mirror is not None and (warning := mirror.mirror.try_push()):
            console().print(warning, markup=False)

    current().on_first(finish)


def _with_more_images(directory: RunDirectory, limit: int) -> tuple[Trainer, bool]:
    """Restore a run with more of its images; return whether it has them, and may get further ones.

    Otherwise it is as it was.
    """
    try:
        trainer = _restore_trainer(directory, (), accepts_data=True, mirror=None, limit=limit)
        return trainer, True
    except (SfumatoError, OSError) as error:
        console().print(f"warning: the run goes on without more images: {error}", markup=False)
    free_memory()
    return _restore_trainer(directory, (), accepts_data=False, mirror=None), False


def _report(path: Path) -> None:
    """Write the report of a run; without a place for it, only a warning is printed."""
    try:
        console().print(f"report: {write_report(path)}", markup=False)
    except (OSError, RunError) as error:
        console().print(f"warning: the report could not be written: {error}", markup=False)


def _restore_trainer(
    directory: RunDirectory,
    overrides: Overrides,
    *,
    accepts_data: bool,
    mirror: str | None,
    limit: int | None = None,
) -> Trainer:
    """Return the trainer as its newest checkpoint left it.

    What cannot go on is refused before the run's description is touched.

    Args:
        limit: how many images it goes on with, where it does not wait for all; None for as many as it
            had.
    """
    before = with_absolute_paths(resolve(directory.path))
    settings = with_absolute_paths(resolve(directory.path, overrides))
    if settings.data.wait == "ready" and before.data.wait == "ready":
        own = _limit_of(directory, before) if limit is None else limit
        settings = replace(settings, data=replace(settings.data, limit=own))
    screen = console()
    changed = configuration.differences(configuration.plain(before), configuration.plain(settings))
    for line in changed:
        screen.print(f"changed on resume: {line}", markup=False)
    require_leave(directory.path, settings, data=True)
    place = settings.checkpoint.mirror
    overridden = [place] if place != before.checkpoint.mirror else []
    require_own_mirror(directory.path, place, named=[*overridden, mirror or ""])
    begins = not directory.has_begun()
    share_of(settings.batch_size, current().size)
    continued = None if begins else Continued.of(directory, accepts_data=accepts_data)
    prepared = prepare_in_turn(
        settings, directory=directory.path, begins=begins, continued=continued
    )
    if begins:
        with directory.unchanged_if_refused():
            _write_description(prepared, directory, begins=0)
            return build_trainer(prepared, directory)
    trainer = build_trainer(prepared, directory)
    for warning in trainer.resume(accepts_data=accepts_data):
        screen.print(f"warning: {warning}", markup=False)
    if changed or accepts_data:
        trainer.state.counters.forget_losses()
    directory.require_space(trainer.saver.disk_bytes())
    _write_description(prepared, directory, begins=trainer.plan.begins)
    return trainer


def _limit_of(directory: RunDirectory, run: Run) -> int:
    """Return how many images a run that does not wait for all had at its newest checkpoint."""
    for path in checkpoint.paths(directory.checkpoints):
        with suppress(CheckpointError, KeyError, TypeError, ValueError):
            checkpoint.require_whole(path)
            return int(checkpoint.configuration_of(path)["data"]["limit"])
    return run.data.limit


def _cost_lines(prepared: PreparedRun) -> list[str]:
    stages = estimate_cost(prepared)
    problems, views = check_plan(prepared, stages)
    return [
        *(line for stage in stages for line in stage.lines()),
        *([views] if views else []),
        *(finding.line() for finding in problems),
    ]


def _write_description(prepared: PreparedRun, directory: RunDirectory, *, begins: int) -> None:
    """Write the run's configuration, data record and environment into its directory.

    Args:
        begins: the step at which training on these data began.
    """
    write_run_config(directory, configuration.plain(prepared.run))
    seen = [row for row in directory.data_record().get("seen", []) if row["step"] < begins]
    seen.append({"step": begins, "images": len(prepared.dataset.entries)})
    record, names = shortened({**prepared.dataset.summary(), "begins": begins, "seen": seen})
    directory.write_json(
        "data.json", {**record, FROM_RUN: paths_relative_to_run(prepared.run, directory.path)}
    )
    if directory.writes:
        write_names(directory.path, names)
    directory.write_environment(sfumato=__version__, commit=commit())


def build_trainer(prepared: PreparedRun, directory: RunDirectory) -> Trainer:
    """Build the diffusion model's trainer, once there is an autoencoder to work with.

    Finished stages are not repeated.
    """
    run, screen = prepared.run, console()
    print_padding_costs(prepared.model.network, prepared.dataset, prepared.info.factor)
    for line in (
        *truncated_captions(prepared.dataset, prepared.model.conditioner),
        *split_words(prepared.dataset, prepared.model.conditioner),
    ):
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
    trainer = diffusion_trainer(
        run,
        model=model,
        autoencoder=autoencoder,
        dataset=dataset,
        directory=directory,
        info=prepared.info,
        saved_config=without_secrets(configuration.plain(run)),
        prior=prepared.prior,
    )
    if line := release_encoders(prepared, model.conditioner):
        screen.print(line, markup=False)
    return trainer


def _unused_path(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(
        candidate for candidate in itertools.chain([path], numbered) if not candidate.exists()
    )
