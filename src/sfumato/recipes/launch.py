"""From a name, a file or a folder to a training run, and from a run back to a pipeline."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato import __version__
from sfumato import config as configuration
from sfumato.condition import NO_CONTEXT
from sfumato.conditioners import Facts, PretrainedTextConfig, TextEncoder
from sfumato.data import Dataset, Listing, files, index, source_at
from sfumato.data.embeddings import EmbeddingStore
from sfumato.data.frames import framed
from sfumato.data.holdout import ROUGH
from sfumato.data.ledger import change
from sfumato.data.sources.find import BUILT_IN
from sfumato.data.values import MAX_BANDS
from sfumato.elsewhere import refuse_diffusers
from sfumato.networks import Backbone
from sfumato.networks.inputs import margin
from sfumato.nn.compiling import require_compiler
from sfumato.observability.progress import ProgressBar, console
from sfumato.pipeline import Model
from sfumato.recipes.assembly import diffusion_trainer, with_auxiliary
from sfumato.recipes.builtin import RECIPES, recipe
from sfumato.recipes.captions import cut_captions
from sfumato.recipes.limits import replaced
from sfumato.recipes.places import FROM_RUN, found_again, from_run, require_there, with_whole_paths
from sfumato.recipes.prediction import predict
from sfumato.recipes.presets import Choice, choose
from sfumato.recipes.run import Run
from sfumato.recipes.verdict import Machine, findings
from sfumato.training import Trainer
from sfumato.training.parameters import count, describe
from sfumato.training.precision import require
from sfumato.training.run_directory import RunDirectory, commit

REJECTS_SHOWN = 5
MARGIN_SAID = 0.1  # more work than the pixels need
SETTLED: dict[str, Container[int]] = {"channels": range(1, MAX_BANDS + 1), "bits": (8, 16)}
Overrides = Sequence[str] | Mapping[str, Any]


def resolve(source: str | Path | Run, overrides: Overrides = ()) -> Run:
    """The configuration that a recipe's name, a YAML file, a folder of pictures or a run directory stands for.

    Raises:
        ConfigError, DataError: naming the key, file or folder that is wrong.
    """
    return settled(source, overrides)[0]


def settled(source: str | Path | Run, overrides: Overrides) -> tuple[Run, list[str]]:
    """The configuration, and a line for each limit of the source that a limit among the overrides replaced."""
    asked = configuration.with_overrides({}, overrides)
    base, where = _plain(source, asked)
    base, lines = replaced(base, asked)
    return configuration.parse(Run, configuration.with_overrides(base, overrides), where=where), lines


def is_preset(source: str | Path | Run) -> bool:
    """Whether the configuration is chosen from the data themselves: `source` is pictures, and no recipe, run or YAML file."""
    if isinstance(source, Run) or str(source) in RECIPES or Path(source).suffix in (".yaml", ".yml"):
        return False
    return not (Path(source) / "config.yaml").is_file()


def _plain(source: str | Path | Run, asked: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What `source` says by itself, and where; where it is pictures, what is asked for besides decides more than itself."""
    if isinstance(source, Run):
        return configuration.plain(source), source.name
    path = Path(source)
    refuse_diffusers(path)
    if (path / "config.yaml").is_file():
        written = configuration.as_before(Run, configuration.load_yaml_file(path / "config.yaml"))
        return found_again(written, path), str(path / "config.yaml")
    if str(source) in RECIPES:
        return configuration.plain(recipe(str(source))), str(source)
    if path.suffix in (".yaml", ".yml"):
        data = configuration.load_yaml_file(path)
        name = data.pop("recipe", None)
        below = {} if name is None else _plain(str(name), configuration.merged(data, asked))[0]
        return configuration.merged(replaced(below, data)[0], data), str(path)
    if files.exists(str(source)) or str(source).startswith("hub:") or str(source) in BUILT_IN:
        return configuration.plain(_chosen(source, asked).run), str(source)
    return configuration.plain(recipe(str(source))), str(source)


