"""The space that a run's diffusion model works in: pixels, or the latents of an autoencoder.

An autoencoder is trained, or a pretrained one is used. Its latents are measured, and the images are
encoded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato import config as configuration
from sfumato.autoencoders import (
    Autoencoder,
    Codec,
    KLAutoencoder,
    KLConfig,
    LatentAutoencoder,
    Pixels,
    Statistics,
    measure,
)
from sfumato.autoencoders import io as autoencoder_files
from sfumato.autoencoders.discriminator import PatchDiscriminator
from sfumato.config.bounds import Count
from sfumato.data import Dataset, PrecomputedLatents, to_float
from sfumato.data.array_cache import load_array, save_array
from sfumato.data.choice import choose_evenly
from sfumato.distributed import current
from sfumato.errors import CheckpointError, ConfigError
from sfumato.evaluation.distances import FEWEST, frechet_interval
from sfumato.evaluation.extractors import extractor
from sfumato.networks.perceptual import Features
from sfumato.observability.progress import ProgressBar, console
from sfumato.process.signals import poll
from sfumato.storage import checkpoint
from sfumato.storage.cache_folder import cache_folder
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import (
    Budget,
    LossesConfig,
    MuonConfig,
    OptimizerConfig,
    PreviewConfig,
    Reconstruction,
    Reconstructor,
    Trainer,
    TrainingConfig,
    ValidationConfig,
    encode_part,
    latents_kept,
    reconstruct,
    with_latents,
)
from sfumato.training.parameters import describe
from sfumato.training.precision import default_device

# folders in a run: of the autoencoder's own training, and of the trained autoencoder in it
FOLDER, FINAL = "autoencoder", "final"
MAX_MEASURED = 10_000  # images that the statistics of latents are measured on
BATCH = 64
DISK_FRACTION = 0.25  # of the free disk space that cached latents may take


def trained_folder(run: Path) -> Path:
    """Return the folder of a run's autoencoder."""
    return run / FOLDER / FINAL


class LatentShape(NamedTuple):
    """The channels of latents, and the factor by which their sides are smaller than the image's."""

    channels: int
    factor: int


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    """No autoencoder: the model works in pixels."""

    kind: ClassVar[str] = "pixels"

    def latent_shape(self, image_channels: int, run: Path | None) -> LatentShape:
        """Return the channels of the images, and the factor 1."""
        return LatentShape(image_channels, 1)

    def load(self, run: Path, image_channels: int) -> Autoencoder:
        """Return `Pixels`, the identity, as the autoencoder of a trained run."""
        return Pixels(image_channels)

    def placeholder(self, dataset: Dataset, *, pixels: bool) -> tuple[Autoencoder, Dataset]:
        """Return `Pixels` and the dataset as it is, to measure training steps."""
        return Pixels(dataset.config.channels), dataset

    def trial_trainers(self, dataset: Dataset, folder: Path) -> dict[str, Trainer]:
        """Return {}: nothing is trained before the diffusion model."""
        return {}

    def prepare(
        self, dataset: Dataset, directory: RunDirectory, *, pixels: bool
    ) -> tuple[Autoencoder, Dataset]:
        """Return `Pixels` and the dataset as it is."""
        return Pixels(dataset.config.channels), dataset

    def encode_part(self, dataset: Dataset, part: slice) -> int:
        """Return 0: nothing is encoded."""
        return 0


