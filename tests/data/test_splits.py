"""No copy of a training image is held out: planted duplicates and near-duplicates stay on one side,
and stray without the clusters.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.data import DataConfig, Dataset, Folder, index, indexing
from tests.helpers.image_bytes import encode

ORIGINALS = 40
SIDE = 64


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


def scene(number: int) -> Image.Image:
    """An image with a texture of its own, smooth enough to survive JPEG."""
    values = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def toned(image: Image.Image) -> Image.Image:
    return image.point(lambda value: value * 0.9 + 8)


def speckled(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 3, (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))


def marked(image: Image.Image) -> Image.Image:
    """One pixel changed."""
    copy = image.copy()
    copy.putpixel((5, 7), (255, 0, 255))
    return copy


COPIES = {
    "recompressed.jpg": lambda image: encode(image, "JPEG", quality=60),
    "as-webp.webp": lambda image: encode(image, "WEBP", quality=70),
    "smaller.png": lambda image: encode(image.resize((48, 48), Image.Resampling.LANCZOS)),
    "larger.png": lambda image: encode(image.resize((96, 96), Image.Resampling.BICUBIC)),
    "toned.png": lambda image: encode(toned(image)),
    "speckled.png": lambda image: encode(speckled(image)),
    "one-pixel.png": lambda image: encode(marked(image)),
    "cropped.png": lambda image: encode(image.crop((1, 1, SIDE - 1, SIDE - 1))),
    "same-bytes.png": lambda image: encode(image),
    "other-container.bmp": lambda image: encode(image, "BMP"),
}
EXACT = ("same-bytes.png", "other-container.bmp")


def plant(root: Path, kinds: Iterable[str], *, numbers: Iterable[int] = range(ORIGINALS)) -> Path:
    """Scenes 000.png, 001.png, ..., each with copies 000-KIND."""
    root.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        image = scene(number)
        (root / f"{number:03d}.png").write_bytes(encode(image))
        for kind in kinds:
            (root / f"{number:03d}-{kind}").write_bytes(COPIES[kind](image))
    return root


def opened(root: Path, **options) -> Dataset:
    return index(
        DataConfig(source=Folder(str(root)), **{"resolution": 32, "holdout": 0.4, **options})
    )


def scenes(dataset: Dataset, positions: np.ndarray) -> set[str]:
    """The scenes that the images at `positions` show, by the number in their names."""
    return {dataset.entries[i].name.rpartition("/")[2][:3] for i in positions}


def straddling(dataset: Dataset) -> set[str]:
    """Scenes of which training has one image and a hold-out another."""
    held = [dataset.holdout, *dataset.named_holdouts.values()]
    return scenes(dataset, dataset.training) & set().union(
        *(scenes(dataset, part) for part in held)
    )


def names(dataset: Dataset, positions: np.ndarray) -> set[str]:
    return {dataset.entries[i].name for i in positions}


def alone(ids: list[str], thumbnails: np.ndarray, *, resolution: int) -> np.ndarray:
    """Each image in a group of its own."""
    return np.arange(len(ids))


@pytest.mark.parametrize("kind", COPIES)
def test_a_planted_copy_is_on_the_side_of_its_original(tmp_path: Path, kind: str) -> None:
    dataset = opened(plant(tmp_path / "set", [kind]))
    assert len(dataset.training) + len(dataset.holdout) == len(dataset.entries) == 2 * ORIGINALS
    assert len(scenes(dataset, dataset.holdout)) >= 6
    assert straddling(dataset) == set()


def test_all_kinds_of_copies_together(tmp_path: Path) -> None:
    dataset = opened(plant(tmp_path / "set", COPIES, numbers=range(20)))
    assert straddling(dataset) == set()
    assert len(set(dataset.clusters)) == 20
    assert len(dataset.summary()["notes"]["duplicate"]) == 20 * (1 + len(EXACT))
    assert len(dataset.summary()["notes"]["near_duplicate"]) == 20 * (len(COPIES) - len(EXACT))


def test_different_scenes_are_no_group(tmp_path: Path) -> None:
    dataset = opened(plant(tmp_path / "set", []))
    assert len(set(dataset.clusters)) == ORIGINALS


@pytest.mark.parametrize("kind", [kind for kind in COPIES if kind not in EXACT])
def test_without_clusters_the_same_copies_do_straddle(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the test above can fail."""
    monkeypatch.setattr(indexing, "clusters", alone)
    dataset = opened(plant(tmp_path / "set", [kind]))
    assert len(straddling(dataset)) >= 8


