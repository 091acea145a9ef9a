"""The preparation of a run: its dataset, conditioning information and untrained model."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sfumato.condition import NO_CONTEXT
from sfumato.conditioners import ConditioningInfo
from sfumato.data import Dataset, Listing, index, is_indexed, prepare_by, prepare_part
from sfumato.data.executors import Cluster, run_on_cluster
from sfumato.data.holdout import MIN_RELIABLE_HOLDOUT_IMAGES, place_of, too_few_images
from sfumato.data.ledger import describe_note
from sfumato.data.recorded_names import FILE
from sfumato.distributed import World, current
from sfumato.errors import DataError
from sfumato.evaluation.extractors import extractor
from sfumato.generation.diffusion_model import Model
from sfumato.networks import Backbone
from sfumato.networks.checks import padding_overhead
from sfumato.networks.perceptual import Features
from sfumato.nn.compiling import require_compiler
from sfumato.observability.progress import ProgressBar, console
from sfumato.observability.sinks import require_sinks
from sfumato.recipes.model import build_model as build_model
from sfumato.recipes.model import text_encoder as text_encoder
from sfumato.recipes.paths import require_there
from sfumato.recipes.run import Run
from sfumato.recipes.run_origin import require_leave
from sfumato.runs.base import base_loader, inherited_info, read_base, require_base
from sfumato.runs.changed_data import Continued
from sfumato.runs.initial_adapter import begin_adapter
from sfumato.runs.prior_images import given_prior
from sfumato.training.parameters import copy_sharing_frozen, count, require_trainable
from sfumato.training.precision import default_device, require

REJECTS_SHOWN = 5
GROUPS_SHOWN, GROUP_NAMES = 3, 4  # of near-duplicates
MIN_PADDING = 0.1  # extra work for padding, as a fraction, above which it is reported


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that is ready to begin.

    Attributes:
        run: the configuration.
        dataset: the indexed dataset.
        info: what the model's conditioner must know about the training set.
        model: the untrained model, on the CPU; training uses a copy, which shares frozen parameters.
        prior: images of what the base knows, if a user gives them.
    """

    run: Run
    dataset: Dataset
    info: ConditioningInfo
    model: Model
    prior: Dataset | None = None

    def trainable_model(self) -> Model:
        """Copy the untrained model to the default device, and add the auxiliary modules.

        Frozen parameters are not copied: they move to the device, and are the model's own.

        Raises:
            ConfigError: if the encoder of an alignment loss is missing.
        """
        return with_auxiliary(self.run, copy_sharing_frozen(self.model))


def prepare(
    run: Run,
    *,
    listing: Listing | None = None,
    directory: Path | None = None,
    begins: bool = True,
    continued: Continued | None = None,
) -> PreparedRun:
    """Index the data and build the model.

    A run that cannot work is refused here, before training begins.

    Args:
        listing: the listing of the run's source, if it was already made.
        directory: the run's directory, if it has one.
        begins: whether training begins with this model; if not, a checkpoint will be loaded into
            it, and the first values of its adapter are not needed.
        continued: what a run was trained with that goes on.
    Raises:
        ConfigError, DataError: naming what is wrong.
    """
    run.adapter.require_packages()
    dataset = open_data(run, listing)
    if continued is not None:
        run, dataset = continued.adjusted(run, dataset, open_data)
    require_base(run)
    base = read_base(run.base) if run.base else None
    info = conditioning_info(run, dataset, directory)
    if base is not None:
        info = inherited_info(info, base.info)
    if continued is not None:
        info = continued.carried(run, dataset, info)
    model = build_model(run, info, directory, load_base=base_loader(run, base))
    require_trainable(model)
    if begins:
        begin_adapter(run, model)
    captions = dataset.captions(dataset.training)
    run.adapter.require_data(model.conditioner, captions)
    for remark in run.adapter.remarks(model.network):
        console().print(remark, markup=False)
    require(model.network, run.precision)
    require_sinks(run.log.sinks)
    if run.compile == "on":
        require_compiler()
    prior = given_prior(run, info, dataset.image_shape)
    return PreparedRun(run=run, dataset=dataset, info=info, model=model, prior=prior)


def prepare_in_turn(
    run: Run,
    *,
    listing: Listing | None = None,
    directory: Path | None = None,
    begins: bool = True,
    continued: Continued | None = None,
) -> PreparedRun:
    """Prepare a run in all of its processes, one after another; see `prepare`.

    Several machines decode a share of the images each, before the first one indexes them.
    """
    world = current()
    if world.machines > 1:
        world.together(lambda: _decode_share(run, world, directory))
    return world.in_turn(
        lambda: prepare(
            run, listing=listing, directory=directory, begins=begins, continued=continued
        )
    )


