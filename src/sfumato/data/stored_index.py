"""The index of a source, kept in columns until a file of it changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.data.annotations import Annotations
from sfumato.data.array_cache import RowReader
from sfumato.data.arrow import arrow
from sfumato.data.data_config import DataConfig
from sfumato.data.dataset import Dataset, DatasetParts
from sfumato.data.decoding import Scale
from sfumato.data.entry_table import EntryTable, NotStorable, encode
from sfumato.data.index_store import (
    HexIds,
    KeyStore,
    KnownKeys,
    NamesAt,
    Place,
    Stored,
    Watch,
    hashes,
    plain_rejects,
    read_only_tensor,
    reader,
    reader_columns,
    rejects_of,
)
from sfumato.data.ledger import Ledger
from sfumato.data.listing import SourceState
from sfumato.data.pixel_store import ReadPart

if TYPE_CHECKING:
    import pyarrow

MAX_NOTES = 31  # a bit for each
READERS = ("rows", "thumbnails")


class StoredIndex:
    """Where the index of a configuration is kept, and the state of its source when this was asked."""

    def __init__(
        self,
        config: DataConfig,
        annotations: Iterable[str],
        excluded: Iterable[str],
        state: SourceState | None,
    ) -> None:
        """Take what decides on an index.

        Args:
            excluded: names of images that are left out.
            state: of the source, from before it is listed; None if nothing is kept of it.
        """
        self._config, self._annotations = config, frozenset(annotations)
        self._state, self._watch = state if config.cache == "auto" else None, Watch()
        self._trusts = config.verify == "auto" and self._state is not None
        self._keys = KeyStore(config.source)
        settings = replace(
            config, workers=0, verify="auto", shuffle="global", window=16, wait="all"
        )
        self._place = Place(
            "indexes", f"{settings!r} {sorted(self._annotations)} {sorted(excluded)}"
        )

    def load(self, *, is_new: bool = False) -> Dataset | None:
        """Return the dataset as it was indexed, if no file of it has changed.

        Args:
            is_new: whether it was saved just now.
        """
        stored = self._place.load(self._state) if self._trusts and self._state else None
        if stored is None:
            return None
        readers = {
            name: reader(name, stored) for name in READERS if f"{name}_files" in stored.facts
        }
        if None in readers.values():
            return None
        return _dataset(self._config, self._annotations, stored, readers, is_kept=not is_new)

    def known_keys(self) -> KnownKeys:
        """Return the keys of images whose files are as they were when they were last read."""
        if not self._trusts:
            return KnownKeys()
        return KnownKeys(self._keys.load())

    def save_keys(self, read: ReadPart) -> None:
        """Keep the keys of the images that were read, so that these need not be read again."""
        if self._state is not None and self._watch.was_slow:
            self._keys.save(*read.known())

    def save(self, dataset: Dataset, read: ReadPart) -> None:
        """Keep a dataset, if it took long to index and its files were not changed meanwhile.

        Args:
            read: its images, and those that cannot be used.
        """
        state, in_memory = self._state, not isinstance(dataset.read_rows, RowReader | None)
        if state is None or in_memory or read.failed or not self._watch.was_slow:
            return
        if self._watch.is_lasting(self._config.source, state):
            self._place.save(state, lambda: (_all_columns(dataset, read), _facts(dataset)))
            # of a sample, those of the other images stay
            self._keys.save(*read.known(), replaces=not dataset.ledger.beyond)


def _all_columns(dataset: Dataset, read: ReadPart) -> dict[str, pyarrow.Array]:
    return {
        **encode(dataset.entries),
        **_columns(dataset),
        "key": hashes(read.keys[read.good]),
    }


def _columns(dataset: Dataset) -> dict[str, pyarrow.Array]:
    """Return the columns of a dataset besides those of its entries."""
    pa = arrow()
    count = len(dataset.entries)
    if len(dataset.notes) > MAX_NOTES:
        raise NotStorable("too many notes")
    bits = np.zeros(count, np.int32)
    for number, names in enumerate(dataset.notes.values()):
        assert isinstance(names, NamesAt)
        bits[names.positions] |= 1 << number
    part = np.zeros(count, np.int16)  # of the training set, unless it is said
    others = (dataset.holdout, *dataset.named_holdouts.values())
    for number, positions in enumerate(others, start=1):
        part[positions] = number
    columns = {
        "id": hashes(HexIds.of(dataset.ids).bytes),
        "label": pa.array(dataset.labels.numpy().astype(np.int64)),
        "shape": pa.array(dataset.shapes.astype(np.int16)),
        "cluster": pa.array(dataset.clusters.astype(np.int64)),
        "notes": pa.array(bits),
        "part": pa.array(part),
        # the positions of one part after another, so that none has to be looked for
        "order": pa.array(np.concatenate([dataset.whole, *others])),
        "trained": pa.array(np.isin(np.arange(count), dataset.training).astype(np.int8)),
        "resizing": pa.FixedSizeListArray.from_arrays(dataset.annotations.resizing.reshape(-1), 4),
    }
    for name, its_reader in _readers(dataset).items():
        columns |= reader_columns(name, its_reader)
    return columns


def _readers(dataset: Dataset) -> dict[str, RowReader]:
    readers = {"rows": dataset.read_rows, "thumbnails": dataset.read_thumbnails}
    return {name: each for name, each in readers.items() if isinstance(each, RowReader)}


def _facts(dataset: Dataset) -> dict[str, Any]:
    facts = {
        "categories": dataset.categories,
        "notes": list(dataset.notes),
        "named_holdouts": list(dataset.named_holdouts),
        "has_repeats": dataset.has_repeats,
        "shape_counts": dataset.shape_counts.tolist(),
        "part_sizes": [
            len(part) for part in (dataset.whole, dataset.holdout, *dataset.named_holdouts.values())
        ],
        "rejects": plain_rejects(dataset.rejects),
        "ledger": asdict(dataset.ledger),
        "crop_loss": dataset.crop_loss,
        "scale": asdict(dataset.scale),
        "remarks": dataset.remarks,
        "fingerprint": dataset.fingerprint,
        "whole_fingerprint": dataset.whole_fingerprint,
    }
    for name, its_reader in _readers(dataset).items():
        facts |= {
            f"{name}_folder": str(its_reader.cache.folder),
            f"{name}_files": its_reader.names,
            f"{name}_lengths": its_reader.lengths.tolist(),
        }
    return facts


def _dataset(
    config: DataConfig,
    annotations: frozenset[str],
    stored: Stored,
    readers: Mapping[str, RowReader | None],
    *,
    is_kept: bool,
) -> Dataset:
    """Return the dataset that a table holds."""
    facts, entries = stored.facts, EntryTable(stored.table)
    scale = Scale(**{
        name: None if value is None else tuple(value) for name, value in facts["scale"].items()
    })  # fmt: skip
    shapes = stored.column("shape")
    bits = stored.column("notes")
    dataset = Dataset(
        config=config,
        entries=entries,
        ids=HexIds(stored.column("id").reshape(-1, 16)),
        labels=read_only_tensor(stored.column("label").astype(np.int64, copy=False)),
        categories=tuple(facts["categories"]),
        shapes=shapes,
        annotations=Annotations(
            entries=entries,
            form=config.pixel_format(scale),
            shapes=shapes,
            names=annotations,
            resizing=stored.column("resizing").reshape(-1, 4),
            loss_mask=config.loss_mask,
        ),
        keys=stored.column("key").reshape(-1, 16),
        read_rows=readers.get("rows"),
        read_thumbnails=readers.get("thumbnails"),
        clusters=stored.column("cluster"),
        rejects=rejects_of(facts["rejects"]),
        ledger=Ledger(**facts["ledger"]),
        notes={
            note: NamesAt(entries, np.flatnonzero(bits & (1 << number)))
            for number, note in enumerate(facts["notes"])
        },
        crop_loss=facts["crop_loss"],
        scale=scale,
        remarks=tuple(facts["remarks"]),
        is_kept=is_kept,
    )
    dataset.__dict__.update(  # its cached properties
        parts=_parts(config, stored),
        fingerprint=facts["fingerprint"],
        whole_fingerprint=facts["whole_fingerprint"],
        **_counted(facts),
    )
    return dataset


def _counted(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of columns that need not be read for it; {} of versions before."""
    if "shape_counts" not in facts:
        return {}
    counts = np.array(facts["shape_counts"], np.int64)
    return {"shape_counts": counts, "has_repeats": facts["has_repeats"]}


def _parts(config: DataConfig, stored: Stored) -> DatasetParts:
    """Return the parts of a set, which stay on disk."""
    names = stored.facts["named_holdouts"]
    if "order" not in stored.table.column_names:  # of versions before
        part = stored.column("part")
        whole, *others = (np.flatnonzero(part == number) for number in range(2 + len(names)))
    else:
        ends = np.cumsum(stored.facts["part_sizes"])[:-1]
        whole, *others = np.split(stored.column("order"), ends)
    return DatasetParts(
        whole=whole,
        training=whole if config.half == "off" else np.flatnonzero(stored.column("trained")),
        holdout=others[0],
        named=dict(zip(names, others[1:], strict=True)),
    )
