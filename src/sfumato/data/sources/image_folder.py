"""Files by relative name, in a folder or an archive, read as a set of images: each image with
everything that lies beside it.

Every file has one fate: it becomes an image, it describes images, or it is left out with a reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sfumato.data import files
from sfumato.data.file_types import (
    ANNOTATION_FILES,
    SUFFIXES,
    SYSTEM,
    ending_of,
    has_known_ending,
    is_image,
    looks_like_image,
    stem_of,
    why_left_out,
)
from sfumato.data.files import UnsafePath
from sfumato.data.listing import Blob, Entry, Listing, Reject, parse_annotations, printable_name
from sfumato.data.sources.file_status import KINDS, FileStatus
from sfumato.data.sources.folder_layout import BESIDE_CATEGORIES, FolderLayout, Place
from sfumato.data.sources.kohya import Folders, folder_lines
from sfumato.data.sources.metadata import is_authoritative
from sfumato.data.sources.metadata_join import Metadata, MetadataFacts
from sfumato.data.text_encoding import Texts
from sfumato.errors import DataError

CAPTIONS = (".txt", ".caption", ".captions", ".cap", ".prompt")
TEXTS = (*CAPTIONS, ".cls", ".json")


class Sidecar(NamedTuple):
    """A file that describes an image: what it holds, and its name."""

    kind: str
    name: str


class _ImagesByStem:
    """Images by the names of what lies beside them: `0.txt`, `0.TXT` and `0.png.txt` are all beside
    `0.png`.
    """

    def __init__(self, images: Sequence[str]) -> None:
        self._exact: dict[str, list[str]] = {}
        self._folded: dict[str, list[str]] = {}
        for name in images:
            for key in dict.fromkeys((stem_of(name), name)):
                self._exact.setdefault(key, []).append(name)
                self._folded.setdefault(key.lower(), []).append(name)

    def of(self, stem: str) -> Sequence[str]:
        return self._exact[stem] if stem in self._exact else self._folded.get(stem.lower(), ())


@dataclass(kw_only=True)
class ImageFolderReader:
    """The files of a folder or archive.

    Attributes:
        where: the folder or archive, for messages.
        names: all files, sorted.
        blob: the place of a file's bytes.
        check: raises UnsafePath for a name, given by metadata, that leads elsewhere.
        check_text: raises UnsafePath for a text that may not be read, such as a link to elsewhere.
        head: the first bytes of a file.
        metadata: "off" reads neither tables nor dataset.json.
        unnamed: whether images that metadata do not name are left out, or used without a caption.
        folders: what the folders of images are; `auto` decides by their names.
        inside: the path of a file as the layout sees it; display_name: as people do.
        holdout: the hold-out of a file by the archive that it is in, where its folders name none.
        unit: what the files are called.
        rejects, remarks: what was already left out and noted; other_files: files that are known not
            to be of the set, by kind.
    """

    where: str
    names: Sequence[str]
    blob: Callable[[str], Blob]
    head: Callable[[str], bytes]
    check: Callable[[str], str] = files.check_relative
    check_text: Callable[[str], str] = str
    metadata: Literal["auto", "off"] = "auto"
    unnamed: Literal["leave_out", "use"] = "leave_out"
    folders: Folders = "auto"
    inside: Callable[[str], str] = str
    display_name: Callable[[str], str] = printable_name
    holdout: Callable[[str], str | None] = lambda name: None
    unit: str = "files"
    rejects: Sequence[Reject] = ()
    remarks: Sequence[str] = ()
    other_files: Mapping[str, int] = field(default_factory=dict)
    status: FileStatus = field(init=False)

    def __post_init__(self) -> None:
        self.status = FileStatus(
            display_name=self.display_name,
            rejects=list(self.rejects),
            remarks=list(self.remarks),
            sidecars=Counter(self.other_files),
        )

    def listing(self) -> Listing:
        """List all images, each with what folders, metadata and the files beside it say.

        Raises:
            DataError: if there are none, or the metadata name none of them.
        """
        count = (
            len(self.names)
            + sum(self.other_files.values())
            + sum(not reject.part for reject in self.rejects)
        )
        images, annotations = self._images()
        if not images:
            raise self._no_images_error()
        sidecars = self._assign_sidecars(images, annotations)
        metadata = (
            self._metadata().read(images, annotations)
            if self.metadata == "auto"
            else MetadataFacts({}, categories=False)
        )
        layout = FolderLayout.of([self.inside(name) for name in images], self.folders)
        texts = self._texts(sidecars)
        placed = list(self._entries(images, layout, metadata, sidecars, texts))
        entries = [entry for _, entry in placed]
        if not entries:
            raise self._no_images_error()
        self._leave_out_rest()
        status = self.status
        status.remarks += [
            line
            for line in (
                layout.line(entries),
                layout.remark,
                *folder_lines((place.kohya, entry) for place, entry in placed),
                texts.note,
            )
            if line
        ]
        return Listing(
            entries=entries,
            rejects=status.rejects,
            sidecars=dict(sorted(status.sidecars.items())),
            unit=self.unit,
            total=count,
            remarks=tuple(status.remarks),
        )

    def _metadata(self) -> Metadata:
        return Metadata(
            where=self.where,
            names=self.names,
            blob=self.blob,
            check=self.check,
            check_text=self.check_text,
            unnamed=self.unnamed,
            status=self.status,
        )

    def _no_images_error(self) -> DataError:
        """Return the error for a tree without images, with the most common reasons first."""
        self._leave_out_rest()
        counts = Counter(reject.reason for reject in self.status.rejects)
        reasons = "; ".join(
            f"{count} {self.unit}: {reason}" for reason, count in counts.most_common(3)
        )
        return DataError(
            f"holds no images ({', '.join(SUFFIXES)})" + (f"; {reasons}" if reasons else ""),
            where=self.where,
            hint="put images in it, or name another folder",
        )

    def _images(self) -> tuple[list[str], dict[str, str]]:
        """Find the images, and the annotations (`cat.mask.png`) with the stems of their images."""
        images = [
            name
            for name in self.names
            if is_image(name) or (not has_known_ending(name) and self._looks_like_image(name))
        ]
        stems = {stem_of(name) for name in images}
        annotations = {
            name: owner
            for name in self.names
            if (owner := _annotated_stem(name, stems)) is not None
        }
        return [name for name in images if name not in annotations], annotations

    def _looks_like_image(self, name: str) -> bool:
        try:
            return looks_like_image(self.head(name))
        except OSError:
            return False

    def _assign_sidecars(
        self, images: Sequence[str], annotations: dict[str, str]
    ) -> dict[str, list[Sidecar]]:
        """Return what lies beside each image, by the image's name."""
        owners = _ImagesByStem(images)
        sidecars: dict[str, list[Sidecar]] = {}
        for name, stem in annotations.items():
            kind = stem_of(name).rpartition(".")[2].lower()
            for owner in owners.of(stem):
                sidecars.setdefault(owner, []).append(Sidecar(kind, name))
        for name in self.names:
            ending = ending_of(name)
            if ending in TEXTS and not is_authoritative(name):
                for owner in owners.of(stem_of(name)):
                    sidecars.setdefault(owner, []).append(
                        Sidecar("captions" if ending in CAPTIONS else ending[1:], name)
                    )
        return sidecars

    def _texts(self, sidecars: dict[str, list[Sidecar]]) -> Texts:
        """Read all texts that lie beside images, in the set's encoding.

        Those that cannot be read are left out.
        """
        texts = Texts()
        for name in dict.fromkeys(
            sidecar.name
            for sidecars_ in sidecars.values()
            for sidecar in sidecars_
            if sidecar.kind not in ANNOTATION_FILES
        ):
            try:
                texts.add(name, self.blob(self.check_text(name)).read())
            except (OSError, ValueError, UnsafePath) as error:
                kind = "JSON" if name.lower().endswith(".json") else "caption"
                self.status.leave_out(name, f"{kind} left out: {error}")
        texts.settle()
        return texts

    def _entries(
        self,
        images: Sequence[str],
        layout: FolderLayout,
        metadata: MetadataFacts,
        sidecars: dict[str, list[Sidecar]],
        texts: Texts,
    ) -> Iterator[tuple[Place, Entry]]:
        """Yield the images that are used, each with its place and what is known of it.

        A .json or .cls sidecar overrides metadata, a caption sidecar is added, and a doodle, mask
        or point cloud sidecar counts if metadata name none. Folders give the category and hold-out
        that nothing else gives; their categories count only if metadata have none, and a kohya
        folder's caption only where the image has none.
        """
        facts: dict[str, dict[str, Any]] = {}
        for name in images:
            if (
                name not in self.status.resolved
            ):  # metadata made an annotation of it, or do not name it
                facts[name] = dict(metadata.facts.get(name, {}))
                for sidecar in sorted(sidecars.get(name, ()), key=_order):
                    self._apply_sidecar(facts[name], sidecar, texts)
        labelled = metadata.categories or any("category" in fields for fields in facts.values())
        for name, fields in facts.items():
            place = layout.place(self.inside(name))
            if (
                place.stray
                and name not in metadata.facts
                and not (labelled and place.stray == BESIDE_CATEGORIES)
            ):
                self.status.leave_out(name, place.stray)
                continue
            if place.category is not None and not metadata.categories:
                fields.setdefault("category", place.category)
            if (holdout := place.holdout or self.holdout(name)) is not None:
                fields.setdefault("holdout", holdout)
            if place.kohya is not None:
                fields["captions"] = fields.get("captions") or (place.kohya.words,)
                fields["repeats"] = place.kohya.repeats
            self.status.use(name)
            yield place, Entry(name=self.display_name(name), image=self.blob(name), **fields)

    def _apply_sidecar(self, fields: dict[str, Any], sidecar: Sidecar, texts: Texts) -> None:
        """Add what one file beside an image says to what is known of the image."""
        if sidecar.kind in ANNOTATION_FILES:
            fields.setdefault(sidecar.kind, self.blob(sidecar.name))
        elif sidecar.name not in texts:
            return  # left out
        elif sidecar.kind == "captions":
            if text := texts[sidecar.name].strip():
                fields["captions"] = (*fields.get("captions", ()), text)
        else:
            try:
                fields.update(_record(sidecar.kind, texts[sidecar.name]))
            except (ValueError, RecursionError) as error:
                self.status.leave_out(sidecar.name, f"JSON left out: {str(error)[:100]}")
                return
        self.status.count(sidecar.name, KINDS[sidecar.kind])

    def _leave_out_rest(self) -> None:
        """Leave out whatever has no fate yet, for the reason that its name gives."""
        for name in self.names:
            if name in self.status.resolved:
                continue
            if name.rpartition("/")[2].lower() in SYSTEM:
                self.status.count(name, "files of the system")
            elif _annotated_stem(name, None) is not None or name.lower().endswith(TEXTS):
                self.status.leave_out(name, "matches no image that is used")
            else:
                self.status.leave_out(name, why_left_out(name))


def _order(sidecar: Sidecar) -> tuple[int, str]:
    """Return a sort key: texts before JSON, which overrides them, and `.txt` before `.caption`."""
    ending = ending_of(sidecar.name)
    return (TEXTS.index(ending) if ending in TEXTS else len(TEXTS), sidecar.name)


def _record(kind: str, text: str) -> dict[str, Any]:
    """Parse what a .json or .cls beside an image says."""
    if kind == "cls":
        return parse_annotations({"cls": text.strip()})
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return parse_annotations(record)


def _annotated_stem(name: str, stems: set[str] | None) -> str | None:
    """Return the stem of the image that a file such as `cat.mask.png` annotates.

    None if it annotates none of `stems`.
    """
    stem, dot, kind = stem_of(name).rpartition(".")
    if (
        not dot
        or kind.lower() not in ANNOTATION_FILES
        or ending_of(name) not in ANNOTATION_FILES[kind.lower()]
    ):
        return None
    return stem if stems is None or stem in stems else None
