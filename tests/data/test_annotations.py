"""What lies beside images reaches a model as it is: in its place, NaN where it is missing, and
moved along with the image.
"""

import io
import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.data import (
    AugmentConfig,
    BatchPlan,
    BucketConfig,
    DataConfig,
    Dataset,
    Folder,
    batches,
    index,
    source_at,
)
from sfumato.data import annotations as module
from sfumato.data.convert import convert
from sfumato.data.listing import MAX_ATTRIBUTES, parse_annotations
from tests.helpers.containers import put, tar
from tests.helpers.image_bytes import encode, noise

SIDE = 8
ANNOTATIONS = ("text", "doodle", "mask", "points", "attributes")
POINTS = np.array([[0.5, -0.25], [-1, 1], [0, 0.125]], np.float32)
LONGER = np.linspace(-1, 1, 10, dtype=np.float32).reshape(5, 2)
DOODLE = noise(SIDE, SIDE, seed=90)[..., 0]
MASK = np.where(np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 3 == 0, 255, 0).astype(np.uint8)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def ply(points: np.ndarray) -> bytes:
    header = f"ply\nformat ascii 1.0\nelement vertex {len(points)}\nproperty float x\nproperty float y\nend_header\n"
    return header.encode() + "".join(f"{x} {y}\n" for x, y in points.tolist()).encode()


def files() -> dict[str, bytes]:
    """Six images: 1 has everything, 2 a longer cloud, 3 damaged annotations, 4 a cloud of other
    dimensions, 5 and 6 nothing.
    """
    found = {f"{i}.png": encode(noise(SIDE, SIDE, seed=i)) for i in range(1, 7)}
    found |= {
        "1.doodle.png": encode(DOODLE),
        "1.mask.png": encode(MASK),
        "1.points.npy": npy(POINTS),
    }
    facts = {
        "captions": ["one", "uno", "eins"],
        "attributes": {"age": 7, "height": -1.5},
        "tags": ["cat", " asleep "],
    }
    found |= {"1.json": json.dumps(facts).encode(), "2.points.ply": ply(LONGER), "2.txt": b"two"}
    found |= {"2.json": json.dumps({"attributes": {"age": 0}, "tags": "cat, outside"}).encode()}
    found |= {
        "3.doodle.png": encode(DOODLE)[:60],
        "3.mask.png": b"",
        "3.points.npy": npy(POINTS)[:-3],
    }
    return found | {"4.points.csv": b"1,2,3\n4,5,6\n"}


