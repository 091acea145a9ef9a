"""A second start reads no image, and finds what the first one found; what has changed is read again,
and nothing else.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from sfumato.data import (
    Blob,
    BucketConfig,
    DataConfig,
    Dataset,
    Entry,
    File,
    Folder,
    index,
    index_store,
    listed,
    listing,
    prepare_part,
    source_at,
    source_state,
    stored_index,
    value_range,
)
from sfumato.data.array_cache import RowReader
from sfumato.data.choice import choose_evenly
from sfumato.data.entry_table import EntryTable, NotStorable, encode
from sfumato.data.frames import Brightest, Frame
from sfumato.data.index_store import KnownKeys
from sfumato.data.listing import Inline, Slice, ZipMember, containers
from sfumato.data.sources.huggingface import HuggingFace, Item
from sfumato.data.sources.npz import ArrayImage
from sfumato.data.sources.parquet import Cell
from sfumato.errors import DataError
from tests.helpers.image_bytes import encode as encoded
from tests.helpers.image_bytes import noise

COUNT = 30


@pytest.fixture(autouse=True)
def keeps_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep what is made fast, of files that were changed just now."""
    monkeypatch.setattr(index_store, "SLOW_S", -1.0)
    monkeypatch.setattr(source_state, "RECENT_NS", -(10**18))
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read from here on."""
    found: list[str] = []
    real = listing.read

    def read(path: str, offset: int, most: int) -> bytes:
        found.append(Path(path).name)
        return real(path, offset, most)

    monkeypatch.setattr(listing, "read", read)
    return found


def folder(place: Path) -> Path:
    """Images of two categories and sizes, with captions, attributes, doodles, masks, copies and one
    that is cut.
    """
    for number in range(COUNT):
        path = place / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(*((16, 16) if number % 3 else (24, 12)), seed=number)))
        path.with_suffix(".txt").write_text(f"image {number}, größer")
        if number % 5 == 0:
            path.with_suffix(".json").write_text(f'{{"attributes": {{"age": {number}.5}}}}')
        if number % 7 == 0:
            Image.new("L", (16, 16), 200).save(path.with_name(f"{number:03d}.doodle.png"))
            Image.new("L", (16, 16), 255).save(path.with_name(f"{number:03d}.mask.png"))
    shutil.copy(place / "a" / "000.png", place / "b" / "copy.png")
    (place / "a" / "cut.png").write_bytes((place / "a" / "002.png").read_bytes()[:60])
    np.save(place / "a" / "float.npy", np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16))
    return place


def tar(place: Path) -> Path:
    place.mkdir()
    files = folder(place.parent / "packed")
    for shard in "ab":
        with tarfile.open(place / f"{shard}.tar", "w") as archive:
            archive.add(files / shard, shard)
    return place


def zipped(kind: int) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        files, target = folder(place.parent / "packed"), place.with_suffix(".zip")
        with zipfile.ZipFile(target, "w", kind) as archive:
            for path in sorted(files.rglob("*.*")):
                archive.write(path, path.relative_to(files))
        return target

    return make


def parquet(place: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": encoded(noise(16, 16, seed=i)), "path": f"{i}.png"}, "text": f"row {i}", "label": i % 3}
        for i in range(COUNT)
    ]  # fmt: skip
    place.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), place / "all.parquet", row_group_size=8)
    return place


def npz(place: Path) -> Path:
    images = np.stack([noise(16, 16, seed=i) for i in range(COUNT)])
    np.savez(place.with_suffix(".npz"), images=images, labels=np.arange(COUNT) % 3)
    return place.with_suffix(".npz")


def animations(place: Path) -> Path:
    place.mkdir()
    for number in range(6):
        frames = [Image.fromarray(noise(16, 16, seed=10 * number + i)) for i in range(3)]
        frames[0].save(place / f"{number}.tiff", save_all=True, append_images=frames[1:])
    return place


def kohya(place: Path) -> Path:
    for repeats, words in ((2, "sks dog"), (1, "dog")):
        inside = place / f"{repeats}_{words}"
        inside.mkdir(parents=True)
        for number in range(6):
            image = encoded(noise(16, 16, seed=10 * repeats + number))
            (inside / f"{number}.png").write_bytes(image)
    return place


SOURCES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "folder": (folder, {"channels": 1, "buckets": BucketConfig(count=3, step=4)}),
    "masks": (folder, {"loss_mask": "files", "holdout": 0.2}),
    "tar": (tar, {}),
    "zip": (zipped(zipfile.ZIP_DEFLATED), {"half": "first"}),
    "stored zip": (zipped(zipfile.ZIP_STORED), {"near_duplicates": "off"}),
    "parquet": (parquet, {"category": "any", "caption": "all"}),
    "npz": (npz, {"bits": 16}),
    "all frames": (animations, {"frames": "all"}),
    "brightest": (animations, {"frames": "max"}),
    "repeats": (kohya, {}),
}


def configured(place: Path, **options: Any) -> DataConfig:
    return DataConfig(source=source_at(str(place)), resolution=16, **options)


def opened(config: DataConfig) -> Dataset:
    return index(config, annotations=("text", "doodle", "attributes"))


def contents(dataset: Dataset) -> dict[str, Any]:
    """All that a dataset says, as plain data."""
    common = dataset.with_common_shape(np.arange(len(dataset.ids)))
    context = dataset.context(common)
    return {
        "entries": list(dataset.entries),
        "single": [dataset.entries[i] for i in range(-1, len(dataset.entries))],
        "slice": list(dataset.entries[2:9:3]),
        "ids": list(dataset.ids),
        "id": (dataset.ids[1], list(dataset.ids[1:3])),
        "labels": dataset.labels.tolist(),
        "parts": [part.tolist() for part in (dataset.training, dataset.whole, dataset.epoch)],
        "held out": (dataset.holdout.tolist(), {n: p.tolist() for n, p in dataset.named_holdouts.items()}),
        "groups": dataset.clusters.tolist(),
        "pixels": dataset.images(common).pixels.numpy().tobytes(),
        "context": {n: v if isinstance(v, list) else v.numpy().tobytes() for n, v in context.items()},
        "thumbnails": dataset.read_thumbnails(np.arange(len(dataset.ids))).tobytes(),
        "summary": dataset.summary(),
        "scale": (dataset.scale, dataset.alpha, dataset.image_shape, dataset.categories),
        "lines": (dataset.ledger.lines(), list(dataset.remarks), list(dataset.rejects)),
        "fingerprint": (dataset.fingerprint, dataset.whole_fingerprint),
    }  # fmt: skip


def assert_equal(found: Dataset, expected: Dataset) -> None:
    ours, theirs = contents(found), contents(expected)
    for name, value in theirs.items():
        assert ours[name] == value, name


@pytest.mark.parametrize("name", SOURCES)
def test_a_second_start_reads_no_image_and_finds_the_same(
    name: str, tmp_path: Path, reads: list[str]
) -> None:
    make, options = SOURCES[name]
    config = configured(make(tmp_path / "set"), **options)
    first = opened(config)
    assert not first.is_kept
    reads.clear()
    second = opened(config)
    assert second.is_kept
    assert reads == []
    assert_equal(second, first)
    again = pickle.loads(pickle.dumps(second))  # noqa: S301 as worker processes get it
    assert list(again.entries) == list(first.entries)
    # what is computed when it is asked for is what was kept
    assert replace(second, is_kept=False).fingerprint == first.fingerprint
    assert replace(second, is_kept=False).training.tolist() == first.training.tolist()


def edit(place: Path) -> str:
    """Change an image in place, of the same size and with the same time of change."""
    path = place / "a" / "004.png"
    before = path.stat()
    data = bytearray(path.read_bytes())
    other = Image.fromarray(noise(16, 16, seed=99))
    buffer = io.BytesIO()
    other.save(buffer, "PNG")
    data[:] = buffer.getvalue()[: len(data)].ljust(len(data), b"\0")
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    return path.name


def add(place: Path) -> str:
    (place / "b" / "new.png").write_bytes(encoded(noise(16, 16, seed=77)))
    return "new.png"


def remove(place: Path) -> str:
    (place / "b" / "003.png").unlink()
    return ""


def rename(place: Path) -> str:
    (place / "b" / "005.png").rename(place / "b" / "renamed.png")
    return "renamed.png"  # its time of change is new, too


def caption(place: Path) -> str:
    (place / "b" / "005.txt").write_text("another caption")
    return ""


@pytest.mark.parametrize("change", [edit, add, remove, rename, caption])
def test_what_has_changed_is_read_again_and_no_other_image(
    change: Callable[[Path], str], tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(value_range, "HEADERS_READ", 0)  # a sample, read in any case
    config = configured(folder(tmp_path / "set"))
    before = opened(config)
    changed = change(tmp_path / "set")
    reads.clear()
    after = opened(config)
    assert not after.is_kept
    images = {name for name in reads if name.endswith(".png") and "doodle" not in name}
    # one that was of no use is looked at again
    assert images == {"cut.png", changed} - {""}
    assert after.fingerprint != before.fingerprint
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "another"))
    assert_equal(after, opened(config))


def test_other_settings_and_excluded_images_have_an_index_of_their_own(tmp_path: Path) -> None:
    place, names = folder(tmp_path / "set"), tmp_path / "without.txt"
    names.write_text("a/000.png\n")
    config = configured(place, exclude=str(names))
    assert len(opened(config).ids) == COUNT + 1
    assert opened(config).is_kept
    names.write_text("a/000.png\na/002.png\n")
    assert len(opened(config).ids) == COUNT
    assert not opened(replace(config, holdout=0.3)).is_kept
    assert not index(config).is_kept  # without what a model reads besides
    assert opened(replace(config, workers=3)).is_kept


def test_always_reads_what_the_file_system_calls_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system whose clock stands still."""
    monkeypatch.setattr(source_state, "_of", lambda state: (state.st_size, 0, 0, 0))
    place = folder(tmp_path / "set")
    config = configured(place)
    before = opened(config)
    edit(place)
    assert opened(config).fingerprint == before.fingerprint
    changed = opened(replace(config, verify="always"))
    assert changed.fingerprint != before.fingerprint
    assert not changed.is_kept
    assert opened(config).fingerprint == changed.fingerprint  # which is kept since


