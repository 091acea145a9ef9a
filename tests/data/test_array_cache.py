"""Decoded pixels are kept: what changed is decoded again, alone; what is damaged is made again;
what is there is never trusted blindly.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data import DataConfig, Dataset, Folder, array_cache, index, pixel_store
from sfumato.data.array_cache import ArrayCache, RowReader, Writer
from sfumato.data.segment_records import (
    FACTS,
    HEAD,
    LINES,
    ROWS,
    Records,
    Segment,
    row_type,
    stored_keys,
)
from sfumato.errors import DataError
from sfumato.storage import atomic
from tests.helpers.containers import put
from tests.helpers.image_bytes import encode, noise

SIDE = 4


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The images that were decoded, in order."""
    seen: list[bytes] = []
    decode = pixel_store.decode

    def spy(data: bytes, *arguments, **options):
        seen.append(data)
        return decode(data, *arguments, **options)

    monkeypatch.setattr(pixel_store, "decode", spy)
    return seen


def image(seed: int) -> bytes:
    return encode(noise(SIDE, SIDE, seed=seed))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return put(tmp_path / "photos", {f"{i:02d}.png": image(i) for i in range(12)})


def opened(root: Path, **options) -> Dataset:
    return index(DataConfig(source=Folder(str(root)), **{"resolution": SIDE} | options))


def right(dataset: Dataset, seeds: list[int] | range = range(12)) -> bool:
    pixels = dataset.images(np.arange(len(dataset.entries)))[0].numpy()
    return bool(
        (
            pixels.transpose(0, 2, 3, 1)
            == np.stack([noise(SIDE, SIDE, seed=seed) for seed in seeds])
        ).all()
    )


def segments(home: Path) -> list[Path]:
    return sorted(home.glob("pixels/*/segment-*"))


def test_what_is_kept_is_not_decoded_again(home: Path, photos: Path, decoded: list[bytes]) -> None:
    first = opened(photos)
    assert len(decoded) == 12
    again = opened(photos)
    assert len(decoded) == 12
    assert right(first)
    assert right(again)
    assert again.fingerprint == first.fingerprint
    assert again.summary() == first.summary()


def test_an_edited_image_is_decoded_again_alone(
    home: Path, photos: Path, decoded: list[bytes]
) -> None:
    opened(photos)
    decoded.clear()
    (photos / "05.png").write_bytes(image(99))
    assert right(opened(photos), [*range(5), 99, *range(6, 12)])
    assert decoded == [image(99)]


def test_an_edit_that_keeps_size_and_time_is_seen(
    home: Path, photos: Path, decoded: list[bytes]
) -> None:
    opened(photos)
    decoded.clear()
    path, other = photos / "05.png", bytearray(encode(noise(SIDE, SIDE, seed=5), compress_level=0))
    path.write_bytes(other)
    opened(photos)
    state = path.stat()
    changed = encode(noise(SIDE, SIDE, seed=98), compress_level=0)
    assert len(changed) == state.st_size
    path.write_bytes(changed)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert right(opened(photos), [*range(5), 98, *range(6, 12)])


def test_new_names_and_deleted_images_need_no_decoding(
    home: Path, photos: Path, decoded: list[bytes]
) -> None:
    opened(photos)
    decoded.clear()
    (photos / "00.png").rename(photos / "99.png")
    (photos / "03.png").unlink()
    assert right(opened(photos), [1, 2, *range(4, 12), 0])
    assert decoded == []


def test_a_image_in_another_container_is_known(
    home: Path, photos: Path, decoded: list[bytes], tmp_path: Path
) -> None:
    from sfumato.data import Zip
    from tests.helpers.containers import zipped

    opened(photos)
    decoded.clear()
    source = Zip(
        str(
            zipped(
                tmp_path / "x.zip",
                {path.name: path.read_bytes() for path in sorted(photos.iterdir())},
            )
        )
    )
    assert right(index(DataConfig(source=source, resolution=SIDE)))
    assert decoded == []


@pytest.mark.parametrize(
    "change", [{"resolution": 3}, {"channels": 1}, {"bits": 16}, {"background": (0, 0, 0)}]
)
def test_another_format_is_kept_apart_and_the_first_stays(
    change: dict, home: Path, photos: Path, decoded: list[bytes]
) -> None:
    opened(photos)
    other = opened(photos, **change)
    assert len(decoded) == 24
    direct = opened(photos, cache="off", **change)
    assert torch.equal(other.images(np.arange(12))[0], direct.images(np.arange(12))[0])
    decoded.clear()
    assert right(opened(photos))
    opened(photos, **change)
    assert decoded == []


