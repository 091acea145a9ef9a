"""The configuration of the data: which images, in which shape, and how training comes to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from sfumato.config.bounds import (
    CountOrZero,
    Finite,
    FractionBelowOne,
    NonNegative,
    Size,
    SizeOrZero,
)
from sfumato.data.annotations import LossMask
from sfumato.data.augment import AugmentConfig
from sfumato.data.buckets import BucketConfig
from sfumato.data.decoding import PixelFormat, Scale
from sfumato.data.frames import Frames
from sfumato.data.holdout import Half
from sfumato.data.listing import Source
from sfumato.data.sources import Digits
from sfumato.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, in which shape.

    Attributes:
        source: where they come from.
        resolution: side of the square they are resized and centre-cropped to, in pixels; with
            buckets, the square root of the area.
        size: (height, width) of a rectangle that takes the place of the square; None for the
            square.
        buckets: shapes other than the square that images may take; None for squares only.
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha; more as arrays have them.
        bits: of each value, 8 or 16.
        background: colour under transparent images where alpha is not kept, RGB from 0 to 255.
        alpha: `auto`: the last channel is alpha where the container says so, which arrays never
            do. `on`: the last of 2 or 4 channels is always alpha. `off`: it never is. RGB (or gray)
            is premultiplied.
        range: values of the source that are black and white, [low, high]; `auto` takes them from
            the type of the numbers, or from the
            set where that does not say it.
        frames: of files that hold several images the `first`, `all` as images of their own, or
            their `max`.
        augment: changes made to training images.
        holdout: share kept from training for validation, chosen by a hash of the content; 25 images
            at least, or a quarter of a smaller set. 0 trains on all, and nothing is validated.
        half: the `first` or the `second` half of the training images is trained on, to learn
            whether more images would help; the same images are held out. `off` trains on all.
        near_duplicates: what stays together in training or hold-out: images that are nearly the
            same (`auto`), or exact copies only
            (`exact`); `off` compares nothing.
        categories: names that have the first numbers, in this order, whether or not an image has
            them: those of a model that is fine-tuned.
        caption: caption of images that have none; captions of an image's own, among them the words
            of a kohya folder, stay as they are.
        category: category of images that have none.
        loss_mask: where training counts errors of an image: where its file `NAME.mask.png` is
            white (`files`), or where it is opaque (`alpha`); `none`: everywhere. Gray counts in
            part; an image without a mask counts everywhere. Autoencoders count all.
        limit: how many images are used, an even sample of all that are listed; 0 for all. A larger
            sample holds a smaller one.
        wait: `all` reads all images before training begins; `ready` begins with a sample of 10,000, or
            of `limit`, and goes on with four times as many, until it has all, as soon as these are
            read.
        exclude: a file with one name a line, such as the `rejects.txt` of `sfumato data check`, of
            images to leave out.
        cache: `auto` keeps decoded pixels on disk, if they need no more than a quarter of the free
            space; `off` does not.
        verify: `auto` reads a source again only where sizes, times of change or numbers (inodes) of its
            files, or what a store says of them (etag, generation), differ from when it was last read;
            `always` reads all of it at each start.
        memory_gib: without a cache, sets whose pixels need less stay in memory, others are decoded
            as they are used.
        workers: processes that decode ahead when they are.
        shuffle: `global` mixes all images of an epoch; `window` those of `window` shards (tars, tables
            or archives, in a random order) before those of the next, so that each shard is fetched
            once in an epoch; of single files, a thousand are a shard.
        window: shards that are mixed.
    """

    source: Source = Digits()
    resolution: Size = 32
    size: tuple[Size, Size] | None = None
    buckets: BucketConfig | None = None
    channels: Size = 3
    bits: Literal[8, 16] = 8
    background: tuple[SizeOrZero, SizeOrZero, SizeOrZero] = (255, 255, 255)
    alpha: Literal["auto", "on", "off"] = "auto"
    range: Literal["auto"] | tuple[Finite, Finite] = "auto"
    frames: Frames = "first"
    augment: AugmentConfig = AugmentConfig()
    holdout: FractionBelowOne = 0.1
    half: Half = "off"
    near_duplicates: Literal["auto", "exact", "off"] = "auto"
    categories: tuple[str, ...] = ()
    caption: str | None = None
    category: str | CountOrZero | None = None
    loss_mask: LossMask = "none"
    limit: SizeOrZero = 0
    wait: Literal["all", "ready"] = "all"
    exclude: str | None = None
    cache: Literal["auto", "off"] = "auto"
    verify: Literal["auto", "always"] = "auto"
    memory_gib: NonNegative = 4.0
    workers: SizeOrZero = 0
    shuffle: Literal["global", "window"] = "global"
    window: Size = 16

    def __post_init__(self) -> None:
        colour_valid = all(0 <= level <= 255 for level in self.background)
        counts_valid = self.resolution >= 1 and self.workers >= 0 and 1 <= self.channels <= 64
        if not counts_valid or not 0 <= self.holdout < 1 or not colour_valid:
            raise ConfigError(
                f"resolution = {self.resolution}, channels = {self.channels}, holdout = "
                f"{self.holdout}, workers = {self.workers}, "
                f"background = {self.background}",
                where="data",
                hint="resolution is at least 1, channels 1 to 64, holdout from 0 to below 1, "
                "workers at least 0, background from 0 to 255",
            )
        if self.size is not None and (min(self.size) < 1 or self.buckets is not None):
            raise ConfigError(
                f"size = {self.size}"
                + (" together with buckets" if self.buckets is not None else ""),
                where="data.size",
                hint="a height and a width of at least 1, without data.buckets",
            )
        if self.range != "auto" and not (
            self.range[0] < self.range[1] and all(map(math.isfinite, self.range))
        ):
            raise ConfigError(
                f"range = {list(self.range)}",
                where="data.range",
                hint="give [BLACK, WHITE], the smaller number first, or auto",
            )
        square = self.buckets is None and (self.size is None or self.size[0] == self.size[1])
        if not square and self.augment.quarter_turns == "all":
            raise ConfigError(
                "quarter turns of tall and wide images",
                where="data.augment",
                hint="set quarter_turns=none",
            )

    def of_other(self, source: Source) -> DataConfig:
        """Return the configuration of all images of another source, in the same shape."""
        return replace(self, source=source, limit=0, wait="all")

    def pixel_format(self, scale: Scale = Scale()) -> PixelFormat:
        """Return the format that images are decoded to, where `scale` defines black and white."""
        single = (self.size or (self.resolution, self.resolution),)
        shapes = single if self.buckets is None else self.buckets.shapes(self.resolution)
        return PixelFormat(
            shapes=shapes,
            channels=self.channels,
            bits=self.bits,
            background=self.background,
            alpha=self.alpha,
            scale=scale,
        )
