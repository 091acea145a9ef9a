"""Folders and metadata as kohya's scripts read them: `10_sks dog` is repeats and a caption."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sfumato.data import BatchPlan, DataConfig, Dataset, Entry, Folder, batches, index, source_at
from sfumato.data.convert import convert
from sfumato.data.listing import Listing, parse_annotations
from sfumato.data.missing_labels import fill_missing
from sfumato.data.sources import Zip
from tests.helpers.image_bytes import encode, noise


def put(root: Path, *names: str) -> Path:
    """A folder with a different image under each name."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(noise(8, 8, seed=number)))
    return root


def listed(root: Path, **options: str) -> Listing:
    return Folder(str(root), **options).listing()


def said(entries: list[Entry]) -> dict[str, tuple[tuple[str, ...], int, str | None]]:
    return {entry.name: (entry.captions, entry.repeats, entry.category) for entry in entries}


def test_a_folder_is_repeats_and_caption_and_own_captions_win(tmp_path: Path) -> None:
    put(tmp_path, "10_sks dog/1.png", "10_sks dog/2.png", "1_a_dog/3.png", "1_a_dog/4.png")
    (tmp_path / "10_sks dog" / "2.txt").write_text("sks dog on a sofa")
    (tmp_path / "1_a_dog" / "4.caption").write_text("a brown dog")
    listing = listed(tmp_path)
    assert said(listing.entries) == {
        "10_sks dog/1.png": (("sks dog",), 10, None),
        "10_sks dog/2.png": (("sks dog on a sofa",), 10, None),
        "1_a_dog/3.png": (("a_dog",), 1, None),
        "1_a_dog/4.png": (("a brown dog",), 1, None),
    }
    assert listing.remarks == (
        "kohya folder: 10_sks dog/ gives 2 images the caption 'sks dog'; repeats 10; 1 of them "
        "have captions of their own, which win",
        "kohya folder: 1_a_dog/ gives 2 images the caption 'a_dog'; repeats 1; 1 of them have "
        "captions of their own, which win",
        "repeats 1, 10: images are seen in this ratio, while budget.steps and batch_size say how "
        "often in all",
    )


@pytest.mark.parametrize("above", ["", "img/"])
def test_a_single_folder_is_read_too_and_its_repeats_change_nothing(
    tmp_path: Path, above: str
) -> None:
    put(tmp_path, f"{above}20_ohwx man/1.png", f"{above}20_ohwx man/2.png")
    listing = listed(tmp_path)
    assert [entry.captions for entry in listing.entries] == [("ohwx man",)] * 2
    assert listing.remarks[1].startswith("repeats 20 everywhere: all images are seen equally often")


@pytest.mark.parametrize(
    ("names", "categories", "reason"),
    [
        (["10_dogs/1.png", "cats/2.png"], ["10_dogs", "cats"], "cats/ is not"),
        (["0_zero/1.png", "1_one/2.png"], ["0_zero", "1_one"], "1 to 999"),
        (
            ["1_cat/1.png", "2_dog/2.png", "3_x/1.png"],
            ["1_cat", "2_dog", "3_x"],
            "one after another",
        ),
        (["1_cat/1.png", "2_dog/2.png"], ["1_cat", "2_dog"], "numbered one after another"),
        (["2023_rome/1.png", "2024_oslo/1.png"], ["2023_rome", "2024_oslo"], "1 to 999"),
        (["2021_rome/1.png", "2024_oslo/1.png"], ["2021_rome", "2024_oslo"], "1 to 999"),
        (["01_cat/1.png", "07_dog/1.png"], ["01_cat", "07_dog"], "1 to 999"),
        (["10_dogs/1.png", "2.png"], [None, None], "images lie next to it"),
        (["10_a/b/1.png", "10_a/c/1.png"], ["b", "c"], None),
        (["10_a/b/1.png", "5_a/c/1.png"], ["10_a", "5_a"], "folders lie inside it"),
    ],
)
def test_what_only_looks_like_it_is_not_taken_for_it_and_said(
    tmp_path: Path, names: list[str], categories: list[str | None], reason: str | None
) -> None:
    listing = listed(put(tmp_path, *names))
    assert sorted(map(str, {entry.category for entry in listing.entries})) == sorted(
        map(str, set(categories))
    )
    assert {entry.repeats for entry in listing.entries} == {1}
    assert not any(entry.captions for entry in listing.entries)
    if reason is not None:
        (remark,) = [line for line in listing.remarks if "kohya" in line]
        assert reason in remark
        assert ("data.source.folders=kohya reads it as one" in remark) == ("999" not in reason)


def test_what_folders_are_can_be_said(tmp_path: Path) -> None:
    put(tmp_path, "10_dogs/1.png", "10_cats/2.png")
    assert {entry.category for entry in listed(tmp_path).entries} == {None}
    as_categories = listed(tmp_path, folders="categories")
    assert {entry.category for entry in as_categories.entries} == {"10_dogs", "10_cats"}
    assert as_categories.remarks == ()
    put(tmp_path, "3.png", "dogs/4.png")
    forced = listed(tmp_path, folders="kohya")
    assert {entry.captions for entry in forced.entries} == {("dogs",), ("cats",)}
    assert {reject.name: reject.reason for reject in forced.rejects} == {
        "3.png": "is outside the kohya folders",
        "dogs/4.png": "is outside the kohya folders",
    }