@dataclass(frozen=True, kw_only=True)
class TrainedAutoencoder(TrainingConfig):
    """An autoencoder trained on the run's own images before the diffusion model is.

    The statistics of its latents are measured and saved with it, so there is no scaling factor to
    choose.

    Attributes:
        network: size and shape of the autoencoder.
        losses: the losses that it is trained with.
        features: the frozen network of the perceptual loss: `auto`, `efficientnet-lite0`, `random`,
            or a file: see `evaluation.extractors.extractor`.
        augmented_copies: latents stored of each image, each of another augmentation, if images are
            augmented.
    """

    kind: ClassVar[str] = "trained"

    network: KLConfig = KLConfig()
    losses: LossesConfig = LossesConfig()
    features: str = "auto"
    augmented_copies: Count = 8
    batch_size: Count = 16
    budget: Budget = Budget(minutes=10)
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=4e-3, warmup_steps=100, muon=MuonConfig()
    )
    preview: PreviewConfig = PreviewConfig(num=16)

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        _require_copies(self.augmented_copies)
        if self.precision == "float8":
            raise ConfigError(
                "an autoencoder is convolutions, which have no float8",
                where="autoencoder.precision",
                hint="use auto or bfloat16",
            )

    def latent_shape(self, image_channels: int, run: Path | None) -> LatentShape:
        """Return the shape of the latents."""
        return LatentShape(self.network.latent_channels, self.network.factor)

    def load(self, run: Path, image_channels: int) -> Autoencoder:
        """Load the autoencoder of a trained run.

        Raises:
            CheckpointError: if it is not there.
        """
        return autoencoder_files.load(run / FOLDER / FINAL)

    def placeholder(self, dataset: Dataset, *, pixels: bool) -> tuple[Autoencoder, Dataset]:
        """Return an untrained autoencoder and the dataset with latents of zeros, to measure training
        steps.
        """
        codec = KLAutoencoder(self.network, image_channels=dataset.config.channels)
        return _with_zero_latents(codec, dataset, self.augmented_copies, pixels=pixels)

    def trial_trainers(self, dataset: Dataset, folder: Path) -> dict[str, Trainer]:
        """Return the autoencoder's trainer in a temporary folder, with minimal validation."""
        config = replace(
            self, validation=ValidationConfig(samples=1, bins=1), preview=PreviewConfig(num=1)
        )
        return {"autoencoder": config.trainer(dataset, RunDirectory.create(folder))}

    def prepare(
        self, dataset: Dataset, directory: RunDirectory, *, pixels: bool
    ) -> tuple[Autoencoder, Dataset]:
        """Return the trained autoencoder and the dataset with its latents.

        Finished parts are not repeated.
        """
        final = directory.path / FOLDER / FINAL
        if current().on_first(lambda: _intact(final) is not None):
            self._require_unchanged(directory.stage(FOLDER))
        else:
            self._train(dataset, directory.stage(FOLDER), final)
        autoencoder = autoencoder_files.load(final)
        return _encode(autoencoder, dataset, self.augmented_copies, directory, pixels=pixels)

    def encode_part(self, dataset: Dataset, part: slice) -> int:
        """Raise ConfigError: the autoencoder is trained by the run."""
        raise ConfigError(
            "images cannot be encoded ahead of training: the run trains its own autoencoder",
            where="autoencoder",
            hint="leave --encode out; several machines of a run share the encoding",
        )

    def _require_unchanged(self, stage: RunDirectory) -> None:
        """Raise ConfigError if the settings of a finished autoencoder have changed.

        The latents, and what is learned from them, belong to that autoencoder.
        """
        for newest in checkpoint.paths(stage.checkpoints):
            try:
                saved = checkpoint.configuration_of(newest)
            except CheckpointError:
                continue  # damaged, and not needed any more
            before = configuration.parse(TrainedAutoencoder, saved, where=str(newest))
            # affects encoding alone
            before = replace(before, augmented_copies=self.augmented_copies)
            changed = configuration.differences(
                configuration.plain(before), configuration.plain(self)
            )
            if changed:
                raise ConfigError(
                    "the autoencoder is trained already, and cannot be changed: "
                    f"{'; '.join(changed)}",
                    where="autoencoder",
                    hint="leave its settings as they are in config.yaml, or start a new run",
                )
            return

    def trainer(self, dataset: Dataset, stage: RunDirectory) -> Trainer:
        """Build the trainer of the autoencoder alone.

        Raises:
            ConfigError: if the images do not fit the autoencoder or its adversary.
        """
        _require_divisible(self.network.factor, dataset)
        device = default_device()
        adversarial, channels = self.losses.adversarial, dataset.config.channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            codec = KLAutoencoder(self.network, image_channels=channels)
            adversary = None
            if adversarial is not None:
                adversary = PatchDiscriminator(
                    channels, channels=adversarial.channels, layers=adversarial.layers
                )
        if adversary is not None and min(dataset.image_shape[1:]) < adversary.smallest:
            raise ConfigError(
                "the discriminator has too many layers for "
                f"{min(dataset.image_shape[1:])} px images",
                where="autoencoder.losses.adversarial.layers",
                hint=f"it needs {adversary.smallest} px; use fewer layers, or no adversary",
            )
        features = extractor(self.features)
        if isinstance(features, torch.nn.Module):
            features.to(device)
        task = Reconstruction(
            self,
            model=Reconstructor(codec, adversary).to(device),
            losses=self.losses,
            features=features,
            dataset=dataset,
            directory=stage,
        )
        return Trainer(
            self,
            task=task,
            dataset=dataset,
            directory=stage,
            saved_config=configuration.plain(self),
        )

    def _train(self, dataset: Dataset, stage: RunDirectory, final: Path) -> None:
        trainer = self.trainer(dataset, stage)
        say = console().print
        say(
            f"first its autoencoder: {describe(trainer.task.model.codec)}, perceptual loss by "
            f"{trainer.task.facts['features']}",
            markup=False,
        )
        if checkpoint.paths(stage.checkpoints):
            for warning in trainer.resume():
                say(f"warning: {warning}", markup=False)
        if not (trainer.finished and stage.status().get("state") == "finished"):
            trainer.run()
        current().on_first(partial(self._finish, trainer, dataset, final))

    def _finish(self, trainer: Trainer, dataset: Dataset, final: Path) -> None:
        """Measure and save the trained autoencoder."""
        codec = cast(Reconstructor, trainer.state.average).codec
        statistics = _measure_latents(codec, dataset)
        figures = trainer.validate()
        facts = {
            **_reconstruction_frechet(codec, dataset, cast(Reconstruction, trainer.task).features),
            "informative": statistics.informative.tolist(),
            "dead_channels": statistics.dead,
            "images_measured": min(MAX_MEASURED, len(dataset.training)),
            **{
                name.removeprefix("validation/ema/"): value
                for name, value in figures.items()
                if "/ema/" in name
            },
        }
        autoencoder_files.save(
            LatentAutoencoder(codec, statistics.mean, statistics.deviation),
            final,
            facts,
            manifest=True,
        )
        distance = (
            f"  rFD {facts['rfd']:.3g} [{facts['rfd_low']:.3g}, {facts['rfd_high']:.3g}] "
            f"(n={facts['rfd_images']}, {facts['rfd_features']})"
            if "rfd" in facts
            else ""
        )
        console().print(
            f"autoencoder: {trainer.task.summary(figures)}{distance}; {_describe_latents(statistics)}",
            markup=False,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainedAutoencoder:
    """A pretrained autoencoder, frozen.

    Attributes:
        path: a folder in diffusers' layout (AutoencoderKL, AutoencoderTiny, AutoencoderDC), or the
            file of a tiny one's encoder.
        decoder: the file of its decoder, in the second case.
        statistics: `measured` on the training set, or its `own` scaling factor.
        augmented_copies: latents stored of each image, each of another augmentation, if images are
            augmented.
        variant: which weights of the folder, where it has several: "fp16" for *.fp16.safetensors.
    """

    kind: ClassVar[str] = "pretrained"

    path: str
    decoder: str | None = None
    statistics: Literal["measured", "own"] = "measured"
    augmented_copies: Count = 8
    variant: str = ""

    def __post_init__(self) -> None:
        _require_copies(self.augmented_copies)

    def latent_shape(self, image_channels: int, run: Path | None) -> LatentShape:
        """Return the shape of the latents.

        It is read from the run's own copy, if there is one, since the original may be gone.
        """
        copy, autoencoder = None if run is None else run / FOLDER / FINAL, None
        if copy is not None and (copy / autoencoder_files.CONFIG).is_file():
            with suppress(CheckpointError):  # damaged: it is made again
                autoencoder = autoencoder_files.load(copy)
        if autoencoder is None:
            autoencoder = autoencoder_files.load(self.path, self.decoder, variant=self.variant)
        return LatentShape(autoencoder.latent_channels, autoencoder.factor)

    def load(self, run: Path, image_channels: int) -> Autoencoder:
        """Load the autoencoder of a trained run, which holds its own copy."""
        return autoencoder_files.load(run / FOLDER / FINAL)

    def placeholder(self, dataset: Dataset, *, pixels: bool) -> tuple[Autoencoder, Dataset]:
        """Return the autoencoder and the dataset with latents of zeros, to measure training steps."""
        return _with_zero_latents(
            autoencoder_files.load(self.path, self.decoder, variant=self.variant).codec,
            dataset,
            self.augmented_copies,
            pixels=pixels,
        )

    def trial_trainers(self, dataset: Dataset, folder: Path) -> dict[str, Trainer]:
        """Return {}: nothing is trained before the diffusion model."""
        return {}

    def prepare(
        self, dataset: Dataset, directory: RunDirectory, *, pixels: bool
    ) -> tuple[Autoencoder, Dataset]:
        """Return the run's copy of the autoencoder, and the dataset with its latents.

        The copy has the statistics of the run's own latents, unless `statistics` is `own`.
        """
        final = directory.path / FOLDER / FINAL
        copy = current().in_turn(partial(self._copy, final, dataset))
        return _encode(copy, dataset, self.augmented_copies, directory, pixels=pixels)

    def encode_part(self, dataset: Dataset, part: slice) -> int:
        """Encode a part of the images into the cache, ahead of training; return how many batches."""
        with tempfile.TemporaryDirectory() as folder:
            copy = self._copy(Path(folder) / FINAL, dataset).to(default_device())
            if not _have_room(copy, dataset, self.augmented_copies):
                raise ConfigError(
                    "the latents of all images need more than "
                    f"{DISK_FRACTION:.0%} of the free disk space, so that training would not use them",
                    where="SFUMATO_CACHE",
                    hint="free some space, or name a larger disk",
                )
            with ProgressBar("encoding images") as bar:
                return encode_part(
                    dataset,
                    copy,
                    identity=autoencoder_files.identity(copy),
                    variants=self.augmented_copies,
                    part=part,
                    on_progress=lambda done, total: bar.update(
                        done / total, f"{done} of {total} batches"
                    ),
                )

    def _copy(self, final: Path, dataset: Dataset) -> LatentAutoencoder:
        """Return the run's copy of the autoencoder, and make it if it is missing."""
        if (copy := _intact(final)) is None:
            autoencoder = autoencoder_files.load(self.path, self.decoder, variant=self.variant).to(
                default_device()
            )
            _require_divisible(autoencoder.factor, dataset)
            facts: dict[str, Any] = {"from": str(self.path)}
            if self.statistics == "measured":
                statistics = _measured(autoencoder, dataset)
                autoencoder = LatentAutoencoder(
                    autoencoder.codec, statistics.mean, statistics.deviation
                )
                facts |= {
                    "informative": statistics.informative.tolist(),
                    "dead_channels": statistics.dead,
                }
                console().print(
                    f"autoencoder {self.path}: {_describe_latents(statistics)}", markup=False
                )
            final.parent.mkdir(parents=True, exist_ok=True)
            autoencoder_files.save(autoencoder, final, facts, manifest=True)
            copy = autoencoder_files.load(final)
        return copy


AutoencoderConfig = PixelsConfig | TrainedAutoencoder | PretrainedAutoencoder


def _intact(final: Path) -> LatentAutoencoder | None:
    """Return a run's autoencoder; None if it is not there yet, or damaged and set aside.

    A damaged one is made again from what it was made of, which a checkpoint then compares with it.
    """
    if not final.exists():
        return None
    try:
        return autoencoder_files.load(final)
    except CheckpointError as error:
        aside = checkpoint.set_aside(final, "corrupt")
        console().print(
            f"warning: {error.args[0].splitlines()[0]} -- kept as {aside.name}; the autoencoder is "
            "made again",
            markup=False,
        )
        return None


def _require_copies(copies: int) -> None:
    if copies < 1:
        raise ConfigError(f"augmented_copies = {copies}", where="autoencoder", hint="use 1 or more")


def _require_divisible(factor: int, dataset: Dataset) -> None:
    """Raise ConfigError unless the sides of every shape of the images are multiples of `factor`."""
    for height, width in dataset.config.pixel_format().shapes:
        if height % factor or width % factor:
            raise ConfigError(
                f"images of {height} x {width} for an autoencoder that makes sides {factor} "
                "times smaller",
                where="autoencoder",
                hint=f"set data.resolution to a multiple of {factor}, or fewer "
                "autoencoder.network.channels",
            )


def _measured(autoencoder: LatentAutoencoder, dataset: Dataset) -> Statistics:
    """Return the statistics of a pretrained autoencoder's latents, which are kept: machines would
    measure them with other rounding, and find no latents of one another.
    """
    identity = hashlib.sha256(
        f"{autoencoder_files.identity(autoencoder)} {dataset.fingerprint}".encode()
    ).hexdigest()
    uses_cache = dataset.config.cache != "off"
    kept = load_array("latent-statistics", identity) if uses_cache else None
    if kept is None:
        found = _measure_latents(autoencoder.codec, dataset)
        kept = torch.stack([found.mean, found.deviation, found.informative]).cpu().numpy()
        if uses_cache:
            save_array("latent-statistics", identity, kept)
    device = next(autoencoder.codec.parameters()).device
    return Statistics(*torch.from_numpy(kept).to(device))


def _measure_latents(codec: Codec, dataset: Dataset) -> Statistics:
    """Measure the latents of up to MAX_MEASURED training images, spread over the set."""
    positions = dataset.training[
        np.linspace(0, len(dataset.training) - 1, min(MAX_MEASURED, len(dataset.training))).astype(
            int
        )
    ]
    device = next(codec.parameters()).device

    def images() -> Iterator[Tensor]:
        for shape in np.unique(dataset.shapes[positions]):
            chosen = positions[dataset.shapes[positions] == shape]
            for first in range(0, len(chosen), BATCH):
                poll()
                yield to_float(dataset.images(chosen[first : first + BATCH])[0]).to(device)

    return measure(codec, images())


@torch.no_grad()
def _reconstruction_frechet(
    codec: KLAutoencoder, dataset: Dataset, features: Features
) -> dict[str, Any]:
    """Return the Fréchet distance between held-out images and their reconstructions.

    Its 95 % interval is over the reconstructions. The number of images and the name of the features
    are returned with it; {} if too few are held out.
    """
    positions = choose_evenly(dataset.with_common_shape(dataset.holdout), MAX_MEASURED)
    if len(positions) < FEWEST:
        return {}
    pairs: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(positions), BATCH):
        poll()
        real = to_float(dataset.images(positions[first : first + BATCH])[0]).to(default_device())
        pairs.append((features.pooled(real).cpu(), features.pooled(reconstruct(codec, real)).cpu()))
    real, reconstructions = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    distance = frechet_interval(reconstructions, real)
    return {
        "rfd": distance.value,
        "rfd_low": distance.low,
        "rfd_high": distance.high,
        "rfd_images": len(positions),
        "rfd_features": features.name,
    }


