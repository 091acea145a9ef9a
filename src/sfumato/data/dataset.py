"""An indexed source: every picture decoded once and vouched for, split by content, kept in memory where it fits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.data.decoding import Channels, PixelFormat, RejectedImage, decode
from sfumato.data.sources import Digits, Entry, SourceConfig
from sfumato.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, in which shape.

    Attributes:
        source: where they come from.
        resolution: side of the square they are resized and centre-cropped to, in pixels.
        channels: 1 (gray) or 3 (colour).
        background: colour under transparent pictures, RGB from 0 to 255.
        flip: mirror each picture left to right half of the time.
        holdout: share kept from training for validation, chosen by a hash of the content.
        memory_gib: sets whose pixels need less stay in memory, others are decoded as they are used.
        workers: processes that decode ahead when the set does not fit in memory.
    """

    source: SourceConfig = Digits()
    resolution: int = 32
    channels: Channels = 3
    background: tuple[int, int, int] = (255, 255, 255)
    flip: Literal["none", "horizontal"] = "none"
    holdout: float = 0.1
    memory_gib: float = 4.0
    workers: int = 0

    def __post_init__(self) -> None:
        colour = all(0 <= level <= 255 for level in self.background)
        if self.resolution < 1 or not 0 < self.holdout < 1 or self.workers < 0 or not colour:
            raise ConfigError(
                f"resolution = {self.resolution}, holdout = {self.holdout}, workers = {self.workers}, background = {self.background}",
                where="data",
                mend="resolution is at least 1, holdout between 0 and 1, workers at least 0, background from 0 to 255",
            )

    def pixel_format(self) -> PixelFormat:
        """The shape that pictures are decoded to."""
        return PixelFormat(resolution=self.resolution, channels=self.channels, background=self.background)


