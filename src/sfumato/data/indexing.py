"""From a source to a dataset: every image is read once, decoded unless the cache has it, and kept
where reading is fast.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sfumato.data.annotations import Annotations
from sfumato.data.array_cache import RowReader, load_array, save_array
from sfumato.data.data_config import DataConfig
from sfumato.data.dataset import Dataset
from sfumato.data.decoding import PixelFormat, quiet
from sfumato.data.duplicates import ALGORITHM, clusters
from sfumato.data.frames import expand_frames, unused_frames
from sfumato.data.holdout import merge_groups, place_of, too_few_images
from sfumato.data.image_facts import ImageFacts
from sfumato.data.index_store import KnownKeys, NamesAt, listed
from sfumato.data.ledger import Ledger
from sfumato.data.listing import Entry, Listing, Reject, path_of, select, value_at, values
from sfumato.data.missing_labels import fill_missing
from sfumato.data.parallel import Tally, forked_map, uses_processes
from sfumato.data.pixel_store import (
    CACHE_SHARE_OF_DISK,
    DECODER,
    CachedPixels,
    PartTask,
    PixelStore,
    ReadPart,
    pixel_store,
    read_part,
)
from sfumato.data.remote import sign_of
from sfumato.data.segment_records import bytes_of
from sfumato.data.source_state import state_of
from sfumato.data.stored_index import StoredIndex
from sfumato.data.value_range import ChosenScale, choose_scale
from sfumato.errors import DataError

# images of a part that one process reads: many parts for each process, so that all end together
MIN_PART, MAX_PART, PARTS_EACH = 256, 8192, 8
MANY_PARTS = 64  # of a cluster, whose number of workers may change
# returns the number and result of each task, in whatever order
Executor = Callable[
    [Callable[[PartTask], ReadPart], Sequence[PartTask]], Iterable[tuple[int, ReadPart]]
]


def index(
    config: DataConfig,
    *,
    annotations: Sequence[str] = ("text",),
    on_progress: Callable[[int, int], None] | None = None,
    listing: Listing | None = None,
) -> Dataset:
    """Read every image of a source once; images that are in the cache are not decoded again.

    Args:
        listing: the source's listing, if it was made already.
        annotations: those that condition the model, besides the category: "text", "doodle",
            "mask", "points", "attributes".
    Raises:
        DataError: if the source is missing; if no image can be read, with the first reasons; or if
            the last channel is alpha in some images only.
    """
    work = _Work(config, annotations, listing)
    kept, step = work.kept, on_progress or (lambda done, total: None)
    if (dataset := kept.load()) is not None and _is_kept_as_now(dataset, config):
        step(len(dataset.entries), len(dataset.entries))
        return dataset
    found = work.listed()
    store = found.store(kept.known_keys())
    part = work.read(found.entries, store, step)
    if not len(part.good):
        rejects = [*found.listing.rejects, *found.unused, *_rejects(found.entries, part)]
        raise too_few_images(0, found.listing.entries, rejects, where=place_of(config.source))
    dataset = _dataset(config, frozenset(annotations), found, part, store)
    kept.save(dataset, part)
    # from here on in columns, which take little memory
    return kept.load(is_new=True) or dataset


def is_indexed(config: DataConfig, *, annotations: Sequence[str] = ("text",)) -> bool:
    """Return whether `index` finds the index of a source, as it is now, in the cache."""
    return _Work(config, annotations, None).kept.load() is not None


def prepare_part(
    config: DataConfig,
    number: int,
    count: int,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Decode one of `count` parts of a source into the cache, which several machines may share.

    It may be called again, and in any order; `index` then reads no image of it. Nothing depends on how
    a source was divided.

    Args:
        number: of the part, from 1.
    Returns:
        how many images are prepared, and how many of them cannot be used.
    Raises:
        DataError: if the source is missing, the disk lacks space, or data.cache is off.
    """
    work = _Work(config, (), None)
    found = work.listed()
    begin, end = (len(found.entries) * each // count for each in (number - 1, number))
    store = found.store_on_disk(work.kept.known_keys())
    part = work.read(found.entries[begin:end], store, on_progress or (lambda done, total: None))
    work.kept.save_keys(part)
    return end - begin, len(part.rejects)


def prepare_by(
    executor: Executor,
    config: DataConfig,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, int]:
    """Decode a source into the cache by an executor's workers, which have the source and the cache at the
    same paths as this process. `index` then reads no image of it.

    Returns:
        how many images are prepared, and how many of them cannot be used.
    Raises:
        DataError: as `prepare_part`; or if the workers have another cache.
    """
    work = _Work(config, (), None)
    found = work.listed()
    store = found.store_on_disk(KnownKeys())
    count = len(found.entries)
    begins = range(0, count, max(MIN_PART, min(MAX_PART, count // MANY_PARTS)))
    tasks = []
    for begin in begins:
        blobs = [entry.image for entry in found.entries[begin : begin + begins.step]]
        signs = {path: sign_of(path) for path in {path_of(blob) for blob in blobs} if path}
        tasks.append(PartTask(blobs, store.form, str(store.cache.folder), signs))
    read = ReadPart.empty(count)
    for number, part in executor(PartTask.read, tasks):
        read.insert(begins[number], part)
        on_progress(read.count, count)
    store.refresh()
    if missing := store.missing(read.keys[read.good]):
        raise DataError(
            f"{missing} of {count} images were decoded by workers into a cache that is not here",
            where=str(store.cache.folder),
            hint="set SFUMATO_CACHE on all machines to one folder that they share",
        )
    work.kept.save_keys(read)
    return count, len(read.rejects)


class _Work:
    """A source that is to be indexed, and what is kept of it."""

    def __init__(
        self, config: DataConfig, annotations: Sequence[str], listing: Listing | None
    ) -> None:
        self._config, self._excluded = config, _excluded_names(config)
        self._trusts = config.verify == "auto" and config.cache == "auto"
        # a listing that is given may be one that was kept
        self._listing = listing if self._trusts or config.cache == "off" else None
        state = self._listing.state if self._listing is not None else state_of(config.source)
        self.kept = StoredIndex(config, annotations, self._excluded, state)

    def listed(self) -> _Listed:
        """List the source, as the configuration says."""
        config = self._config
        listing = self._listing or listed(config.source, trusts=self._trusts)
        listing = fill_missing(listing, caption=config.caption, category=config.category)
        listing = expand_frames(listing, config.frames)
        if not self._excluded:
            entries, unused = listing.entries, []
        else:
            names = values(listing.entries, "name")
            is_used = np.array([name not in self._excluded for name in names], bool)
            entries = select(listing.entries, np.flatnonzero(is_used))
            unused = [
                Reject(names[place], f"listed in {config.exclude}")
                for place in np.flatnonzero(~is_used).tolist()
            ]
        chosen = select(entries, sample(len(entries), config.limit))
        more = set(values(entries, "category")) if len(chosen) < len(entries) else set()
        return _Listed(
            config,
            listing,
            chosen,
            unused,
            choose_scale(config.range, entries),
            beyond=len(entries) - len(chosen),
            categories=more,
        )

    def read(
        self, entries: Sequence[Entry], store: PixelStore, step: Callable[[int, int], None]
    ) -> ReadPart:
        """Read images, and store what is decoded; what was read before an interruption is known to
        the next start.
        """
        read = ReadPart.empty(len(entries))
        try:
            with quiet():
                _read(entries, store, read, step)
        except BaseException:
            self.kept.save_keys(read)
            raise
        return read


def _read(
    entries: Sequence[Entry], store: PixelStore, read: ReadPart, step: Callable[[int, int], None]
) -> None:
    """Read images into `read`: in parts by processes that add to the store where it is on disk and the
    images are many.
    """
    count = len(entries)
    if not store.is_on_disk or not uses_processes(count):

        def goes_on() -> bool:
            step(read.count, count)
            return True

        blobs = [entry.image for entry in entries]
        read_part(blobs, store, read, goes_on=goes_on, map_=forked_map)
        return
    tally = Tally()

    def work(begin: int) -> ReadPart:
        blobs = [entry.image for entry in entries[begin : begin + size]]
        return read_part(blobs, store, ReadPart.empty(len(blobs)), goes_on=tally.add)

    def tell() -> None:
        step(min(tally.count, count), count)

    size = max(MIN_PART, min(MAX_PART, -(-count // (PARTS_EACH * (cpu_count() or 1)))))
    begins = range(0, count, size)
    try:
        for begin, part in zip(
            begins,
            forked_map(work, begins, chunk=1, images=size, on_wait=tell, on_stop=tally.stop),
            strict=True,
        ):
            read.insert(begin, part)
    finally:
        tally.stop()
    store.refresh()
    step(count, count)


@dataclass(frozen=True)
class _Listed:
    """What a source lists: the entries that are used and the images that are left out already; where a
    sample is used, how many more there are, and the categories of all.
    """

    config: DataConfig
    listing: Listing
    entries: Sequence[Entry]
    unused: list[Reject]
    scale: ChosenScale
    beyond: int
    categories: set[str | None]

    def store(self, known: KnownKeys) -> PixelStore:
        """Return where its pixels are put."""
        form = self.config.pixel_format(self.scale.scale)
        return pixel_store(self.config, form, len(self.entries), known)

    def store_on_disk(self, known: KnownKeys) -> CachedPixels:
        """Return the cache.

        Raises:
            DataError: if the pixels are not kept there.
        """
        store = self.store(known)
        if not isinstance(store, CachedPixels):
            raise DataError(
                "decoded images are not kept, so that nothing can be prepared",
                where="data.cache",
                hint="set data.cache=auto, and free space: the cache takes at most "
                f"{CACHE_SHARE_OF_DISK:.0%} of what is free",
            )
        return store


def sample(count: int, limit: int) -> NDArray[np.int64]:
    """Return the positions of an even sample of at most `limit` of `count` images, ascending; of all
    for 0.

    A larger sample holds a smaller one. They are in the order of SplitMix64 (Steele et al. 2014).
    """
    if not 0 < limit < count:
        return np.arange(count)
    with np.errstate(over="ignore"):
        mixed = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    return np.sort(np.argpartition(mixed, limit - 1)[:limit])


def sampled(listing: Listing, limit: int) -> Listing:
    """Return the sample of a listing that `data.limit` leaves; 0 leaves all."""
    part = sample(len(listing.entries), limit)
    return replace(listing, entries=select(listing.entries, part))


def _rejects(entries: Sequence[Entry], part: ReadPart) -> list[Reject]:
    return [
        Reject(value_at(entries, "name", place), reason)
        for place, reason in sorted(part.rejects.items())
    ]


def _dataset(
    config: DataConfig,
    annotations: frozenset[str],
    found: _Listed,
    part: ReadPart,
    store: PixelStore,
) -> Dataset:
    """Make a dataset of the images that were read."""
    good, form = select(found.entries, part.good), store.form
    unused = [*found.unused, *_rejects(found.entries, part)]
    facts = ImageFacts.of(store.facts(part.keys[part.good]))
    read_rows, read_thumbnails = store.readers(part.keys[part.good])
    merged = merge_groups(good, facts.ids, _clusters(config, form, facts.ids, read_thumbnails))
    labels, categories = _categories(config, values(good, "category"), found.categories)
    notes: dict[str, Sequence[str]] = {
        note: NamesAt(good, np.array(places)) for note, places in facts.notes.items()
    }
    _require_one_kind_of_alpha(notes, len(good))
    resized, losses = facts.resizing_and_losses(form)
    annotation_data = Annotations(
        entries=good,
        form=form,
        shapes=facts.shapes,
        names=annotations,
        resizing=resized,
        loss_mask=config.loss_mask,
    )
    with quiet():
        unreadable: dict[str, list[int]] = {}
        for name, place in annotation_data.find_unreadable():
            unreadable.setdefault(f"{name}_unreadable", []).append(place)
        mask_lines = annotation_data.loss_mask_lines()
    notes |= {note: NamesAt(good, np.array(places)) for note, places in unreadable.items()}
    dataset = Dataset(
        config=config,
        entries=good,
        ids=facts.ids,
        labels=labels,
        categories=categories,
        shapes=facts.shapes,
        annotations=annotation_data,
        keys=bytes_of(part.keys[part.good]),
        read_rows=read_rows,
        read_thumbnails=read_thumbnails if isinstance(read_thumbnails, RowReader) else None,
        clusters=merged.groups,
        rejects=[*found.listing.rejects, *unused],
        ledger=Ledger.of(found.listing, unused, beyond=found.beyond),
        notes=notes,
        crop_loss=float(losses.mean()),
        scale=found.scale.scale,
        remarks=(
            *found.scale.lines,
            *merged.remarks,
            *unused_frames(facts.frames.tolist()),
            *mask_lines,
        ),
    )
    assert dataset.parts  # refuses a source that holds out all of its images
    return dataset


def _categories(
    config: DataConfig, named: Sequence[str | None], more: Iterable[str | None]
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return the number of each image's category, -1 where it has none, and their names.

    Args:
        named: the category of each image.
        more: those of images that are not read.
    """
    others = {name for name in (*named, *more) if name is not None}
    categories = (
        *config.categories,
        *sorted(others.difference(config.categories), key=_natural),
    )
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(categories)}
    return torch.tensor([numbers.get(name, -1) for name in named]), categories


def _is_kept_as_now(dataset: Dataset, config: DataConfig) -> bool:
    """Return whether a dataset from the cache has its pixels where they would be put now."""
    if dataset.read_rows is not None:
        return True
    store = pixel_store(config, dataset.pixel_format, len(dataset.entries), KnownKeys())
    return not store.keeps_pixels


def _require_one_kind_of_alpha(notes: Mapping[str, Sequence[str]], count: int) -> None:
    """Raise DataError if the last channel is alpha in some images and something else in others."""
    without = notes.get("no_alpha", [])
    if without and len(without) < count:
        raise DataError(
            f"the last channel of {len(without)} images, e.g. {without[0]}, is not marked as "
            f"alpha, and that of {count - len(without)} is",
            where="data.alpha",
            hint="set data.alpha=on if it is alpha in all, or train the two kinds apart",
        )


def _clusters(
    config: DataConfig,
    form: PixelFormat,
    ids: Sequence[str],
    read_thumbnails: Callable[[NDArray[np.int64]], NDArray[Any]],
) -> NDArray[np.int64]:
    """Return the groups of images that stay together.

    Groups of near-duplicates are kept in the cache, since finding them takes a while.
    """
    if config.near_duplicates == "off":
        return np.arange(len(ids))
    if config.near_duplicates == "exact":
        return clusters(ids, read_thumbnails, resolution=0)
    identity = hashlib.sha256(
        f"{DECODER} {ALGORITHM} {form!r} {' '.join(ids)}".encode()
    ).hexdigest()
    stored = load_array("clusters", identity) if config.cache == "auto" else None
    if stored is not None and stored.shape == (len(ids),):
        result: NDArray[np.int64] = stored.astype(np.int64)
        return result
    groups = clusters(ids, read_thumbnails, resolution=min(min(shape) for shape in form.shapes))
    if config.cache == "auto":
        save_array("clusters", identity, groups)
    return groups


def _excluded_names(config: DataConfig) -> set[str]:
    """Read the names in the file of rejects.

    What follows a tab is the reason; a line that begins with # and has no tab is a comment.
    """
    if config.exclude is None:
        return set()
    try:
        lines = Path(config.exclude).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read: {error}",
            where=config.exclude,
            hint="name a text file with one image a line",
        ) from None
    return {
        line.partition("\t")[0]
        for line in lines
        if line.strip() and not (line.startswith("#") and "\t" not in line)
    }


def _natural(name: str) -> tuple[int, int, str]:
    """Return a sort key that orders numbers by value, then words: 2 before 10."""
    return (0, int(name), name) if name.isdecimal() and len(name) < 19 else (1, 0, name)
