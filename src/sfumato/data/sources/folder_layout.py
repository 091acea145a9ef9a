"""How the folders of a set are read: as splits, as categories, or as neither."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from sfumato.data.listing import Entry, printable_name
from sfumato.data.sources.kohya import Folders, KohyaFolder, are_kohya, kohya_folder
from sfumato.data.split_names import HELD_OUT, TRAIN, split_of

BESIDE_CATEGORIES = "is outside the category folders"
BESIDE_KOHYA = "is outside the kohya folders"
BESIDE_SPLITS = "is outside the split folders"
BESIDE_WRAPPER = "is outside the one top folder that holds the set"
Meaning = Literal["none", "categories", "kohya"]
_SHARD_NUMBERS = re.compile(r"\d{5,}")


class Place(NamedTuple):
    """What the folders say of an image; `stray` is why it is in none of those that count, "" if it
    is in one; `kohya` is the kohya folder that it is in.
    """

    category: str | None = None
    holdout: str | None = None
    stray: str = ""
    kohya: KohyaFolder | None = None


@dataclass(frozen=True, kw_only=True)
class FolderLayout:
    """The folders of a set.

    Attributes:
        wrapper: the folders around all of it, "" or ending in "/".
        splits: hold-out by the name of a top folder, None for a folder of training images; {} where
            there are no splits.
        inner: the one folder inside each split that holds its images, "" or ending in "/".
        meaning: of the folders inside: none, categories, or kohya's repeats and captions.
        rooted: whether images that lie in no split are trained on.
        remark: what was decided that one might not expect.
    """

    wrapper: str = ""
    splits: dict[str, str | None] = field(default_factory=dict)
    inner: str = ""
    meaning: Meaning = "none"
    rooted: bool = False
    remark: str = ""

    @classmethod
    def of(cls, names: Sequence[str], folders: Folders = "auto") -> FolderLayout:
        """Derive the layout from the paths of images. A stray image decides nothing.

        `folders` says what folders inside are; `auto` decides by their names.
        """
        wrapper, names = _strip_wrapper(names, folders)
        tops = sorted({name.partition("/")[0] for name in names if "/" in name})
        kinds = {top: split_of(top) for top in tops}
        trained = [top for top in tops if kinds[top] == TRAIN]
        held = [top for top in tops if kinds[top] == HELD_OUT]
        loose = any("/" not in name for name in names)
        rooted = loose and not trained and len(held) == len(tops)
        if not held or not (trained or rooted):
            meaning, remark = _meaning(names, folders)
            return cls(wrapper=wrapper, meaning=meaning, remark=remark)
        splits = {**dict.fromkeys(trained), **{top: printable_name(top) for top in held}}
        below = [
            name.partition("/")[2]
            for name in names
            if name.partition("/")[0] in splits and "/" in name
        ]
        inner, below = _strip_wrapper(below, folders)
        meaning, remark = _meaning(below, folders)
        return cls(
            wrapper=wrapper,
            splits=splits,
            inner=inner,
            meaning=meaning,
            rooted=rooted,
            remark=remark,
        )

    def place(self, name: str) -> Place:
        """Return what the folders say of one image."""
        if not name.startswith(self.wrapper):
            return Place(stray=BESIDE_WRAPPER)
        path, holdout = name[len(self.wrapper) :], None
        if self.splits:
            top, slash, below = path.partition("/")
            if not slash and self.rooted:
                return Place()
            if not slash or top not in self.splits:
                return Place(stray=BESIDE_SPLITS)
            holdout, path = self.splits[top], below
            if not path.startswith(self.inner):
                return Place(holdout=holdout, stray=BESIDE_SPLITS)
            path = path[len(self.inner) :]
        folder, slash, _ = path.partition("/")
        if self.meaning == "none":
            return Place(holdout=holdout)
        if self.meaning == "kohya":
            read = kohya_folder(folder) if slash else None
            return Place(holdout=holdout, stray="" if read else BESIDE_KOHYA, kohya=read)
        return (
            Place(printable_name(folder), holdout)
            if slash
            else Place(holdout=holdout, stray=BESIDE_CATEGORIES)
        )

    def line(self, entries: Sequence[Entry]) -> str:
        """Describe how the folders were read, with counts; "" for a set without splits."""
        if not self.splits:
            return ""
        held = Counter(entry.holdout for entry in entries)
        trained = held.pop(None, 0)
        categories = len({entry.category for entry in entries if entry.category is not None})
        parts = " and ".join(f"{printable_name(name)}/" for name in self.splits)
        return f"{parts}: {trained:,} to train on, {sum(held.values()):,} held out by name" + (
            f", {categories} categories" if categories else ""
        )


def _strip_wrapper(names: Sequence[str], folders: Folders) -> tuple[str, list[str]]:
    """Return the folders that hold all images, and the paths below them.

    Strays beside a folder with folders in it are ignored. A folder of kohya's is not stripped.
    """
    wrapper, inside = "", list(names)
    while True:
        tops = {name.partition("/")[0] for name in inside if "/" in name}
        if len(tops) != 1:
            return wrapper, inside
        (top,) = tops
        below = [name.partition("/")[2] for name in inside if "/" in name]
        deep = any("/" in name for name in below)
        kohya = folders != "categories" and _kohya([top], folders, inside)[0]
        if not deep and (len(below) < len(inside) or kohya):
            return wrapper, inside
        wrapper, inside = f"{wrapper}{top}/", below


def _kohya(tops: Sequence[str], folders: Folders, names: Sequence[str]) -> tuple[bool, str]:
    """Return whether folders are kohya's, and a remark if they only look like it."""
    if folders == "kohya":
        return any(kohya_folder(top) for top in tops), ""
    return are_kohya(
        tops,
        loose=any("/" not in name for name in names),
        deep=any(name.count("/") > 1 for name in names),
    )


def _meaning(names: Sequence[str], folders: Folders) -> tuple[Meaning, str]:
    """Return what the folders that hold images are, and a remark if one might not expect it."""
    tops = sorted({name.partition("/")[0] for name in names if "/" in name})
    if not tops:
        return "none", ""
    kohya, remark = (False, "") if folders == "categories" else _kohya(tops, folders, names)
    if kohya:
        return "kohya", ""
    if folders == "kohya":
        remark = "data.source.folders=kohya has no effect: no folder is named REPEATS_CAPTION"
    if all(_SHARD_NUMBERS.fullmatch(top) for top in tops):
        return "none", f"folders {tops[0]}/ to {tops[-1]}/ are numbered parts, not categories"
    if len(tops) == 1 and any("/" not in name for name in names):
        return "none", remark or (
            f"one folder next to the images, {printable_name(tops[0])}/, is not taken for a category"
        )
    return "categories", remark