def _decode_share(run: Run, world: World, directory: Path | None) -> None:
    """Decode this machine's share of the images, unless the run's data are indexed already.

    What is wrong with the data is said when they are indexed.
    """
    if world.local_rank or run.data.cache == "off":
        return
    with suppress(DataError):
        if not is_indexed(run.data, annotations=run.conditioner.names):
            decode_part(run, world.machine + 1, world.machines, directory=directory)


def _require_data(run: Run, directory: str | Path | None) -> None:
    """Refuse data that are missing, or that a run from elsewhere would fetch without leave."""
    if directory is not None and (Path(directory) / "config.yaml").is_file():
        require_leave(Path(directory), run, data=True)
    require_there(run)


def decode_part(
    run: Run, number: int, count: int, *, directory: str | Path | None = None
) -> tuple[int, int]:
    """Decode one of `count` parts of the run's data into the cache, and show progress.

    Args:
        directory: as of `open_data`.
    Returns:
        how many images it has, and how many of them cannot be used.
    """
    _require_data(run, directory)
    with ProgressBar(f"decoding part {number}/{count}") as bar:
        return prepare_part(
            run.data,
            number,
            count,
            on_progress=lambda done, total: bar.update(done / total, f"{done} of {total}"),
        )


def decode_on_cluster(
    run: Run, cluster: Cluster, address: str, *, directory: str | Path | None = None
) -> tuple[int, int]:
    """Decode the run's data into the cache by the workers of a cluster, and show progress.

    Args:
        address: of the cluster; "" starts one on this machine.
        directory: as of `open_data`.
    Returns:
        how many images there are, and how many of them cannot be used.
    """
    _require_data(run, directory)
    executor = partial(run_on_cluster, cluster, address=address)
    with ProgressBar(f"decoding by {cluster}") as bar:
        return prepare_by(
            executor,
            run.data,
            on_progress=lambda done, total: bar.update(done / total, f"{done} of {total}"),
        )


def open_data(
    run: Run, listing: Listing | None = None, *, directory: str | Path | None = None
) -> Dataset:
    """Index the run's data, and show progress.

    Args:
        listing: that of its source, if it was already made.
        directory: the run's directory, if it has one: of a run from elsewhere, data are not fetched
            without leave.
    """
    _require_data(run, directory)
    with ProgressBar("reading images") as bar:
        dataset = index(
            run.data,
            annotations=run.conditioner.names,
            listing=listing,
            on_progress=lambda done, total: bar.update(done / total, f"{done} of {total}"),
        )
        bar.say(dataset.ledger.line())
        if dataset.is_kept:
            bar.say(
                "no file has changed since the images were indexed, according to the file system "
                "(data.verify=always reads them all again)"
            )
        for remark in dataset.ledger.remarks:
            bar.say(remark)
        for reject in dataset.rejects[:REJECTS_SHOWN]:
            bar.say(f"  left out {reject.name}: {reject.reason}")
        if len(dataset.rejects) > REJECTS_SHOWN:
            bar.say(
                f"  and {len(dataset.rejects) - REJECTS_SHOWN} more; a run lists all in data.json, or in {FILE}"
            )
        for kind, names in dataset.notes.items():
            bar.say(describe_note(kind, names))
        groups = np.bincount(dataset.clusters)
        if (groups > 1).any():
            bar.say(
                f"{groups[groups > 1].sum()} images have duplicates or near-duplicates; training "
                f"and hold-out share none of them: {_named_groups(dataset)}"
            )
        for remark in dataset.remarks:
            bar.say(remark)
        for line in (_half_line(dataset), _holdout_line(run, dataset)):
            if line:
                bar.say(line)
        if run.conditioner.attributes is not None and (
            left_out := dataset.annotations.attributes.left_out
        ):
            bar.say(
                f"attributes: the {len(dataset.annotations.attributes.names)} most frequent are read, "
                f"{left_out} rarer ones are not"
            )
        if dataset.crop_loss > 0.1:
            bar.say(
                f"cropping cuts away {dataset.crop_loss:.0%} of the images' area; data.buckets "
                "keeps more of it"
            )
    return dataset