def _predicted(run: Run, model: Model, dataset: Dataset, facts: Facts) -> list[str]:
    stages, images = predict(run, model, dataset, facts), len(dataset.training)
    verdict = [finding.line() for finding in findings(stages, images=images, machine=Machine.here())]
    return [*(line for stage in stages for line in stage.lines()), *verdict]


def reasons(source: str | Path | Run, overrides: Overrides) -> list[str]:
    """Why a preset is as it is; [] for what is no preset."""
    if not is_preset(source):
        return []
    return [f"chosen: {reason}" for reason in _chosen(source, configuration.with_overrides({}, overrides)).reasons]


def preset(place: str, overrides: Overrides, listing: Listing) -> Run:
    """The configuration that is chosen for a listed source, with settings laid over it."""
    asked = configuration.with_overrides({}, overrides)
    base = configuration.plain(_chosen(place, asked, listing).run)
    return configuration.parse(Run, configuration.with_overrides(base, overrides), where=place)


def _chosen(source: str | Path | Run, asked: Mapping[str, Any], listing: Listing | None = None) -> Choice:
    """The preset of a source; settings of its images, or an autoencoder, decide more than themselves."""
    data: Any = asked.get("data")
    data = data if isinstance(data, dict) else {}
    known: dict[str, Any] = {
        name: data[name] for name, legal in SETTLED.items() if isinstance(data.get(name), int) and data[name] in legal
    }
    listing = source_at(str(source)).listing() if listing is None else listing
    if data.get("frames") in ("all", "max"):
        listing = framed(listing, data["frames"])
    chosen = partial(choose, str(source), listing, resolution=_sides(data), **known)
    if "autoencoder" not in asked:
        return chosen()
    plain = configuration.merged(configuration.plain(chosen().run), {"autoencoder": asked["autoencoder"]})
    return chosen(space=configuration.parse(Run, plain, where=str(source)).autoencoder)