def opened(root: Path, annotations: Sequence[str] = ANNOTATIONS, **options) -> Dataset:
    return index(
        DataConfig(source=Folder(str(root)), **{"resolution": SIDE, "cache": "off", **options}),
        annotations=annotations,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(tmp_path_factory.mktemp("annotations"), files())


@pytest.fixture(scope="module")
def dataset(root: Path) -> Dataset:
    return opened(root)


ALL = np.arange(6)


# --- values ---------------------------------------------------------------------------------------


def test_annotations_are_no_images_of_their_own(dataset: Dataset) -> None:
    assert [entry.name for entry in dataset.entries] == [f"{i}.png" for i in range(1, 7)]
    assert dataset.rejects == []


def test_doodles_and_masks_are_what_the_files_hold_and_nan_where_there_are_none(
    dataset: Dataset,
) -> None:
    context = dataset.context(ALL)
    for name, pixels in (("doodle", DOODLE), ("mask", MASK)):
        assert context[name].shape == (6, 1, SIDE, SIDE)
        assert context[name].dtype == torch.float32
        torch.testing.assert_close(context[name][0, 0], torch.from_numpy(pixels) / 127.5 - 1)
        assert context[name][1:].isnan().all()


def test_clouds_are_padded_to_the_longest_of_the_batch(dataset: Dataset) -> None:
    points = dataset.context(ALL)["points"]
    assert points.shape == (6, 5, 2)
    assert torch.equal(points[0, :3], torch.from_numpy(POINTS))
    torch.testing.assert_close(points[1], torch.from_numpy(LONGER))
    assert points[0, 3:].isnan().all()
    assert points[2:].isnan().all()
    assert dataset.context(np.array([0]))["points"].shape == (1, 3, 2)
    assert dataset.context(np.array([4, 5]))["points"].shape == (2, 1, 2)


def test_the_number_of_dimensions_is_that_of_most_clouds(dataset: Dataset) -> None:
    assert dataset.annotations.dimensions == 2


def test_attributes_and_tags_are_numbers_by_name(dataset: Dataset) -> None:
    assert dataset.annotations.attributes.names == ("age", "asleep", "cat", "height", "outside")
    values = dataset.context(ALL)["attributes"]
    assert values.dtype == torch.float32
    assert values[0].tolist() == [7, 1, 1, -1.5, 0]
    assert values[1, [0, 1, 2, 4]].tolist() == [0, 0, 1, 1]


def test_a_label_is_0_where_it_is_not_given_and_a_number_is_unknown(dataset: Dataset) -> None:
    values = dataset.context(ALL)["attributes"]
    assert values[2:, [1, 2, 4]].eq(0).all()
    assert values[2:, [0, 3]].isnan().all()
    assert values[1, 3].isnan()


def test_a_number_that_is_1_once_is_no_label(tmp_path: Path) -> None:
    given = ({"n": 1, "same": 1}, {"n": 1}, {"n": 2}, {})
    found = {f"{i}.png": encode(noise(SIDE, SIDE, seed=i)) for i in range(4)}
    found |= {
        f"{i}.json": json.dumps({"attributes": facts}).encode() for i, facts in enumerate(given)
    }
    values = opened(put(tmp_path, found)).annotations.attributes.rows(np.arange(4))
    assert values[:3, 0].tolist() == [1, 1, 2]
    assert values[3, 0].isnan()
    assert values[:, 1].tolist() == [1, 0, 0, 0]


def test_captions_are_the_first_unless_draws_choose(dataset: Dataset) -> None:
    assert dataset.context(ALL)["text"] == ["one", "two", "", "", "", ""]
    for draw, text in (
        (0.0, "one"),
        (0.34, "uno"),
        (0.65, "uno"),
        (0.67, "eins"),
        (0.999999, "eins"),
    ):
        assert dataset.context(ALL, draws=[draw] * 6)["text"] == [text, "two", "", "", "", ""]


def test_only_what_a_model_reads_is_looked_at(root: Path) -> None:
    assert opened(root, annotations=()).context(ALL).keys() == {"category"}
    doodles = opened(root, annotations=("doodle",))
    assert doodles.context(ALL).keys() == {"category", "doodle"}
    assert doodles.notes == {"doodle_unreadable": ["3.png"]}


def test_positions_may_be_in_any_order_and_repeat(dataset: Dataset) -> None:
    whole, some = dataset.context(ALL), dataset.context(np.array([4, 0, 0]))
    assert some["text"] == ["", "one", "one"]
    for name in ("doodle", "mask", "attributes"):
        torch.testing.assert_close(some[name], whole[name][[4, 0, 0]], equal_nan=True)


# --- damage ---------------------------------------------------------------------------------------


def test_damaged_annotations_are_noted_and_count_as_missing(dataset: Dataset) -> None:
    assert dataset.notes == {
        f"{name}_unreadable": ["3.png"] for name in ("doodle", "mask", "points")
    }
    assert dataset.summary()["notes"] == dataset.notes


def test_an_annotation_that_disappears_later_counts_as_missing(tmp_path: Path) -> None:
    root = put(tmp_path, files())
    dataset = opened(root)
    dataset.annotations._cache.clear()
    for name in ("1.doodle.png", "1.points.npy"):
        (root / name).unlink()
    context = dataset.context(ALL)
    assert context["doodle"].isnan().all()
    assert context["points"][0].isnan().all()
    assert not context["mask"][0].isnan().any()


def test_annotations_are_examined_without_warnings(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    found = {f"{i}.png": encode(noise(SIDE, SIDE, seed=i)) for i in range(3)}
    # Pillow warns of its EXIF data
    odd = encode(DOODLE, exif=b"II*\0\x08\0\0\0\x05\0\x12\x01\x03\0")
    assert opened(put(tmp_path, {**found, "0.doodle.png": odd})).notes == {}
    assert list(recwarn) == []


@pytest.mark.parametrize("most", [0, 100, 1 << 30])
def test_what_is_kept_decoded_changes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(module, "MAX_CACHE_BYTES", most)
    dataset = opened(root)
    sizes = [0 if array is None else array.nbytes for array in dataset.annotations._cache.values()]
    assert sum(sizes) <= 2 * most  # an estimate: annotations differ in size
    for _ in range(2):
        context = dataset.context(ALL)
        torch.testing.assert_close(context["doodle"][0, 0], torch.from_numpy(DOODLE) / 127.5 - 1)
        assert torch.equal(context["points"][0, :3], torch.from_numpy(POINTS))


# --- shapes ---------------------------------------------------------------------------------------


def test_annotations_take_the_shape_and_the_crop_of_their_image(tmp_path: Path) -> None:
    tall = np.zeros((4 * SIDE, 2 * SIDE), np.uint8)
    tall[: 2 * SIDE] = 255
    wide = np.ascontiguousarray(tall.T)
    found = {f"{i}.png": encode(noise(4 * SIDE, 2 * SIDE, seed=i)) for i in range(3)}
    found |= {f"{i}.png": encode(noise(2 * SIDE, 4 * SIDE, seed=i)) for i in range(3, 6)}
    found |= {f"{i}.doodle.png": encode(tall if i < 3 else wide) for i in range(6)}
    dataset = opened(put(tmp_path, found), resolution=2 * SIDE, buckets=BucketConfig(step=4))
    for chosen, axis in ((ALL[:3], 2), (ALL[3:], 3)):
        pixels, doodles = dataset.images(chosen).pixels, dataset.context(chosen)["doodle"]
        assert doodles.shape[2:] == pixels.shape[2:]
        assert doodles.shape[axis] > doodles.shape[5 - axis]
        light, dark = doodles.chunk(2, axis)
        assert light.mean() > 0.9
        assert dark.mean() < -0.9
    assert len({tuple(dataset.images(ALL[i : i + 1]).pixels.shape) for i in range(6)}) == 2


# --- training -------------------------------------------------------------------------------------


def lying_over(root: Path, count: int = 12) -> Path:
    """Images whose doodle and mask are their own first channel, with a point at each bright pixel
    and a caption.
    """
    found = {}
    for i in range(count):
        pixels = noise(SIDE, SIDE, seed=i)
        pixels[..., 1:] = pixels[..., :1]
        y, x = np.nonzero(pixels[..., 0] > 200)
        places = np.stack([(x + 0.5) * 2 / SIDE - 1, 1 - (y + 0.5) * 2 / SIDE], 1).astype(
            np.float32
        )
        found |= {
            f"{i}.png": encode(pixels),
            f"{i}.doodle.png": encode(pixels),
            f"{i}.mask.png": encode(pixels),
        }
        found |= {
            f"{i}.points.npy": npy(places),
            f"{i}.json": json.dumps({"captions": [f"{i} a", f"{i} b"]}).encode(),
        }
    return put(root, found)


def seen(dataset: Dataset, *, count: int = 3, batch_size: int = 5) -> list:
    plan = BatchPlan(seed=3, shapes=dataset.shapes[dataset.training], batch_size=batch_size)
    return [
        group for batch in islice(batches(dataset, plan, start=0), count) for group in batch.groups
    ]


def bright(images: torch.Tensor) -> list[set[tuple[int, int]]]:
    """Of each image, columns and rows of the pixels above 200."""
    found: list[set[tuple[int, int]]] = [set() for _ in images]
    for number, y, x in torch.nonzero((images[:, 0] + 1) * 127.5 > 200.5).tolist():
        found[number].add((x, y))
    return found


def pointed_at(points: torch.Tensor) -> list[set[tuple[int, int]]]:
    """Of each cloud, columns and rows of the pixels that its points are in."""
    clouds = [cloud[~cloud.isnan().any(1)] for cloud in points]
    return [
        {
            (math.floor((x + 1) * SIDE / 2), math.floor((1 - y) * SIDE / 2))
            for x, y in cloud.tolist()
        }
        for cloud in clouds
    ]


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(),
        AugmentConfig(flip="both"),
        AugmentConfig(flip="horizontal"),
        AugmentConfig(quarter_turns="all"),
    ],
)
def test_annotations_move_with_the_image(tmp_path: Path, augment: AugmentConfig) -> None:
    dataset = opened(lying_over(tmp_path), augment=augment)
    for part in seen(dataset):
        assert torch.equal(part.context["doodle"], part.images[:, :1])
        assert torch.equal(part.context["mask"], part.images[:, :1])
        assert pointed_at(part.context["points"]) == bright(part.images)
    moved = torch.cat([part.images for part in seen(dataset)])
    still = torch.cat([part.images for part in seen(opened(tmp_path))])
    assert torch.equal(moved, still) == augment.is_off