def test_another_decoder_or_format_of_the_cache_shares_nothing(
    home: Path, photos: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(photos)
    monkeypatch.setattr(pixel_store, "DECODER", pixel_store.DECODER + 1)
    opened(photos)
    assert len(decoded) == 24
    monkeypatch.setattr(array_cache, "FORMAT", "test")
    opened(photos)
    assert len(decoded) == 36


def biggest(segment: Path) -> Path:
    return max(segment.glob("pixels*.bin"), key=lambda path: path.stat().st_size)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def as_before(segment: Path) -> None:
    """Write the records as versions before did: in one file of lines."""
    cache = ArrayCache.at(segment.parent)
    lines = []
    for key in cache.records:
        record = cache.records[key]
        places = {
            name: [place.file.rpartition("/")[2], place.row, place.check]
            for name, place in record.arrays.items()
        }
        lines.append(json.dumps([key, record.facts, places]))
    (segment / LINES).write_text("\n".join(lines) + "\n")
    for name in (HEAD, ROWS, FACTS):
        (segment / name).unlink()


def with_record(segment: Path, facts: object, places: dict) -> None:
    """The first image's record, once more and wrong."""
    as_before(segment)
    path = segment / LINES
    key = json.loads(path.read_text().partition("\n")[0])[0]
    path.write_text(path.read_text() + json.dumps([key, facts, places]) + "\n")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 3] ^= 1
    path.write_bytes(data)


HARM: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "in binary": lambda path: path.write_bytes(bytes(range(256))),
    "of zeros": lambda path: path.write_bytes(bytes(5000)),
    "with a bit that has flipped": flipped,
}
DAMAGE: dict[str, Callable[[Path], object]] = {
    "pixels cut": lambda segment: cut(biggest(segment)),
    "pixels empty": lambda segment: biggest(segment).write_bytes(b""),
    "pixels gone": lambda segment: biggest(segment).unlink(),
    "thumbnails cut": lambda segment: cut(next(segment.glob("thumbnail*"))),
    **{
        f"{file} {name}": lambda segment, file=file, harm=harm: harm(segment / file)  # type: ignore[misc]
        for file in (HEAD, ROWS, FACTS)
        for name, harm in HARM.items()
        if (file, name) != (HEAD, "with a bit that has flipped")
    },
    "a head of another kind": lambda segment: (segment / HEAD).write_text("[1, 2]"),
    "nested": lambda segment: (segment / HEAD).write_text("[" * 100_000),
    "lines of another kind": lambda segment: (segment / LINES).write_text('{"a": 1}\n[1, 2]\n'),
    "lines cut": lambda segment: (as_before(segment), os.truncate(segment / LINES, 700)),
    "a record without facts": lambda segment: with_record(segment, None, {}),
    "a record of another file": lambda segment: with_record(segment, {}, {"pixels": ["x.bin", 0]}),
    "a record of no row": lambda segment: with_record(
        segment, {}, {"pixels": [biggest(segment).name, "x"]}
    ),
    "a record beyond the end": lambda segment: with_record(
        segment, {}, {"pixels": [biggest(segment).name, 12, 0]}
    ),
    "a record before the beginning": lambda segment: with_record(
        segment, {}, {"pixels": [biggest(segment).name, -1, 0]}
    ),
    "a file instead of the folder": lambda segment: (
        segment.rename(segment.with_name("old")),
        segment.write_bytes(b""),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_segment_is_noticed_and_made_again(
    damage: str, home: Path, photos: Path, decoded: list[bytes]
) -> None:
    opened(photos)
    decoded.clear()
    (segment,) = segments(home)
    DAMAGE[damage](segment)
    assert right(opened(photos))
    assert sorted(decoded) == sorted(image(i) for i in range(12))
    decoded.clear()
    assert right(opened(photos))
    assert decoded == []


def test_a_cache_of_versions_before_is_used(home: Path, photos: Path, decoded: list[bytes]) -> None:
    opened(photos)
    (segment,) = segments(home)
    as_before(segment)
    decoded.clear()
    put(photos, {"12.png": image(12)})
    assert right(opened(photos), range(13))
    assert decoded == [image(12)]


def test_damage_to_one_segment_leaves_the_others(
    home: Path, photos: Path, decoded: list[bytes]
) -> None:
    opened(photos)
    put(photos, {"12.png": image(12)})
    opened(photos)
    decoded.clear()
    cut(biggest(segments(home)[1]))
    assert right(opened(photos), range(13))
    assert decoded == [image(12)]


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"not numpy", b"\x80\x04."])
def test_damaged_groups_of_duplicates_are_found_again(
    data: bytes, home: Path, photos: Path
) -> None:
    put(photos, {"copy.png": image(3)})
    before = opened(photos)
    (kept,) = home.glob("clusters/*.npz")
    kept.write_bytes(data)
    after = opened(photos)
    assert (after.clusters == before.clusters).all()
    assert after.clusters[3] == after.clusters[12]


