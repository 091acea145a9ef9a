"""An indexed source: every picture decoded once and vouched for, split so that nothing leaks, and kept where reading is fast."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.data.augment import AugmentConfig
from sfumato.data.buckets import BucketConfig
from sfumato.data.cache import ArrayCache, Gather, Writer
from sfumato.data.decoding import Decoded, PixelFormat, Pixels, RejectedImage, decode
from sfumato.data.duplicates import clusters, thumbnail
from sfumato.data.entry import Entry, Reject
from sfumato.data.files import cache_folder
from sfumato.data.parallel import in_order
from sfumato.data.sources import Digits, SourceConfig
from sfumato.errors import ConfigError, DataError

DECODER = 1  # raised when the same bytes come to give other pixels
CACHE_SHARE_OF_DISK = 0.25
COMMIT_EVERY = 20_000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, in which shape.

    Attributes:
        source: where they come from.
        resolution: side of the square they are resized and centre-cropped to, in pixels; with buckets, the square root of the area.
        buckets: shapes other than the square that pictures may take; None for squares only.
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha; more as arrays have them.
        bits: of each value, 8 or 16.
        background: colour under transparent pictures where alpha is not kept, RGB from 0 to 255.
        augment: changes made to training pictures.
        holdout: share kept from training for validation, chosen by a hash of the content; near-duplicates stay together.
        exclude: a file with one name a line, such as the `rejects.txt` of `sfumato data check`, of pictures to leave out.
        cache: `auto` keeps decoded pixels on disk, if they need no more than a quarter of the free space; `off` does not.
        memory_gib: without a cache, sets whose pixels need less stay in memory, others are decoded as they are used.
        workers: processes that decode ahead when they are.
    """

    source: SourceConfig = Digits()
    resolution: int = 32
    buckets: BucketConfig | None = None
    channels: int = 3
    bits: Literal[8, 16] = 8
    background: tuple[int, int, int] = (255, 255, 255)
    augment: AugmentConfig = AugmentConfig()
    holdout: float = 0.1
    exclude: str | None = None
    cache: Literal["auto", "off"] = "auto"
    memory_gib: float = 4.0
    workers: int = 0

    def __post_init__(self) -> None:
        colour = all(0 <= level <= 255 for level in self.background)
        whole = self.resolution >= 1 and self.workers >= 0 and 1 <= self.channels <= 64
        if not whole or not 0 < self.holdout < 1 or not colour:
            raise ConfigError(
                f"resolution = {self.resolution}, channels = {self.channels}, holdout = {self.holdout}, workers = {self.workers}, "
                f"background = {self.background}",
                where="data",
                mend="resolution is at least 1, channels 1 to 64, holdout between 0 and 1, workers at least 0, background from 0 to 255",
            )
        if self.buckets is not None and self.augment.quarter_turns == "all":
            raise ConfigError("quarter turns of tall and wide pictures", where="data.augment", mend="set quarter_turns=none")

    def pixel_format(self) -> PixelFormat:
        """The shapes and colours that pictures are decoded to."""
        square = ((self.resolution, self.resolution),)
        shapes = square if self.buckets is None else self.buckets.shapes(self.resolution)
        return PixelFormat(shapes=shapes, channels=self.channels, bits=self.bits, background=self.background)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Readable pictures of a source, in a fixed order.

    Attributes:
        entries, ids: each picture and the hash of its content.
        labels: index into `categories`, or -1 where the source has none; shape (N,).
        shapes: index into the format's shapes; shape (N,).
        gather: pixels (n, C, H, W) at given positions of one shape, from disk or memory; None where each is decoded when used.
        clusters: number of the group of near-duplicates that each picture belongs to; shape (N,).
        rejects: what was left out; notes: what had to be converted, by kind.
        crop_loss: mean share of the pictures' area that cropping cut away.
        training, holdout: positions of the two parts, which share no picture and no near-duplicate.
        named_holdouts: further parts that the source keeps from training, by name.
    """

    config: DataConfig
    entries: Sequence[Entry]
    ids: Sequence[str]
    labels: Tensor
    categories: tuple[str, ...]
    shapes: NDArray[np.int64]
    gather: Callable[[NDArray[np.int64]], Pixels] | None
    clusters: NDArray[np.int64]
    rejects: Sequence[Reject]
    notes: dict[str, list[str]]
    crop_loss: float
    training: NDArray[np.int64] = field(init=False)
    holdout: NDArray[np.int64] = field(init=False)
    named_holdouts: dict[str, NDArray[np.int64]] = field(init=False)

    def __post_init__(self) -> None:
        part = _parts(self.entries, self.ids, self.clusters, self.config.holdout)
        object.__setattr__(self, "holdout", np.flatnonzero(part == "holdout"))
        object.__setattr__(self, "training", np.flatnonzero(part == "training"))
        names = sorted(set(part) - {"holdout", "training"})
        object.__setattr__(self, "named_holdouts", {name.removeprefix(":"): np.flatnonzero(part == name) for name in names})

    @property
    def fingerprint(self) -> str:
        """Hash of the contents, their order and the pixel format: equal exactly if training sees the same pixels and texts."""
        texts = hashlib.sha256("\0".join("\1".join(entry.captions) for entry in self.entries).encode()).hexdigest()
        lines = [
            repr(self.config.pixel_format()),
            *self.ids,
            *map(str, self.labels.tolist()),
            texts,
            self.training.tobytes().hex(),
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of most pictures."""
        height, width = self.config.pixel_format().shapes[self._usual_shape]
        return (self.config.channels, height, width)

    @property
    def _usual_shape(self) -> int:
        return int(np.bincount(self.shapes).argmax())

    def usual(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of `positions` whose pictures have `image_shape`."""
        return positions[self.shapes[positions] == self._usual_shape]

    def images(self, positions: NDArray[np.int64] | Sequence[int]) -> tuple[Tensor, list[Reject]]:
        """Pixels (n, C, H, W), uint8 or uint16, at `positions` of one shape, and what could no longer be read.

        An unreadable picture is replaced by the next readable one of its part, shape and category, so that a batch never shrinks,
        every run that meets it replaces it alike, no label lies, and nothing held out is trained on.
        """
        positions = np.asarray(positions, np.int64)
        if self.gather is not None:
            return torch.from_numpy(self.gather(positions)), []
        decoded, bad = [], []
        with quiet():
            for position in positions:
                pixels, failed = self._read(int(position))
                decoded.append(pixels)
                bad += failed
        return torch.from_numpy(np.stack(decoded)), bad

    def context(self, positions: NDArray[np.int64]) -> dict[str, Tensor]:
        """What conditioners may read of the pictures at `positions`: "category", index into `categories` or -1, (n,)."""
        return {"category": self.labels[torch.from_numpy(positions)]}

    def _read(self, position: int) -> tuple[Pixels, list[Reject]]:
        bad: list[Reject] = []
        form, shape = self.config.pixel_format(), self.shapes[position]
        for candidate in self._substitutes(position):
            entry = self.entries[candidate]
            try:
                decoded = decode(entry.image.read(), form)
                if decoded.shape == shape:
                    return decoded.pixels, bad
                bad.append(Reject(entry.name, "has another shape than when it was indexed"))
            except (RejectedImage, OSError) as error:
                bad.append(Reject(entry.name, str(error)))
        raise DataError(
            "neither it nor any picture like it can be read any more", where=bad[0].name, mend="is the disk still there?"
        )

    def _substitutes(self, position: int) -> Iterator[int]:
        """`position`, then the others of its part, shape and category in order, from there on and around."""
        yield position
        part = next(p for p in (self.training, self.holdout, *self.named_holdouts.values()) if position in p)
        like = (self.labels[part] == self.labels[position]).numpy() & (self.shapes[part] == self.shapes[position])
        peers = part[like]
        start = int(np.searchsorted(peers, position)) + 1
        yield from (int(peer) for peer in np.roll(peers, -start)[:-1])

    def summary(self) -> dict[str, Any]:
        """What `data.json` records."""
        times = Counter(self.ids)
        duplicates = [entry.name for entry, id_ in zip(self.entries, self.ids, strict=True) if times[id_] > 1]
        near = np.bincount(self.clusters)[self.clusters] > 1
        similar = [
            entry.name for entry, id_, near in zip(self.entries, self.ids, near, strict=True) if near and times[id_] == 1
        ]
        counts = Counter(self.labels.tolist())
        shapes = self.config.pixel_format().shapes
        found = {"duplicate": duplicates, "near_duplicate": similar}
        return {
            "fingerprint": self.fingerprint,
            "source": type(self.config.source).__name__,
            "attribution": getattr(self.config.source, "attribution", None),
            "images": len(self.entries),
            "training": len(self.training),
            "holdout": len(self.holdout),
            "named_holdouts": {name: len(positions) for name, positions in self.named_holdouts.items()},
            "categories": {name: counts.get(index, 0) for index, name in enumerate(self.categories)},
            "captioned": sum(bool(entry.captions) for entry in self.entries),
            "shapes": {
                f"{w}x{h}": int((self.shapes == i).sum()) for i, (h, w) in enumerate(shapes) if (self.shapes == i).any()
            },
            "crop_loss": round(self.crop_loss, 4),
            "rejects": [{"file": reject.name, "reason": reject.reason} for reject in self.rejects],
            "notes": {**self.notes, **{kind: names for kind, names in found.items() if names}},
            "holdout_files": [self.entries[i].name for i in self.holdout],
        }


class quiet(warnings.catch_warnings):
    """Without the warnings of picture parsers: what is odd and matters is in the notes."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


def _parts(entries: Sequence[Entry], ids: Sequence[str], groups: NDArray[np.int64], share: float) -> NDArray[np.str_]:
    """The part of each picture: "training", "holdout", or ":name" of a hold-out that the source names.

    Whole groups of near-duplicates go to one part: the named one if any of them is in it, else by a hash of their least id.
    """
    least: dict[int, str] = {}
    named: dict[int, str] = {}
    for entry, id_, group in zip(entries, ids, groups.tolist(), strict=True):
        least[group] = min(id_, least.get(group, id_))
        if entry.holdout is not None:
            named[group] = min(f":{entry.holdout}", named.get(group, f":{entry.holdout}"))
    keys = {group: _key(id_) for group, id_ in least.items() if group not in named}
    if len(keys) < 2:
        raise DataError(
            f"{len(keys)} different picture(s) to learn from, near-duplicates counted as one",
            where="data",
            mend="at least two are needed: one to learn from, one to validate on; thousands make a good model",
        )
    held = {group for group, key in keys.items() if key < share} or {min(keys, key=keys.__getitem__)}
    if len(held) == len(keys):
        held.discard(max(keys, key=keys.__getitem__))
    return np.array([named.get(group, "holdout" if group in held else "training") for group in groups.tolist()])


def _key(id_: str) -> float:
    return float(int(hashlib.sha256(f"holdout/{id_}".encode()).hexdigest()[:12], 16) / 16**12)


def index(config: DataConfig, *, on_progress: Callable[[int, int], None] | None = None) -> Dataset:
    """Read every picture of a source once; what the cache holds already is not decoded again.

    Raises:
        DataError: if the source is missing or fewer than two different pictures can be read, with the first reasons.
    """
    listing = config.source.listing()
    excluded = _excluded(config)
    wanted = [entry for entry in listing.entries if entry.name not in excluded]
    rejects = [
        *listing.rejects,
        *(Reject(e.name, f"listed in {config.exclude}") for e in listing.entries if e.name in excluded),
    ]
    shelf = _shelf(config, len(wanted))
    good: list[Entry] = []
    facts: list[dict[str, Any]] = []
    with quiet():
        for number, (entry, found) in enumerate(_examined(wanted, shelf)):
            if "reject" in found:
                rejects.append(Reject(entry.name, found["reject"]))
            else:
                good.append(entry)
                facts.append(found)
            if on_progress is not None:
                on_progress(number + 1, len(wanted))
    gather, thumbnails = shelf.finish()
    ids = [str(fact["id"]) for fact in facts]
    if len(set(ids)) < 2:
        reasons = "; ".join(f"{reject.name}: {reject.reason}" for reject in rejects[:3])
        raise DataError(
            f"{len(set(ids))} different readable pictures among {len(listing.entries)} files"
            + (f" ({reasons})" if reasons else ""),
            where=str(getattr(config.source, "path", type(config.source).__name__)),
            mend="at least two are needed: one to learn from, one to validate on; thousands make a good model",
        )
    categories = tuple(sorted({entry.category for entry in good if entry.category is not None}, key=_natural))
    numbers = {name: number for number, name in enumerate(categories)}
    notes: dict[str, list[str]] = {}
    for entry, fact in zip(good, facts, strict=True):
        for note in fact["notes"]:
            notes.setdefault(note, []).append(entry.name)
    return Dataset(
        config=config,
        entries=good,
        ids=ids,
        labels=torch.tensor([-1 if entry.category is None else numbers[entry.category] for entry in good]),
        categories=categories,
        shapes=np.array([fact["shape"] for fact in facts], np.int64),
        gather=gather,
        clusters=_clusters(config, ids, thumbnails),
        rejects=rejects,
        notes=notes,
        crop_loss=float(np.mean([_lost(fact["size"], config.pixel_format().shapes[fact["shape"]]) for fact in facts])),
    )


def _clusters(config: DataConfig, ids: Sequence[str], thumbnails: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Groups of near-duplicates; kept in the cache, since finding them takes a while in large sets."""
    identity = hashlib.sha256(f"{DECODER} {config.pixel_format()!r} {' '.join(ids)}".encode()).hexdigest()
    kept = cache_folder() / "clusters" / f"{identity}.npy"
    if config.cache == "auto" and kept.is_file():
        with contextlib.suppress(OSError, ValueError):
            stored = np.load(kept, allow_pickle=False)
            if stored.shape == (len(ids),):
                return stored.astype(np.int64)
    found = clusters(ids, thumbnails, resolution=config.resolution)
    if config.cache == "auto":
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(f".{uuid.uuid4().hex}.npy")
            np.save(temporary, found)
            temporary.replace(kept)
    return found


def _excluded(config: DataConfig) -> set[str]:
    """Names in the file of rejects; what follows a tab is the reason."""
    if config.exclude is None:
        return set()
    try:
        lines = Path(config.exclude).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read: {error}", where=config.exclude, mend="name a text file with one picture a line"
        ) from None
    return {line.partition("\t")[0] for line in lines if line.strip() and not line.startswith("#")}


def _lost(size: Sequence[int], target: tuple[int, int]) -> float:
    """Share of a picture's area outside the largest part with the target's aspect ratio."""
    ratio = (size[0] / size[1]) / (target[1] / target[0])
    return 1 - min(ratio, 1 / ratio)


def _natural(name: str) -> tuple[int, int, str]:
    """Numbers by value, then words: 2 before 10."""
    return (0, int(name), name) if name.isdecimal() and len(name) < 19 else (1, 0, name)


def _examined(entries: Sequence[Entry], shelf: _Shelf) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """Facts about each picture, in order."""
    for entry, found in zip(entries, in_order(lambda entry: _look(entry, shelf), entries), strict=True):
        yield entry, shelf.keep(found)


@dataclass(frozen=True, slots=True)
class _Look:
    """One picture read: the key of its bytes, and what the decoder said unless the cache knows it."""

    key: str
    decoded: Decoded | None = None
    thumbnail: NDArray[np.uint8] | None = None
    reject: str | None = None


def _look(entry: Entry, shelf: _Shelf) -> _Look:
    try:
        if entry.category == "":
            raise RejectedImage("lies beside the category folders, in none of them")
        data = entry.image.read()
    except (RejectedImage, OSError) as error:
        return _Look("", reject=str(error))
    key = hashlib.sha256(data).hexdigest()[:32]
    if shelf.knows(key):
        return _Look(key)
    try:
        decoded = decode(data, shelf.form, identify=True)
    except RejectedImage as error:
        return _Look(key, reject=str(error))
    return _Look(key, decoded, thumbnail(decoded.pixels))


class _Shelf:
    """Where decoded pixels go while a source is indexed: to the cache, into memory, or nowhere."""

    def __init__(self, form: PixelFormat, cache: ArrayCache | None, *, in_memory: bool) -> None:
        self.form, self.cache = form, cache
        self._writer = None if cache is None else Writer(cache)
        self._keys: list[str] = []
        self._pixels: list[Pixels] | None = [] if cache is None and in_memory else None
        self._thumbnails: list[NDArray[np.uint8]] = []

    def knows(self, key: str) -> bool:
        return self.cache is not None and key in self.cache.records

    def keep(self, look: _Look) -> dict[str, Any]:
        """Take in one picture; returns its facts, or {"reject": reason}."""
        if look.decoded is None:
            if look.reject is not None:
                return {"reject": look.reject}
            assert self.cache is not None
            self._keys.append(look.key)
            return dict(self.cache.records[look.key].facts)
        decoded, small = look.decoded, look.thumbnail
        assert small is not None
        facts = {"id": decoded.id, "shape": decoded.shape, "size": list(decoded.size), "notes": list(decoded.notes)}
        if self._writer is not None and self.cache is not None:
            self._keys.append(look.key)
            self._writer.add(look.key, facts, {"pixels": decoded.pixels, "thumbnail": small})
            if len(self._writer) >= COMMIT_EVERY:  # what is decoded stays, if the rest is interrupted
                self._writer.commit()
                self._writer = Writer(self.cache)
        else:
            self._thumbnails.append(small)
            if self._pixels is not None:
                self._pixels.append(decoded.pixels)
        return facts

    def finish(self) -> tuple[Callable[[NDArray[np.int64]], Pixels] | None, NDArray[np.uint8]]:
        """A way to the pixels if they were kept, and all thumbnails (N, 16, 16, 3)."""
        if self.cache is not None and self._writer is not None:
            self._writer.commit()
            records = [self.cache.records[key] for key in self._keys]
            thumbnails = Gather(self.cache, [record.arrays["thumbnail"] for record in records])
            return Gather(self.cache, [record.arrays["pixels"] for record in records]), thumbnails(np.arange(len(records)))
        return None if self._pixels is None else _InMemory(self._pixels), np.array(self._thumbnails, np.uint8)


class _InMemory:
    """Pixels of every picture, those of one shape as one array."""

    def __init__(self, pixels: list[Pixels]) -> None:
        self.row = np.empty(len(pixels), np.int64)
        self.arrays: dict[tuple[int, ...], Pixels] = {}
        self.shapes = [picture.shape for picture in pixels]
        for shape in set(self.shapes):
            places = [i for i, other in enumerate(self.shapes) if other == shape]
            self.row[places] = np.arange(len(places))
            self.arrays[shape] = np.stack([pixels[i] for i in places])

    def __call__(self, positions: NDArray[np.int64]) -> Pixels:
        return self.arrays[self.shapes[positions[0]]][self.row[positions]]


def _shelf(config: DataConfig, count: int) -> _Shelf:
    form = config.pixel_format()
    height, width = max(form.shapes, key=lambda shape: shape[0] * shape[1])
    size = count * form.channels * height * width * form.bits // 8
    cache = _cache(form, size) if config.cache == "auto" else None
    return _Shelf(form, cache, in_memory=size <= config.memory_gib * 2**30)


def _cache(form: PixelFormat, size: int) -> ArrayCache | None:
    """The cache of a pixel format, if its folder can be written to and has room."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        if size > CACHE_SHARE_OF_DISK * shutil.disk_usage(cache_folder()).free:
            return None
        cache = ArrayCache.open("pixels", f"decoder {DECODER} {form!r}")
        Writer(cache).discard()
    except OSError:
        return None
    return cache