def _sides(data: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width, if they are set to something that they can be; what cannot be is refused when the whole is read."""
    resolution, size = data.get("resolution"), data.get("size")
    match size if isinstance(size, list | tuple) else [resolution, resolution]:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None


def parameters(run: Run) -> int:
    """Learned numbers in a run's model, its conditioner aside; nothing is built."""
    channels = run.autoencoder.layout(run.data.channels, None).channels
    with torch.device("meta"):
        network = run.network.build(image_channels=channels, context=NO_CONTEXT)
    return count(network.parameters())


def facts_of(run: Run, dataset: Dataset, place: Path | None = None) -> Facts:
    """What the run's conditioner must know of its training set. `place` is the run's, where it has one."""
    captions = (text for position in dataset.training for text in dataset.entries[position].captions)
    attributes = dataset.layers.attributes if run.conditioner.attributes is not None else None
    means, deviations = attributes.moments(dataset.training) if attributes else ((), ())
    return Facts(
        channels=run.data.channels,
        categories=dataset.categories,
        words=() if run.conditioner.text is None else run.conditioner.text.words(captions),
        attributes=attributes.names if attributes else (),
        means=means,
        deviations=deviations,
        dimensions=dataset.layers.dimensions if run.conditioner.points is not None else 0,
        augmentation=run.data.augment.labels,
        factor=run.autoencoder.layout(run.data.channels, place).factor,
        bits=run.data.bits,
        untrained=untrained(dataset),
        value_range=dataset.scale.range,
        alpha=dataset.alpha if run.data.channels in (2, 4) else "straight",
    )


def untrained(dataset: Dataset) -> tuple[str, ...]:
    """Categories that no training image has."""
    counts = np.bincount(dataset.labels.numpy()[dataset.training].clip(min=-1) + 1, minlength=len(dataset.categories) + 1)
    return tuple(name for name, count in zip(dataset.categories, counts[1:], strict=True) if not count)


def build_model(run: Run, facts: Facts, place: Path | None = None) -> Model:
    """The untrained model; its initial weights depend on `run.seed` and the facts only. `place` is the run's, where it has one."""
    channels = run.autoencoder.layout(run.data.channels, place).channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        conditioner = run.conditioner.build(facts, encoder=text_encoder)
        network = run.network.build(image_channels=channels, context=conditioner.sizes)
        return Model(network, conditioner, run.denoiser)


def text_encoder(config: PretrainedTextConfig) -> TextEncoder:
    """A pretrained text encoder whose embeddings are kept on disk."""
    encoder = TextEncoder(config, files.cache_folder() / "encoders")
    return replace(encoder, known=EmbeddingStore(encoder.identity))


def open_data(run: Run) -> Dataset:
    """Index the run's data, showing progress."""
    require_there(run)
    with ProgressBar("reading pictures") as bar:
        dataset = index(
            run.data,
            layers=run.conditioner.reads,
            on_progress=lambda done, total: bar.update(done / total, f"{done} of {total}"),
        )
        bar.say(dataset.ledger.line())
        for remark in dataset.ledger.remarks:
            bar.say(remark)
        for reject in dataset.rejects[:REJECTS_SHOWN]:
            bar.say(f"  left out {reject.name}: {reject.reason}")
        if len(dataset.rejects) > REJECTS_SHOWN:
            bar.say(f"  and {len(dataset.rejects) - REJECTS_SHOWN} more, all of which are in data.json")
        for kind, names in dataset.notes.items():
            bar.say(change(kind, names))
        groups = np.bincount(dataset.clusters)
        if (groups > 1).any():
            bar.say(
                f"{groups[groups > 1].sum()} pictures have duplicates or near-duplicates; training and hold-out share none of them"
            )
        for remark in dataset.remarks:
            bar.say(remark)
        if len(dataset.holdout) < ROUGH:
            bar.say(
                f"only {len(dataset.holdout)} held out: figures on them are rough, and copying is hard to notice; more images help"
            )
        if run.conditioner.attributes is not None and (left_out := dataset.layers.attributes.left_out):
            bar.say(
                f"attributes: the {len(dataset.layers.attributes.names)} most frequent are read, {left_out} rarer ones are not"
            )
        if dataset.crop_loss > 0.1:
            bar.say(f"cropping cuts away {dataset.crop_loss:.0%} of the pictures' area; data.buckets keeps more of it")
    return dataset


def train(source: str | Path | Run, *, overrides: Overrides = (), run: str | Path | None = None) -> Path:
    """Train from a recipe, a YAML file or a folder of pictures; returns the run directory.

    Args:
        overrides: settings as a mapping or as "a.b=c" strings.
        run: the new run's directory; by default runs/<name>, numbered if taken.
    """
    if run is not None:
        RunDirectory.require_free(Path(run))
    settings, lines = settled(source, overrides)
    settings = with_whole_paths(settings)
    if run is None:
        RunDirectory.require_free(_free(Path("runs") / settings.name))
    for line in lines:
        console().print(line, markup=False)
    dataset = open_data(settings)
    if is_preset(source):
        facts = facts_of(settings, dataset)
        lines = [
            *reasons(source, overrides),
            *_predicted(settings, build_model(settings, facts), dataset, facts),
        ]
        console().print("\n".join([*lines, "more about the data: sfumato data check " + str(source)]), markup=False)
    directory = RunDirectory.create(Path(run) if run is not None else _free(Path("runs") / settings.name))
    with directory.locked():
        directory.write_status("preparing", 0)
        facts, model = _built(settings, dataset, directory)
        for line in cut_captions(dataset, model.conditioner):
            console().print(line, markup=False)
        _describe(settings, dataset, directory)
        _trainer(settings, dataset, directory, facts, model).run()
    return directory.path


def resume(path: str | Path, *, overrides: Overrides = ()) -> Path:
    """Go on with a run from its newest whole checkpoint, bit for bit; overrides are shown as a difference."""
    directory = RunDirectory.existing(Path(path))
    with directory.locked():
        trainer = _resumed(directory, overrides)
        step = trainer.state.counters.step
        if trainer.finished and directory.status().get("state") == "finished":
            console().print(
                f"finished already, at step {step}; to go on, raise its budget: sfumato resume {path} budget.minutes=..."
            )
            return directory.path
        console().print(f"resuming at step {step}")
        trainer.run()
    return directory.path


def _resumed(directory: RunDirectory, overrides: Overrides) -> Trainer:
    """The trainer as its newest checkpoint left it; what cannot go on is refused before the run's description is touched."""
    before = with_whole_paths(resolve(directory.path))
    settings = with_whole_paths(resolve(directory.path, overrides))
    screen = console()
    for line in configuration.differences(configuration.plain(before), configuration.plain(settings)):
        screen.print(f"changed on resume: {line}", markup=False)
    dataset = open_data(settings)
    facts, model = _built(settings, dataset, directory)
    if directory.status().get("state") == "preparing":
        with directory.unchanged_if_refused():
            _describe(settings, dataset, directory)
            return _trainer(settings, dataset, directory, facts, model)
    trainer = _trainer(settings, dataset, directory, facts, model)
    for warning in trainer.resume():
        screen.print(f"warning: {warning}", markup=False)
    directory.require_space(trainer.disk_bytes())
    _describe(settings, dataset, directory)
    return trainer


def _built(settings: Run, dataset: Dataset, directory: RunDirectory) -> tuple[Facts, Model]:
    """The untrained model; what the settings lack is said here, before anything is done."""
    facts = facts_of(settings, dataset, directory.path)
    model = with_auxiliary(settings, build_model(settings, facts, directory.path))
    require(model.network, settings.precision)
    if settings.compile == "on":
        require_compiler()
    _say_margins(model.network, dataset, facts.factor)
    return facts, model


def _describe(settings: Run, dataset: Dataset, directory: RunDirectory) -> None:
    """Write down what the run is."""
    directory.config.write_text(configuration.dump_yaml(configuration.plain(settings)))
    directory.write_json("data.json", {**dataset.summary(), FROM_RUN: from_run(settings, directory.path)})
    directory.write_environment(sfumato=__version__, commit=commit())


def _trainer(settings: Run, dataset: Dataset, directory: RunDirectory, facts: Facts, model: Model) -> Trainer:
    """The diffusion model's, once there is an autoencoder to work with; finished stages are not repeated."""
    autoencoder, dataset = settings.autoencoder.prepared(dataset, directory, pixels=settings.sees_pictures)
    console().print(
        f"{directory.path}: {len(dataset.training)} pictures to learn from, {len(dataset.holdout)} held out, "
        f"{len(dataset.categories) or 'no'} categories, {dataset.image_shape[1]} px; {describe(model)}",
        markup=False,
    )
    return diffusion_trainer(
        settings, model=model, autoencoder=autoencoder, dataset=dataset, directory=directory, facts=facts,
        pinned=configuration.plain(settings),
    )  # fmt: skip


def _say_margins(network: Backbone, dataset: Dataset, factor: int) -> None:
    """Say which sizes cost the network much more than a size near by."""
    shapes = dataset.config.pixel_format().shapes
    for height, width in (shapes[number] for number in np.unique(dataset.shapes)):
        multiple = network.multiple * factor
        if (more := margin(-(-height // factor), -(-width // factor), network.multiple)) > MARGIN_SAID:
            console().print(
                f"images of {height} x {width} are padded to multiples of {multiple} inside the network, {more:.0%} more work than at "
                f"{height // multiple * multiple or multiple} x {width // multiple * multiple or multiple}, pixel for pixel",
                markup=False,
            )


def _free(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))]
    return next(candidate for candidate in candidates if not candidate.exists())
