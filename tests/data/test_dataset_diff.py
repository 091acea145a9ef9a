"""What changed in a data set since a run began is named: images, captions and the split apart, with
the files' names.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sfumato.data import AugmentConfig, DataConfig, Dataset, Folder, dataset_diff, index
from tests.helpers.runs import images


def opened(folder: Path, **settings: Any) -> Dataset:
    return index(DataConfig(source=Folder(str(folder)), resolution=8, channels=1, **settings))


def image(folder: Path, number: int) -> Path:
    return sorted(folder.rglob("*.png"))[number]


def renamed(folder: Path) -> None:
    image(folder, 0).rename(folder / "even" / "zz.png")


def caption(folder: Path) -> None:
    image(folder, 3).with_suffix(".txt").write_text("corrected")


def edited(folder: Path) -> None:
    Image.new("L", (8, 8), 77).save(image(folder, 2))


def added(folder: Path) -> None:
    for number in range(7):
        Image.new("L", (8, 8), 10 * number).save(folder / "even" / f"more-{number}.png")


def moved(folder: Path) -> None:
    image(folder, 0).rename(folder / "odd" / image(folder, 0).name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, ["1 image(s) renamed, which changes their order (even/000.png -> even/zz.png)"]),
        (caption, ["captions differ (even/006.png)"]),
        (edited, ["1 image(s) edited (even/004.png)"]),
        (lambda folder: image(folder, 0).unlink(), ["1 image(s) gone (even/000.png)"]),
        (
            added,
            [
                "7 image(s) new (even/more-0.png, even/more-1.png, even/more-2.png, "
                "even/more-3.png, even/more-4.png, ...)"
            ],
        ),
        (
            moved,
            [
                "1 image(s) renamed, which changes their order (even/000.png -> odd/000.png)",
                "categories differ",
            ],
        ),
        (lambda folder: None, []),
    ],
)
def test_a_change_is_named(tmp_path: Path, change: Callable[[Path], None], said: list[str]) -> None:
    folder = images(tmp_path / "set", count=20)
    image(folder, 3).with_suffix(".txt").write_text("first")
    before = json.loads(json.dumps(opened(folder).summary()))
    change(folder)
    after = opened(folder)
    found = dataset_diff.changes(before, after)
    assert found[: len(said)] == said
    assert (found == []) == (after.fingerprint == before["fingerprint"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"holdout": 0.5}, "the split into training and hold-out differs (data.holdout,"),
        (
            {"bits": 16},
            "size, channels or bits of the pixels differ: PixelFormat(shapes=((8, 8),), "
            "channels=1, bits=8",
        ),
    ],
)
def test_a_changed_setting_is_told_from_changed_images(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    folder = images(tmp_path / "set", count=20)
    before = json.loads(json.dumps(opened(folder).summary()))
    (found,) = dataset_diff.changes(before, opened(folder, **settings))
    assert found.startswith(said)


def test_what_does_not_touch_the_contents_is_no_change(tmp_path: Path) -> None:
    folder = images(tmp_path / "set", count=20)
    before = json.loads(json.dumps(opened(folder).summary()))
    # in the same place of the order
    image(folder, 4).rename(image(folder, 4).with_name("008-a.png"))
    after = opened(folder, augment=AugmentConfig(flip="horizontal"), cache="off")
    assert after.fingerprint == before["fingerprint"]


def test_older_runs_recorded_nothing_to_compare(tmp_path: Path) -> None:
    assert (
        dataset_diff.changes({"fingerprint": "x"}, opened(images(tmp_path / "set", count=20))) == []
    )


def test_of_very_large_sets_single_files_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = images(tmp_path / "set", count=20)
    monkeypatch.setattr(dataset_diff, "MAX_LISTED_IMAGES", 19)
    before = opened(folder).summary()
    assert "files" not in before
    edited(folder)
    assert dataset_diff.changes(before, opened(folder))[0] == "other images"