def _describe_latents(statistics: Statistics) -> str:
    low, high = float(statistics.deviation.min()), float(statistics.deviation.max())
    dead = (
        f"latent channels {', '.join(map(str, statistics.dead))} are dead (near-zero variance)"
        if statistics.dead
        else "no dead channel"
    )
    return (
        f"per-channel standard deviation of latents from {low:.3g} to {high:.3g}, normalized to 1; "
        f"{dead}"
    )


def _with_zero_latents(
    codec: Codec, dataset: Dataset, variants: int, *, pixels: bool
) -> tuple[Autoencoder, Dataset]:
    _require_divisible(codec.factor, dataset)
    size = codec.latent_channels
    latents = LatentAutoencoder(codec, torch.zeros(size), torch.ones(size))
    _, height, width = dataset.image_shape
    blank = np.zeros((2 * size, height // codec.factor, width // codec.factor), np.float16)
    read_rows = partial(_repeat, blank)
    return latents, replace(
        dataset,
        latents=PrecomputedLatents(
            read_rows=read_rows, numbers=dataset.training_numbers, variants=variants, pixels=pixels
        ),
    )


def _repeat(blank: NDArray[np.float16], rows: Sized) -> NDArray[np.float16]:
    """Return `blank` once for each row.

    A function with a name can be passed to the processes that read ahead.
    """
    return np.broadcast_to(blank, (len(rows), *blank.shape)).copy()


def _encode(
    autoencoder: LatentAutoencoder,
    dataset: Dataset,
    variants: int,
    directory: RunDirectory,
    *,
    pixels: bool,
) -> tuple[Autoencoder, Dataset]:
    """Return the autoencoder on its device, and the dataset with its latents if there is room."""
    autoencoder = autoencoder.to(default_device())
    if not current().on_first(lambda: _stores_latents(autoencoder, dataset, variants, directory)):
        console().print(
            "latents are computed again for every batch: there is no room to store them, or "
            "data.cache is off",
            markup=False,
        )
        return autoencoder, dataset
    with ProgressBar("encoding images") as bar:
        return autoencoder, with_latents(
            dataset,
            autoencoder,
            identity=autoencoder_files.identity(autoencoder),
            variants=variants,
            pixels=pixels,
            on_progress=lambda done, total: bar.update(done / total, f"{done} of {total} batches"),
        )


def _stores_latents(
    autoencoder: LatentAutoencoder, dataset: Dataset, variants: int, directory: RunDirectory
) -> bool:
    """Return whether latents are stored on disk.

    This is decided once for a run, since stored latents are rounded and others are not.
    """
    decision = directory.path / FOLDER / "kept.json"
    if decision.is_file():
        with suppress(OSError, ValueError, TypeError, KeyError):  # damaged: it is decided again
            return bool(json.loads(decision.read_text())["kept"])
    store = dataset.config.cache != "off" and _have_room(autoencoder, dataset, variants)
    directory.write_json(f"{FOLDER}/kept.json", {"kept": store})
    return store


def _have_room(autoencoder: LatentAutoencoder, dataset: Dataset, variants: int) -> bool:
    """Return whether the latents of all images that will be read have room in the cache, beside those
    that are there.
    """
    _, height, width = dataset.image_shape
    count = 1 if dataset.config.augment.is_off else variants
    each = (
        2
        * 2
        * autoencoder.latent_channels
        * (height // autoencoder.factor)
        * (width // autoencoder.factor)
    )
    images = len(dataset.training)
    if dataset.config.wait == "ready":  # the decision is one for all that will be read
        images += dataset.ledger.beyond
    missing = count * images - latents_kept(dataset, autoencoder_files.identity(autoencoder))
    cache_folder().mkdir(parents=True, exist_ok=True)
    room = DISK_FRACTION * shutil.disk_usage(cache_folder()).free
    return each * max(0, missing) <= room
