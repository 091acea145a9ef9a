"""An indexed source: every image has been decoded and checked once, the split does not leak, and
pixels are kept where reading is fast.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.data.annotations import Annotations
from sfumato.data.array_cache import DamagedRows
from sfumato.data.batch_plan import BatchPlan
from sfumato.data.data_config import DataConfig
from sfumato.data.dataset_diff import record_contents
from sfumato.data.decoding import PixelFormat, Pixels, RejectedImage, Scale, decode, quiet
from sfumato.data.holdout import assign_splits, take_half
from sfumato.data.ledger import Ledger
from sfumato.data.listing import Entry, Reject, containers, integers, values
from sfumato.data.segment_records import key_of
from sfumato.errors import DataError
from sfumato.observability.progress import console

FEWEST, SINGLE = 8, 1000  # images of a container that is a shard; and of a shard of other images


def _hash_of(texts: Iterable[str], separator: str) -> str:
    """Return the SHA-256 of joined texts, without joining all of them at once."""
    result, rest = hashlib.sha256(), iter(texts)
    begin = ""
    while part := list(islice(rest, 10_000)):
        result.update((begin + separator.join(part)).encode())
        begin = separator
    return result.hexdigest()


class Images(NamedTuple):
    """Pixels (n, C, H, W), uint8 or uint16; the images that could no longer be read; and the
    positions of the images that the pixels are of, substitutes included.
    """

    pixels: Tensor
    bad: list[Reject]
    positions: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PrecomputedLatents:
    """Latents of the training images, computed ahead of training.

    Attributes:
        read_rows: moments (n, 2 c, h, w) at given rows; variant v of the training part's image
            number k is row k * variants + v.
        numbers: of each image in the training part, or -1; shape (N,).
        variants: of each image, each augmented in its own way.
        pixels: whether batches hold the images too, for a conditioner that makes something of them.
    """

    read_rows: Callable[[NDArray[np.int64]], NDArray[np.floating[Any]]]
    numbers: NDArray[np.int64]
    variants: int
    pixels: bool


@dataclass(frozen=True, kw_only=True)
class DatasetParts:
    """The positions of what is trained on (`whole`, and `training` as `data.half` says), of what is
    held out, and of the hold-outs that the source names.
    """

    whole: NDArray[np.int64]
    training: NDArray[np.int64]
    holdout: NDArray[np.int64]
    named: dict[str, NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The readable images of a source, in a fixed order.

    Attributes:
        entries, ids: each image and the hash of its content.
        labels: index into `categories`, or -1 where the source has none; shape (N,).
        shapes: index into the format's shapes; shape (N,).
        keys: hash of each encoded image, (N, 16), by which a change is noticed when it is decoded again;
            None where it is not known.
        read_rows: pixels (n, C, H, W) at given positions of one shape, from disk or memory; None
            where each is decoded when used.
        read_thumbnails: thumbnails (n, 32, 32, 3) at given positions, from disk; None where they
            are not kept.
        clusters: number of the group of near-duplicates that each image belongs to; shape (N,).
        remarks: what a person is told about the values, groups and frames, a sentence a line.
        rejects: what was left out; ledger: the account of all that the source holds; notes: what
            had to be converted, by kind.
        crop_loss: mean share of the images' area that cropping cut away.
        annotations: doodles, masks, points, attributes and captions of each image.
        latents: their latents, where training works on those.
        scale: the values that are black and white.
        is_kept: whether it was indexed before, and no file has changed since, as the file system
            says.
    """

    config: DataConfig
    entries: Sequence[Entry]
    ids: Sequence[str]
    labels: Tensor
    categories: tuple[str, ...]
    shapes: NDArray[np.integer]
    read_rows: Callable[[NDArray[np.int64]], Pixels] | None
    clusters: NDArray[np.int64]
    remarks: Sequence[str]
    rejects: Sequence[Reject]
    ledger: Ledger
    notes: Mapping[str, Sequence[str]]
    crop_loss: float
    annotations: Annotations
    keys: NDArray[np.uint8] | None = None
    read_thumbnails: Callable[[NDArray[np.int64]], NDArray[Any]] | None = None
    latents: PrecomputedLatents | None = None
    scale: Scale = Scale()
    is_kept: bool = False

    @cached_property
    def parts(self) -> DatasetParts:
        """What is trained on and what is held out.

        Raises:
            DataError: if the source holds out all images.
        """
        splits = assign_splits(self.entries, self.ids, self.clusters, self.config.holdout)
        whole = np.flatnonzero(splits == "training")
        names = sorted(set(splits) - {"holdout", "training"})
        return DatasetParts(
            whole=whole,
            training=take_half(
                self.config.half,
                whole,
                entries=self.entries,
                ids=self.ids,
                groups=self.clusters,
            ),
            holdout=np.flatnonzero(splits == "holdout"),
            named={name.removeprefix(":"): np.flatnonzero(splits == name) for name in names},
        )

    @property
    def training(self) -> NDArray[np.int64]:
        """The positions of the training part, which shares no image and no near-duplicate with the
        hold-out.
        """
        return self.parts.training

    @property
    def whole(self) -> NDArray[np.int64]:
        """The positions of the training part, without regard to `data.half`."""
        return self.parts.whole

    @property
    def holdout(self) -> NDArray[np.int64]:
        """The positions of the images that are held out."""
        return self.parts.holdout

    @property
    def named_holdouts(self) -> dict[str, NDArray[np.int64]]:
        """The positions of further parts that the source keeps from training, by name."""
        return self.parts.named

    @cached_property
    def epoch(self) -> NDArray[np.int64]:
        """The positions of the training part, each as often as an epoch holds it: as its repeats
        say, over their greatest common divisor.
        """
        return self._repeated(self.training) if self.has_repeats else self.training

    @cached_property
    def shards(self) -> NDArray[np.int64]:
        """Where in `epoch` the images of each container begin, (s,); of files with fewer than FEWEST
        images, SINGLE images are a shard.
        """
        numbers = containers(self.entries)[self.epoch]
        begins = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1))
        if len(begins) * FEWEST > len(numbers) or (numbers < 0).any():
            return np.arange(0, len(numbers), SINGLE)
        return begins

    @property
    def decodes_on_use(self) -> bool:
        """Whether training decodes each image as it comes to it."""
        return self.read_rows is None and (self.latents is None or self.latents.pixels)

    def plan(self, *, seed: int, batch_size: int) -> BatchPlan:
        """Return the order in which training sees the images of `epoch`, as the configuration says."""
        return BatchPlan(
            seed=seed,
            shapes=self._shapes_of_an_epoch(),
            batch_size=batch_size,
            shards=self.shards if self.config.shuffle == "window" else np.zeros(1, np.int64),
            window=self.config.window if self.config.shuffle == "window" else 0,
        )

    def _shapes_of_an_epoch(self) -> NDArray[np.integer]:
        """Return the shape of each image of `epoch`; a single value where all have the same."""
        if np.count_nonzero(self.shape_counts) == 1:
            return np.broadcast_to(self.shapes[:1], len(self.epoch))
        return self.shapes[self.epoch]

    @cached_property
    def has_repeats(self) -> bool:
        """Whether images differ in their repeats."""
        repeats = integers(self.entries, "repeats")
        return bool(repeats.min() < repeats.max())

    def _repeated(self, training: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return positions, each as often as an epoch holds it."""
        repeats = integers(self.entries, "repeats").astype(np.int64)[training]
        return np.repeat(training, repeats // max(1, np.gcd.reduce(repeats)))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what training sees: images, order, pixel format, categories, texts, repeats and
        split.

        It is equal exactly if these are. The texts are captions and attributes; doodles, masks and
        point clouds are not part of it.
        """
        return self._hash(self.training)

    @cached_property
    def whole_fingerprint(self) -> str:
        """The fingerprint that the set has without `data.half`."""
        return self._hash(self.whole)

    def _hash(self, training: NDArray[np.int64]) -> str:
        texts = _hash_of(("\1".join(texts) for texts in values(self.entries, "captions")), "\0")
        texts += repr([each for each in values(self.entries, "attributes") if each])
        if self.has_repeats and len(self._repeated(training)) > len(training):
            texts += repr(list(values(self.entries, "repeats")))
        labels = map(str, self.labels.tolist())
        ends = texts, training.tobytes().hex()
        return _hash_of(chain([repr(self.pixel_format)], self.ids, labels, ends), "\n")

    @property
    def pixel_format(self) -> PixelFormat:
        """The format that the images are decoded to."""
        return self.config.pixel_format(self.scale)

    @property
    def alpha(self) -> Literal["none", "premultiplied"]:
        """What the last of 2 or 4 channels is."""
        return "none" if self.config.alpha == "off" or "no_alpha" in self.notes else "premultiplied"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The most common (C, H, W)."""
        height, width = self.config.pixel_format().shapes[self._common_shape]
        return (self.config.channels, height, width)

    @property
    def training_numbers(self) -> NDArray[np.int64]:
        """The number of each image within the training part, or -1; shape (N,)."""
        numbers = np.full(len(self.ids), -1)
        numbers[self.training] = np.arange(len(self.training))
        return numbers

    @cached_property
    def shape_counts(self) -> NDArray[np.int64]:
        """How many images have each of the format's shapes, (s,)."""
        return np.bincount(self.shapes, minlength=len(self.config.pixel_format().shapes))

    @property
    def _common_shape(self) -> int:
        return int(self.shape_counts.argmax())

    def with_common_shape(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of `positions` whose images have the shape `image_shape`."""
        result: NDArray[np.int64] = positions[self.shapes[positions] == self._common_shape]
        return result

    def images(self, positions: NDArray[np.int64] | Sequence[int]) -> Images:
        """Return pixels at `positions`, which must share one shape.

        An unreadable image is replaced by the next readable one of its part, shape and category, or
        of any category if need be, so that a batch never shrinks, every run that meets it replaces
        it in the same way, and nothing held out is trained on.

        Where stored pixels are damaged, the images are decoded again, which is said once.

        Raises:
            DataError: if no image can take its place.
        """
        positions = np.asarray(positions, np.int64)
        if self.read_rows is not None:
            try:
                return Images(torch.from_numpy(self.read_rows(positions)), [], positions)
            except DamagedRows as error:
                _warn_of_damage(str(error.segment))
        decoded, bad, read_positions = [], [], []
        with quiet():
            for position in positions:
                pixels, rejects, read = self._read(int(position))
                decoded.append(pixels)
                read_positions.append(read)
                bad += rejects
        return Images(torch.from_numpy(np.stack(decoded)), bad, np.array(read_positions, np.int64))

    def captions(
        self, positions: NDArray[np.int64] | Sequence[int] | None = None
    ) -> list[tuple[str, ...]]:
        """Return the captions of the images at `positions`, by default of all."""
        found = values(self.entries, "captions")
        return list(found) if positions is None else [found[int(place)] for place in positions]

    def context(
        self, positions: NDArray[np.int64], *, draws: Sequence[float] | None = None
    ) -> dict[str, Any]:
        """Return, by name, what conditioners may read of the images at `positions`, of one shape.

        "category" is an index into `categories` or -1, (n,); for the annotations see
        `Annotations.context`.
        """
        return {
            "category": self.labels[torch.from_numpy(positions)],
            **self.annotations.context(positions, draws),
        }

    def _read(self, position: int) -> tuple[Pixels, list[Reject], int]:
        bad: list[Reject] = []
        form, shape = self.pixel_format, self.shapes[position]
        for candidate in self._substitutes(position):
            entry = self.entries[candidate]
            try:
                data = entry.image.read()
                decoded = decode(data, form)
                if decoded.shape == shape and self._is_as_indexed(candidate, data):
                    return decoded.pixels, bad, candidate
                bad.append(Reject(entry.name, "has changed since it was indexed"))
            except (RejectedImage, OSError) as error:
                bad.append(Reject(entry.name, str(error)))
        raise DataError(
            "can no longer be read, and neither can any substitute",
            where=bad[0].name,
            hint="check that the disk is still mounted",
        )

    def _is_as_indexed(self, position: int, data: bytes) -> bool:
        """Return whether an encoded image has the bytes that were indexed."""
        if self.keys is None:
            return True
        expected: bytes = self.keys[position].tobytes()
        return expected.hex() == key_of(data)

    def _substitutes(self, position: int) -> Iterator[int]:
        """Yield `position`, then the others of its part and shape, those of its category first.

        They begin after `position` and wrap around.
        """
        yield position
        part = next(
            p for p in (self.training, self.holdout, *self.named_holdouts.values()) if position in p
        )
        peers = part[self.shapes[part] == self.shapes[position]]
        around = np.roll(peers, -int(np.searchsorted(peers, position)) - 1)[:-1]
        alike = (self.labels[around] == self.labels[position]).numpy()
        yield from (int(peer) for peer in (*around[alike], *around[~alike]))

    def summary(self) -> dict[str, Any]:
        """Return what `data.json` records."""
        times = Counter(self.ids)
        names = values(self.entries, "name")
        duplicates = [name for name, id_ in zip(names, self.ids, strict=True) if times[id_] > 1]
        near = np.bincount(self.clusters)[self.clusters] > 1
        similar = [
            name
            for name, id_, near in zip(names, self.ids, near, strict=True)
            if near and times[id_] == 1
        ]
        counts = Counter(self.labels.tolist())
        shapes = self.config.pixel_format().shapes
        copies = {"duplicate": duplicates, "near_duplicate": similar}
        return {
            "fingerprint": self.fingerprint,
            "whole_fingerprint": self.whole_fingerprint,
            "source": type(self.config.source).__name__,
            "attribution": getattr(self.config.source, "attribution", None),
            "images": len(self.entries),
            "training": len(self.training),
            "holdout": len(self.holdout),
            "named_holdouts": {
                name: len(positions) for name, positions in self.named_holdouts.items()
            },
            "categories": {
                name: counts.get(index, 0) for index, name in enumerate(self.categories)
            },
            "captioned": sum(map(bool, values(self.entries, "captions"))),
            "shapes": {
                f"{w}x{h}": count
                for (h, w), count in zip(shapes, self.shape_counts.tolist(), strict=True)
                if count
            },
            "crop_loss": round(self.crop_loss, 4),
            "value_range": self.scale.range,
            "remarks": list(self.remarks),
            "ledger": self.ledger.plain(),
            "rejects": [{"file": reject.name, "reason": reject.reason} for reject in self.rejects],
            "notes": {
                kind: list(names) for kind, names in {**self.notes, **copies}.items() if names
            },
            **record_contents(self),
            "holdout_files": [names[i] for i in self.holdout],
        }


@lru_cache
def _warn_of_damage(segment: str) -> None:
    console().print(
        f"warning: {segment}: stored pixels differ from what was written (check value); the images "
        "are decoded again instead. Check the disk",
        markup=False,
    )
