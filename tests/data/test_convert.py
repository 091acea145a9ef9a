"""What is converted is the same data: byte for byte each time, whole or not there at all, and what
was left out is told.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sfumato.data import (
    DataConfig,
    Dataset,
    Digits,
    Entry,
    Folder,
    Listing,
    Npz,
    Parquet,
    Source,
    WebDataset,
    index,
    source_at,
)
from sfumato.data import convert as module
from sfumato.data.convert import convert
from sfumato.data.listing import Inline
from sfumato.errors import ConfigError, DataError
from tests.helpers import containers
from tests.helpers.containers import SIDE, put
from tests.helpers.image_bytes import encode, noise, smooth

KINDS = {"parquet": ".parquet", "webdataset": ".tar"}


def opened(source: Source, **options) -> Dataset:
    return index(DataConfig(source=source, resolution=SIDE, cache="off", **options))


def rich_folder(root: Path) -> Folder:
    """Images with everything that may lie beside them, in all encodings."""
    files = containers.images() | containers.sidecars("json")
    files |= {
        "cat/photo.jpg": encode(smooth(40, 30), "JPEG", quality=90),
        "cat/photo.json": json.dumps({"caption": "a photo", "holdout": "photos"}).encode(),
        "cat/photo.doodle.png": encode(noise(SIDE, SIDE, seed=40)),
        "cat/photo.mask.png": encode(noise(SIDE, SIDE, seed=41)),
        "cat/photo.png": encode(noise(SIDE, SIDE, seed=42)),  # two images of one stem
        "dog/web.webp": encode(noise(SIDE, SIDE, seed=43), "WEBP", lossless=True),
        "dog/bits.png": encode(noise(SIDE, SIDE, seed=44)[..., 0] > 99),
        "dog/con.v2.png": encode(noise(SIDE, SIDE, seed=45)),
        "dog/" + "ü" * 120 + ".png": encode(noise(SIDE, SIDE, seed=46)),
        "dog/.png.png": encode(noise(SIDE, SIDE, seed=47)),
    }
    points = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    np.save(root / "points.npy", points)
    files["cat/photo.points.npy"] = (root / "points.npy").read_bytes()
    return Folder(str(put(root / "rich", files)))


def arrays(root: Path, values: np.ndarray) -> Npz:
    np.savez(root / "a.npz", images=values, labels=np.arange(len(values)) % 2)
    return Npz(str(root / "a.npz"))


SOURCES: dict[str, Callable[[Path], Source]] = {
    "folder": rich_folder,
    "tar": lambda root: source_at(str(containers.webdataset(root / "x.tar"))),
    "parquet": lambda root: source_at(str(containers.table(root / "x.parquet"))),
    "zip": lambda root: source_at(str(containers.edm_zip(root / "x.zip"))),
    "npz": lambda root: source_at(str(containers.npz(root / "x.npz"))),
    "npz, gray": lambda root: arrays(
        root, np.stack([noise(SIDE, SIDE, seed=i)[..., 0] for i in range(5)])
    ),
    "npz, gray with a band": lambda root: arrays(
        root, np.stack([noise(SIDE, SIDE, seed=i)[..., :1] for i in range(5)])
    ),
    "save_to_disk": lambda root: source_at(str(containers.saved(root / "saved"))),
}


def told(dataset: Dataset) -> list[tuple]:
    """What training learns from, but for names."""
    categories = [
        dataset.categories[label] if label >= 0 else None for label in dataset.labels.tolist()
    ]
    facts = [
        (entry.captions, entry.holdout, *map(read, (entry.doodle, entry.mask, entry.points)))
        for entry in dataset.entries
    ]
    return list(zip(dataset.ids, categories, facts, strict=True))


def read(blob) -> bytes | None:
    return None if blob is None else blob.read()


def pixels(dataset: Dataset) -> np.ndarray:
    return dataset.images(np.arange(len(dataset.entries)))[0].numpy()


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_converted_reads_the_same(kind: str, name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path)
    (path,), rejects = convert(source.listing(), tmp_path / f"out{KINDS[kind]}")
    before, after = opened(source), opened(source_at(str(path)))
    assert told(after) == told(before)
    assert (pixels(after) == pixels(before)).all()
    assert rejects == []
    assert after.rejects == []
    assert after.notes == before.notes or name == "folder"  # notes name files
    assert {n: len(files) for n, files in after.notes.items()} == {
        n: len(files) for n, files in before.notes.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_deep_pixels_are_kept(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (4, SIDE, SIDE, 5), dtype=np.uint16)
    source = arrays(tmp_path, values)
    (path,), _ = convert(source.listing(), tmp_path / f"out{KINDS[kind]}")
    after = opened(source_at(str(path)), channels=5, bits=16)
    assert (pixels(after).transpose(0, 2, 3, 1) == values).all()
    assert after.ids == opened(source, channels=5, bits=16).ids


def test_a_table_keeps_names_and_a_converted_copy_converts_to_itself(tmp_path: Path) -> None:
    source = rich_folder(tmp_path)
    (first,), _ = convert(source.listing(), tmp_path / "a.parquet")
    assert [entry.name for entry in Parquet(str(first)).listing().entries] == [
        entry.name for entry in source.listing().entries
    ]
    (second,), _ = convert(Parquet(str(first)).listing(), tmp_path / "b.parquet")
    assert second.read_bytes() == first.read_bytes()


def test_a_shard_is_a_plain_tar_that_says_nothing_of_who_wrote_it(tmp_path: Path) -> None:
    (path,), _ = convert(rich_folder(tmp_path).listing(), tmp_path / "a.tar")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode, m.isreg()) for m in members} == {
        (0, 0, "", "", 0, 0o644, True)
    }
    stems = [
        m.name.rpartition("/")[0] + "/" + m.name.rpartition("/")[2].partition(".")[0]
        for m in members
    ]
    runs = [stem for number, stem in enumerate(stems) if number == 0 or stems[number - 1] != stem]
    assert len(runs) == len(set(runs))


def test_a_table_is_what_hugging_face_expects(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (path,), _ = convert(rich_folder(tmp_path).listing(), tmp_path / "a.parquet")
    found = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert type(found.features["image"]).__name__ == "Image"
    rows = {str(row["image"].getpixel((0, 0))): row for row in found if row["image"].mode == "RGB"}
    for sample in containers.SAMPLES[1:4]:
        row = rows[str(tuple(sample.values[0, 0].tolist()))]
        assert (np.asarray(row["image"]) == sample.values).all()
        assert tuple(row["captions"] or ()) == sample.captions


PROGRAM = """
import sys
from pathlib import Path
from sfumato.data import Folder
from sfumato.data.convert import convert
convert(Folder(sys.argv[1]).listing(), Path(sys.argv[2]))
"""


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    source = rich_folder(tmp_path)
    for kind, suffix in KINDS.items():
        (here,), _ = convert(source.listing(), tmp_path / f"here{suffix}")
        there = tmp_path / f"there{suffix}"
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "7",
            "OMP_NUM_THREADS": "2",
            "TZ": "Asia/Tokyo",
            "LC_ALL": "C",
        }
        subprocess.run(
            [sys.executable, "-c", PROGRAM, source.path, str(there)], check=True, env=environment
        )
        assert there.read_bytes() == here.read_bytes(), kind


def shards(listing: Listing, root: Path, kind: str) -> dict[str, str]:
    paths, _ = convert(listing, root, to=kind, shard_mib=1)
    assert paths == sorted(root.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def large(count: int = 7) -> Listing:
    """Images of 0.3 MiB each, three to a shard."""
    return Listing(
        entries=[
            Entry(name=f"{i}.png", image=Inline(encode(noise(320, 320, seed=i))))
            for i in range(count)
        ]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gets_shards_of_about_the_size_asked_for_the_same_each_time(
    kind: str, tmp_path: Path
) -> None:
    first = shards(large(), tmp_path / "one", kind)
    assert shards(large(), tmp_path / "two", kind) == first
    assert len(first) == 3
    sizes = [path.stat().st_size for path in sorted((tmp_path / "one").iterdir())]
    assert max(sizes) < 1.05 * 2**20
    source = (Parquet if kind == "parquet" else WebDataset)(str(tmp_path / "one"))
    assert [entry.image.read() for entry in source.listing().entries] == [
        entry.image.read() for entry in large().entries
    ]


def test_row_groups_are_small_enough_to_read_one_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(Digits().listing(), tmp_path / "digits.parquet")
    metadata = pq.read_metadata(tmp_path / "digits.parquet")
    assert max(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)) == 100
    monkeypatch.setattr(module, "ROW_BYTES", 600_000)
    convert(large(), tmp_path / "large.parquet")
    metadata = pq.read_metadata(tmp_path / "large.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [2, 2, 2, 1]


def test_nothing_that_exists_is_written_over(tmp_path: Path) -> None:
    listing = large(1)
    for place in ("a.parquet", "a.tar", "file"):
        (tmp_path / place).write_bytes(b"precious")
        with pytest.raises(DataError, match="exists already"):
            convert(listing, tmp_path / place, to=None if "." in place else "parquet")
        assert (tmp_path / place).read_bytes() == b"precious"
    put(tmp_path / "full", {"data-000000.tar": b"precious"})
    with pytest.raises(DataError, match="exists already"):
        convert(listing, tmp_path / "full", to="webdataset")
    assert (tmp_path / "full" / "data-000000.tar").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("place", "to"),
    [
        ("a.zip", None),
        ("folder", None),
        ("folder", "zip"),
        ("a.tar", "parquet"),
        ("a.parquet", "webdataset"),
    ],
)
def test_a_destination_of_no_such_kind_is_refused(
    place: str, to: str | None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is not a supported container"):
        convert(large(1), tmp_path / place, to=to)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be written") as caught:
        convert(large(1), tmp_path / "file" / "a.tar")
    assert "check the disk" in caught.value.hint


class Interrupting:
    """An image at which a person presses Ctrl-C, or the disk fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def read(self) -> bytes:
        raise self.error


