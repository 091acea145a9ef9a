"""How the folders of a set are read: as splits, as categories, or as neither."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sfumato.data.listing import printable_name
from sfumato.data.split_names import HELD_OUT, TRAIN, split_of

BESIDE_CATEGORIES = "is outside the category folders"
BESIDE_SPLITS = "is outside the split folders"
BESIDE_WRAPPER = "is outside the one top folder that holds the set"
_SHARD_NUMBERS = re.compile(r"\d{5,}")


class Place(NamedTuple):
    """What the folders say of an image; `stray` is why it is in none of those that count, "" if it
    is in one.
    """

    category: str | None = None
    holdout: str | None = None
    stray: str = ""


@dataclass(frozen=True, kw_only=True)
class FolderLayout:
    """The folders of a set.

    Attributes:
        wrapper: the folders around all of it, "" or ending in "/".
        splits: hold-out by the name of a top folder, None for a folder of training images; {} where
            there are no splits.
        inner: the one folder inside each split that holds its images, "" or ending in "/".
        nested: whether the folders inside are categories.
        rooted: whether images that lie in no split are trained on.
        remark: what was decided that one might not expect.
    """

    wrapper: str = ""
    splits: dict[str, str | None] = field(default_factory=dict)
    inner: str = ""
    nested: bool = False
    rooted: bool = False
    remark: str = ""

    @classmethod
    def of(cls, names: Sequence[str]) -> FolderLayout:
        """Derive the layout from the paths of images. A stray image decides nothing."""
        wrapper, names = _strip_wrapper(names)
        tops = sorted({name.partition("/")[0] for name in names if "/" in name})
        kinds = {top: split_of(top) for top in tops}
        trained = [top for top in tops if kinds[top] == TRAIN]
        held = [top for top in tops if kinds[top] == HELD_OUT]
        loose = any("/" not in name for name in names)
        rooted = loose and not trained and len(held) == len(tops)
        if not held or not (trained or rooted):
            nested, remark = _categories(tops, loose)
            return cls(wrapper=wrapper, nested=nested, remark=remark)
        splits = {**dict.fromkeys(trained), **{top: printable_name(top) for top in held}}
        below = [
            name.partition("/")[2]
            for name in names
            if name.partition("/")[0] in splits and "/" in name
        ]
        inner, below = _strip_wrapper(below)
        nested, remark = _categories(
            sorted({name.partition("/")[0] for name in below if "/" in name}),
            any("/" not in n for n in below),
        )
        return cls(
            wrapper=wrapper, splits=splits, inner=inner, nested=nested, rooted=rooted, remark=remark
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
        if not self.nested:
            return Place(holdout=holdout)
        category, slash, _ = path.partition("/")
        return (
            Place(printable_name(category), holdout)
            if slash
            else Place(holdout=holdout, stray=BESIDE_CATEGORIES)
        )


def _strip_wrapper(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the folders that hold all images, and the paths below them.

    Strays beside a folder with folders in it are ignored.
    """
    wrapper, inside = "", list(names)
    while True:
        tops = {name.partition("/")[0] for name in inside if "/" in name}
        if len(tops) != 1:
            return wrapper, inside
        (top,) = tops
        below = [name.partition("/")[2] for name in inside if "/" in name]
        if len(below) < len(inside) and not any("/" in name for name in below):
            return wrapper, inside
        wrapper, inside = f"{wrapper}{top}/", below


def _categories(tops: Sequence[str], loose: bool) -> tuple[bool, str]:
    """Return whether folders are categories, and a remark if there are folders that are not."""
    if not tops:
        return False, ""
    if all(_SHARD_NUMBERS.fullmatch(top) for top in tops):
        return False, f"folders {tops[0]}/ to {tops[-1]}/ are numbered parts, not categories"
    if len(tops) == 1 and loose:
        return (
            False,
            f"one folder next to the images, {printable_name(tops[0])}/, is not taken for a category",
        )
    return True, ""
