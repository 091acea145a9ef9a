"""Shards that processes list one by one give the listing that they have together."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from sfumato.data import Parquet, WebDataset, index, listed
from sfumato.data import listing as listing_module
from sfumato.data.data_config import DataConfig
from sfumato.data.entry_table import EntryTable, encode, encode_part, joined
from sfumato.data.listing import Entry, Inline, Listing, Slice
from sfumato.errors import DataError


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# what a shard may hold besides images and captions; the last ones bring shards together
ODD = {
    "a class": ("{}.cls", b"7"),
    "a record": ("{}.json", b'{"caption": "two", "label": "x", "attributes": {"age": 3}}'),
    "a broken record": ("{}.json", b"{"),
    "a mask": ("{}.mask.png", png(1)),
    "another image": ("{}.seg.png", png(2)),
    "another ending": ("{}.TXT", b"loud"),
    "an orphan": ("orphan-{}.txt", b"of nobody"),
    "something else": ("{}.zip", b"PK"),
    "a hidden file": (".{}.txt", b"x"),
    "a system's file": ("Thumbs.db", b"x"),
    "an image again": ("{}.png", png(3)),
    "bytes that are no UTF-8": ("{}.txt", "Größe".encode("latin-1")),
    "a folder": ("cats/{}.png", png(4)),
    "a table": ("metadata.csv", b"file_name,caption\n00000.png,said by a table\n"),
    "a small table": ("list.tsv", b"file_name\tcaption\n00000.png\tsaid by a table\n"),
    "kohya's metadata": ("meta_cap.json", b'{"00000.png": {"caption": "said by kohya"}}'),
    "labels": ("dataset.json", b'{"labels": [["00000.png", 2]]}'),
}
NAMES = {
    "numbered": "{:03d}.tar",
    "splits": "{}-{:03d}.tar",
    "below": "part{:02d}/0.tar",
}


def write(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def shards(folder: Path, seed: int) -> set[str]:
    """Write shards with some oddities at random; return which."""
    rng = random.Random(seed)
    chosen = set(rng.sample(sorted(ODD), rng.choice((0, 0, 1, 2, 4))))
    count, naming = rng.randint(2, 4), rng.choice(sorted(NAMES))
    for shard in range(count):
        members = []
        for number in range(rng.randint(0 if shard else 1, 6)):
            key = f"{number:05d}"
            members.append((f"{key}.png", png(1000 * seed + 10 * shard + number)))
            if rng.random() < 0.7:
                members.append((f"{key}.txt", f"caption {number} ü".encode()))
        for name in sorted(chosen):
            if rng.random() < 0.6:
                form, data = ODD[name]
                members.insert(rng.randint(0, len(members)), (form.format("00000"), data))
        split = "test" if shard == 1 else "train"
        form = NAMES[naming]
        name = form.format(split, shard) if naming == "splits" else form.format(shard)
        write(folder / name, members)
    return chosen


def plain(listing: Listing) -> dict[str, object]:
    return {
        "entries": list(listing.entries),
        "rejects": sorted((r.name, r.reason, r.part) for r in listing.rejects),
        "sidecars": listing.sidecars,
        "unit": listing.unit,
        "total": listing.total,
        "remarks": listing.remarks,
    }


def result(source: WebDataset | Parquet) -> object:
    try:
        return plain(source.listing())
    except DataError as error:
        return str(error)


@pytest.fixture
def by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.data.parallel.MIN_FORKED", 1)


@pytest.mark.parametrize(
    "seeds",
    [range(12), *(pytest.param(range(n, n + 12), marks=pytest.mark.slow) for n in (12, 24))],
)
def test_tars_are_listed_as_they_are_together(
    seeds: range, tmp_path: Path, by_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts, columns = 0, 0
    for seed in seeds:
        shards(tmp_path / str(seed), seed)
        source = WebDataset(str(tmp_path / str(seed)))
        found = result(source)
        if isinstance(found, dict):
            in_parts += isinstance(source.listing().entries, EntryTable)
            columns += 1
        with monkeypatch.context() as patch:
            patch.setattr("sfumato.data.sources.webdataset.in_parts", lambda *_: None)
            assert result(source) == found, seed
    assert 3 <= in_parts < columns  # both ways were taken


@pytest.mark.parametrize(
    ("oddity", "apart"),
    [
        *((name, True) for name in list(ODD)[:11]),
        *((name, False) for name in list(ODD)[11:]),
    ],
)
def test_what_may_concern_other_shards_is_listed_with_them(
    oddity: str, apart: bool, tmp_path: Path, by_processes: None
) -> None:
    form, data = ODD[oddity]
    for shard in range(2):
        members = [(f"{number:05d}.png", png(10 * shard + number)) for number in range(3)]
        write(tmp_path / f"{shard}.tar", [*members, (form.format("00001"), data)])
    listing = WebDataset(str(tmp_path)).listing()
    assert isinstance(listing.entries, EntryTable) == apart


def table(path: Path, count: int, *, seed: int, **columns: list[object]) -> None:
    images = [{"bytes": png(seed + n), "path": f"{n // 2}.png"} for n in range(count)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    data = {"image": pa.array(images, struct), **columns}
    parquet.write_table(pa.table(data), path, row_group_size=3)


def test_tables_are_listed_as_they_are_together(
    tmp_path: Path, by_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path / "train-0.parquet", 7, seed=0, caption=[f"c{n}" for n in range(7)])
    table(tmp_path / "train-1.parquet", 4, seed=50, label=[1, 2, None, 1], extra=[1, 2, 3, 4])
    table(tmp_path / "train-2.parquet", 0, seed=90, caption=[])
    too_long = ["x" * (1 << 21), "short"]
    table(tmp_path / "test-0.parquet", 2, seed=70, caption=too_long)
    (tmp_path / "notes.md").write_text("x")
    source = Parquet(str(tmp_path))
    found = source.listing()
    assert isinstance(found.entries, EntryTable)
    assert len(found.entries) == 12
    assert len(found.rejects) == 2
    assert {entry.holdout for entry in found.entries} == {None, "test"}
    monkeypatch.setattr("sfumato.data.sources.parquet.in_parts", lambda *_: None)
    together = source.listing()
    assert isinstance(together.entries, list)
    assert plain(found) == plain(together)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_damaged_shard_is_the_same_error(
    kind: str, tmp_path: Path, by_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = WebDataset(str(tmp_path)) if kind == "tar" else Parquet(str(tmp_path))
    for number in range(3):
        path = tmp_path / f"{number}.{kind}"
        if kind == "tar":
            write(path, [("0.png", png(number))])
        else:
            table(path, 3, seed=number)
    path.write_bytes(b"nothing of the kind" * 40)
    found = result(source)
    assert isinstance(found, str)
    assert str(path) in found
    place = "webdataset" if kind == "tar" else "parquet"
    monkeypatch.setattr(f"sfumato.data.sources.{place}.in_parts", lambda *_: None)
    assert result(source) == found


def test_a_set_that_was_listed_in_parts_is_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in range(3):
        members = [(f"{number:05d}.png", png(100 * shard + number)) for number in range(20)]
        texts = [
            (f"{number:05d}.json", json.dumps({"label": number % 3}).encode())
            for number in range(20)
        ]
        write(tmp_path / "set" / f"{shard}.tar", [*members, *texts])
    config = DataConfig(source=WebDataset(str(tmp_path / "set")), resolution=4)
    found = {}
    for name, forked in (("together", 10**9), ("parts", 1)):
        monkeypatch.setattr("sfumato.data.parallel.MIN_FORKED", forked)
        monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / name))
        data = index(config)
        found[name] = (data.fingerprint, data.categories, list(data.entries), data.summary())
    assert found["parts"] == found["together"]


def test_parts_are_joined_as_one_encoding_gives_them() -> None:
    rng = random.Random(0)
    entries = [
        Entry(
            name=f"{number}",
            image=Slice(f"/{number % 3}.tar", number, 9) if number % 5 else Inline(b"x"),
            category=rng.choice(["a", "b", None]),
            captions=("one",) * rng.randint(0, 3),
            mask=Inline(b"m") if number > 70 else None,
            group=rng.choice([None, f"{number}"]),
        )
        for number in range(100)
    ]
    whole = encode(entries)
    for cuts in ([0, 100], [0, 1, 50, 100], [0, 0, 70, 100]):
        parts = [encode_part(entries[a:b]) for a, b in pairwise(cuts)]
        table = joined(parts)
        assert list(table) == entries
        assert {name: column.to_pylist() for name, column in table.columns.items()} == {
            name: column.to_pylist() for name, column in whole.items()
        }
        assert {name: column.type for name, column in table.columns.items()} == {
            name: column.type for name, column in whole.items()
        }


def test_tars_whose_names_are_no_text_are_listed_together(
    tmp_path: Path, by_processes: None
) -> None:
    for number in range(2):
        path = tmp_path / f"{number}.tar"
        write(path, [("0.png", png(number))])
    path.rename(os.fsdecode(os.fsencode(tmp_path) + "/caf\xe9.tar".encode("latin-1")))
    entries = WebDataset(str(tmp_path)).listing().entries
    assert isinstance(entries, list)
    assert len(entries) == 2


def test_a_listing_with_an_error_that_may_pass_is_not_kept(
    tmp_path: Path, by_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfumato.data.index_store.SLOW_S", 0.0)
    monkeypatch.setattr("sfumato.data.source_state.RECENT_NS", 0)
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    for shard in range(2):
        write(tmp_path / "set" / f"{shard}.tar", [("0.png", png(shard)), ("0.txt", b"a caption")])
    time.sleep(0.05)
    source, read = WebDataset(str(tmp_path / "set")), listing_module._read

    def failing(path: str, offset: int, most: int) -> bytes:
        data = read(path, offset, most)
        if data == b"a caption":
            raise OSError(errno.EIO, "input/output error")
        return data

    with monkeypatch.context() as patch:
        patch.setattr(listing_module, "_read", failing)
        assert not any(entry.captions for entry in listed(source).entries)
    assert all(entry.captions == ("a caption",) for entry in listed(source).entries)
