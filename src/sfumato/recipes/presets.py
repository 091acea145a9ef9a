"""A configuration chosen from the data and the machine, with the reasons."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from sfumato.autoencoders import KLConfig
from sfumato.conditioners import CategoryConfig
from sfumato.contexts import ContextConfig
from sfumato.data import AugmentConfig, DataConfig, Listing, Source, listed, source_at
from sfumato.diffusion import Linear, LogitNormal, Shift, UnitVariance, Warped
from sfumato.generation.diffusion_model import DenoiserConfig, SamplingConfig
from sfumato.networks import UNetConfig
from sfumato.recipes.autoencoder_stage import AutoencoderConfig, PixelsConfig, TrainedAutoencoder
from sfumato.recipes.run import Run
from sfumato.recipes.survey import MOST, Survey
from sfumato.training import Budget, MuonConfig, OptimizerConfig, PowerEMA

SMALL, LARGE = 5_000, 500_000  # images
MANY_CATEGORIES = 1_000
LATENTS_FROM = 96  # pixels of a side
# sides of feature maps: the smallest, and up to which places attend to one another in any case
SMALLEST_MAP, ATTENDED = 4, 8
# side of a feature map, above which attention over its places takes most of a step
MOST_ATTENDED = 32


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A configuration and the reasons for it, one sentence a line."""

    run: Run
    reasons: tuple[str, ...]


