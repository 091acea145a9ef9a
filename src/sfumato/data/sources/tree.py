"""Files by relative name, in a folder or an archive, read as a set of images: each image with all that lies beside it.

Every file has one fate: it becomes an image, it says something about images, or it is left out with a reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sfumato.data import files
from sfumato.data.endings import SUFFIXES, SYSTEM, has_known_ending, is_image, looks_like_image, why_left_out
from sfumato.data.entry import MAX_BYTES, Blob, Entry, Listing, Reject, described, legible
from sfumato.data.files import UnsafePath
from sfumato.data.sources.layout import BESIDE_CATEGORIES, Layout
from sfumato.data.sources.metadata import Finder, Row, Table, is_authoritative, may_be_table, read_table
from sfumato.data.texts import Texts
from sfumato.errors import DataError

LAYERS = {"doodle": SUFFIXES, "mask": SUFFIXES, "points": (".npy", ".ply", ".xyz", ".csv")}
KINDS = {
    "captions": "captions", "json": "JSON files", "cls": "category files", "doodle": "doodles", "mask": "masks", "points": "point clouds",
}  # fmt: skip
CAPTIONS = (".txt", ".caption", ".captions", ".cap", ".prompt")
TEXTS = (*CAPTIONS, ".cls", ".json")
MAX_TABLE_BYTES = 64 << 20  # of a table that is not called metadata
UNNAMED = "not named in the metadata"
ROWS_TRIED, MOST_TABLES = 50, 100


class Beside(NamedTuple):
    """A file that says something about images: what, and about which."""

    kind: str
    name: str


class Told(NamedTuple):
    """What metadata say of images, by the image's name, and whether categories are among it."""

    facts: dict[str, dict[str, Any]]
    categories: bool


class _Owners:
    """Images by the names of what lies beside them: `0.txt`, `0.TXT` and `0.png.txt` are all beside `0.png`."""

    def __init__(self, images: Sequence[str]) -> None:
        self._exact: dict[str, list[str]] = {}
        self._folded: dict[str, list[str]] = {}
        for name in images:
            for key in dict.fromkeys((_stem(name), name)):
                self._exact.setdefault(key, []).append(name)
                self._folded.setdefault(key.lower(), []).append(name)

    def of(self, stem: str) -> Sequence[str]:
        return self._exact[stem] if stem in self._exact else self._folded.get(stem.lower(), ())


