"""Folders and metadata as kohya's sd-scripts read them: `10_sks dog/` holds images that are seen ten
times as often as those of a folder `1_...`, and whose caption is "sks dog"; `meta.json` gives a
caption and tags for each file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sfumato.data.listing import MAX_REPEATS, Entry, printable_name

Folders = Literal["auto", "categories", "kohya"]
_NAME = re.compile(r"(\d+)_(.*\S.*)")
_ABSOLUTE = re.compile(r"[A-Za-z]:[\\/]|[\\/]")
METADATA = ("meta", "meta_cap", "meta_cap_dd", "meta_clean", "meta_lat")


class KohyaFolder(NamedTuple):
    """What the name of a folder says: the caption of its images, and how often they are seen."""

    name: str
    words: str
    repeats: int


def kohya_folder(name: str) -> KohyaFolder | None:
    """Read a folder's name, `10_sks dog`; None if it is not of this form."""
    match = _NAME.fullmatch(name)
    if match is None or not 0 < int(match[1]) <= MAX_REPEATS or match[1].startswith("0"):
        return None
    return KohyaFolder(name, printable_name(match[2].strip()), int(match[1]))


def are_kohya(tops: Sequence[str], *, loose: bool, deep: bool) -> tuple[bool, str]:
    """Return whether folders are kohya's, and a remark if some only look like it.

    They are if all of them are called NUMBER_WORDS, images lie in them and neither beside nor
    below, and the numbers do not merely count the folders (0, 1, 2 or 1, 2, 3), as those of
    categories do.

    Args:
        tops: folders that hold images.
        loose: whether there are images beside them.
        deep: whether there are images in folders inside them.
    """
    alike = [top for top in tops if _NAME.fullmatch(top)]
    if not alike:
        return False, ""
    numbers = sorted(int(top.partition("_")[0]) for top in alike)
    way = "; data.source.folders=kohya reads it as one"
    if any(kohya_folder(top) is None for top in alike):
        reason, way = f"repeats are written as 1 to {MAX_REPEATS}", ""
    elif len(alike) < len(tops):
        reason = f"{_named(next(top for top in tops if top not in alike))} is not"
    elif loose:
        reason = "images lie next to it"
    elif deep:
        reason = "folders lie inside it"
    elif len(tops) > 1 and numbers == list(range(numbers[0], numbers[0] + len(tops))) and (
        numbers[0] <= 1
    ):  # fmt: skip
        reason = "the folders are numbered one after another, as categories are"
    else:
        return True, ""
    return False, (
        f"{_named(alike[0])} is named like a kohya folder (repeats_caption) and not read as one, "
        f"since {reason}{way}"
    )


def _named(top: str) -> str:
    return f"{printable_name(top)}/"


def folder_lines(placed: Iterable[tuple[KohyaFolder | None, Entry]]) -> list[str]:
    """Describe kohya's folders, a line each, and what their repeats come to."""
    counts: dict[KohyaFolder, list[int]] = {}
    for folder, entry in placed:
        if folder is not None:
            count = counts.setdefault(folder, [0, 0])
            count[0] += 1
            count[1] += entry.captions != (folder.words,)
    lines = [
        f"kohya folder: {_named(folder.name)} gives {images} images the caption "
        f"{folder.words!r}; repeats {folder.repeats}"
        + (f"; {own} of them have captions of their own, which win" if own else "")
        for folder, (images, own) in counts.items()
    ]
    repeats = sorted({folder.repeats for folder in counts})
    if len(repeats) > 1:
        lines.append(
            f"repeats {', '.join(map(str, repeats))}: images are seen in this ratio, while "
            "budget.steps and batch_size say how often in all"
        )
    elif repeats and repeats[0] > 1:
        lines.append(
            f"repeats {repeats[0]} everywhere: all images are seen equally often, as budget.steps "
            "and batch_size say"
        )
    return lines


def is_metadata(name: str) -> bool:
    """Return whether a file is called as kohya's metadata are."""
    return name.rpartition("/")[2].lower().removesuffix(".json") in METADATA


def read_record(record: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a record of kohya's metadata with its tags at the end of its caption.

    A whole path, of the machine that it was written on, is cut to its longest end that is among
    `names`, the files of the set.

    Source: sd-scripts joins caption and tags with a comma where both are given.
    """
    path = str(record.get("file_name", ""))
    if _ABSOLUTE.match(path):
        parts = re.split(r"[\\/]+", path)
        ends = ("/".join(parts[start:]) for start in range(1, len(parts)))
        record = {**record, "file_name": next((end for end in ends if end in names), path)}
    words = [record.get("caption"), record.get("tags")]
    texts = [text.strip() for text in words if isinstance(text, str) and text.strip()]
    return {**record, "caption": ", ".join(texts)} if texts else dict(record)