def _half_line(dataset: Dataset) -> str:
    """Return a line where training is on half of the images; "" where it is on all."""
    if dataset.config.half == "off":
        return ""
    missing = categories_without_training_images(dataset)
    return (
        f"data.half={dataset.config.half}: {len(dataset.training):,} of {len(dataset.whole):,} "
        "training images; the same images are held out"
        + (f"; no image of {', '.join(missing)} is among them" if missing else "")
    )


def _holdout_line(run: Run, dataset: Dataset) -> str:
    """Return a line where few images are held out, or none; "" where there are enough.

    Raises:
        DataError: if a run from scratch has only one image, near-duplicates counted as one.
    """
    count = len(dataset.holdout)
    if count >= MIN_RELIABLE_HOLDOUT_IMAGES:
        return ""
    if count:
        return (
            f"only {count} held out: figures on them are rough, and copying is hard to notice; "
            "more images help"
        )
    wanted = run.data.holdout > 0
    if wanted and not run.has_base:
        raise too_few_images(1, dataset.entries, dataset.rejects, where=place_of(run.data.source))
    reason = "data.holdout=0"
    if wanted:
        single = len(dataset.entries) == 1
        reason = "there is one image" if single else "all images are copies or look-alikes of one"
    return (
        f"nothing is held out ({reason}): neither the gain on new images nor memorization can be "
        "measured, so look at the samples"
    )


def _named_groups(dataset: Dataset) -> str:
    """Name the images of the first groups of near-duplicates."""
    alike = np.flatnonzero(np.bincount(dataset.clusters) > 1)
    shown = [np.flatnonzero(dataset.clusters == group) for group in alike[:GROUPS_SHOWN]]
    names = [
        ", ".join(dataset.entries[i].name for i in group[:GROUP_NAMES])
        + (", ..." if len(group) > GROUP_NAMES else "")
        for group in shown
    ]
    more = len(alike) - len(names)
    return "; ".join(names) + (f"; and {more} more groups" if more else "")


def conditioning_info(
    run: Run, dataset: Dataset, directory: Path | None = None
) -> ConditioningInfo:
    """Return what the run's conditioner must know about its training set.

    `directory` is the run's directory, if it has one.
    """
    return ConditioningInfo(
        channels=run.data.channels,
        categories=dataset.categories,
        factor=run.autoencoder.latent_shape(run.data.channels, directory).factor,
        bits=run.data.bits,
        untrained=categories_without_training_images(dataset),
        value_range=dataset.scale.range,
        alpha=dataset.alpha if run.data.channels in (2, 4) else "straight",
        **run.conditioner.info_fields(dataset),
    )


def categories_without_training_images(dataset: Dataset) -> tuple[str, ...]:
    """Return the categories that no training image has."""
    counts = np.bincount(
        dataset.labels.numpy()[dataset.training].clip(min=-1) + 1,
        minlength=len(dataset.categories) + 1,
    )
    return tuple(
        name for name, count in zip(dataset.categories, counts[1:], strict=True) if not count
    )


def with_auxiliary(run: Run, model: Model) -> Model:
    """Move the model to the default device, and add the auxiliary modules.

    Raises:
        ConfigError: if the encoder of an alignment loss is missing.
    """
    device = default_device()

    def encoder(name: str) -> Features:
        features = extractor(name)
        return features.to(device) if isinstance(features, torch.nn.Module) else features

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model.auxiliary = run.auxiliary.build(model.network, encoder=encoder)
    return model.to(device)


def network_parameters(run: Run) -> int:
    """Count the parameters of a run's network, its conditioner aside, without allocating them."""
    return count(empty_network(run).parameters())


def empty_network(run: Run) -> Backbone:
    """Return a run's network, its conditioner aside, with parameters that are not allocated."""
    channels = run.autoencoder.latent_shape(run.data.channels, None).channels
    with torch.device("meta"):
        return run.network.build(image_channels=channels, context=NO_CONTEXT)


def print_padding_costs(network: Backbone, dataset: Dataset, factor: int) -> None:
    """Print which sizes of images cost the network much more than a size nearby."""
    shapes = dataset.config.pixel_format().shapes
    for height, width in (shapes[number] for number in np.unique(dataset.shapes)):
        multiple = network.multiple * factor
        if (
            more := padding_overhead(-(-height // factor), -(-width // factor), network.multiple)
        ) > MIN_PADDING:
            console().print(
                f"images of {height} x {width} are padded to multiples of {multiple} inside the "
                f"network, {more:.0%} more work than at "
                f"{height // multiple * multiple or multiple} x "
                f"{width // multiple * multiple or multiple}, pixel for pixel",
                markup=False,
            )