def test_without_a_cache_nothing_is_kept(tmp_path: Path) -> None:
    config = configured(folder(tmp_path / "set"), cache="off")
    assert not opened(config).is_kept
    assert not opened(config).is_kept
    assert not (tmp_path / "cache").exists()


def test_files_changed_just_before_they_were_read_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_state, "RECENT_NS", 2 * 10**9)
    config = configured(folder(tmp_path / "set"))
    opened(config)
    assert not opened(config).is_kept


def test_files_changed_while_they_were_read_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder(tmp_path / "set")
    config = configured(place)
    index(config, on_progress=lambda done, total: add(place) and None)
    assert "b/new.png" in [entry.name for entry in opened(config).entries]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        ("indexes/*/*/table.arrow", flip),
        ("indexes/*/*/table.arrow", lambda path: path.write_bytes(path.read_bytes()[:-9])),
        ("indexes/*/*/table.arrow", Path.unlink),
        ("indexes/*/*/check", lambda path: path.write_text("")),
        ("listings/*/*/table.arrow", flip),
        ("pixels/*/segment-*/pixels*", Path.unlink),
        ("pixels/*/segment-*/thumbnail*", lambda path: path.write_bytes(b"")),
    ],
)
def test_what_is_damaged_is_made_again(
    what: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    config = configured(folder(tmp_path / "set"))
    first = opened(config)
    listed(config.source)
    expected = contents(first)
    damage(next((tmp_path / "cache").glob(what)))
    again = opened(config)
    assert again.is_kept == what.startswith("listings")
    listed(config.source)
    assert contents(again) == expected
    assert opened(config).is_kept


def test_a_damaged_row_is_decoded_again_and_the_index_made_anew(tmp_path: Path) -> None:
    config = configured(folder(tmp_path / "set"), near_duplicates="off")
    expected = contents(opened(config))
    flip(next((tmp_path / "cache").glob("pixels/*/segment-*/pixels*")))
    kept = opened(config)
    assert kept.is_kept
    assert kept.images(np.arange(5)).pixels.shape[0] == 5
    assert len(kept.images(np.arange(len(kept.ids))).pixels) == len(kept.ids)
    again = opened(config)
    assert not again.is_kept
    assert contents(again) == expected


def test_few_are_kept(tmp_path: Path) -> None:
    place = folder(tmp_path / "set")
    config = configured(place)
    for number in range(4):
        (place / "b" / "003.txt").write_text(f"caption {number}")
        opened(config)
    assert len(list((tmp_path / "cache").glob("indexes/*/*"))) == index_store.KEPT


BLOB_KINDS: list[Blob] = [
    File("a.png"),
    Slice("a.tar", 2**40, 17),
    ZipMember("a.zip", "inside/größer.png"),
    Inline(b"\x00\xff"),
    ArrayImage("a.npy", 128, (8, 8, 3), "|u1"),
    Cell("a.parquet", 3, 17, "image"),
    Item("owner/name", "train", 5, "image"),
    Frame(Slice("a.tar", 1, 2), 3),
    Brightest(File("a.tiff")),
]


def test_every_kind_of_blob_survives(tmp_path: Path) -> None:
    import pyarrow as pa

    entries = [
        Entry(
            name=f"{number}",
            image=blob,
            doodle=BLOB_KINDS[-number] if number % 2 else None,
            category="cat" if number % 3 else None,
            captions=("one", "two") if number % 2 else (),
            attributes=(("age", 0.1), ("wise", 1.0)) if number % 2 else (),
            holdout="test" if number == 4 else None,
            group="file" if number > 6 else None,
            repeats=1 + number,
        )
        for number, blob in enumerate(BLOB_KINDS)
    ]
    table = EntryTable(pa.table(encode(entries)))
    assert list(table) == entries
    assert [table[number] for number in range(len(entries))] == entries
    for name in ("name", "category", "captions", "attributes", "repeats", "image", "doodle"):
        assert list(table.values(name)) == [getattr(entry, name) for entry in entries], name
    with pytest.raises(IndexError):
        table[len(entries)]


def test_a_blob_of_another_package_is_not_kept(tmp_path: Path) -> None:
    class Foreign:
        path = "a.png"

    with pytest.raises(NotStorable):
        encode([Entry(name="a", image=Foreign())])  # type: ignore[arg-type]


def test_only_sources_whose_files_say_all_are_kept(tmp_path: Path) -> None:
    place = folder(tmp_path / "set")
    assert source_state.state_of(Folder(str(place))) is not None
    assert source_state.state_of(source_at("digits")) is None
    assert source_state.state_of(Folder("memory://images")) is None
    assert source_state.state_of(Folder(str(tmp_path / "missing"))) is None


def test_a_saved_dataset_is_kept_until_it_is_written_anew(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def save(first: int) -> None:
        images = [
            {"bytes": encoded(noise(16, 16, seed=first + n)), "path": None} for n in range(12)
        ]
        features = datasets.Features({"image": datasets.Image()})
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        datasets.Dataset.from_dict({"image": images}, features=features).save_to_disk(
            str(tmp_path / "set")
        )

    save(0)
    config = configured(tmp_path / "set")
    first = contents(opened(config))
    kept = opened(config)
    assert kept.is_kept
    assert contents(kept) == first
    save(100)
    again = opened(config)
    assert not again.is_kept
    assert not set(again.ids) & set(first["ids"])
    assert source_state.state_of(HuggingFace(path="owner/name")) is None


def test_links_are_followed_once_and_hidden_files_do_not_count(tmp_path: Path) -> None:
    place = folder(tmp_path / "set")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.png").write_bytes(encoded(noise(16, 16, seed=5)))
    (place / "linked").symlink_to(outside)
    (place / "circle").symlink_to(place)
    (place / "gone.png").symlink_to(tmp_path / "nothing")
    states = [source_state.state_of(Folder(str(place)))]
    (place / ".hidden").write_text("changes nothing")
    states.append(source_state.state_of(Folder(str(place))))
    (outside / "x.png").write_bytes(encoded(noise(16, 16, seed=6)))
    states.append(source_state.state_of(Folder(str(place))))
    assert states[0].hash == states[1].hash != states[2].hash  # type: ignore[union-attr]


def test_rows_that_end_too_early_are_noticed(tmp_path: Path) -> None:
    dataset = opened(configured(folder(tmp_path / "set")))
    reader = dataset.read_rows
    assert isinstance(reader, RowReader)
    assert reader.is_whole(reader.lengths)
    file = next((tmp_path / "cache").glob("pixels/*/segment-*/pixels*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert not reader.is_whole(reader.lengths)


def failing(monkeypatch: pytest.MonkeyPatch, wanted: str, number: int) -> None:
    """Let reading of some files fail, as a disk does for a while."""
    real = listing._read

    def read(path: str, offset: int, most: int) -> bytes:
        if path.endswith(wanted):
            raise OSError(number, "no luck")
        return real(path, offset, most)

    monkeypatch.setattr(listing, "_read", read)


@pytest.mark.parametrize("wanted", ["4.png", "4.txt", "7.doodle.png"])
def test_what_a_failing_disk_has_left_out_is_not_kept(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(folder(tmp_path / "set"))
    with monkeypatch.context() as patch:
        failing(patch, wanted, errno.EIO)
        poor = opened(config)
        listed(config.source)
    again = opened(config)
    assert not again.is_kept
    assert contents(again) != contents(poor)
    assert len(list(again.rejects)) == 1  # the cut one


def test_what_lasts_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(folder(tmp_path / "set"))
    with monkeypatch.context() as patch:
        failing(patch, "4.png", errno.EACCES)  # another mode is another state
        opened(config)
        assert opened(config).is_kept


def test_always_lists_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_state, "_of", lambda state: (state.st_size, 0, 0, 0))
    place = folder(tmp_path / "set")
    config = configured(place)
    opened(config)
    kept = listed(config.source)
    assert isinstance(kept.entries, EntryTable)
    text = (place / "b" / "003.txt").read_text()
    (place / "b" / "003.txt").write_text(text.upper())
    changed = index(replace(config, verify="always"), listing=kept)
    assert text.upper() in [caption for e in changed.entries for caption in e.captions]
    plain = listed(config.source, trusts=False)
    assert text.upper() in [caption for e in plain.entries for caption in e.captions]


def test_a_listing_from_before_a_change_is_not_kept_as_the_state_after_it(tmp_path: Path) -> None:
    place = folder(tmp_path / "set")
    config = configured(place)
    before = listed(config.source)
    (place / "b" / "003.txt").write_text("changed meanwhile")
    index(config, annotations=("text",), listing=before)
    after = index(config, annotations=("text",))
    assert not after.is_kept
    assert "changed meanwhile" in [caption for e in after.entries for caption in e.captions]


def test_a_kind_derived_from_a_built_in_one_is_not_kept(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Captioned(Folder):
        """Its captions come from elsewhere."""

        kind: ClassVar[str] = "captioned for a test"

    assert source_state.state_of(Captioned(str(folder(tmp_path / "set")))) is None


def test_a_folder_renamed_and_linked_anew_is_another_state(tmp_path: Path) -> None:
    place = folder(tmp_path / "set")
    (place / "zz").symlink_to(place / "a")
    before = source_state.state_of(Folder(str(place)))
    (place / "a").rename(place / "dogs")
    (place / "zz").unlink()
    (place / "zz").symlink_to(place / "dogs")
    assert source_state.state_of(Folder(str(place))) != before
    (place / "up").symlink_to(tmp_path)
    assert source_state.state_of(Folder(str(place))) is not None


def test_names_that_are_no_text_cost_time_only(tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    folder(place)
    (place / "a" / os.fsdecode(b"\xe9.png")).write_bytes(encoded(noise(16, 16, seed=3)))
    config = configured(place)
    assert len(opened(config).ids) == len(opened(config).ids) == COUNT + 3
    assert not opened(config).is_kept


def test_an_unpacked_array_that_is_gone_is_unpacked_again(tmp_path: Path) -> None:
    images = np.stack([noise(16, 16, seed=i) for i in range(COUNT)])
    np.savez_compressed(tmp_path / "set.npz", images=images)
    config = configured(tmp_path / "set.npz")
    listed(config.source)
    shutil.rmtree(tmp_path / "cache" / "arrays")
    assert len(opened(config).ids) == COUNT


def test_an_edited_archive_of_the_same_size_and_time_is_unpacked_again(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    found = []
    for seed in (0, 1):
        images = np.stack([noise(16, 16, seed=seed)] * COUNT)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=images)
        path.write_bytes(buffer.getvalue().ljust(40_000, b"\0"))
        os.utime(path, ns=(10**18, 10**18))
        found.append(opened(configured(path)).ids[0])
    assert found[0] != found[1]


def test_frames_made_by_other_code_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(animations(tmp_path / "set"), frames="max")
    before = opened(config).ids
    monkeypatch.setattr(source_state, "_code", lambda: "other code")
    monkeypatch.setattr(Brightest, "read", lambda blob: encoded(noise(16, 16, seed=9)))
    assert opened(config).ids != before


def test_an_index_of_another_form_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder(tmp_path / "set")
    opened(configured(place))
    monkeypatch.setattr(index_store, "FORMAT", 99)
    add(place)
    assert not opened(configured(place)).is_kept


@pytest.mark.parametrize("name", ["folder", "tar", "stored zip", "parquet", "all frames"])
@pytest.mark.parametrize("order", [[1, 2, 3], [3, 1, 2], [2, 2, 1, 3]])
def test_parts_prepared_in_any_order_make_the_same_index_which_reads_no_image(
    name: str, order: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options = SOURCES[name]
    config = configured(make(tmp_path / "set"), **options)
    with monkeypatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(tmp_path / "another"))
        whole = contents(opened(config))
    done = {number: prepare_part(config, number, 3) for number in order}
    assert sum(images for images, _ in done.values()) == len(whole["ids"]) + (name in CUT)
    assert sum(bad for _, bad in done.values()) == (name in CUT)
    unknown: list[int | None] = []
    real = KnownKeys.of

    def of(known: KnownKeys, number: int | None) -> str | None:
        key = real(known, number)
        unknown.extend([number] if key is None else [])
        return key

    monkeypatch.setattr(KnownKeys, "of", of)
    found = opened(config)
    assert len(unknown) == (name in CUT)  # what is of no use is looked at again
    for part, value in whole.items():
        assert contents(found)[part] == value, part
    assert len(list((tmp_path / "cache" / "keys").glob("*/*"))) == 1  # of all images


CUT = {"folder", "tar", "stored zip"}  # that hold an image of no use


def test_other_settings_that_decode_nothing_anew_read_no_image(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(value_range, "HEADERS_READ", 0)
    config = configured(folder(tmp_path / "set"), channels=1, loss_mask="none")
    index(config, annotations=("text",))
    reads.clear()
    other = index(replace(config, holdout=0.4), annotations=())
    assert not other.is_kept
    assert not [name for name in reads if name.endswith((".png", ".jpg")) and "cut" not in name]
    index(replace(config, holdout=0.4, bits=16), annotations=())
    assert [name for name in reads if name.endswith((".png", ".jpg"))]  # other pixels


def test_an_index_that_was_interrupted_reads_no_image_twice(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(value_range, "HEADERS_READ", 0)
    config = configured(folder(tmp_path / "set"))

    class Stop(BaseException):
        """A signal."""

    def stop(done: int, total: int) -> None:
        if done == 20:
            raise Stop

    with pytest.raises(Stop):
        index(config, on_progress=stop)
    before = {name for name in reads if name.endswith(".png")}
    reads.clear()
    opened(config)
    again = {name for name in reads if name.endswith(".png")} & before
    assert len(before) > 20
    assert len(again) < len(before) - 15  # those that were read ahead, and doodles


def test_nothing_is_prepared_that_could_not_be_kept(tmp_path: Path) -> None:
    config = configured(folder(tmp_path / "set"), cache="off")
    with pytest.raises(DataError, match="nothing can be prepared"):
        prepare_part(config, 1, 2)


def test_files_elsewhere_are_known_by_their_numbers(tmp_path: Path, reads: list[str]) -> None:
    """As after a folder has got another name."""
    prepare_part(configured(folder(tmp_path / "set")), 1, 1)
    first = source_state.Identities()
    before = first.of(File(str(tmp_path / "set" / "a" / "000.png")))
    (tmp_path / "set").rename(tmp_path / "moved")
    after = source_state.Identities().of(File(str(tmp_path / "moved" / "a" / "000.png")))
    assert before == after != first.of(File(str(tmp_path / "moved" / "a" / "002.png")))


@pytest.mark.parametrize(
    "blobs",
    [
        [Frame(Slice(f"{n // 3}.tar", n, 2), 3) for n in range(9)],
        [Brightest(File(f"{n // 2}.tiff")) for n in range(9)],
        [Frame(File("a.tiff"), 0), File("a.tiff"), File("b.png"), Inline(b"x"), Frame(Inline(b"x"), 1)],
        [Slice("a.tar", 1, 2), Slice("a.tar", 3, 2), File("b.png")],
        [Inline(b"x"), Inline(b"y")],
    ],
)  # fmt: skip
def test_files_that_hold_images_are_the_same_in_a_list_and_in_columns(blobs: list[Blob]) -> None:
    import pyarrow as pa

    entries = [Entry(name=f"{number}", image=blob) for number, blob in enumerate(blobs)]
    table = EntryTable(pa.table(encode(entries)))
    inside = containers(entries)
    for found in (containers(table), containers(table.take(np.arange(len(table))))):
        assert ((found < 0) == (inside < 0)).all()
        assert ((found[:, None] == found) == (inside[:, None] == inside)).all()


@pytest.mark.parametrize("options", [{}, {"half": "first"}, {"holdout": 0.0}])
def test_parts_that_are_kept_are_those_that_versions_before_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    place = folder(tmp_path / "set")
    for number in range(3):
        path = place / "b" / f"far{number}.png"
        path.write_bytes(encoded(noise(16, 16, seed=500 + number)))
        path.with_suffix(".json").write_text('{"holdout": "far"}')
    config = configured(place, **options)
    expected = contents(opened(config))
    parts = opened(config).parts
    assert parts.named.keys() == {"far"}
    assert not parts.whole.flags.writeable  # a part of the table
    real = stored_index._columns
    monkeypatch.setattr(
        stored_index,
        "_columns",
        lambda dataset: {k: v for k, v in real(dataset).items() if k != "order"},
    )
    facts = stored_index._facts
    newer = ("part_sizes", "shape_counts", "has_repeats", "rows_lengths", "thumbnails_lengths")
    monkeypatch.setattr(
        stored_index,
        "_facts",
        lambda dataset: {k: v for k, v in facts(dataset).items() if k not in newer},
    )
    shutil.rmtree(next((tmp_path / "cache").glob("indexes")))
    before = opened(config)
    assert contents(before) == expected
    kept = opened(config)
    assert kept.is_kept
    assert contents(kept) == expected


def test_of_a_large_table_some_blocks_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_store, "BLOCK", 64)
    monkeypatch.setattr(index_store, "CHECKED", 4)
    file = tmp_path / "table"
    data = bytearray(range(256)) * 4
    file.write_bytes(data)
    known = index_store._check(file)
    blocks = choose_evenly(np.arange(16), 4)
    for number in range(16):
        changed = bytearray(data)
        changed[64 * number + 9] ^= 1
        file.write_bytes(changed)
        assert (index_store._check(file) != known) == (number in blocks)
    file.write_bytes(data + b"x")
    assert index_store._check(file) != known
    assert {0, 15} <= set(blocks.tolist())  # the schema and the footer