@pytest.mark.parametrize("place", ["a.tar", "a.parquet", "webdataset", "parquet"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_an_interrupted_conversion_leaves_nothing(
    error: BaseException, place: str, tmp_path: Path
) -> None:
    listing = large()
    listing.entries[5] = Entry(name="bad.png", image=Interrupting(error))
    dest = tmp_path / place
    with pytest.raises(type(error)):
        convert(listing, dest, to=None if dest.suffix else place, shard_mib=1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert convert(large(), dest, to=None if dest.suffix else place, shard_mib=1)[0]


KILLED = """
import os, sys
from pathlib import Path
from sfumato.data import Folder
from sfumato.data.convert import convert
convert(Folder(sys.argv[1]).listing(), Path(sys.argv[2]), to="webdataset", shard_mib=1,
        on_progress=lambda done, total: done == 6 and os._exit(9))
"""


def test_a_killed_conversion_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    images = put(tmp_path / "in", {entry.name: entry.image.read() for entry in large().entries})
    result = subprocess.run([sys.executable, "-c", KILLED, str(images), str(tmp_path / "out")])
    assert result.returncode == 9
    assert any((tmp_path / "out").iterdir())
    with pytest.raises(DataError, match="holds no"):
        source_at(str(tmp_path / "out")).listing()
    with pytest.raises(DataError, match="exists already"):
        convert(large(), tmp_path / "out", to="webdataset")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_listed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 100_000)
    header = b"\x93NUMPY\x01\x00" + (60).to_bytes(2, "little")
    lying = header + b"{'descr': '|u1', 'fortran_order': False, 'shape': (9**15,)}".ljust(60)
    listing = Listing(
        entries=[
            *(
                Entry(
                    name=f"good{i}.png",
                    image=Inline(encode(noise(SIDE, SIDE, seed=i))),
                    category="a",
                )
                for i in range(3)
            ),
            Entry(name="gone.png", image=Interrupting(FileNotFoundError("it is gone"))),
            Entry(name="large.png", image=Inline(bytes(200_000))),
            Entry(name="lying.npy", image=Inline(lying)),
            Entry(name="vast.npy", image=Inline(lying.replace(b"(9**15,)", b"(999999999999999,)"))),
        ]
    )
    (path,), rejects = convert(listing, tmp_path / f"a{KINDS[kind]}")
    found = {reject.name: reject.reason for reject in rejects}
    assert set(found) == {"gone.png", "large.png", "lying.npy", "vast.npy"}
    assert found["gone.png"] == "it is gone"
    assert opened(source_at(str(path))).ids == opened(source_at(str(path))).ids
    assert len(source_at(str(path)).listing().entries) == 3


def test_when_nothing_can_be_read_nothing_is_written(tmp_path: Path) -> None:
    listing = Listing(entries=[Entry(name="gone.png", image=Interrupting(OSError("gone")))])
    for place in ("a.tar", "a.parquet"):
        with pytest.raises(DataError, match="nothing was written"):
            convert(listing, tmp_path / place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "a/b.png",
        "CON.png",
        "nul/x.png",
        "..",
        "/",
        ".",
        "a" * 400 + ".png",
        "猫" * 150,
        "__x__/__y__.png",
        "x\ny",
    ],
)
def test_names_of_any_kind_survive_a_tar(name: str, tmp_path: Path) -> None:
    entries = [
        Entry(name=n, image=Inline(encode(noise(SIDE, SIDE, seed=i))))
        for i, n in enumerate((name, name + "2", "other.png"))
    ]
    entries.append(replace(entries[0], image=entries[2].image, captions=("the same name",)))
    (path,), _ = convert(Listing(entries=entries), tmp_path / "a.tar")
    found = WebDataset(str(path)).listing()
    assert found.rejects == []
    assert [entry.image.read() for entry in found.entries] == [
        entry.image.read() for entry in entries
    ]
    assert found.entries[3].captions == ("the same name",)


def test_progress_is_told_for_every_image(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(
        large(3), tmp_path / "a.tar", on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