def test_turned_annotations_stay_where_the_image_is(tmp_path: Path) -> None:
    dataset = opened(
        lying_over(tmp_path), augment=AugmentConfig(rotation_degrees=30, crop=0.3, flip="both")
    )
    for part in seen(dataset):
        torch.testing.assert_close(part.context["doodle"], part.images[:, :1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "kept", [{"memory_gib": 1.0}, {"memory_gib": 0.0}, {"memory_gib": 0.0, "workers": 2}]
)
def test_worker_processes_give_the_same_annotations(tmp_path: Path, kept: dict) -> None:
    root = lying_over(tmp_path)
    expected = seen(opened(root, augment=AugmentConfig(flip="both")), count=4)
    for part, other in zip(
        seen(opened(root, augment=AugmentConfig(flip="both"), **kept), count=4),
        expected,
        strict=True,
    ):
        assert part.context["text"] == other.context["text"]
        for name in ("doodle", "mask", "points", "attributes"):
            torch.testing.assert_close(
                part.context[name], other.context[name], equal_nan=True, atol=0, rtol=0
            )
    # draws choose among captions
    assert len({text[-1] for part in expected for text in part.context["text"]}) == 2


# --- attributes and tags --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"attributes": {"b": 2, "a": 1.5}}, (("a", 1.5), ("b", 2.0))),
        ({"attributes": '{"a": 3}'}, (("a", 3.0),)),
        ({"attributes.age": 4, "attributes.x.y": "5"}, (("age", 4.0), ("x.y", 5.0))),
        ({"tags": ["cat", " cat ", "", 7, None]}, (("cat", 1.0),)),
        ({"tags": "cat, asleep,,"}, (("asleep", 1.0), ("cat", 1.0))),
        ({"attributes": {"yes": True, "no": False}}, (("no", 0.0), ("yes", 1.0))),
        (
            {
                "attributes": {
                    "a": math.nan,
                    "b": math.inf,
                    "c": None,
                    "d": "x",
                    "e": [1],
                    "f": 10**400,
                    "g": 0,
                }
            },
            (("g", 0.0),),
        ),
        ({"attributes": {"new\nline\x1b": 1}}, (("new\\nline\\x1b", 1.0),)),
        ({"attributes": {"\ud800": 1}}, (("\\ud800", 1.0),)),
        ({"attributes": "[" * 100_000}, None),
        ({"attributes": [1, 2]}, None),
        ({"attributes": None, "tags": None}, None),
        ({"tags": 5}, None),
    ],
)
def test_attributes_are_finite_numbers_under_names_that_can_be_printed(
    record: dict, found: tuple | None
) -> None:
    assert parse_annotations(record).get("attributes") == found


