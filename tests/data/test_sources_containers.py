"""The same images give the same samples, whatever they are packed in."""

import json
import multiprocessing
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sfumato.data import DataConfig, Dataset, Entry, Parquet, WebDataset, index, source_at
from sfumato.data.decoding import array_id
from tests.helpers import containers
from tests.helpers.containers import CATEGORIES, SAMPLES, SIDE, put
from tests.helpers.image_bytes import encode, noise

ALL = [s.captions for s in SAMPLES]
FIRST = [s.captions[:1] for s in SAMPLES]
NONE: list[tuple[str, ...]] = [() for _ in SAMPLES]
METADATA = {
    "metadata.csv": containers.metadata_csv,
    "metadata.jsonl": containers.metadata_jsonl,
    "metadata.parquet": containers.metadata_parquet,
}


def folder(*more: dict[str, bytes]) -> Callable[[Path], Path]:
    return lambda root: put(
        root / "photos",
        {name: data for files in (containers.images(), *more) for name, data in files.items()},
    )


def table_folder(root: Path) -> Path:
    (root / "data").mkdir()
    return containers.table(root / "data" / "train-00000-of-00001.parquet").parent


def tar_folder(root: Path) -> Path:
    (root / "shards").mkdir()
    return containers.webdataset(root / "shards" / "shard-000000.tar").parent


CONTAINERS: dict[str, tuple[Callable[[Path], Path], list[tuple[str, ...]]]] = {
    "folder": (folder(), NONE),
    "folder, text beside": (folder(containers.sidecars("txt")), ALL),
    "folder, JSON beside": (folder(containers.sidecars("json")), ALL),
    "folder, metadata.csv": (folder({"metadata.csv": containers.metadata_csv()}), FIRST),
    "folder, metadata.jsonl": (folder({"metadata.jsonl": containers.metadata_jsonl()}), ALL),
    "folder, metadata.parquet": (folder({"metadata.parquet": containers.metadata_parquet()}), ALL),
    "folder, dataset.json": (lambda root: unpacked(containers.edm_zip(root / "edm.zip")), NONE),
    "parquet": (lambda root: containers.table(root / "t.parquet"), ALL),
    "parquet, plain bytes": (lambda root: containers.table(root / "t.parquet", struct=False), ALL),
    "folder of parquet": (table_folder, ALL),
    "tar": (lambda root: containers.webdataset(root / "t.tar"), ALL),
    "folder of tars": (tar_folder, ALL),
    "zip": (
        lambda root: containers.zipped(
            root / "z.zip", containers.images() | containers.sidecars("txt")
        ),
        ALL,
    ),
    "zip, deflated": (
        lambda root: containers.zipped(
            root / "z.zip", containers.images() | containers.sidecars("json"), zipfile.ZIP_DEFLATED
        ),
        ALL,
    ),
    "zip, dataset.json": (lambda root: containers.edm_zip(root / "edm.zip"), NONE),
    "npz": (lambda root: containers.npz(root / "a.npz"), NONE),
    "npz, deflated": (lambda root: containers.npz(root / "a.npz", compressed=True), NONE),
    "save_to_disk": (lambda root: containers.saved(root / "saved"), ALL),
}


def unpacked(path: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(path.with_suffix(""))
    return path.with_suffix("")


def opened(place: Path) -> Dataset:
    return index(DataConfig(source=source_at(str(place)), resolution=SIDE, cache="off"))


def pixels(dataset: Dataset) -> np.ndarray:
    return dataset.images(np.arange(len(dataset.entries)))[0].numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_same_samples(kind: str, tmp_path: Path) -> None:
    make, captions = CONTAINERS[kind]
    dataset = opened(make(tmp_path))
    assert dataset.ids == [array_id(s.values) for s in SAMPLES]
    assert dataset.ids[0] == dataset.ids[4]
    assert (pixels(dataset) == np.stack([s.values for s in SAMPLES])).all()
    assert [entry.captions for entry in dataset.entries] == captions
    assert dataset.categories == ("cat", "dog")
    assert [dataset.categories[label] for label in dataset.labels.tolist()] == CATEGORIES
    assert dataset.rejects == []


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in CONTAINERS
        if "npz" not in kind and "save" not in kind and "bytes" not in kind
    ],
)
def test_names_are_kept(kind: str, tmp_path: Path) -> None:
    dataset = opened(CONTAINERS[kind][0](tmp_path))
    assert [entry.name.rpartition(":")[2] for entry in dataset.entries] == [s.name for s in SAMPLES]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_names_are_unique(kind: str, tmp_path: Path) -> None:
    names = [
        entry.name for entry in source_at(str(CONTAINERS[kind][0](tmp_path))).listing().entries
    ]
    assert len(set(names)) == len(SAMPLES)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_names_are_unique_over_shards_and_over_rows_of_one_name(kind: str, tmp_path: Path) -> None:
    make = containers.table if kind == "parquet" else containers.webdataset
    for split in ("a", "b"):
        (tmp_path / split).mkdir()
        make(tmp_path / split / f"0.{'parquet' if kind == 'parquet' else 'tar'}")
    source = (Parquet if kind == "parquet" else WebDataset)(str(tmp_path))
    assert len({entry.name for entry in source.listing().entries}) == 2 * len(SAMPLES)


