"""From a name, a file or a folder to a training run, and from a run back to a pipeline."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from sfumato import config as configuration
from sfumato.condition import NO_CONTEXT
from sfumato.conditioners import Facts, PretrainedTextConfig, TextEncoder, Words
from sfumato.data import Dataset, Listing, files, index, source_at
from sfumato.data.embeddings import EmbeddingStore
from sfumato.data.frames import framed
from sfumato.data.sources.find import BUILT_IN
from sfumato.data.values import MAX_BANDS
from sfumato.errors import ConfigError, ShapeError
from sfumato.networks import DiT, UNet
from sfumato.nn.compiling import require_compiler
from sfumato.observability.progress import ProgressBar, console
from sfumato.pipeline import Model
from sfumato.recipes.assembly import diffusion_trainer, with_auxiliary
from sfumato.recipes.builtin import RECIPES, recipe
from sfumato.recipes.prediction import predict
from sfumato.recipes.presets import Choice, choose
from sfumato.recipes.run import Run
from sfumato.training import Trainer
from sfumato.training.precision import require
from sfumato.training.run_directory import RunDirectory

MOST_WORDS = 50_000
SETTLED: dict[str, Container[int]] = {"resolution": range(1, 1 << 20), "channels": range(1, MAX_BANDS + 1), "bits": (8, 16)}
Overrides = Sequence[str] | Mapping[str, Any]


def resolve(source: str | Path | Run, overrides: Overrides = ()) -> Run:
    """The configuration that a recipe's name, a YAML file, a folder of pictures or a run directory stands for.

    Raises:
        ConfigError, DataError: naming the key, file or folder that is wrong.
    """
    base, where = _plain(source, configuration.with_overrides({}, overrides))
    return configuration.parse(Run, configuration.with_overrides(base, overrides), where=where)


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
    if (path / "config.yaml").is_file():
        return configuration.load_yaml_file(path / "config.yaml"), str(path / "config.yaml")
    if str(source) in RECIPES:
        return configuration.plain(recipe(str(source))), str(source)
    if path.suffix in (".yaml", ".yml"):
        data = configuration.load_yaml_file(path)
        name = data.pop("recipe", None)
        below = {} if name is None else _plain(str(name), configuration.merged(data, asked))[0]
        return configuration.merged(below, data), str(path)
    if files.exists(str(source)) or str(source).startswith("hub:") or str(source) in BUILT_IN:
        return configuration.plain(_chosen(source, asked).run), str(source)
    return configuration.plain(recipe(str(source))), str(source)


def describe(source: str | Path | Run, *, overrides: Overrides = ()) -> str:
    """The configuration as YAML, with the reasons for it and what it will take, for `train --dry-run`."""
    run = resolve(source, overrides)
    dataset = open_data(run)
    facts = facts_of(run, dataset)
    model = build_model(run, facts)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    said = [
        f"{len(dataset.training)} pictures to learn from, {len(dataset.holdout)} held out, {len(dataset.rejects)} left out",
        f"{len(dataset.categories) or 'no'} categories; {parameters / 1e6:.2f}M parameters",
    ]
    lines = [*_reasons(source, overrides), *said, *_predicted(run, model, dataset, facts)]
    return "\n".join([*(f"# {line}" for line in lines), configuration.dump_yaml(configuration.plain(run))])


def _predicted(run: Run, model: Model, dataset: Dataset, facts: Facts) -> list[str]:
    return [line for found in predict(run, model, dataset, facts) for line in found.lines(len(dataset.training))]


def _reasons(source: str | Path | Run, overrides: Overrides) -> list[str]:
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
    data = asked.get("data")
    given = {name: value for name, value in data.items() if name in SETTLED} if isinstance(data, dict) else {}
    known: dict[str, Any] = {name: value for name, value in given.items() if isinstance(value, int) and value in SETTLED[name]}
    listing = source_at(str(source)).listing() if listing is None else listing
    if isinstance(data, dict) and data.get("frames") in ("all", "max"):
        listing = framed(listing, data["frames"])
    chosen = partial(choose, str(source), listing, **known)
    if "autoencoder" not in asked:
        return chosen()
    plain = configuration.merged(configuration.plain(chosen().run), {"autoencoder": asked["autoencoder"]})
    return chosen(space=configuration.parse(Run, plain, where=str(source)).autoencoder)


def parameters(run: Run) -> int:
    """Learned numbers in a run's model, its conditioner aside; nothing is built."""
    channels = run.autoencoder.layout(run.data.channels, None).channels
    with torch.device("meta"):
        network = run.network.build(image_channels=channels, context=NO_CONTEXT)
    return sum(parameter.numel() for parameter in network.parameters())