@dataclass(frozen=True)
class Reject:
    """A picture left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Readable pictures of a source, in a fixed order.

    Attributes:
        entries, ids: each picture and the hash of its content.
        labels: index into `categories`, or -1 where the source has none; shape (N,).
        pixels: uint8 (N, C, R, R) when the set is in memory, else None.
        rejects: what was left out; notes: what had to be converted, by kind.
        training, holdout: positions of the two parts, which share no content.
    """

    config: DataConfig
    entries: Sequence[Entry]
    ids: Sequence[str]
    labels: Tensor
    categories: tuple[str, ...]
    pixels: Tensor | None
    rejects: Sequence[Reject]
    notes: dict[str, list[str]]
    training: NDArray[np.int64] = field(init=False)
    holdout: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        held = _held_out(self.ids, self.config.holdout)
        object.__setattr__(self, "holdout", np.flatnonzero(held))
        object.__setattr__(self, "training", np.flatnonzero(~held))

    @property
    def fingerprint(self) -> str:
        """Hash of the contents, their order and the pixel format: equal exactly if training sees the same pixels."""
        text = "\n".join([repr(self.config.pixel_format()), *self.ids, *map(str, self.labels.tolist())])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, R, R)."""
        return (self.config.channels, self.config.resolution, self.config.resolution)

    def images(self, positions: NDArray[np.int64] | Sequence[int]) -> tuple[Tensor, list[Reject]]:
        """uint8 pixels (n, C, R, R) at `positions`, and what could no longer be read.

        An unreadable picture is replaced by the next readable one of its part and category, so that a batch never shrinks, every
        run that meets it replaces it alike, no label lies, and nothing held out is trained on.
        """
        if self.pixels is not None:
            return self.pixels[torch.as_tensor(positions)], []
        decoded, bad = [], []
        for position in positions:
            pixels, failed = self._read(int(position))
            decoded.append(torch.from_numpy(pixels))
            bad += failed
        return torch.stack(decoded), bad

    def context(self, positions: NDArray[np.int64]) -> dict[str, Tensor]:
        """What conditioners may read of the pictures at `positions`: "category", index into `categories` or -1, (n,)."""
        return {"category": self.labels[torch.from_numpy(positions)]}

    def _read(self, position: int) -> tuple[NDArray[np.uint8], list[Reject]]:
        bad: list[Reject] = []
        for candidate in self._substitutes(position):
            entry = self.entries[candidate]
            try:
                return decode(entry.read(), self.config.pixel_format())[0], bad
            except (RejectedImage, OSError) as error:
                bad.append(Reject(entry.name, str(error)))
        raise DataError(
            "neither it nor any picture like it can be read any more", where=bad[0].name, mend="is the disk still there?"
        )

    def _substitutes(self, position: int) -> Iterator[int]:
        """`position`, then the others of its part and category in order, from there on and around."""
        yield position
        part = self.holdout if np.isin(position, self.holdout) else self.training
        peers = part[(self.labels[part] == self.labels[position]).numpy()]
        start = int(np.searchsorted(peers, position)) + 1
        yield from (int(peer) for peer in np.roll(peers, -start)[:-1])

    def summary(self) -> dict[str, Any]:
        """What `data.json` records."""
        times = Counter(self.ids)
        duplicates = [entry.name for entry, id_ in zip(self.entries, self.ids, strict=True) if times[id_] > 1]
        counts = Counter(self.labels.tolist())
        return {
            "fingerprint": self.fingerprint,
            "images": len(self.entries),
            "training": len(self.training),
            "holdout": len(self.holdout),
            "categories": {name: counts.get(index, 0) for index, name in enumerate(self.categories)},
            "rejects": [{"file": reject.name, "reason": reject.reason} for reject in self.rejects],
            "notes": {**self.notes, **({"duplicate": duplicates} if duplicates else {})},
            "holdout_files": [self.entries[i].name for i in self.holdout],
        }


def _held_out(ids: Sequence[str], share: float) -> NDArray[np.bool_]:
    """True for contents whose hash falls below `share`; the lowest one always, and never all."""
    keys = np.array([int(hashlib.sha256(f"holdout/{id_}".encode()).hexdigest()[:12], 16) / 16**12 for id_ in ids])
    held: NDArray[np.bool_] = (keys < share) | (keys == keys.min())
    return held & (keys < keys.max()) if held.all() else held


def index(config: DataConfig, *, on_progress: Callable[[int, int], None] | None = None) -> Dataset:
    """Read every picture of a source once.

    Raises:
        DataError: if the source is missing or fewer than two different pictures can be read, with the first reasons.
    """
    entries = config.source.entries()
    form = config.pixel_format()
    size = len(entries) * form.channels * form.resolution**2
    kept = (
        np.empty((len(entries), form.channels, form.resolution, form.resolution), np.uint8)
        if size <= config.memory_gib * 2**30
        else None
    )
    good: list[Entry] = []
    ids: list[str] = []
    rejects: list[Reject] = []
    notes: dict[str, list[str]] = {}
    for number, entry in enumerate(entries):
        try:
            if entry.category == "":
                raise RejectedImage("lies beside the category folders, in none of them")
            data = entry.read()
            pixels, remarks = decode(data, form)
        except (RejectedImage, OSError) as error:
            rejects.append(Reject(entry.name, str(error)))
        else:
            if kept is not None:
                kept[len(good)] = pixels
            good.append(entry)
            ids.append(hashlib.sha256(data).hexdigest()[:32])
            for remark in remarks:
                notes.setdefault(remark, []).append(entry.name)
        if on_progress is not None:
            on_progress(number + 1, len(entries))
    if len(set(ids)) < 2:
        reasons = "; ".join(f"{reject.name}: {reject.reason}" for reject in rejects[:3])
        raise DataError(
            f"{len(set(ids))} different readable pictures among {len(entries)} files" + (f" ({reasons})" if reasons else ""),
            where=str(getattr(config.source, "path", type(config.source).__name__)),
            mend="at least two are needed: one to learn from, one to validate on; thousands make a good model",
        )
    categories = tuple(sorted({entry.category for entry in good if entry.category is not None}, key=_natural))
    numbers = {name: number for number, name in enumerate(categories)}
    labels = torch.tensor([-1 if entry.category is None else numbers[entry.category] for entry in good])
    return Dataset(
        config=config,
        entries=good,
        ids=ids,
        labels=labels,
        categories=categories,
        pixels=None if kept is None else torch.from_numpy(kept[: len(good)]),
        rejects=rejects,
        notes=notes,
    )


def _natural(name: str) -> tuple[int, int, str]:
    """Numbers by value, then words: 2 before 10."""
    return (0, int(name), name) if name.isdecimal() and len(name) < 19 else (1, 0, name)
