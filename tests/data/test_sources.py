"""A source lists the images that a person would expect it to, in an order that no machine
changes.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from sfumato.data import Digits, Entry, Folder, decoding, files, listing
from sfumato.data.decoding import PixelFormat, decode
from sfumato.errors import DataError
from tests.helpers.image_bytes import encode, noise

IMAGE = encode(noise(8, 8))


def put(root: Path, *names: str) -> Path:
    """A folder with one image under each name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGE)
    return root


def entries(root: Path) -> list[Entry]:
    return Folder(str(root)).listing().entries


def left_out(root: Path) -> dict[str, str]:
    return {reject.name: reject.reason for reject in Folder(str(root)).listing().rejects}


def listed(root: Path) -> list[tuple[str, str | None]]:
    return [(entry.name, entry.category) for entry in entries(root)]


def test_digits_are_scikit_learns() -> None:
    listing, digits = Digits().listing(), load_digits()
    entries = listing.entries
    assert listing.rejects == []
    assert len(entries) == 1797
    assert [entry.category for entry in entries] == [str(label) for label in digits.target]
    decoded = decode(entries[17].image.read(), PixelFormat(shapes=((8, 8),), channels=1))
    assert (decoded.pixels[0] == np.rint(digits.images[17] * 255 / 16)).all()
    assert decoded.notes == ()


def test_a_flat_folder_has_no_categories(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "a.JPG", "c.webp")
    assert listed(tmp_path) == [("a.JPG", None), ("b.png", None), ("c.webp", None)]
    assert entries(tmp_path)[0].image.read() == IMAGE


def test_sub_folders_are_categories_and_the_top_most_one_counts(tmp_path: Path) -> None:
    put(tmp_path, "dog/2.png", "cat/1.png", "dog/puppies/young/3.png")
    assert listed(tmp_path) == [
        ("cat/1.png", "cat"),
        ("dog/2.png", "dog"),
        ("dog/puppies/young/3.png", "dog"),
    ]


def test_an_image_beside_category_folders_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "dog/1.png", "stray.png")
    assert listed(tmp_path) == [("cat/1.png", "cat"), ("dog/1.png", "dog")]
    assert left_out(tmp_path) == {"stray.png": "is outside the category folders"}


def test_hidden_files_folders_and_other_files_are_left_out(tmp_path: Path) -> None:
    put(
        tmp_path,
        "seen.png",
        ".hidden.png",
        "._seen.png",
        ".git/x.png",
        "__MACOSX/y.png",
        "notes.txt",
        "z.svg",
        "model.pt",
    )
    (tmp_path / "notes.txt").write_text("notes")
    assert listed(tmp_path) == [("seen.png", None)]
    assert left_out(tmp_path).keys() == {"notes.txt", "z.svg", "model.pt"}


def test_linked_folders_are_entered_once_and_circles_end(tmp_path: Path) -> None:
    outside = put(tmp_path / "outside", "0.png", "deep/1.png")
    root = put(tmp_path / "root", "cats/in.png")
    (root / "dogs").symlink_to(outside, target_is_directory=True)
    (root / "again").symlink_to(outside / "deep", target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "up").symlink_to(tmp_path, target_is_directory=True)
    (outside / "back").symlink_to(root / "cats", target_is_directory=True)
    (root / "cats" / "file.png").symlink_to(outside / "0.png")
    assert listed(root) == [
        ("again/1.png", "again"),
        ("cats/file.png", "cats"),
        ("cats/in.png", "cats"),
        ("dogs/0.png", "dogs"),
    ]
    assert left_out(root).keys() == {"loop", "up", "dogs/deep", "dogs/back"}


def test_unicode_names_and_names_with_spaces(tmp_path: Path) -> None:
    put(tmp_path, "été/Ω 1.png", "猫/emoji 🐈.png", "naïve/a\u202eb.png")
    assert {category for _, category in listed(tmp_path)} == {"été", "猫", "naïve"}
    assert all(entry.image.read() == IMAGE for entry in entries(tmp_path))


def test_the_order_does_not_follow_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "b/1.png", "a/2.png", "a/10.png", "a.png", "c.png")
    (tmp_path / "d").symlink_to(
        put(tmp_path.parent / f"{tmp_path.name}-outside", "1.png", "2.png"),
        target_is_directory=True,
    )
    before, walk = listed(tmp_path), os.walk

    def backwards(*arguments: object, **options: object):
        for folder, folders, names in walk(*arguments, **options):
            folders.sort(reverse=True)
            yield folder, folders, sorted(names, reverse=True)

    monkeypatch.setattr(files.os, "walk", backwards)
    assert listed(tmp_path) == before


def test_an_empty_folder_says_what_would_count(tmp_path: Path) -> None:
    put(tmp_path, "readme.md")
    with pytest.raises(DataError, match=r"holds no images \(.jpg, .jpeg, .png") as caught:
        Folder(str(tmp_path)).listing()
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_and_a_file_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no-such: no such folder"):
        Folder(str(tmp_path / "no-such")).listing()
    put(tmp_path, "one.png")
    with pytest.raises(DataError, match=r"one\.png: is a file, not a folder"):
        Folder(str(tmp_path / "one.png")).listing()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_and_devices_are_never_waited_for(tmp_path: Path, make) -> None:
    put(tmp_path, "a.png")
    make(tmp_path / "b.png")
    assert listed(tmp_path) == [("a.png", None)]
    assert left_out(tmp_path) == {"b.png": "a pipe or device"}


def test_names_that_are_no_utf8_can_be_written_down(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "caf") + b"\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(IMAGE)
    put(tmp_path, "dog/1.png")
    only, _ = entries(tmp_path)
    assert (only.name, only.category) == ("caf\\udce9/\\udcff.png", "caf\\udce9")
    assert only.image.read() == IMAGE


def test_a_broken_link_is_listed_and_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (only,) = entries(tmp_path)
    with pytest.raises(FileNotFoundError):
        only.image.read()


def test_no_more_of_a_huge_file_is_read_than_it_takes_to_refuse_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no space
    monkeypatch.setattr(listing, "MAX_BYTES", 1000)
    monkeypatch.setattr(decoding, "MAX_BYTES", 1000)
    (only,) = entries(tmp_path)
    data = only.image.read()
    assert len(data) == 1001
    with pytest.raises(decoding.RejectedImage, match="more than"):
        decode(data, PixelFormat(shapes=((8, 8),), channels=3))