@dataclass(kw_only=True)
class Tree:
    """Files of a folder or archive.

    Attributes:
        where: the folder or archive, for messages.
        names: all files, sorted.
        blob: the place of a file's bytes.
        check: raises UnsafePath for a name, given by metadata, that leads elsewhere.
        check_text: raises UnsafePath for a text that may not be read, such as a link to elsewhere.
        head: the first bytes of a file.
        metadata: "off" reads neither tables nor dataset.json.
        unnamed: whether images that metadata do not name are left out, or used without a caption.
        inside: the path of a file as the layout sees it; shown: as people do.
        holdout: the hold-out of a file by the archive that it is in, where its folders name none.
        unit: what the files are called.
        rejects: what was left out before.
    """

    where: str
    names: Sequence[str]
    blob: Callable[[str], Blob]
    head: Callable[[str], bytes]
    check: Callable[[str], str] = files.check_relative
    check_text: Callable[[str], str] = str
    metadata: Literal["auto", "off"] = "auto"
    unnamed: Literal["leave_out", "use"] = "leave_out"
    inside: Callable[[str], str] = str
    shown: Callable[[str], str] = legible
    holdout: Callable[[str], str | None] = lambda name: None
    unit: str = "files"
    rejects: list[Reject] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    _beside: Counter[str] = field(default_factory=Counter)
    _aside: int = 0
    _told: set[str] = field(default_factory=set)  # files whose fate is known

    def set_aside(self, count: int, kind: str) -> None:
        """Count files that are known not to be of the set."""
        self._aside += count
        if count:
            self._beside[kind] += count

    def listing(self) -> Listing:
        """Entries of all images.

        Raises:
            DataError: if there are none, or the metadata name none of them.
        """
        found = len(self.names) + self._aside + sum(not reject.part for reject in self.rejects)
        images, layers = self._images()
        if not images:
            raise self._nothing()
        beside = self._assigned(images, layers)
        told = self._metadata(images, layers) if self.metadata == "auto" else Told({}, categories=False)
        layout = Layout.of([self.inside(name) for name in images])
        texts = self._texts(beside)
        entries = list(self._entries(images, layout, told, beside, texts))
        if not entries:
            raise self._nothing()
        self._rest()
        self.remarks += [line for line in (_layout_line(layout, entries), layout.remark, texts.note) if line]
        return Listing(
            entries=entries, rejects=self.rejects, beside=dict(sorted(self._beside.items())), unit=self.unit, found=found,
            remarks=tuple(self.remarks),
        )  # fmt: skip

    def _nothing(self) -> DataError:
        """What to say where nothing is left: the reasons, commonest first."""
        self._rest()
        counts = Counter(reject.reason for reject in self.rejects)
        reasons = "; ".join(f"{count} {self.unit}: {reason}" for reason, count in counts.most_common(3))
        return DataError(
            f"holds no pictures ({', '.join(SUFFIXES)})" + (f"; {reasons}" if reasons else ""),
            where=self.where,
            mend="put images in it, or name another folder",
        )

    def _images(self) -> tuple[list[str], dict[str, str]]:
        """Names of images, and layers of images (`cat.mask.png`) with the stem of the image that each belongs to."""
        found = [name for name in self.names if is_image(name) or (not has_known_ending(name) and self._looks_like_image(name))]
        stems = {_stem(name) for name in found}
        layers = {name: owner for name in self.names if (owner := _layer_of(name, stems)) is not None}
        return [name for name in found if name not in layers], layers

    def _looks_like_image(self, name: str) -> bool:
        try:
            return looks_like_image(self.head(name))
        except OSError:
            return False

    def _assigned(self, images: Sequence[str], layers: dict[str, str]) -> dict[str, list[Beside]]:
        """What lies beside each image, by the image's name."""
        owners = _Owners(images)
        beside: dict[str, list[Beside]] = {}
        for name, stem in layers.items():
            kind = _stem(name).rpartition(".")[2].lower()
            for owner in owners.of(stem):
                beside.setdefault(owner, []).append(Beside(kind, name))
        for name in self.names:
            ending = _ending(name)
            if ending in TEXTS and not is_authoritative(name):
                for owner in owners.of(_stem(name)):
                    beside.setdefault(owner, []).append(Beside("captions" if ending in CAPTIONS else ending[1:], name))
        return beside

    def _texts(self, beside: dict[str, list[Beside]]) -> Texts:
        """All texts that lie beside images, in the set's encoding; those that cannot be read are left out."""
        texts = Texts()
        for name in dict.fromkeys(side.name for sides in beside.values() for side in sides if side.kind not in LAYERS):
            try:
                texts.add(name, self.blob(self.check_text(name)).read())
            except (OSError, ValueError, UnsafePath) as error:
                what = "JSON" if name.lower().endswith(".json") else "caption"
                self._leave_out(name, f"{what} left out: {error}")
        texts.settle()
        return texts

    def _entries(
        self, images: Sequence[str], layout: Layout, told: Told, beside: dict[str, list[Beside]], texts: Texts
    ) -> Iterator[Entry]:
        """The images that are used, each with what is known of it: by its folder, then by metadata, then by what lies beside it."""
        known: dict[str, dict[str, Any]] = {}
        for name in images:
            if name not in self._told:  # metadata made a layer of it, or do not name it
                known[name] = dict(told.facts.get(name, {}))
                for side in sorted(beside.get(name, ()), key=_order):
                    self._lay_over(known[name], side, texts)
        labelled = told.categories or any("category" in found for found in known.values())
        for name, found in known.items():
            place = layout.place(self.inside(name))
            if place.stray and name not in told.facts and not (labelled and place.stray == BESIDE_CATEGORIES):
                self._leave_out(name, place.stray)
                continue
            if place.category is not None and not told.categories:
                found.setdefault("category", place.category)
            if (holdout := place.holdout or self.holdout(name)) is not None:
                found.setdefault("holdout", holdout)
            self._told.add(name)
            yield Entry(name=self.shown(name), image=self.blob(name), **found)

    def _lay_over(self, found: dict[str, Any], side: Beside, texts: Texts) -> None:
        """Add what one file beside an image says to what is known of the image."""
        if side.kind in LAYERS:
            found.setdefault(side.kind, self.blob(side.name))
        elif side.name not in texts:
            return  # left out
        elif side.kind == "captions":
            if text := texts[side.name].strip():
                found["captions"] = (*found.get("captions", ()), text)
        else:
            try:
                found.update(_record(side.kind, texts[side.name]))
            except (ValueError, RecursionError) as error:
                self._leave_out(side.name, f"JSON left out: {str(error)[:100]}")
                return
        self._count(side.name, KINDS[side.kind])

    # --- metadata --------------------------------------------------------------------------------------------------------------

    def _metadata(self, images: Sequence[str], layers: dict[str, str]) -> Told:
        """What tables and dataset.json say of images, by the image's name."""
        stems = {_stem(name) for name in images}
        candidates = [name for name in self.names if may_be_table(name) and name not in layers and _stem(name) not in stems]
        decisive = [name for name in self.names if is_authoritative(name)]
        if len({name.rpartition(".")[2].lower() for name in decisive}) > 1:
            raise DataError(
                f"metadata files of several kinds: {', '.join(decisive[:3])}", where=self.where, mend="keep one kind of them"
            )
        facts: dict[str, dict[str, Any]] = {}
        finder = Finder(self.names, self.check)
        drawn: dict[str, str] = {}
        for name in decisive or candidates[:MOST_TABLES]:
            self._by_table(name, finder, facts, drawn, decisive=bool(decisive))
        for name in drawn.keys() - facts.keys():
            self._count(name, KINDS[drawn[name]])
        if decisive:
            self._leave_out_unnamed(images, facts, UNNAMED)
        for name in [name for name in self.names if name.rpartition("/")[2] == "dataset.json"][:1]:
            self._by_dataset_json(name, images, facts)
        return Told(facts, categories=any("category" in found for found in facts.values()))

    def _by_table(
        self, name: str, finder: Finder, facts: dict[str, dict[str, Any]], drawn: dict[str, str], *, decisive: bool
    ) -> None:
        """Add what a table says, and the layers that it names to `drawn`. One that is not called metadata counts if it names images."""
        try:
            data = self.blob(self.check_text(name)).read()
            if not decisive and len(data) > MAX_TABLE_BYTES:
                raise ValueError(f"more than {MAX_TABLE_BYTES >> 20} MiB")
            if len(data) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
            table = read_table(name, data)
        except (OSError, ValueError, RecursionError, UnsafePath) as error:
            if decisive:
                raise DataError(
                    f"{name} cannot be read: {str(error)[:200]}", where=self.where,
                    mend="repair or remove that file, or set data.source.metadata=off",
                ) from None  # fmt: skip
            self._leave_out(name, f"a table that cannot be read: {str(error)[:100]}")
            return
        folder = name.rpartition("/")[0]
        if not decisive and not _names_some(table, finder, folder):
            return  # its fate is that of any other file
        before, faults = len(facts), len(self.rejects)
        for row in table.rows:
            self._row(row, table.file_column, folder, finder, facts, drawn)
        if decisive and len(facts) == before:
            self._refuse(table, self.rejects[faults:])
        self._count(name, "metadata")
        if table.unused:
            self.remarks.append(f"{name}: columns that are not used: {', '.join(map(legible, table.unused[:12]))[:300]}")

    def _refuse(self, table: Table, faults: Sequence[Reject]) -> None:
        reasons = "; ".join(f"{reject.name}: {reject.reason}" for reject in faults[:3]) or "it has no rows"
        column = (
            "its column of file names is one of file_name, image, path, ..." if table.file_column is None else "check the names"
        )
        raise DataError(
            f"its metadata name no picture that is there ({reasons})", where=self.where,
            mend=f"{column}, or set data.source.metadata=off",
        )  # fmt: skip

    def _row(
        self, row: Row, column: str | None, folder: str, finder: Finder, facts: dict[str, dict[str, Any]], drawn: dict[str, str]
    ) -> None:
        try:
            if row.fault:
                raise UnsafePath(row.fault)
            value = None if column is None else row.record.get(column)
            if value is None or value == "":
                raise UnsafePath(f"has no file_name; its columns are {', '.join(map(str, row.record))[:200]}")
            name = finder.find(value, folder)
            told = described(row.record)
            layers = {
                layer: finder.find(other, folder)
                for layer in LAYERS
                if (other := row.record.get(f"{layer}_file_name")) not in (None, "")
            }
            if name in facts:
                if facts[name].get("captions") and told.get("captions"):  # several rows for an image are several captions
                    facts[name]["captions"] = (*facts[name]["captions"], *told["captions"])
                    return
                raise UnsafePath(f"{name[:80]!r} is named twice")
        except (UnsafePath, ValueError) as reason:
            self.rejects.append(Reject(legible(row.place), str(reason), part=True))
            return
        for layer, other in layers.items():
            drawn[other] = layer
            told[layer] = self.blob(other)
        facts[name] = told

    def _leave_out_unnamed(self, images: Sequence[str], facts: dict[str, dict[str, Any]], reason: str) -> None:
        unnamed = [name for name in images if name not in facts and name not in self._told]
        if self.unnamed == "use":
            self.remarks += (
                [f"{len(unnamed)} images are not named in the metadata, and are trained without a caption"] if unnamed else []
            )
            return
        for name in unnamed:
            self._leave_out(name, reason)
        if unnamed:
            self.remarks.append(
                f"{len(unnamed)} images are not named in the metadata and are left out; "
                "data.source.unnamed=use trains them without a caption"
            )

    def _by_dataset_json(self, file: str, images: Sequence[str], facts: dict[str, dict[str, Any]]) -> None:
        """EDM's and StyleGAN's label file; any other file of that name is passed over."""
        try:
            data = self.blob(file).read()
            if len(data) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
            record = json.loads(data)
            if not isinstance(record, dict) or "labels" not in record:
                self._leave_out(file, 'not a label file, which holds {"labels": [["00000/img00000000.png", 6], ...]}')
                return
            folder = file.removesuffix("dataset.json")
            categories = {folder + str(name): str(label) for name, label in record["labels"] or []}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(
                f"dataset.json cannot be read: {str(error)[:100]}", where=self.where,
                mend='it holds {"labels": [["00000/img00000000.png", 6], ...]} or {"labels": null}; or set data.source.metadata=off',
            ) from None  # fmt: skip
        self._count(file, "metadata")
        for name in images:
            if name in categories:
                facts.setdefault(name, {})["category"] = legible(categories[name])
        if categories:
            self._leave_out_unnamed(images, facts, "not named in dataset.json")

    # --- the account -----------------------------------------------------------------------------------------------------------

    def _leave_out(self, name: str, reason: str) -> None:
        if name not in self._told:
            self._told.add(name)
            self.rejects.append(Reject(self.shown(name), reason))

    def _count(self, name: str, kind: str) -> None:
        if name not in self._told:
            self._told.add(name)
            self._beside[kind] += 1

    def _rest(self) -> None:
        """Whatever has no fate yet is left out, with the reason that its name gives."""
        for name in self.names:
            if name in self._told:
                continue
            if name.rpartition("/")[2].lower() in SYSTEM:
                self._count(name, "files of the system")
            elif _layer_of(name, None) is not None or name.lower().endswith(TEXTS):
                self._leave_out(name, "belongs to none of the images that are used")
            else:
                self._leave_out(name, why_left_out(name))


