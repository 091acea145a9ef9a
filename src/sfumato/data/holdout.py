"""The split into training and hold-out: whole groups of images that are alike are held out, chosen
by a hash of their content.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato.data.listing import Entry, Reject, Source, value_at, values
from sfumato.errors import DataError

MIN_HOLDOUT_IMAGES = 25  # held out, if they are at most a quarter of the set
MAX_SMALL_SHARE = 0.25
MAX_GROUP_SHARE = 0.25  # of a set, above which a group of images that stay together is not held out
MIN_RELIABLE_HOLDOUT_IMAGES = (
    # below which metrics on held-out images are too rough to rely on: at 12, a share's 95 %
    # interval spans 50 points
    12
)
# of a set, above which a group of images that are alike is split; and a size that never is
LARGE_SHARE, NEVER_LARGE = 0.1, 4
NAMED = 4  # images of a group
Half = Literal["off", "first", "second"]


class Groups(NamedTuple):
    """Groups of images that stay together, (N,), and remarks on them."""

    groups: NDArray[np.int64]
    remarks: tuple[str, ...]


def merge_groups(entries: Sequence[Entry], ids: Sequence[str], alike: NDArray[np.int64]) -> Groups:
    """Join the groups of images that are alike with those of `Entry.group`, and split large ones.

    A group above a tenth of the set would be learned from or held out as a whole, so each of its
    images becomes a separate group, together with its exact copies. If `Entry.group` would join all
    images into one group, it is ignored.
    """
    stack_names = values(entries, "group")
    names = {
        name: number for number, name in enumerate(dict.fromkeys(stack_names)) if name is not None
    }
    split, remarks = _split_large(entries, alike, ids)
    if not names:
        return Groups(split, remarks)
    stacks = np.array(
        [
            len(ids) + names[name] if name is not None else number
            for name, number in zip(stack_names, range(len(stack_names)), strict=True)
        ]
    )
    merged = _join(split, stacks)
    if len(np.unique(merged)) > 1:
        return Groups(merged, remarks)
    return Groups(
        split, (*remarks, "all images come from one file, so training and hold-out share it")
    )


def _split_large(
    entries: Sequence[Entry], groups: NDArray[np.int64], ids: Sequence[str]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    sizes = np.bincount(groups)[groups]
    large = sizes > max(LARGE_SHARE * len(groups), NEVER_LARGE)
    if not large.any():
        return groups, ()
    from sfumato.data.duplicates import firsts_of_equals

    same = firsts_of_equals(ids)
    # nothing but exact copies, which stay together
    if len(np.unique(same[large])) == len(np.unique(groups[large])):
        return groups, ()
    result = np.where(large, len(ids) + same, groups)
    largest = np.flatnonzero(groups == groups[sizes.argmax()])
    names = ", ".join(value_at(entries, "name", number) for number in largest[:NAMED])
    remark = (
        f"{int(large.sum())} images are alike, such as frames of one video (the largest group has "
        f"{len(largest)} of {len(ids)}: {names}, ...): they are split over training and hold-out "
        "one by one, so held-out metrics will be optimistic (leakage); to hold out a group by "
        "hand, put it into a folder called test/"
    )
    return np.unique(result, return_inverse=True)[1].astype(np.int64), (remark,)


def _join(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return groups in which images that share a group in either stay together."""
    from sfumato.data.duplicates import components

    first, second = (np.unique(groups, return_inverse=True)[1] for groups in (first, second))
    count = int(first.max()) + 1
    return components(count + int(second.max()) + 1, np.stack([first, count + second], axis=1))[
        first
    ]


def too_few_images(
    count: int, entries: Sequence[Entry], rejects: Sequence[Reject], *, where: str
) -> DataError:
    """Return the error of a set with fewer than two different images.

    Args:
        count: of different images.
        entries: all that there are; rejects: those that cannot be read.
    """
    reasons = "; ".join(f"{reject.name}: {reject.reason}" for reject in rejects[:3])
    return DataError(
        f"{count} different readable images among {len(entries)} files, near-duplicates counted as "
        "one" + (f" ({reasons})" if reasons else ""),
        where=where,
        hint="at least two are needed: one to train on, one to validate on; a good model needs "
        "thousands",
    )


def place_of(source: Source) -> str:
    """Return where a source is, for errors."""
    return str(getattr(source, "path", type(source).__name__))