def choose(
    place: str,
    listing: Listing | None = None,
    *,
    resolution: int | tuple[int, int] | None = None,
    channels: int | None = None,
    bits: Literal[8, 16] | None = None,
    space: AutoencoderConfig | None = None,
) -> Choice:
    """Choose the preset for a source of images on this machine.

    Args:
        listing: what the source lists, if it is already known.
        resolution: side, or height and width, if already settled; from 96 on, the model works in
            latents of its own autoencoder.
        channels, bits: of the images, if already settled.
        space: the autoencoder, or pixels, if already settled.
    Raises:
        DataError: if the source does not exist or holds nothing.
    """
    source = source_at(place)
    survey = Survey.of(listed(source) if listing is None else listing)
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores"
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    resolution, why_resolution = (
        _resolution(survey, gpu=gpu) if sides is None else (min(sides), f"{_by(sides)} px, as set")
    )
    space, why_space = (
        _space(sides or (resolution, resolution), gpu=gpu) if space is None else (space, [])
    )
    network, optimizer, why_network = _network(
        survey, gpu=gpu, room=1 if isinstance(space, PixelsConfig) else 2
    )
    categories, why_categories = _categories(survey)
    small = survey.count < SMALL
    reasons = [
        f"{survey.count} images on {machine}: {why_network}",
        why_resolution,
        *why_space,
        *why_categories,
    ]
    why_channels = f": {survey.why}" if channels is None else ", as set"
    channels = survey.channels if channels is None else channels
    reasons.append(f"{channels} channel(s){why_channels}")
    why_bits = (
        f": {survey.high_bit_depth:.0%} of the sampled images have more than 8"
        if bits is None
        else ", as set"
    )
    bits = (16 if survey.high_bit_depth >= MOST else 8) if bits is None else bits
    if survey.high_bit_depth or "set" in why_bits:
        reasons.append(f"{bits} bits a value{why_bits}")
    if small:
        reasons.append(
            "the set is small, so augmentation that does not leak (0.12) and dropout hold off "
            "memorizing"
        )
    reasons += survey.captions.reasons
    run = _run(
        place=place,
        source=source,
        survey=survey,
        network=network,
        optimizer=optimizer,
        resolution=resolution,
        space=space,
        channels=channels,
        bits=bits,
        categories=categories,
    )
    latent_shape = space.latent_shape(channels, None)
    factor = shift(latent_shape.channels * (resolution // latent_shape.factor) ** 2)
    if factor > 1:
        run = _shift_schedules(run, factor)
        reasons.append(f"timestep shift {factor:g}: higher resolutions need higher noise levels")
    return Choice(run=run, reasons=tuple(reasons))


def _network(survey: Survey, *, gpu: bool, room: int) -> tuple[UNetConfig, OptimizerConfig, str]:
    """Choose the network and its optimizer; `room` widens the network for latents.

    A CPU gets a narrow network and Muon, which pay off in an hour (docs/ablations.md, "What each
    part buys"). On GPUs, larger datasets get larger networks, which have not been measured yet.
    """
    if not gpu:
        width = 32 * room
        network = UNetConfig(channels=width, multipliers=(1, 2, 4), blocks=1, attention_depths=(2,))
        why = f"a narrow U-Net of {width} channels, trained with Muon: best measured in an hour of CPU training"
        return (
            network,
            OptimizerConfig(learning_rate=4e-3, warmup_steps=100, muon=MuonConfig()),
            why,
        )
    width = room * (96 if survey.count < SMALL else 128 if survey.count < LARGE else 192)
    network = UNetConfig(
        channels=width, multipliers=(1, 2, 3), attention_depths=(2,), head_channels=32
    )
    return (
        network,
        OptimizerConfig(learning_rate=5e-4, warmup_steps=100),
        f"a U-Net of {width} channels",
    )


def _resolution(survey: Survey, *, gpu: bool) -> tuple[int, str]:
    largest = 64 if gpu else 32
    if not survey.side:
        return largest, f"{largest} px: no image could be read"
    resolution = max(8, min(largest, survey.side // 8 * 8))
    if resolution == largest < survey.side:
        reason = "what this machine trains in reasonable time"
    elif resolution < survey.side:
        reason = "the largest multiple of 8 within the images"
    else:
        reason = "the images are no larger"
    return (
        resolution,
        f"{resolution} px: {reason} (shorter sides are {survey.side} px in the median)",
    )


def _by(sides: tuple[int, int]) -> str:
    """Format sides as 32, or as 32 x 48."""
    return " x ".join(map(str, dict.fromkeys(sides)))


def _space(sides: tuple[int, int], *, gpu: bool) -> tuple[AutoencoderConfig, list[str]]:
    """Choose pixels, or latents if there would be too many pixels.

    Latents have 1/8 of the sides, or 1/4 if 8 does not divide the sides.
    """
    resolution = min(sides)
    depth = max(depth for depth in range(4) if not any(side % 2**depth for side in sides))
    if resolution < LATENTS_FROM or depth < 2:
        return PixelsConfig(), []
    widths, blocks, groups = ((64, 128, 256, 256), 2, 16) if gpu else ((16, 32, 64, 128), 1, 4)
    network = KLConfig(
        channels=widths[: depth + 1],
        latent_channels=16 if depth == 3 else 4,
        blocks=blocks,
        groups=groups,
    )
    height, width = (side // network.factor for side in sides)
    return TrainedAutoencoder(network=network, budget=Budget(minutes=20)), [
        f"in latents of {height} x {width} of an autoencoder of its own, which is trained first: "
        f"{resolution} px is too large for pixel-space diffusion"
    ]


def _categories(survey: Survey) -> tuple[CategoryConfig | None, list[str]]:
    count = len(survey.categories)
    if count < 2:
        return None, [
            "no categories: the model generates images like the set, and cannot be conditioned "
            "on a category"
        ]
    if count > min(MANY_CATEGORIES, survey.count / 4):
        return None, [
            f"{count} categories are too many for {survey.count} images: they are not used"
        ]
    return CategoryConfig(), [
        f"steered by {count} categories, from {min(survey.categories.values())} to "
        f"{max(survey.categories.values())} images each"
    ]


def _name(place: str) -> str:
    """Return the run's name: the folder's, or the file's without its ending."""
    path = Path(place)
    if path.is_dir():
        return path.resolve().name or "images"
    name = place.rstrip("/").rpartition("/")[2]
    return name.rpartition(".")[0] or name or "images"


def _run(
    *,
    place: str,
    source: Source,
    survey: Survey,
    network: UNetConfig,
    optimizer: OptimizerConfig,
    resolution: int,
    space: AutoencoderConfig,
    channels: int,
    bits: Literal[8, 16],
    categories: CategoryConfig | None,
) -> Run:
    small = survey.count < SMALL
    factor = space.latent_shape(channels, None).factor
    side = resolution // factor
    multipliers = _multipliers(network.multipliers, side)
    depth = len(multipliers) - 1
    attended = tuple(at for at in range(depth + 1) if at == depth or -(-side // 2**at) <= ATTENDED)
    widths = [network.channels * multipliers[at] for at in attended]
    network = replace(
        network, multipliers=multipliers, attention_depths=attended, dropout=0.1 if small else 0.0,
        head_channels=32 if any(width % 64 for width in widths) else 64,
    )  # fmt: skip
    return Run(
        name=_name(place),
        data=DataConfig(
            source=source,
            resolution=resolution,
            channels=channels,
            bits=bits,
            workers=2,
            augment=AugmentConfig(karras=0.12) if small else AugmentConfig(flip="none"),
        ),
        autoencoder=space,
        network=network,
        denoiser=DenoiserConfig(input_scale=UnitVariance(0.5 if factor == 1 else 1.0)),
        conditioner=ContextConfig(category=categories, text=survey.captions.text),
        optimizer=optimizer,
        ema=PowerEMA(0.1),
        batch_size=64,
        budget=Budget(minutes=60),
        sampling=SamplingConfig(
            guidance=1.5 if categories is not None or survey.captions.usable else 1.0
        ),
    )


def _multipliers(usual: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Choose the widths of the depths for maps of `side`.

    Small maps have fewer depths. Large ones have more, so that attention sees at most 32 x 32
    places.
    """
    depth = len(usual) - 1
    while depth and side // 2**depth < SMALLEST_MAP:
        depth -= 1
    while -(-side // 2**depth) > MOST_ATTENDED:
        depth += 1
    return (*usual, *[usual[-1]] * depth)[: depth + 1]


def shift(values: int) -> float:
    """Return how far training and sampling move to more noise, sqrt(values / 4096), but at least 1.

    Neighbouring values of large images predict one another, so that the same noise hides less of
    them. The shift is never to less noise, which made better images that followed their category
    less (docs/ablations.md).

    Args:
        values: number of values of an image, or of its latents.

    Source: Esser et al. 2024 (arXiv:2403.03206), eq. 23; with 4,096 values as the reference: Zheng
        et al. 2025 (arXiv:2510.11690), sec. 4.
    """
    return round(max(1.0, math.sqrt(values / 4096)), 2)


def _shift_schedules(run: Run, factor: float) -> Run:
    """Return the run with training and sampling moved to more noise."""
    schedule = Warped(schedule=Linear(), warp=Shift(factor))
    return replace(
        run,
        objective=replace(run.objective, schedule=Warped(schedule=schedule, warp=LogitNormal())),
        sampling=replace(run.sampling, schedule=schedule),
    )
