"""The final sweep of a run: settings of sampling compared on its held-out images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.condition import reorder
from sfumato.data import Dataset
from sfumato.data.choice import choose_evenly
from sfumato.data.holdout import MIN_RELIABLE_HOLDOUT_IMAGES
from sfumato.errors import RunError
from sfumato.evaluation.classifier import Classifier
from sfumato.evaluation.extractors import extractor
from sfumato.evaluation.fidelity import choose_conditions, choose_reference
from sfumato.evaluation.quality import MAX_COMPARED, real_features
from sfumato.evaluation.report import category_classifier
from sfumato.evaluation.sweep import Sweep
from sfumato.evaluation.sweep_judge import Judge
from sfumato.evaluation.sweep_plan import NUMBERS, WIDTHS, settings_around
from sfumato.evaluation.sweep_result import Setting, SweepResult, read_plain
from sfumato.generation.options import SamplingOptions
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest
from sfumato.observability.progress import ProgressBar, console, duration
from sfumato.process.signals import Interrupted, acknowledge, handled, poll
from sfumato.recipes.config_checks import unguidable
from sfumato.recipes.resolver import resolve
from sfumato.recipes.run import Run
from sfumato.runs.loading import load_own, load_weights
from sfumato.runs.preparation import open_data
from sfumato.runs.recommended import own_setting, own_step
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import post_hoc_ema
from sfumato.training.copy_search import CopyCounter
from sfumato.training.ema import PowerEMA

SEED = 20_011  # whose noise no other command uses by default
SHARE = 0.05  # of the training time
AUTOMATIC_S = 20.0  # that a sweep after training must have, to start by itself
LEAST_MINUTES = 1.0  # of `sfumato sweep` by default
CLASSIFIER_SHARE = 0.2  # of the time, that training a classifier of categories may take
PROBED = 0.1  # of that time, from which on it has to be in proportion to what is done
Progress = Callable[[float, str], None]


def sweep_run(
    path: str | Path,
    *,
    minutes: float | None = None,
    dataset: Dataset | None = None,
    on_progress: Progress = lambda fraction, text: None,
    stop: Callable[[], None] = lambda: None,
) -> SweepResult:
    """Compare settings of sampling on a run's held-out images, and write RUN/sweep.json.

    Args:
        minutes: that it may take; by default 5 % of the training time, and at least one.
        dataset: the run's data, if they are open already.
        on_progress: called with the fraction of the time that has passed, and the current part.
        stop: called between steps of sampling; what it raises ends the sweep.
    Raises:
        RunError: if this is not a run, it holds out too few images, or the time is too short.
    """
    begun = time.perf_counter()
    directory = RunDirectory.existing(Path(path))
    run = resolve(directory.path)
    if minutes is None:
        minutes = max(LEAST_MINUTES, SHARE * trained_seconds(directory) / 60)
    dataset = open_data(run, directory=directory.path) if dataset is None else dataset
    require_held_out(dataset, directory.path)
    pipeline, own = load_own(directory), own_setting(directory, run.sampling)
    left = 60 * minutes - (time.perf_counter() - begun)
    drawing, judge = _opened(pipeline, dataset, directory, own, seconds=left, stop=stop)
    guided = set(pipeline.reads) - set(pipeline.model.conditioner.unguided)
    widths = _widths(run, directory) if own.weights == "ema" else ()
    result = Sweep(
        settings_around(own, guidable=bool(guided) and not unguidable(run), widths=widths),
        drawing,
        judge,
        seconds=60 * minutes - (time.perf_counter() - begun),
        step=own_step(directory),
        on_progress=on_progress,
    ).run()
    directory.write_json(directory.sweep.name, result.plain())
    return result


def require_held_out(dataset: Dataset, path: Path) -> None:
    """Raise RunError unless enough images of the usual shape are held out."""
    count = len(dataset.with_common_shape(dataset.holdout))
    if count < MIN_RELIABLE_HOLDOUT_IMAGES:
        raise RunError(
            f"{count} held-out images are too few to compare settings of sampling "
            f"({MIN_RELIABLE_HOLDOUT_IMAGES} are needed)",
            where=str(path),
            hint="more images or a larger data.holdout help; sampling uses the run's own settings",
        )


def trained_seconds(directory: RunDirectory) -> float:
    """Return how long a run has trained; 0 where that is not recorded."""
    loaded, _ = checkpoint.read_newest(directory.checkpoints)
    return float(loaded.counters.get("seconds", 0.0))


def sweep_after_training(path: Path, run: Run, dataset: Dataset, *, seconds: float) -> None:
    """Compare settings of sampling at the end of a training, if it was long enough.

    Nothing that happens here affects the run, which is finished and saved.

    Args:
        seconds: of training.
    """
    minutes, screen = run.sweep.minutes, console()
    if minutes == 0:
        return
    later = f"`sfumato sweep {path}` does it"
    if minutes is None:
        minutes = SHARE * seconds / 60
        if 60 * minutes < AUTOMATIC_S:
            screen.print(
                f"settings of sampling are not compared: {SHARE:.0%} of {duration(seconds)} is too "
                f"short; {later}",
                markup=False,
            )
            return
    try:
        if _is_done(RunDirectory(path)):
            return
        with handled(), ProgressBar("comparing settings of sampling") as bar:
            result = sweep_run(
                path,
                minutes=minutes,
                dataset=dataset,
                on_progress=bar.update,
                stop=poll,
            )
        screen.print(result.table(), markup=False)
    except Interrupted as signal:
        acknowledge()
        screen.print(
            f"{signal}: settings of sampling are not compared; the run is finished and saved; "
            f"{later}",
            markup=False,
        )
    except RunError as error:
        screen.print(f"{error.what}; {error.hint}", markup=False)
    except Exception as error:  # whatever it is, the run is finished
        screen.print(f"warning: settings of sampling are not compared: {error}", markup=False)


def _is_done(directory: RunDirectory) -> bool:
    """Return whether the weights of a run were compared already."""
    plain = read_plain(directory.sweep)
    return plain is not None and plain["step"] == own_step(directory)


def _widths(run: Run, directory: RunDirectory) -> Sequence[float]:
    """Return widths of averages that can be reconstructed, and that are not the run's own."""
    if not any(directory.averages.glob("ema-*/step-*.safetensors")):
        return ()
    return [width for width in WIDTHS if PowerEMA(width) != run.ema]