def assign_splits(
    entries: Sequence[Entry], ids: Sequence[str], groups: NDArray[np.int64], share: float
) -> NDArray[np.str_]:
    """Return the part of each image: "training", "holdout", or ":name" of a hold-out of the source.

    A whole group is held out if the hash of its least id is below `share`, so that images that are
    added or removed move no others. If these are fewer than 25 images, or than a quarter of a
    smaller set, the groups with the next hashes are held out as well: chance must not leave too
    few to say anything. A
    group is passed over if it is more than a quarter of the set, or the last of a category to learn
    from. A hold-out that the source names holds what the source says, and exact copies of it.

    Nothing is held out where `share` is 0, or if all images are in one group.

    Raises:
        DataError: if the source holds out all images.
    """
    named = {
        id_: f":{name}"
        for name, id_ in zip(values(entries, "holdout"), ids, strict=True)
        if name is not None
    }
    least: dict[int, str] = {}
    sizes: Counter[int] = Counter()
    kinds: dict[int, set[str | None]] = {}
    categories = values(entries, "category")
    for category, id_, group in zip(categories, ids, groups.tolist(), strict=True):
        if id_ not in named:
            least[group] = min(id_, least.get(group, id_))
            sizes[group] += 1
            kinds.setdefault(group, set()).add(category)
    keys = {group: _key(id_) for group, id_ in least.items()}
    if not keys:
        raise DataError(
            "all images are held out by the source, and none is left to learn from",
            where="data",
            hint="put images to train on beside the folder that is held out",
        )
    alone = share == 0 or len(keys) == 1
    held = set() if alone else _choose_holdout(keys, sizes, kinds, share)
    pairs = zip(ids, groups.tolist(), strict=True)
    return np.array(
        [named.get(id_, "holdout" if group in held else "training") for id_, group in pairs]
    )


def _choose_holdout(
    keys: dict[int, float], sizes: Counter[int], kinds: dict[int, set[str | None]], share: float
) -> set[int]:
    total = sizes.total()
    most = max(1, MAX_GROUP_SHARE * total)
    least = min(MIN_HOLDOUT_IMAGES, int(MAX_SMALL_SHARE * total))
    left = Counter(kind for group in keys for kind in kinds[group])
    order = sorted(keys, key=keys.__getitem__)
    held: set[int] = set()
    size = 0
    for group in order:
        if keys[group] >= share and size >= least:
            break
        if sizes[group] <= most and all(left[kind] > 1 for kind in kinds[group]):
            held.add(group)
            size += sizes[group]
            left.subtract(kinds[group])
    # Something has to be validated on, if need be the smallest group there is.
    return held or {min(order, key=lambda group: (sizes[group], keys[group]))}


def expected_holdout(count: int, share: float) -> int:
    """Return about how many of `count` images `assign_splits` holds out."""
    if share == 0 or count < 2:
        return 0
    return max(1, round(share * count), min(MIN_HOLDOUT_IMAGES, int(MAX_SMALL_SHARE * count)))


def take_half(
    half: Half,
    training: NDArray[np.int64],
    *,
    entries: Sequence[Entry],
    ids: Sequence[str],
    groups: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the positions of one half of the training images, or all of them for "off".

    Whole groups of images that are alike are in one half, in an order of the hash of their least
    id, the largest first; each goes where its categories, and then all images, are fewer. So the
    halves of a category, and the two halves, differ by one image, or by one group if that is more.

    Raises:
        DataError: if all training images are in one group.
    """
    if half == "off":
        return training
    members: dict[int, list[int]] = {}
    for position in training.tolist():
        members.setdefault(int(groups[position]), []).append(position)
    if len(members) < 2:
        raise DataError(
            f"{len(training)} training images, near-duplicates counted as one, cannot be halved",
            where="data.half",
            hint="set data.half=off, or add images",
        )
    keys = {group: _key(min(ids[i] for i in part), "half") for group, part in members.items()}
    surplus: Counter[str | None] = Counter()  # images of the first half less those of the second
    first: list[int] = []
    for group in sorted(members, key=lambda group: (-len(members[group]), keys[group])):
        kinds = Counter(value_at(entries, "category", position) for position in members[group])
        lead = sum(count * surplus[kind] for kind, count in kinds.items()) or surplus.total()
        if lead <= 0:
            first += members[group]
            surplus.update(kinds)
        else:
            surplus.subtract(kinds)
    chosen = np.isin(training, first)
    return training[chosen if half == "first" else ~chosen]


def _key(id_: str, purpose: str = "holdout") -> float:
    return float(int(hashlib.sha256(f"{purpose}/{id_}".encode()).hexdigest()[:12], 16) / 16**12)