def test_exact_copies_have_one_id_and_so_one_side_even_without_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "clusters", alone)
    dataset = opened(plant(tmp_path / "set", EXACT))
    assert straddling(dataset) == set()
    assert len(set(dataset.ids)) == ORIGINALS


def test_a_copy_of_a_copy_is_with_them(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", [])
    for path in sorted(root.iterdir()):
        image = Image.open(path)
        for generation, quality in enumerate((85, 70, 55)):
            data = encode(image, "JPEG", quality=quality)
            path.with_name(f"{path.stem}-{generation}.jpg").write_bytes(data)
            image = Image.open(io.BytesIO(data))
    assert straddling(opened(root)) == set()


def test_more_copies_than_neighbours_are_looked_at_are_one_group_still(tmp_path: Path) -> None:
    """A dozen new encodings of each of three versions hide the other two versions from one
    another.
    """
    root = plant(tmp_path / "set", [], numbers=range(12))
    for number in range(12):
        image = scene(number)
        for version, changed in enumerate(
            (image, image.crop((2, 2, SIDE - 2, SIDE - 2)), speckled(image))
        ):
            for quality in range(84, 96):
                (root / f"{number:03d}-{version}-{quality}.jpg").write_bytes(
                    encode(changed, "JPEG", quality=quality)
                )
    dataset = opened(root)
    assert len(dataset.entries) == 12 * 37
    assert len(set(dataset.clusters)) == 12
    assert straddling(dataset) == set()


def test_a_set_of_nothing_but_copies_of_two_scenes(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", COPIES, numbers=range(2))
    dataset = opened(root)
    # split, or half of the set would be held out
    assert sorted(set(np.bincount(dataset.clusters))) == [1, 1 + len(EXACT)]
    assert 0 < len(dataset.holdout) < 11
    assert "22 images are alike" in dataset.remarks[0]


def test_copies_in_other_categories_and_under_other_captions_are_not_split(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number in range(ORIGINALS):
        for category, data in (
            ("cat", encode(scene(number))),
            ("dog", COPIES["recompressed.jpg"](scene(number))),
        ):
            path = (
                root
                / category
                / f"{number:03d}-{category}{'.png' if category == 'cat' else '.jpg'}"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(f"a {category}")
    dataset = opened(root)
    assert len(dataset.entries) == 2 * ORIGINALS
    assert straddling(dataset) == set()


@pytest.mark.parametrize(
    "options",
    [{"cache": "off"}, {"cache": "off", "memory_gib": 0.0}, {"channels": 1}, {"bits": 16}],
)
def test_no_way_of_keeping_pixels_lets_copies_straddle(tmp_path: Path, options: dict) -> None:
    dataset = opened(
        plant(tmp_path / "set", ["recompressed.jpg", "toned.png"], numbers=range(20)), **options
    )
    assert len(dataset.holdout) >= 6
    assert straddling(dataset) == set()


# --- which side -----------------------------------------------------------------------------------


def test_the_split_is_the_same_each_time_with_and_without_the_cache(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", ["recompressed.jpg"])
    first = opened(root)
    for again in (
        opened(root),
        opened(root, cache="off"),
        opened(root, cache="off", memory_gib=0.0),
    ):
        assert np.array_equal(again.training, first.training)
        assert np.array_equal(again.holdout, first.holdout)
        assert again.fingerprint == first.fingerprint


def test_new_images_move_none_of_the_others(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", ["recompressed.jpg"])
    before = names(opened(root), opened(root).holdout)
    dataset = opened(plant(root, [], numbers=range(100, 130)))
    old = {name for name in names(dataset, dataset.holdout) if int(name[:3]) < 100}
    assert old == before
    assert names(dataset, dataset.holdout) > before


def test_a_new_copy_goes_to_its_original_or_takes_the_whole_group_along(tmp_path: Path) -> None:
    """The least id of a group decides, so a copy can move its own group; every other image
    stays.
    """
    root = plant(tmp_path / "set", [])
    before = opened(root)
    sides = {
        name: name in names(before, before.holdout) for name in names(before, np.arange(ORIGINALS))
    }
    plant(root, ["toned.png"], numbers=range(8))
    after = opened(root)
    held = names(after, after.holdout)
    assert straddling(after) == set()
    assert all((name in held) == side for name, side in sides.items() if int(name[:3]) >= 8)
    assert sum((name in held) != side for name, side in sides.items()) <= 8


def test_leaving_images_out_moves_none_of_the_others(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", [])
    before = opened(root)
    gone = sorted(names(before, before.training))[:10]
    (tmp_path / "rejects.txt").write_text("".join(f"{name}\tno good\n" for name in gone))
    after = opened(root, exclude=str(tmp_path / "rejects.txt"))
    assert names(after, after.holdout) == names(before, before.holdout)
    assert names(after, after.training) == names(before, before.training) - set(gone)


# --- named hold-outs ------------------------------------------------------------------------------


def split_folders(root: Path, copy: str) -> Path:
    """Scenes 0 to 39 for training, the first 10 of them again as copies among the tests, and 10
    that only the tests have.
    """
    plant(root / "train", [])
    plant(root / "test", [], numbers=range(50, 60))
    for number in range(10):
        (root / "test" / f"{number:03d}-{copy}").write_bytes(COPIES[copy](scene(number)))
    return root


def test_a_named_hold_out_is_a_part_of_its_own(tmp_path: Path) -> None:
    dataset = opened(split_folders(tmp_path / "set", "recompressed.jpg"))
    assert dataset.named_holdouts.keys() == {"test"}
    test = dataset.named_holdouts["test"]
    assert names(dataset, test) == {
        entry.name for entry in dataset.entries if entry.name.startswith("test/")
    }
    parts = [dataset.training, dataset.holdout, test]
    assert sorted(int(i) for part in parts for i in part) == list(range(len(dataset.entries)))
    assert dataset.summary()["named_holdouts"] == {"test": 20}


@pytest.mark.parametrize("copy", EXACT)
def test_training_images_that_the_test_set_holds_too_leave_training(
    tmp_path: Path, copy: str
) -> None:
    dataset = opened(split_folders(tmp_path / "set", copy))
    assert straddling(dataset) == set()
    moved = {
        name for name in names(dataset, dataset.named_holdouts["test"]) if name.startswith("train/")
    }
    assert moved == {f"train/{number:03d}.png" for number in range(10)}


def test_what_only_resembles_a_named_hold_out_stays_where_its_source_put_it(tmp_path: Path) -> None:
    dataset = opened(split_folders(tmp_path / "set", "recompressed.jpg"))
    assert straddling(dataset) & {f"{number:03d}" for number in range(10)}
    assert not scenes(dataset, dataset.training) & scenes(dataset, dataset.holdout)


def test_hold_outs_named_beside_each_image(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", EXACT)
    for number in range(0, 20, 2):
        (root / f"{number:03d}.json").write_text(
            f'{{"holdout": "{"hats" if number < 10 else "boots"}"}}'
        )
    dataset = opened(root)
    wanted = {"hats": range(0, 10, 2), "boots": range(10, 20, 2)}
    for name, numbers in wanted.items():
        assert scenes(dataset, dataset.named_holdouts[name]) == {
            f"{number:03d}" for number in numbers
        }
        assert len(dataset.named_holdouts[name]) == 5 * 3  # with their exact copies
    assert straddling(dataset) == set()


def nuclei(seed: int) -> Image.Image:
    """Some hundred small blobs spread evenly, whose means over an eighth of the side tell
    nothing.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:128, :128]
    values = sum(
        np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 8) for cx, cy in rng.uniform(0, 128, (250, 2))
    )
    return Image.fromarray((8 * values).round().astype(np.uint8))


def test_fields_of_many_small_things_are_copies_only_of_what_shows_the_same_ones(
    tmp_path: Path,
) -> None:
    """28 different microscope fields were called copies of one."""
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(encode(nuclei(number)))
    # so that the set's range is whole
    (tmp_path / "bright.png").write_bytes(encode(Image.new("L", (128, 128), 230)))
    (tmp_path / "3 again.jpg").write_bytes(encode(nuclei(3), "JPEG", quality=95))
    dataset = index(DataConfig(source=Folder(str(tmp_path)), resolution=128, channels=1))
    groups: dict[int, list[str]] = {}
    for entry, group in zip(dataset.entries, dataset.clusters, strict=True):
        groups.setdefault(int(group), []).append(entry.name)
    assert sorted(sorted(names) for names in groups.values() if len(names) > 1) == [
        ["3 again.jpg", "3.png"]
    ]