def _opened(
    pipeline: Pipeline,
    dataset: Dataset,
    directory: RunDirectory,
    own: Setting,
    *,
    seconds: float,
    stop: Callable[[], None],
) -> tuple[_Drawing, Judge]:
    """Return what draws samples and what judges them, under the same conditions."""
    reference = choose_reference(dataset, pipeline.reads)
    conditions = choose_conditions(pipeline, dataset, reference, NUMBERS)
    order = randomness.permutation(0, "sweep", index=0, size=NUMBERS).tolist()
    labels = None if conditions.labels is None else conditions.labels[torch.tensor(order)]
    network = extractor("auto")
    judge = Judge(
        network=network,
        held_out=real_features(dataset, network, choose_evenly(reference.held_out, MAX_COMPARED)),
        copies=CopyCounter(dataset),
        labels=labels,
        classifier=None if labels is None else _classifier(pipeline, dataset, seconds, stop),
    )
    drawing = _Drawing(
        pipeline=pipeline,
        directory=directory,
        request=ResolvedRequest.of(
            reorder(conditions.context, order), pipeline.image_shape, NUMBERS
        ),
        own=own.weights,
        stop=stop,
    )
    return drawing, judge


class _TooSlow(Exception):
    """A classifier takes too long to train."""


def _classifier(
    pipeline: Pipeline, dataset: Dataset, seconds: float, stop: Callable[[], None]
) -> Classifier | None:
    """Return a classifier of categories, if it is trained within its share of the time."""
    begun = time.perf_counter()

    def watch(fraction: float, text: str) -> None:
        stop()
        passed = time.perf_counter() - begun
        # the first steps are slow; after them it is known how long all will take
        if passed > CLASSIFIER_SHARE * seconds * min(1.0, PROBED + fraction):
            raise _TooSlow

    try:
        return category_classifier(pipeline, dataset, watch)
    except _TooSlow:
        console().print(
            f"category accuracy is not measured: a classifier takes more than "
            f"{CLASSIFIER_SHARE:.0%} of the time",
            markup=False,
        )
        return None


@dataclass
class _Drawing:
    """Draws samples of a pipeline by setting and number.

    Attributes:
        request: the conditions of all numbers.
        own: the name of the run's own weights, which the pipeline has at first.
        stop: called between steps.
    """

    pipeline: Pipeline
    directory: RunDirectory
    request: ResolvedRequest
    own: str | float
    stop: Callable[[], None]

    def __post_init__(self) -> None:
        self._present = self.own
        self._own_tensors: dict[str, Tensor] = {}

    def __call__(self, setting: Setting, numbers: range) -> Tensor:
        """Return images (n, C, H, W) in [0, 1]."""
        self.stop()
        self._use(setting.weights)
        batches = self.pipeline.batches(
            numbers.stop,
            self.request,
            SamplingOptions(guidance=setting.guidance, steps=setting.steps),
            seed=SEED,
            skip=range(numbers.start),
            on_step=lambda _: self.stop(),
        )
        return torch.cat([images for _, images in batches])

    def _use(self, weights: str | float) -> None:
        """Load the run's own weights, or an average of another width."""
        if weights == self._present:
            return
        model = self.pipeline.model
        if not self._own_tensors:
            self._own_tensors = {
                name: tensor.clone() for name, tensor in model.state_dict().items()
            }
        trained = self._own_tensors
        if isinstance(weights, float):
            trained = post_hoc_ema.reconstruct(self.directory.averages, width=weights)
        load_weights(model, trained, self._own_tensors)
        self._present = weights