def test_rows_that_share_a_path_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = tuple(containers.Sample("image.png", s.category, s.captions, s.values) for s in SAMPLES)
    monkeypatch.setattr(containers, "SAMPLES", same)
    names = [
        entry.name
        for entry in Parquet(str(containers.table(tmp_path / "t.parquet"))).listing().entries
    ]
    assert len(set(names)) == len(SAMPLES)
    assert all(name.startswith("image.png") for name in names)


@pytest.mark.parametrize("name", METADATA)
def test_images_that_metadata_do_not_name_are_listed(name: str, tmp_path: Path) -> None:
    place = folder({name: METADATA[name](), "cat/unnamed.png": encode(noise(SIDE, SIDE, seed=9))})(
        tmp_path
    )
    (reject,) = opened(place).rejects
    assert (reject.name, reject.reason) == ("cat/unnamed.png", "not named in the metadata")


@pytest.mark.parametrize("empty", ["", "  \n\t "])
@pytest.mark.parametrize(
    "kind", ["txt", "json", "metadata.jsonl", "metadata.csv", "tar", "parquet", "save_to_disk"]
)
def test_an_empty_caption_is_none(
    kind: str, empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = tuple(containers.Sample(s.name, s.category, (empty,), s.values) for s in SAMPLES)
    monkeypatch.setattr(containers, "SAMPLES", blank)
    make = {
        "txt": lambda root: folder(containers.sidecars("txt"))(root),
        "json": lambda root: folder(containers.sidecars("json"))(root),
        "metadata.jsonl": lambda root: folder({"metadata.jsonl": containers.metadata_jsonl()})(
            root
        ),
        "metadata.csv": lambda root: folder({"metadata.csv": containers.metadata_csv()})(root),
    }
    place = make.get(kind, CONTAINERS.get(kind, (None,))[0])(tmp_path)
    assert [entry.captions for entry in source_at(str(place)).listing().entries] == NONE


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array([0, 1, 2]), ["0", "1", "2"]),
        (np.array([b"cat", "é".encode(), b"dog"]), ["cat", "é", "dog"]),
        (np.array([["cat"], ["dog"], ["猫"]]), ["cat", "dog", "猫"]),
        (np.eye(3)[[2, 0, 1]], ["2", "0", "1"]),
    ],
)
def test_labels_of_an_npz_are_read_as_people_store_them(
    labels: np.ndarray, expected: list[str], tmp_path: Path
) -> None:
    np.savez(
        tmp_path / "a.npz", arr_0=np.stack([noise(4, 4, seed=i) for i in range(3)]), arr_1=labels
    )
    assert [
        entry.category for entry in source_at(str(tmp_path / "a.npz")).listing().entries
    ] == expected


@pytest.mark.parametrize("kind", ["parquet", "metadata.jsonl", "metadata.parquet", "save_to_disk"])
def test_attributes_are_read_from_tables(kind: str, tmp_path: Path) -> None:
    import datasets

    texts = {
        "attributes": {"age": 7.0, "height": 1.5},
        "attributes.weight": 3,
        "tags": ["small", "asleep"],
        "other": "x",
    }
    files = {f"{i}.png": encode(noise(SIDE, SIDE, seed=i)) for i in range(3)}
    rows = [{"file_name": name} | texts for name in files]
    if kind == "metadata.jsonl":
        put(tmp_path / "x", files | {kind: "\n".join(map(json.dumps, rows)).encode()})
    elif kind == "metadata.parquet":
        pq.write_table(pa.Table.from_pylist(rows), put(tmp_path / "x", files) / kind)
    else:
        found = pa.Table.from_pylist(
            [{"image": {"bytes": data, "path": None}} | texts for data in files.values()]
        )
        if kind == "parquet":
            pq.write_table(found, tmp_path / "x.parquet")
        else:
            columns = datasets.Dataset(found).cast_column("image", datasets.Image())
            columns.save_to_disk(str(tmp_path / "x"))
    (place,) = tmp_path.iterdir()
    expected = (("age", 7.0), ("asleep", 1.0), ("height", 1.5), ("small", 1.0), ("weight", 3.0))
    assert [entry.attributes for entry in source_at(str(place)).listing().entries] == [expected] * 3


def test_a_later_version_of_a_file_is_read_anew(tmp_path: Path) -> None:
    for suffix, make in {
        ".parquet": containers.table,
        ".zip": containers.edm_zip,
        ".tar": containers.webdataset,
    }.items():
        path = make(tmp_path / f"x{suffix}")
        before = opened(path).ids
        with pytest.MonkeyPatch.context() as patch:
            fewer = tuple(
                containers.Sample(s.name, s.category, s.captions, s.values[::-1].copy())
                for s in SAMPLES
            )
            patch.setattr(containers, "SAMPLES", fewer)
            path.unlink()
            make(path)
        after = opened(path).ids
        assert not set(before) & set(after), suffix
        assert after == [array_id(s.values[::-1]) for s in SAMPLES]


def test_processes_may_read_one_deflated_zip_at_the_same_time(tmp_path: Path) -> None:
    files = {f"{i}.png": encode(noise(64, 64, seed=i)) for i in range(40)}
    entries = (
        source_at(str(containers.zipped(tmp_path / "z.zip", files, zipfile.ZIP_DEFLATED)))
        .listing()
        .entries
    )
    entries[0].image.read()  # this process has the archive open when the others begin
    with multiprocessing.get_context("fork").Pool(4) as pool:
        read = pool.map(_bytes, entries * 5, chunksize=1)
    assert read == [files[entry.name] for entry in entries] * 5


def _bytes(entry: Entry) -> bytes:
    return entry.image.read()
