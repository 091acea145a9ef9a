"""An index vouches for its images: the split follows content, the fingerprint follows pixels,
damage is replaced and reported.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.data import DataConfig, Dataset, Digits, Folder, index
from sfumato.errors import ConfigError, DataError
from tests.helpers.image_bytes import encode, noise

ON_USE = {"cache": "off", "memory_gib": 0.0}  # nothing is kept, images are decoded as they are used


def fill(root: Path, count: int, *, first: int = 0, category: str = "") -> Path:
    """`count` different images 0000.png, 0001.png, ..."""
    (root / category).mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (root / category / f"{number:04d}.png").write_bytes(encode(noise(4, 4, seed=number)))
    return root


def opened(root: Path, **options) -> Dataset:
    return index(DataConfig(source=Folder(str(root)), resolution=4, **options))


def names(dataset: Dataset, positions: np.ndarray) -> set[str]:
    return {dataset.entries[i].name for i in positions}


def contents(dataset: Dataset, positions: np.ndarray) -> set[bytes]:
    return {dataset.entries[i].image.read() for i in positions}


def test_the_parts_cover_the_set_once(tmp_path: Path) -> None:
    dataset = opened(fill(tmp_path, 50))
    assert sorted([*dataset.training, *dataset.holdout]) == list(range(50))


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
def test_the_held_out_share_is_near_the_one_asked_for(share: float) -> None:
    dataset = index(DataConfig(source=Digits(), resolution=8, channels=1, holdout=share))
    spread = (share * (1 - share) / 1797) ** 0.5
    assert abs(len(dataset.holdout) / 1797 - share) < 3.5 * spread


def test_duplicates_never_straddle_the_split(tmp_path: Path) -> None:
    fill(tmp_path, 40)
    for number in range(40):
        (tmp_path / f"copy-of-{number:04d}.png").write_bytes(
            (tmp_path / f"{number:04d}.png").read_bytes()
        )
    dataset = opened(tmp_path, holdout=0.5)
    assert len(dataset.holdout) > 10
    assert not contents(dataset, dataset.training) & contents(dataset, dataset.holdout)
    assert len(dataset.summary()["notes"]["duplicate"]) == 80


def test_the_split_survives_new_names_and_new_images(tmp_path: Path) -> None:
    dataset = opened(fill(tmp_path, 60), holdout=0.3)
    held = contents(dataset, dataset.holdout)
    for number, path in enumerate(sorted(tmp_path.iterdir(), reverse=True)):
        path.rename(path.with_name(f"renamed-{number}.png"))
    dataset = opened(tmp_path, holdout=0.3)
    assert contents(dataset, dataset.holdout) == held
    dataset = opened(fill(tmp_path, 30, first=100), holdout=0.3)
    old = {encode(noise(4, 4, seed=number)) for number in range(60)}
    assert contents(dataset, dataset.holdout) & old == held


def test_a_larger_share_holds_out_the_same_and_more(tmp_path: Path) -> None:
    fill(tmp_path, 60)
    small, large = opened(tmp_path, holdout=0.2), opened(tmp_path, holdout=0.6)
    assert names(small, small.holdout) < names(large, large.holdout)


@pytest.mark.parametrize("share", [1e-6, 1 - 1e-6])
def test_both_parts_hold_something_whatever_the_share(tmp_path: Path, share: float) -> None:
    dataset = opened(fill(tmp_path, 2), holdout=share)
    assert len(dataset.training) == len(dataset.holdout) == 1


def test_what_cannot_be_read_is_left_out_with_its_reason(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    (tmp_path / "0001.png").write_bytes(b"")
    (tmp_path / "0003.png").write_bytes(b"<html>404</html>")
    (tmp_path / "cut.jpg").write_bytes(encode(noise(40, 40), "JPEG")[:900])
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    dataset = opened(tmp_path)
    reasons = {reject.name: reject.reason for reject in dataset.rejects}
    assert reasons["0001.png"] == "empty file"
    assert reasons["0003.png"].startswith("not an image in a known format")
    assert reasons["cut.jpg"].startswith("damaged: ")
    assert "No such file" in reasons["gone.png"]
    assert [entry.name for entry in dataset.entries] == ["0000.png", "0002.png", "0004.png"]
    assert (dataset.images([1])[0][0].numpy() == noise(4, 4, seed=2).transpose(2, 0, 1)).all()
    assert dataset.summary()["rejects"] == [
        {"file": name, "reason": reason} for name, reason in reasons.items()
    ]


def test_a_image_beside_the_category_folders_is_left_out(tmp_path: Path) -> None:
    fill(tmp_path, 3, category="cat")
    fill(tmp_path, 3, first=10, category="dog")
    fill(tmp_path, 1, first=7)
    dataset = opened(tmp_path)
    assert dataset.categories == ("cat", "dog")
    assert [(reject.name, reject.reason) for reject in dataset.rejects] == [
        ("0007.png", "is outside the category folders")
    ]


def test_without_readable_images_the_error_has_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"0 different readable images among 1 files, .* \(x.png: empty file\)"
    ) as caught:
        opened(tmp_path)
    assert str(tmp_path) in str(caught.value)
    fill(tmp_path, 1)
    one = opened(tmp_path)  # enough for a fine-tuning
    assert (len(one.training), len(one.holdout)) == (1, 0)


def test_categories_come_in_natural_order_with_labels_to_match(tmp_path: Path) -> None:
    for number, category in enumerate(("10", "zebra", "2", "1", "Ape")):
        fill(tmp_path, 2, first=10 * number, category=category)
    dataset = opened(tmp_path)
    assert dataset.categories == ("1", "2", "10", "Ape", "zebra")
    for entry, label in zip(dataset.entries, dataset.labels.tolist(), strict=True):
        assert dataset.categories[label] == entry.category
    assert dataset.summary()["categories"] == dict.fromkeys(dataset.categories, 2)


def test_without_categories_labels_are_minus_one(tmp_path: Path) -> None:
    dataset = opened(fill(tmp_path, 3))
    assert dataset.categories == ()
    assert dataset.context(np.array([0, 2]))["category"].tolist() == [-1, -1]


def test_in_the_cache_in_memory_and_on_use_give_the_same_pixels(tmp_path: Path) -> None:
    fill(tmp_path, 9)
    read = opened(tmp_path, **ON_USE)
    assert read.read_rows is None
    positions = np.array([5, 0, 5, 8])
    for _ in range(2):  # the cache first fills, and then is read
        for kept in (opened(tmp_path), opened(tmp_path, cache="off")):
            assert kept.read_rows is not None
            assert torch.equal(kept.images(positions)[0], read.images(positions)[0])
            assert (kept.images([5])[0][0].numpy() == noise(4, 4, seed=5).transpose(2, 0, 1)).all()
            assert kept.fingerprint == read.fingerprint
            assert np.array_equal(kept.holdout, read.holdout)


def test_the_fingerprint_is_stable_and_sees_a_pixel_the_order_the_label_and_the_format(
    tmp_path: Path,
) -> None:
    fill(tmp_path, 3, category="a")
    fill(tmp_path, 3, first=3, category="b")
    before = opened(tmp_path).fingerprint
    assert opened(tmp_path).fingerprint == before
    changed = {
        "resolution": index(DataConfig(source=Folder(str(tmp_path)), resolution=5)).fingerprint,
        "gray": opened(tmp_path, channels=1).fingerprint,
        "background": opened(tmp_path, background=(0, 0, 0)).fingerprint,
    }
    image = noise(4, 4, seed=1)
    image[2, 3, 0] ^= 1
    (tmp_path / "a" / "0001.png").write_bytes(encode(image))
    changed["pixel"] = opened(tmp_path).fingerprint
    (tmp_path / "a" / "0001.png").write_bytes(encode(noise(4, 4, seed=1)))
    assert opened(tmp_path).fingerprint == before
    (tmp_path / "a" / "0000.png").rename(tmp_path / "a" / "9999.png")
    changed["order"] = opened(tmp_path).fingerprint
    (tmp_path / "a" / "9999.png").rename(tmp_path / "a" / "0000.png")
    (tmp_path / "a" / "0002.png").rename(tmp_path / "b" / "0002.png")
    changed["label"] = opened(tmp_path).fingerprint
    assert before not in changed.values()
    assert len(set(changed.values())) == len(changed)


@pytest.mark.parametrize("harm", ["deleted", "emptied", "cut", "edited"])
def test_a_image_lost_after_indexing_is_replaced_alike_and_reported(
    tmp_path: Path, harm: str
) -> None:
    dataset = opened(fill(tmp_path, 20), **ON_USE)
    lost = int(dataset.training[3])
    path = tmp_path / dataset.entries[lost].name
    if harm == "deleted":
        path.unlink()
    elif harm == "edited":  # a readable image of the same size and shape, but another
        data = bytearray(path.read_bytes())
        path.write_bytes((tmp_path / dataset.entries[int(dataset.training[7])].name).read_bytes())
        assert bytes(data) != path.read_bytes()
    else:
        path.write_bytes(path.read_bytes()[:60] if harm == "cut" else b"")
    others = [int(dataset.training[i]) for i in (0, 4, 5)]
    pixels, bad, _ = dataset.images([others[0], lost, others[2]])
    assert len(pixels) == 3
    assert torch.equal(pixels[1], dataset.images([others[1]])[0][0])
    assert [reject.name for reject in bad] == [path.name]
    assert bad[0].reason
    again, *_ = dataset.images([lost])
    assert torch.equal(again[0], pixels[1])


def test_a_substitute_is_of_the_same_category_and_part(tmp_path: Path) -> None:
    for number, category in enumerate("abc"):
        fill(tmp_path, 12, first=100 * number, category=category)
    dataset = opened(tmp_path, **ON_USE, holdout=0.4)
    for lost in range(len(dataset.entries)):
        path = tmp_path / dataset.entries[lost].name
        data = path.read_bytes()
        path.unlink()
        given, bad, _ = dataset.images([lost])
        path.write_bytes(data)
        assert len(bad) == 1
        part = dataset.holdout if lost in dataset.holdout else dataset.training
        peers = [i for i in part if dataset.labels[i] == dataset.labels[lost] and i != lost]
        assert any(torch.equal(given[0], dataset.images([i])[0][0]) for i in peers)


def test_several_neighbours_lost_are_all_reported(tmp_path: Path) -> None:
    dataset = opened(fill(tmp_path, 10), **ON_USE)
    gone = dataset.training[-2:]
    for position in gone:
        (tmp_path / dataset.entries[position].name).unlink()
    pixels, bad, _ = dataset.images(gone[:1])
    # around the end, to the first
    assert torch.equal(pixels, dataset.images(dataset.training[:1])[0])
    assert [reject.name for reject in bad] == [dataset.entries[position].name for position in gone]


def test_when_nothing_can_be_read_any_more_it_says_so(tmp_path: Path) -> None:
    dataset = opened(fill(tmp_path, 5), **ON_USE)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"can no longer be read, and neither can any substitute"):
        dataset.images([0])


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_images_kept_in_the_cache_or_in_memory_need_no_source(tmp_path: Path, cache: str) -> None:
    dataset = opened(fill(tmp_path, 5), cache=cache)
    for path in tmp_path.iterdir():
        path.unlink()
    pixels, bad, _ = dataset.images([4])
    assert (pixels[0].numpy() == noise(4, 4, seed=4).transpose(2, 0, 1)).all()
    assert bad == []


def test_conversions_are_noted_with_the_files(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    (tmp_path / "small.png").write_bytes(encode(noise(3, 3)))
    assert opened(tmp_path).notes == {"upscaled": ["small.png"]}


def test_progress_is_told_for_every_file(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    index(
        DataConfig(source=Folder(str(fill(tmp_path, 3))), resolution=4),
        on_progress=lambda done, of: told.append((done, of)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"resolution": 0},
        {"holdout": -0.1},
        {"holdout": 1.0},
        {"workers": -1},
        {"background": (0, 256, 0)},
    ],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="data: resolution = "):
        DataConfig(**wrong)
