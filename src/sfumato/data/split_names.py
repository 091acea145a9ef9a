"""The names that people give to the parts of a set that are trained on or kept from training."""

from __future__ import annotations

import re
from collections.abc import Sequence

TRAIN, HELD_OUT = "train", "held out"
LONGEST_SPLIT = 64  # letters, which bounds what the patterns have to try
_AROUND = r"(?:[-_. ]?(?:sets?|data|dataset|images?|imgs?|pictures|photos|splits?|fold|part|\d{1,6}(?!\d)(?:-of-\d{1,6}(?!\d))?))*"
_TRAIN = re.compile(rf"(?:train|training|tr){_AROUND}", re.IGNORECASE)
_HELD = re.compile(
    rf"(?:test|testing|te|tst|val|valid|validation|validate|dev|eval|evaluation|hold-?out){_AROUND}",
    re.IGNORECASE,
)


def split_of(name: str) -> str | None:
    """Return which split a folder's or file's name means: "train", "held out", or None.

    `Train`, `training_set`, `train2017`, `test-images` and `val` are names of splits; `trains` and
    `developer` are not.
    """
    if len(name) > LONGEST_SPLIT:
        return None
    return TRAIN if _TRAIN.fullmatch(name) else HELD_OUT if _HELD.fullmatch(name) else None


def held_out_files(names: Sequence[str]) -> dict[str, str]:
    """Return the hold-outs by file, for shards and tables named like splits.

    Such names are `test-00000-of-00002.parquet` and `val/0.tar`. Nothing is held out if all files
    have them.
    """
    split_parts = {name: part for name in names if (part := _split_part(name)) is not None}
    held = {name: _word(part) for name, part in split_parts.items() if split_of(part) == HELD_OUT}
    return held if len(held) < len(names) else {}


def _split_part(name: str) -> str | None:
    """Return the first folder of a path, or the stem of its file, that is named like a split."""
    *folders, file = name.split("/")
    return next(
        (part for part in (*folders, file.rpartition(".")[0]) if split_of(part) is not None), None
    )


def _word(part: str) -> str:
    """Return the first word of a name: `test` of `test-00000-of-00002`."""
    return re.split(r"[^A-Za-z]", part)[0].lower()