PROGRAM = """
import sys
from pathlib import Path
from sfumato.data import DataConfig, Folder, index
Path(sys.argv[2]).touch()
while not all(Path(name).exists() for name in sys.argv[2:]):
    pass  # begin at the same time
for _ in range(3):
    dataset = index(DataConfig(source=Folder(sys.argv[1]), resolution=4))
print(dataset.fingerprint)
"""


def test_two_processes_may_fill_the_cache_at_the_same_time(
    home: Path, photos: Path, decoded: list[bytes], tmp_path: Path
) -> None:
    ready = [str(tmp_path / "ready0"), str(tmp_path / "ready1")]
    put(photos, {f"more{i}.png": image(i) for i in range(100, 200)})
    commands = [
        [sys.executable, "-c", PROGRAM, str(photos), *ready],
        [sys.executable, "-c", PROGRAM, str(photos), *ready[::-1]],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for command in commands
    ]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    dataset = opened(photos)
    assert said == [dataset.fingerprint + "\n"] * 2
    assert right(dataset, [*range(12), *range(100, 200)])
    assert decoded == []
    assert not list(home.glob("pixels/*/.tmp-*"))


def test_an_interrupted_run_keeps_what_it_decoded(
    home: Path, photos: Path, decoded: list[bytes]
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(DataConfig(source=Folder(str(photos)), resolution=SIDE), on_progress=stop)
    decoded.clear()
    assert right(opened(photos))
    assert decoded == [image(i) for i in range(7, 12)]
    assert not list(home.glob("pixels/*/.tmp-*"))


def test_a_killed_run_leaves_nothing_that_is_taken_for_whole(
    home: Path, photos: Path, decoded: list[bytes]
) -> None:
    opened(photos)
    (segment,) = segments(home)
    segment.rename(segment.with_name(".tmp-killed"))
    decoded.clear()
    assert right(opened(photos))
    assert len(decoded) == 12


def test_pixels_are_mapped_and_cannot_be_written_through(home: Path, photos: Path) -> None:
    dataset = opened(photos)
    assert isinstance(dataset.read_rows, RowReader)
    pixels = dataset.images([0, 1])[0]
    pixels[:] = 0
    assert right(dataset)
    (segment,) = segments(home)
    mapped = dataset.read_rows.cache.map(f"{segment.name}/{biggest(segment).name}")
    assert isinstance(mapped, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 0


def test_with_the_cache_off_nothing_is_written(
    home: Path, photos: Path, decoded: list[bytes]
) -> None:
    for _ in range(2):
        assert right(opened(photos, cache="off"))
    assert len(decoded) == 24
    assert not home.exists()


def test_a_cache_that_cannot_be_written_is_done_without(home: Path, photos: Path) -> None:
    home.write_bytes(b"a file where the folder should be")
    assert right(opened(photos))


def test_a_nearly_full_disk_is_left_alone(
    home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_store, "CACHE_SHARE_OF_DISK", 1e-15)
    assert right(opened(photos))
    assert not segments(home)


def test_a_disk_that_fills_up_meanwhile_is_an_error_with_a_remedy(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArrayCache.open("pixels", "test")
    writer = Writer(store)
    writer.add("key", {}, {"pixels": np.zeros(3, np.uint8)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(DataError, match="No space left on device") as caught:
        writer.commit()
    assert "data.cache=off" in caught.value.hint
    assert list(store.folder.iterdir()) == []


def test_rejects_are_looked_at_each_time(home: Path, photos: Path, decoded: list[bytes]) -> None:
    put(photos, {"bad.png": b"\x89PNG cut"})
    assert [reject.name for reject in opened(photos).rejects] == ["bad.png"]
    decoded.clear()
    assert [reject.name for reject in opened(photos).rejects] == ["bad.png"]
    assert decoded == [b"\x89PNG cut"]


def test_notes_and_sizes_come_from_the_cache_too(home: Path, photos: Path) -> None:
    put(photos, {"small.png": encode(noise(3, 2)), "wide.png": encode(noise(8, 16, seed=50))})
    first, again = opened(photos), opened(photos)
    assert again.notes == first.notes == {"upscaled": ["small.png"]}
    assert again.crop_loss == first.crop_loss > 0


def test_arrays_of_several_shapes_in_several_segments_are_gathered(home: Path) -> None:
    store = ArrayCache.open("latents", "test")
    expected = {}
    for part in range(3):
        writer = Writer(store)
        for number in range(4):
            key, side = f"{part}-{number}", 2 + number % 2
            expected[key] = (
                np.random.default_rng(10 * part + number).normal(size=(side, 3)).astype(np.float16)
            )
            writer.add(key, {"side": side}, {"latent": expected[key]})
        writer.commit()
    store = ArrayCache.open("latents", "test")
    wanted = [key for key in sorted(expected, reverse=True) if expected[key].shape[0] == 3]
    read_rows = RowReader.of(store, stored_keys(wanted), "latent")
    assert (
        read_rows(np.array([5, 0, 3, 3])) == np.stack([expected[wanted[i]] for i in (5, 0, 3, 3)])
    ).all()
    assert read_rows(np.array([], np.int64)).shape[0] == 0
    assert {store.records[key].facts["side"] for key in wanted} == {3}
    assert store.size_bytes() > sum(array.nbytes for array in expected.values())


def test_of_equal_keys_the_one_in_the_last_segment_counts(home: Path) -> None:
    store = ArrayCache.open("latents", "test")
    for value in (1, 2):
        writer = Writer(store)
        writer.add("a", {"value": value}, {"x": np.full(2, value, np.int16)})
        writer.add(f"b{value}", {}, {})
        writer.commit()
    for cache in (store, ArrayCache.open("latents", "test")):
        assert len(cache.records) == len(list(cache.records)) == 3
        assert cache.records["a"].facts == {"value": 2}
        assert cache.array(cache.records["a"].arrays["x"]).tolist() == [2, 2]
        assert cache.records["b1"].arrays == {}
        assert "c" not in cache.records
        with pytest.raises(KeyError):
            cache.records.facts(stored_keys(["a", "c"]))
    assert "a" not in Records()
    assert len(Records()) == 0


def test_records_are_found_as_in_a_dictionary(home: Path) -> None:
    """Also keys of zeros at the end, which numpy takes for padding."""
    generator = np.random.default_rng(0)
    names = [generator.bytes(16).hex() for _ in range(50)]
    names += [name[: 2 * length].ljust(32, "0") for length, name in enumerate(names[:16])]
    names += ["", "0", "x" * 100, "0" * 31, "\ud800", "0" * 33]
    store, expected = ArrayCache.open("latents", "test"), {}
    for _ in range(4):
        writer = Writer(store)
        for name in generator.choice(names, 30):
            expected[str(name)] = {"value": int(generator.integers(1000))}
            writer.add(str(name), expected[str(name)], {})
        writer.commit()
    assert {name: dict(store.records[name].facts) for name in expected} == expected
    assert [name in store.records for name in names] == [name in expected for name in names]
    wanted = list(expected)[::-1]
    assert store.records.facts(stored_keys(wanted)) == [expected[name] for name in wanted]
    assert len(store.records) == len(expected)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=12, unique=True), max_size=14),
    st.lists(st.booleans(), min_size=14, max_size=14),
)
def test_records_of_segments_that_are_added_one_by_one_are_those_of_a_dictionary(
    segments: list[list[int]], looks: list[bool]
) -> None:
    records, expected = Records(), dict[str, tuple[int, int]]()
    for number, keys in enumerate(segments):
        rows = np.zeros(len(keys), row_type([]))
        rows["key"] = stored_keys([str(key) for key in keys])
        head = {"names": [], "files": []}
        records.add(Segment(Path(f"segment-{number}"), head, rows, np.empty(0, np.uint8)))
        expected |= {str(key): (number, row) for row, key in enumerate(keys)}
        if looks[number]:  # which sorts what was added since
            found, rows_ = records.find(stored_keys([str(key) for key in range(42)]))
            assert list(zip(found.tolist(), rows_.tolist(), strict=True)) == [
                expected.get(str(key), (-1, 0)) for key in range(42)
            ]
    assert len(records) == len(list(records)) == len(expected)
    assert all(key in records for key in expected)
    lengths = [len(run.keys) for run in records._runs]
    assert all(older >= 2 * newer for older, newer in pairwise(lengths))
    assert len(deepcopy(records)) == len(expected)  # as when it is pickled
