"""What is held out: whole groups, enough of them, never the last of a category, and nobody is moved
by a chain.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data.duplicates import clusters
from sfumato.data.holdout import (
    MAX_GROUP_SHARE,
    assign_splits,
    expected_holdout,
    merge_groups,
    take_half,
)
from sfumato.data.listing import Entry, Inline
from sfumato.data.thumbnail_difference import difference
from sfumato.data.thumbnails import stretch_contrast, thumbnail
from sfumato.errors import DataError


def entries(categories: list[str], groups: list[str | None] | None = None) -> list[Entry]:
    groups = groups or [None] * len(categories)
    return [
        Entry(name=str(i), image=Inline(b""), category=c, group=g)
        for i, (c, g) in enumerate(zip(categories, groups, strict=True))
    ]


def ids(count: int, seed: int = 0) -> list[str]:
    return [hashlib.sha256(f"{seed}/{i}".encode()).hexdigest() for i in range(count)]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abcde")), min_size=2, max_size=80),
    share=st.sampled_from([0.01, 0.1, 0.4]),
    seed=st.integers(0, 99),
)
def test_every_split_keeps_its_promises(
    rows: list[tuple[int, str]], share: float, seed: int
) -> None:
    groups = np.array([group for group, _ in rows])
    categories = [category for _, category in rows]
    if len(set(groups)) < 2:
        return
    found = assign_splits(entries(categories), ids(len(rows), seed), groups, share)
    held = found == "holdout"
    assert 0 < held.sum() < len(rows)
    assert all(len(set(held[groups == group])) == 1 for group in set(groups))
    if len(set(groups[held])) > 1:  # one alone may be all that there is to validate on
        assert all(
            (groups == group).sum() <= max(1, MAX_GROUP_SHARE * len(rows))
            for group in set(groups[held])
        )
        for category in set(categories):
            assert not held[[c == category for c in categories]].all()


@pytest.mark.parametrize(
    ("count", "fewest", "most"),
    [(20, 3, 6), (60, 6, 18), (125, 14, 37), (300, 18, 50), (5000, 430, 570)],
)
def test_small_sets_hold_out_about_25_images_or_a_fifth(count: int, fewest: int, most: int) -> None:
    sizes = [
        int(
            (
                assign_splits(entries(["a"] * count), ids(count, seed), np.arange(count), 0.1)
                == "holdout"
            ).sum()
        )
        for seed in range(20)
    ]
    assert fewest <= np.median(sizes) <= most
    assert min(sizes) >= min(4, count // 5)


def test_the_only_image_of_a_category_is_learned_from() -> None:
    categories = [*["common"] * 30, *(f"rare{i}" for i in range(7))]
    for seed in range(30):
        found = assign_splits(entries(categories), ids(37, seed), np.arange(37), 0.1)
        assert (found[30:] == "training").all()


def test_frames_of_one_file_are_never_split() -> None:
    stacks = [f"stack-{i // 6}" for i in range(120)]
    found = merge_groups(entries(["a"] * 120, stacks), ids(120), np.arange(120))
    assert found.remarks == ()
    split = assign_splits(entries(["a"] * 120, stacks), ids(120), found.groups, 0.1)
    assert all(len(set(split[i : i + 6])) == 1 for i in range(0, 120, 6))
    only = merge_groups(entries(["a"] * 50, ["one"] * 50), ids(50), np.arange(50))
    assert "all images come from one file" in only.remarks[0]
    assert set(assign_splits(entries(["a"] * 50, ["one"] * 50), ids(50), only.groups, 0.1)) == {
        "training",
        "holdout",
    }


def test_a_group_above_a_tenth_of_the_set_is_split_and_said_but_copies_stay_together() -> None:
    alike = np.array([0] * 40 + list(range(1, 61)))
    names = ids(100)
    names[1] = names[0]
    found = merge_groups(entries(["a"] * 100), names, alike)
    assert found.remarks[0].startswith("40 images are alike")
    assert len(set(found.groups)) == 99
    assert found.groups[0] == found.groups[1]
    small = merge_groups(entries(["a"] * 12), ids(12), np.array([0, 0, 0, *range(1, 10)]))
    assert small.remarks == ()  # three copies in a small set are still copies


def frames(count: int, side: int = 64) -> np.ndarray:
    """A block that moves over a scene: each frame is nearly the next, and the first is not the
    last.
    """
    scene = np.kron(np.random.default_rng(0).integers(0, 256, (3, 8, 8)), np.ones((8, 8))).astype(
        np.uint8
    )
    result = np.repeat(scene[None], count, axis=0)
    for number in range(count):
        left = number * (side - 16) // count
        result[number, :, 24:40, left : left + 16] = np.array([255, 0, 0])[:, None, None]
    return result


def test_frames_each_like_the_next_are_several_groups_around_one_of_them() -> None:
    small = np.array([thumbnail(frame) for frame in frames(48)])
    groups = clusters(ids(48), small.__getitem__, resolution=64)
    sizes = np.bincount(groups)
    assert sizes.max() < 40  # a chain would have all of them
    assert sizes.max() > 1  # neighbours are still found
    first, last = small[:1], small[-1:]
    assert groups[0] != groups[-1]
    assert difference(first, last)[0] > 16


def test_dim_and_sparse_images_are_told_apart() -> None:
    """16-bit images that fill a sixtieth of their range, and stars on black, once all counted as
    one image.
    """
    generator = np.random.default_rng(0)
    dim = [
        (np.kron(generator.random((8, 8)), np.ones((8, 8))) * 1000 + 100).astype(np.uint16)[None]
        for _ in range(20)
    ]
    stars = np.zeros((20, 1, 256, 256), np.uint8)
    for field in stars:
        for y, x in generator.integers(4, 252, (12, 2)):
            field[0, y - 1 : y + 2, x - 1 : x + 2] = generator.integers(120, 255)
    for images in (dim, list(stars)):
        small = np.array([thumbnail(image) for image in images])
        assert stretch_contrast(small).max() > 200
        assert len(set(clusters(ids(20), small.__getitem__, resolution=64))) == 20
    bright = np.array([thumbnail(frame) for frame in frames(3)])
    assert stretch_contrast(bright) is bright  # a set that uses its range is compared as it is


def test_images_that_are_alike_are_named_where_they_are_split() -> None:
    groups, remarks = merge_groups(entries(["a"] * 8), ids(8), np.array([0, 0, 0, 0, 0, 1, 2, 3]))
    assert len(set(groups.tolist())) == 8
    assert "(the largest group has 5 of 8: 0, 1, 2, 3, ...)" in remarks[0]


def test_nothing_is_held_out_of_one_group_or_if_that_is_set() -> None:
    listed = entries(["a"] * 8)
    alone = assign_splits(listed, ids(8), np.zeros(8, np.int64), 0.1)
    unset = assign_splits(listed, ids(8), np.arange(8), 0.0)
    assert set(alone) == set(unset) == {"training"}
    assert "holdout" in assign_splits(listed, ids(8), np.arange(8), 0.1)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), min_size=2, max_size=80),
    seed=st.integers(0, 99),
)
def test_halves_share_no_group_and_have_half_of_each_category(
    rows: list[tuple[int, str]], seed: int
) -> None:
    groups = np.array([3 * group + "abc".index(kind) for group, kind in rows])
    categories = np.array([kind for _, kind in rows])
    if len(set(groups)) < 2:
        return
    training = np.arange(0, len(rows), 1)
    known = {"entries": entries(list(categories)), "ids": ids(len(rows), seed), "groups": groups}
    first, second = (take_half(half, training, **known) for half in ("first", "second"))
    assert sorted([*first, *second]) == training.tolist()
    assert not set(groups[first]) & set(groups[second])
    for kind in set(categories):
        sizes = [(categories[half] == kind).sum() for half in (first, second)]
        largest = np.bincount(groups[categories == kind]).max()
        assert abs(sizes[0] - sizes[1]) <= largest
    if np.bincount(groups).max() == 1:
        assert abs(len(first) - len(second)) <= len(set(categories))
    assert (take_half("first", training, **known) == first).all()
    assert (take_half("off", training, **known) == training).all()


def test_halves_follow_the_content_and_not_the_order_of_the_files() -> None:
    names = ids(40)
    known = {"entries": entries(["a"] * 40), "groups": np.arange(40)}
    first = take_half("first", np.arange(40), ids=names, **known)
    reverse = take_half("first", np.arange(40), ids=names[::-1], **known)
    assert {names[i] for i in first} == {names[::-1][i] for i in reverse}
    assert sorted(first.tolist()) != list(range(20))  # nor is it the first half of the list


def test_copies_of_one_image_cannot_be_halved() -> None:
    with pytest.raises(DataError, match=r"data\.half.*3 training images.* cannot be halved"):
        take_half(
            "first",
            np.arange(3),
            entries=entries(["a"] * 3),
            ids=ids(3),
            groups=np.zeros(3, np.int64),
        )


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(1797, 0.1, 180), (200, 0.1, 25), (60, 0.1, 15), (60, 0.5, 30), (60, 0.0, 0), (3, 0.1, 1)],
)
def test_the_expected_holdout_is_that_of_the_rules(count: int, share: float, expected: int) -> None:
    assert expected_holdout(count, share) == expected
    if share:
        held = assign_splits(entries(["a"] * count), ids(count), np.arange(count), share)
        assert abs((held == "holdout").sum() - expected) <= max(2, 4 * expected**0.5)