def test_a_zip_is_read_alike(tmp_path: Path) -> None:
    put(tmp_path / "set", "3_x/1.png", "7_y/2.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in (tmp_path / "set").rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path / "set"))
    entries = Zip(str(tmp_path / "set.zip")).listing().entries
    assert {(entry.captions, entry.repeats) for entry in entries} == {(("x",), 3), (("y",), 7)}


def test_metadata_give_captions_with_their_tags(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png", "sub/3.png", "4.png")
    records = {
        "1.png": {"caption": "a dog", "tags": "outdoors, grass"},
        "2": {"tags": "indoors"},
        "C:\\train\\set/sub/3.png": {"caption": "a cat", "train_resolution": [64, 64]},
        "/root/set/5.png": {"caption": "not here"},
        "elsewhere/4.png": {"caption": "another image"},
    }
    (tmp_path / "meta.json").write_text(json.dumps(records))
    listing = listed(tmp_path)
    assert {entry.name: entry.captions for entry in listing.entries} == {
        "1.png": ("a dog, outdoors, grass",),
        "2.png": ("indoors",),
        "sub/3.png": ("a cat",),
        "4.png": (),
    }
    assert listing.sidecars == {"metadata": 1}  # and not 4.png, by a path that only ends like it
    absent = [reject.name for reject in listing.rejects if reject.part]
    assert absent == ["meta.json, item 4", "meta.json, item 5"]


def kohya_set(root: Path, heavy: int, light: int) -> DataConfig:
    put(
        root,
        *(f"{heavy}_x/{number}.png" for number in range(10)),
        *(f"{light}_y/{number}.png" for number in range(10)),
    )
    return DataConfig(source=Folder(str(root)), resolution=8, cache="off")


def seen(dataset: Dataset, epochs: int) -> Counter[str]:
    """How often training sees each image, read from the batches themselves."""
    plan = BatchPlan(seed=1, shapes=dataset.shapes[dataset.epoch], batch_size=len(dataset.epoch))
    texts = Counter[str]()
    stream = batches(dataset, plan, start=0)
    for _ in range(epochs):
        for group in next(stream).groups:
            texts.update(group.context["text"])
    return texts


def test_repeats_are_the_ratio_in_which_images_are_seen(tmp_path: Path) -> None:
    dataset = index(kohya_set(tmp_path, 12, 4))
    counts = Counter(dataset.entries[position].repeats for position in dataset.training)
    assert len(dataset.epoch) == 3 * counts[12] + counts[4]
    times = Counter(dataset.epoch.tolist())
    assert times == {
        int(position): {12: 3, 4: 1}[dataset.entries[position].repeats]
        for position in dataset.training
    }
    assert set(dataset.epoch) == set(dataset.training)  # nothing held out is trained on
    assert seen(dataset, 2) == {"x": 2 * 3 * counts[12], "y": 2 * counts[4]}


def test_equal_repeats_are_as_none_and_others_are_another_data_set(tmp_path: Path) -> None:
    equal = index(kohya_set(tmp_path / "a", 10, 10))
    assert np.array_equal(equal.epoch, equal.training)
    once = index(kohya_set(tmp_path / "b", 1, 1))
    uneven = index(kohya_set(tmp_path / "c", 10, 1))
    assert once.fingerprint == equal.fingerprint != uneven.fingerprint


def test_a_caption_for_those_that_have_none_is_counted(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png", "3.png", "4.png")
    (tmp_path / "2.txt").write_text("my own")
    (tmp_path / "3.txt").write_text(" \n")
    config = DataConfig(source=Folder(str(tmp_path)), resolution=8, caption=" a sks dog ")
    dataset = index(config)
    assert [entry.captions for entry in dataset.entries] == [
        ("a sks dog",),
        ("my own",),
        ("a sks dog",),
        ("a sks dog",),
    ]
    assert dataset.ledger.remarks == (
        "data.caption: 3 of 4 images have no caption of their own and get 'a sks dog'",
    )
    assert dataset.summary()["captioned"] == 4
    plain = config.source.listing()
    assert fill_missing(plain) is plain
    assert fill_missing(plain, caption="  ") is plain


def test_a_caption_that_is_not_needed_says_so(tmp_path: Path) -> None:
    listing = fill_missing(listed(put(tmp_path, "10_x/1.png", "10_x/2.png")), caption="never")
    assert [entry.captions for entry in listing.entries] == [("x",)] * 2
    assert listing.remarks[-1] == ("data.caption is not used: all 2 images have one of their own")


@pytest.mark.parametrize("name", ["set.parquet", "set.tar"])
def test_a_converted_set_has_the_same_captions_and_repeats(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    config = kohya_set(tmp_path / "set", 12, 4)
    before = config.source.listing()
    _, left_out = convert(before, tmp_path / name)
    after = source_at(str(tmp_path / name)).listing()
    assert left_out == []
    assert sorted((e.captions, e.repeats) for e in after.entries) == sorted(
        (e.captions, e.repeats) for e in before.entries
    )
    assert {e.repeats for e in after.entries} == {12, 4}


@pytest.mark.parametrize(
    ("value", "repeats"), [(10, 10), (10.0, 10), (0, 1), (1000, 1), ("10", 1), (2.5, 1), (None, 1)]
)
def test_repeats_of_a_table_are_whole_numbers_as_in_the_name_of_a_folder(value, repeats) -> None:
    assert parse_annotations({"num_repeats": value}).get("repeats", 1) == repeats