def facts_of(run: Run, dataset: Dataset, place: Path | None = None) -> Facts:
    """What the run's conditioner must know of its training set. `place` is the run's, where it has one."""
    captions = (text for position in dataset.training for text in dataset.entries[position].captions)
    values = dataset.layers.values[torch.from_numpy(dataset.training)]
    means = values.nanmean(0)
    return Facts(
        channels=run.data.channels,
        categories=dataset.categories,
        words=Words.fitted(captions, most=MOST_WORDS).vocabulary if run.conditioner.text is not None else (),
        attributes=dataset.layers.attributes,
        means=tuple(means.tolist()),
        deviations=tuple((values - means).square().nanmean(0).sqrt().tolist()),
        dimensions=dataset.layers.dimensions if run.conditioner.points is not None else 0,
        augmentation=run.data.augment.labels,
        factor=run.autoencoder.layout(run.data.channels, place).factor,
        bits=run.data.bits,
        value_range=dataset.scale.range,
        alpha=dataset.alpha if run.data.channels in (2, 4) else "straight",
    )


def build_model(run: Run, facts: Facts, place: Path | None = None) -> Model:
    """The untrained model; its initial weights depend on `run.seed` and the facts only. `place` is the run's, where it has one."""
    channels = run.autoencoder.layout(run.data.channels, place).channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        conditioner = run.conditioner.build(facts, encoder=_encoder)
        network = run.network.build(image_channels=channels, context=conditioner.sizes)
        return Model(network, conditioner, run.denoiser)


def _encoder(config: PretrainedTextConfig) -> TextEncoder:
    """A pretrained text encoder whose embeddings are kept on disk."""
    encoder = TextEncoder(config, files.cache_folder() / "encoders")
    return replace(encoder, known=EmbeddingStore(encoder.identity))


def open_data(run: Run) -> Dataset:
    """Index the run's data, showing progress."""
    with ProgressBar("reading pictures") as bar:
        dataset = index(
            run.data,
            layers=run.conditioner.reads,
            on_progress=lambda done, total: bar.update(done / total, f"{done} of {total}"),
        )
        if dataset.rejects:
            bar.say(f"{len(dataset.rejects)} picture(s) left out, listed in data.json:")
            for reject in dataset.rejects[:10]:
                bar.say(f"  {reject.name}: {reject.reason}")
        for remark in dataset.remarks:
            bar.say(remark)
        for kind, names in dataset.notes.items():
            bar.say(f"{len(names)} {kind.replace('_', ' ')}, e.g. {names[0]}")
        groups = np.bincount(dataset.clusters)
        if (groups > 1).any():
            bar.say(
                f"{groups[groups > 1].sum()} pictures have duplicates or near-duplicates; training and hold-out share none of them"
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
    settings = resolve(source, overrides)
    dataset = open_data(settings)
    if is_preset(source):
        facts = facts_of(settings, dataset)
        lines = [
            *_reasons(source, overrides),
            *_predicted(settings, build_model(settings, facts), dataset, facts),
        ]
        console().print("\n".join([*lines, "more about the data: sfumato data check " + str(source)]), markup=False)
    directory = RunDirectory.create(Path(run) if run is not None else _free(Path("runs") / settings.name))
    with directory.locked():
        directory.write_status("preparing", 0)
        facts, model = _built(settings, dataset, directory)
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
    before = resolve(directory.path)
    settings = resolve(directory.path, overrides)
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
    _require_sides(cast(UNet | DiT, model.network), dataset, facts.factor)
    return facts, model


def _describe(settings: Run, dataset: Dataset, directory: RunDirectory) -> None:
    """Write down what the run is."""
    directory.config.write_text(configuration.dump_yaml(configuration.plain(settings)))
    directory.write_json("data.json", dataset.summary())
    directory.write_environment()


def _trainer(settings: Run, dataset: Dataset, directory: RunDirectory, facts: Facts, model: Model) -> Trainer:
    """The diffusion model's, once there is an autoencoder to work with; finished stages are not repeated."""
    autoencoder, dataset = settings.autoencoder.prepared(dataset, directory, pixels=settings.sees_pictures)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console().print(
        f"{directory.path}: {len(dataset.training)} pictures to learn from, {len(dataset.holdout)} held out, "
        f"{len(dataset.categories) or 'no'} categories, {dataset.image_shape[1]} px; {parameters / 1e6:.2f}M parameters",
        markup=False,
    )
    return diffusion_trainer(
        settings, model=model, autoencoder=autoencoder, dataset=dataset, directory=directory, facts=facts,
        pinned=configuration.plain(settings),
    )  # fmt: skip


def _require_sides(network: UNet | DiT, dataset: Dataset, factor: int) -> None:
    """Raise ConfigError unless the network takes pictures of every shape, before an autoencoder is trained for it."""
    shapes = dataset.config.pixel_format().shapes
    for height, width in (shapes[number] for number in np.unique(dataset.shapes)):
        if height % factor or width % factor:
            continue  # which the autoencoder refuses
        try:
            network.require_sides(height // factor, width // factor)
        except ShapeError as error:
            latents = f", which are latents of {height // factor} x {width // factor}" if factor > 1 else ""
            raise ConfigError(
                f"pictures of {height} x {width}{latents}: {error.what}",
                where="data.resolution",
                mend=f"{error.mend}; {factor} times as large in pixels, also for data.buckets.step"
                if factor > 1
                else error.mend,
            ) from None


def _free(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))]
    return next(candidate for candidate in candidates if not candidate.exists())