def _names_some(table: Table, finder: Finder, folder: str) -> bool:
    """Whether any of a table's first rows names a file that is there, and says something of it."""
    if table.file_column is None:
        return False
    for row in table.rows[:ROWS_TRIED]:
        try:
            finder.find(row.record.get(table.file_column), folder)
            if described(row.record):
                return True
        except (UnsafePath, ValueError):
            continue
    return False


def _order(side: Beside) -> tuple[int, str]:
    """Texts before JSON, which counts more; `.txt` before `.caption`."""
    ending = _ending(side.name)
    return (TEXTS.index(ending) if ending in TEXTS else len(TEXTS), side.name)


def _record(kind: str, text: str) -> dict[str, Any]:
    """What a .json or .cls beside an image says."""
    if kind == "cls":
        return described({"cls": text.strip()})
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return described(record)


def _stem(name: str) -> str:
    """A name without its ending."""
    ending = _ending(name)
    return name[: -len(ending)] if ending else name


def _ending(name: str) -> str:
    """The ending with its dot in lower case, "" if there is none."""
    base = name.rpartition("/")[2]
    stem, dot, ending = base.rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def _layer_of(name: str, stems: set[str] | None) -> str | None:
    """The stem of the image that a file such as `cat.mask.png` is a layer of; None if it is not a layer of any of `stems`."""
    stem, dot, kind = _stem(name).rpartition(".")
    if not dot or kind.lower() not in LAYERS or _ending(name) not in LAYERS[kind.lower()]:
        return None
    return stem if stems is None or stem in stems else None


def _layout_line(layout: Layout, entries: Sequence[Entry]) -> str:
    """How the folders were read, with counts."""
    if not layout.splits:
        return ""
    held = Counter(entry.holdout for entry in entries)
    trained = held.pop(None, 0)
    categories = len({entry.category for entry in entries if entry.category is not None})
    parts = " and ".join(f"{legible(name)}/" for name in layout.splits)
    return f"{parts}: {trained:,} to learn from, {sum(held.values()):,} held out by name" + (
        f", {categories} categories" if categories else ""
    )