def test_a_image_has_so_many_attributes_and_no_more() -> None:
    assert (
        len(parse_annotations({"tags": [str(i) for i in range(5000)]})["attributes"])
        == MAX_ATTRIBUTES
    )


def test_a_table_of_metadata_names_attributes_by_column(tmp_path: Path) -> None:
    found = {f"{i}.png": encode(noise(SIDE, SIDE, seed=i)) for i in range(3)}
    rows = b'file_name,attributes.age,tags\n0.png,3,"cat,wild"\n1.png,,cat\n2.png,old,\n'
    dataset = opened(put(tmp_path, {**found, "metadata.csv": rows}))
    assert [entry.attributes for entry in dataset.entries] == [
        (("age", 3.0), ("cat", 1.0), ("wild", 1.0)), (("cat", 1.0),), (),
    ]  # fmt: skip
    assert dataset.annotations.attributes.rows(np.arange(3))[:, 1:].tolist() == [
        [1, 1],
        [1, 0],
        [0, 0],
    ]


def test_other_attributes_are_other_data(tmp_path: Path) -> None:
    before = opened(put(tmp_path, files())).fingerprint
    assert opened(tmp_path).fingerprint == before
    put(
        tmp_path,
        {"2.json": json.dumps({"attributes": {"age": 1}, "tags": "cat, outside"}).encode()},
    )
    assert opened(tmp_path).fingerprint != before


def test_a_sidecar_without_captions_leaves_those_of_another(tmp_path: Path) -> None:
    images = {f"{i}.png": encode(noise(SIDE, SIDE, seed=i)) for i in range(2)}
    found = {
        **images,
        "0.txt": b"zero",
        "0.json": b'{"tags": "cat"}',
        "1.txt": b"one",
        "1.json": b'{"caption": "uno"}',
    }
    assert opened(put(tmp_path / "folder", found)).context(np.arange(2))["text"] == ["zero", "uno"]
    shard = {
        **images,
        "0.txt": b"zero",
        "0.cls": b"3",
        "1.caption": b"one",
        "1.json": b'{"tags": ["cat"]}',
    }
    dataset = index(
        DataConfig(
            source=source_at(str(tar(tmp_path / "a.tar", dict(sorted(shard.items()))))),
            resolution=SIDE,
            cache="off",
        )
    )
    assert dataset.context(np.arange(2))["text"] == ["zero", "one"]


@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_converted_data_have_the_same_annotations(root: Path, tmp_path: Path, suffix: str) -> None:
    (path,), rejects = convert(Folder(str(root)).listing(), tmp_path / f"out{suffix}")
    assert [reject.part for reject in rejects] == [True]  # a doodle that is cut
    before = opened(root)
    after = index(
        DataConfig(source=source_at(str(path)), resolution=SIDE, cache="off"),
        annotations=ANNOTATIONS,
    )
    assert [entry.attributes for entry in after.entries] == [
        entry.attributes for entry in before.entries
    ]
    assert after.annotations.attributes.names == before.annotations.attributes.names
    mine, theirs = before.context(ALL), after.context(ALL)
    assert mine["text"] == theirs["text"]
    for name in ("doodle", "mask", "points", "attributes"):
        assert torch.equal(mine[name].nan_to_num(9), theirs[name].nan_to_num(9)), name
