"""Sources that nobody vouches for: each attack gives a listed reject or an error that says what,
where and how to fix it.
"""

import contextlib
import io
import json
import os
import pickle
import re
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sfumato.data import (
    DataConfig,
    Dataset,
    Folder,
    HuggingFace,
    Npz,
    Parquet,
    Source,
    WebDataset,
    Zip,
    index,
    listing,
    source_at,
)
from sfumato.data.sources import npz, parquet, webdataset, zip_archive
from sfumato.errors import DataError
from tests.helpers import containers
from tests.helpers.containers import put
from tests.helpers.image_bytes import chunk, encode, noise, png

GOOD = {f"good{i}.png": encode(noise(8, 8, seed=i)) for i in range(3)}
IMAGE = encode(noise(8, 8, seed=7))


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise AssertionError("still waiting after 120 s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 120)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def opened(source: Source) -> Dataset:
    return index(DataConfig(source=source, resolution=8, cache="off"))


def rejected(source: Source) -> dict[str, str]:
    """What is left out of a source whose good images must all be there."""
    dataset = opened(source)
    assert {
        name.rpartition("/")[2].rpartition(":")[2]
        for name in (entry.name for entry in dataset.entries)
    } >= set(GOOD)
    return {reject.name: reject.reason for reject in dataset.rejects}


def assert_refused(source: Source, what: str) -> None:
    """The source as a whole is refused, in words for a person."""
    with pytest.raises(DataError, match=what) as caught:
        opened(source)
    assert str(source.path) in caught.value.where
    assert caught.value.hint


def in_folder(root: Path, files: dict[str, bytes]) -> Source:
    return Folder(str(put(root / "photos", files)))


def in_tar(root: Path, files: dict[str, bytes]) -> Source:
    return WebDataset(str(containers.tar(root / "x.tar", files)))


def in_zip(root: Path, files: dict[str, bytes]) -> Source:
    return Zip(str(containers.zipped(root / "x.zip", files)))


def in_deflated_zip(root: Path, files: dict[str, bytes]) -> Source:
    return Zip(str(containers.zipped(root / "x.zip", files, zipfile.ZIP_DEFLATED)))


def in_table(root: Path, files: dict[str, bytes]) -> Source:
    pq.write_table(
        pa.table({"image": [{"bytes": data, "path": name} for name, data in files.items()]}),
        root / "x.parquet",
    )
    return Parquet(str(root / "x.parquet"))


PACKED: dict[str, Callable[[Path, dict[str, bytes]], Source]] = {
    "folder": in_folder,
    "tar": in_tar,
    "zip": in_zip,
    "deflated zip": in_deflated_zip,
    "parquet": in_table,
}


# Images


def array(header: str, body: bytes = b"") -> bytes:
    """An .npy whose header says anything."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


def pickled_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Marked()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


class Marked:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["MARKER"],)


BAD_IMAGES = {
    "empty.png": (b"", "empty file"),
    "cut.png": (encode(noise(40, 40))[:200], "damaged"),
    "text.png": (b"<html><script>alert(1)</script>", "not an image in a known format"),
    "postscript.png": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "not an image in a known format",
    ),
    "vast.png": (png(50_000, 50_000, depth=8, colour=2, rows=b"\0"), "more than 80 million pixels"),
    "thin.png": (encode(noise(1, 100)), "sides 100 : 1"),
    "text_bomb.png": (
        png(
            8,
            8,
            depth=8,
            colour=0,
            rows=bytes(72),
            extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20))),
        ),
        "damaged|more than",
    ),
    "pickle.npy": (pickle.dumps([1]), "not an image in a known format"),
    "lies.npy": (
        array("{'descr': '|u1', 'fortran_order': False, 'shape': (8000, 8000, 1)}", bytes(64)),
        "cut short",
    ),
    "negative.npy": (
        array("{'descr': '|u1', 'fortran_order': False, 'shape': (-8, -8, 1)}", bytes(64)),
        "no pixels|damaged",
    ),
    "endless.npy": (
        array("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 9, 1)}"),
        "million pixels",
    ),
    "code.npy": (array("__import__('os').mkdir('x')"), "damaged"),
}


@pytest.mark.parametrize("kind", PACKED)
def test_bad_images_are_left_out_with_the_reason(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("MARKER", str(tmp_path / "unpickled"))
    bad = {name: data for name, (data, _) in BAD_IMAGES.items()} | {"objects.npy": pickled_array()}
    found = rejected(PACKED[kind](tmp_path, GOOD | bad))
    assert set(found) == set(bad)
    for name, (_, reason) in BAD_IMAGES.items():
        assert re.search(reason, found[name]), (name, found[name])
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_a_image_over_the_byte_limit_is_left_out(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.data import decoding

    for module in (decoding, listing):
        monkeypatch.setattr(module, "MAX_BYTES", 1000)
    assert (
        "more than"
        in rejected(PACKED[source](tmp_path, GOOD | {"large.png": encode(noise(64, 64))}))[
            "large.png"
        ]
    )


# Names in archives

NAMES = [
    "../up.png",
    "a/../../up.png",
    "/etc/up.png",
    "//host/up.png",
    "C:/up.png",
    "C:\\up.png",
    "a\\..\\up.png",
    "%2e%2e/up.png",
    "a/%2e%2e%2fup.png",
    "~/up.png",
    "file://up.png",
    "http://host/up.png",
    "a//up.png",
    "a/./up.png",
    "CON.png",
    "nul/up.png",
    "a\x1b]0;title\x07.png",
    "gpj.\u202epng",
    "line\nbreak.png",
    "x" * 300 + ".png",
    "d/" * 2500 + "deep.png",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:24])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_lead_elsewhere_are_left_out(kind: str, name: str, tmp_path: Path) -> None:
    source = PACKED[kind](tmp_path, GOOD | {name: IMAGE})
    (found,) = rejected(source).items()
    assert (
        "is not below" in found[1]
        or "printable" in found[1]
        or "too long" in found[1]
        or "reserved" in found[1]
    )
    assert "".join(found).isprintable()
    assert len(found[0].encode()) <= 220
    assert [path.name for path in tmp_path.iterdir()] == [Path(source.path).name]


def test_names_of_rows_are_only_names(tmp_path: Path) -> None:
    entries = in_table(tmp_path, dict.fromkeys(NAMES, IMAGE)).listing().entries
    assert len(entries) == len(NAMES)
    assert all(entry.name.isprintable() and entry.image.read() == IMAGE for entry in entries)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_one_name_twice_is_told(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "tar":
        containers.tar(path, GOOD)
        with tarfile.open(path, "a") as archive:
            info = tarfile.TarInfo("good2.png")
            info.size = len(IMAGE)
            archive.addfile(info, io.BytesIO(IMAGE))
    else:
        containers.zipped(path, GOOD)
        with (
            zipfile.ZipFile(path, "a") as archive,
            pytest.warns(UserWarning, match="Duplicate name"),
        ):
            archive.writestr("good2.png", IMAGE)
    source = source_at(str(path))
    assert "twice" in rejected(source)["good2.png"]
    assert len(opened(source).entries) == len(GOOD)


# Tar


def tar_of(path: Path, *more: tarfile.TarInfo | bytes) -> WebDataset:
    """The good images between what else is given, as headers or as raw bytes."""
    with path.open("wb") as file:
        for part in more:
            file.write(part if isinstance(part, bytes) else part.tobuf())
        for name, data in GOOD.items():
            file.write(member(name, len(data)).tobuf() + data + bytes(-len(data) % 512))
        file.write(bytes(1024))
    return WebDataset(str(path))


def member(
    name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, target: str = ""
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, target
    return info


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, "../../secret.png"),
        (tarfile.SYMTYPE, "loop.png"),
        (tarfile.LNKTYPE, "good0.png"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_links_and_devices_in_a_tar_are_left_out(kind: bytes, target: str, tmp_path: Path) -> None:
    source = tar_of(tmp_path / "x.tar", member("loop.png", kind=kind, target=target))
    assert rejected(source) == {"loop.png": "is a link, a device or sparse"}


def test_a_chain_of_links_in_a_tar_leads_nowhere(tmp_path: Path) -> None:
    secret = put(tmp_path / "outside", {"secret.png": IMAGE})
    chain = [
        member("a", kind=tarfile.SYMTYPE, target=".."),
        member("a/b", kind=tarfile.SYMTYPE, target="outside"),
    ]
    source = tar_of(
        tmp_path / "x.tar",
        *chain,
        member("a/b/secret.png", kind=tarfile.SYMTYPE, target=str(secret)),
    )
    assert set(rejected(source)) == {"a", "a/b", "a/b/secret.png"}


def signed_size(number: int) -> bytes:
    """A header whose size is written in base 256, as large or negative ones are."""
    head = bytearray(member("size.png").tobuf(format=tarfile.GNU_FORMAT))
    head[124:136] = (
        b"\xff" * 4 + struct.pack(">q", number)
        if number < 0
        else b"\x80\0\0\0" + struct.pack(">q", number)
    )
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**62), 10**15, 2**62])
def test_a_tar_member_that_lies_about_its_size_ends_the_reading(size: int, tmp_path: Path) -> None:
    good = tar_of(tmp_path / "good.tar")
    data = Path(good.path).read_bytes()[:-1024]
    (tmp_path / "x.tar").write_bytes(data + signed_size(size) + bytes(1024))
    assert rejected(WebDataset(str(tmp_path / "x.tar")))
    (tmp_path / "y.tar").write_bytes(signed_size(size) + data + bytes(1024))
    with contextlib.suppress(DataError):
        assert rejected(WebDataset(str(tmp_path / "y.tar")))


def test_headers_before_headers_without_end_are_not_followed(tmp_path: Path) -> None:
    long_name = (
        member("././@LongLink", 512, tarfile.GNUTYPE_LONGNAME).tobuf(format=tarfile.GNU_FORMAT)
        + b"n" * 511
        + b"\0"
    )
    assert_refused(
        tar_of(tmp_path / "x.tar", long_name * 5000), "not a complete tar|holds no images"
    )


def test_a_vast_extended_header_is_not_read(tmp_path: Path) -> None:
    head = member("h", 1 << 33, tarfile.XHDTYPE).tobuf(format=tarfile.GNU_FORMAT)
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(head)
        file.truncate(1 << 34)  # a hole: takes no space
    assert_refused(WebDataset(str(tmp_path / "x.tar")), "a header of 8589934592 bytes")


def test_a_tar_stops_at_its_greatest_number_of_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "MAX_MEMBERS", 3)
    source = in_tar(tmp_path, GOOD | {"one_more.png": IMAGE})
    assert rejected(source) == {"x.tar": "more than 3 members: the rest is not read"}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "not a complete tar"),
        (b"\x1f\x8b\x08" + bytes(600), "not a complete tar"),
        (bytes(10240), "holds no images"),
        (b"x" * 99, "not a complete tar"),
    ],
)
def test_what_is_no_tar_is_refused(data: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    assert_refused(WebDataset(str(tmp_path / "x.tar")), what)


def test_a_damaged_note_of_a_tars_members_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    source = in_tar(tmp_path, GOOD)
    before = source.listing()
    (kept,) = (tmp_path / "cache" / "tar-index").iterdir()
    for damage in (
        b"",
        b"{",
        b"[]",
        b'{"members": [[1]], "rejects": []}',
        b'{"members": 3}',
        b"\xff",
    ):
        kept.write_bytes(damage)
        assert source.listing() == before


# Zip


def test_links_in_a_zip_are_left_out(tmp_path: Path) -> None:
    path = containers.zipped(tmp_path / "x.zip", GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        for name, kind in {
            "link.png": stat.S_IFLNK,
            "pipe.png": stat.S_IFIFO,
            "device.png": stat.S_IFCHR,
        }.items():
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, (kind | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
    assert rejected(Zip(str(path))) == dict.fromkeys(
        ("link.png", "pipe.png", "device.png"), "is a link or a device"
    )


def test_an_absurd_ratio_is_left_out_before_unpacking(tmp_path: Path) -> None:
    bomb = encode(noise(8, 8)) + bytes(30 << 20)
    assert rejected(in_deflated_zip(tmp_path, GOOD | {"bomb.png": bomb})) == {
        "bomb.png": "unpacks to over 200 times its size"
    }


def replaced(path: Path, name: str, offset: int, value: bytes, *, local: bool = False) -> Zip:
    """A zip with bytes of one member's central (or local) header overwritten."""
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\x03\x04") if local else data.find(b"PK\x01\x02")
    while data[place + (30 if local else 46) :][: len(name)] != name.encode():
        place = data.find(b"PK\x03\x04" if local else b"PK\x01\x02", place + 1)
        assert place > 0
    data[place + offset : place + offset + len(value)] = value
    path.write_bytes(data)
    return Zip(str(path))


SIZE = struct.pack("<L", 0x7FFFFFFF)


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
@pytest.mark.parametrize(
    ("offset", "value", "local"),
    [
        (24, struct.pack("<L", 9), False),  # sizes, the unpacked one first
        (20, struct.pack("<L", 9), False),
        (24, SIZE, False),
        (20, SIZE, False),
        (20, SIZE + SIZE, False),
        (10, struct.pack("<H", 8), False),  # method
        (10, struct.pack("<H", 14), False),
        (10, struct.pack("<H", 97), False),
        (8, b"\1\0", False),  # encrypted
        (42, SIZE, False),  # place of the local header
        (42, struct.pack("<L", 5), False),
        (16, b"\0\0\0\0", False),  # checksum
        (0, b"QQ", True),
        (26, b"\xff\xff\xff\xff", True),  # lengths of name and extra field
    ],
)
def test_headers_of_a_zip_that_lie_cost_at_most_that_image(
    method: int, offset: int, value: bytes, local: bool, tmp_path: Path
) -> None:
    path = containers.zipped(tmp_path / "x.zip", GOOD | {"bad.png": IMAGE}, method)
    source = replaced(path, "bad.png", offset, value, local=local)
    try:
        dataset = opened(source)
    except DataError as error:
        assert "is not a complete zip" in error.what  # noqa: PT017
        return
    kept = {entry.name: entry.image.read() for entry in dataset.entries}
    assert GOOD.items() <= kept.items()
    assert {reject.name for reject in dataset.rejects} | set(kept) == set(GOOD) | {"bad.png"}


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_damaged_data_in_a_zip_cost_that_image(method: int, tmp_path: Path) -> None:
    path = containers.zipped(tmp_path / "x.zip", {"bad.png": encode(noise(30, 30)), **GOOD}, method)
    data = bytearray(path.read_bytes())
    for place in (41, 60, 100, 900, 1500):  # the first member's data begin at 37
        data[place] ^= 0xFF
    path.write_bytes(data)
    assert set(rejected(Zip(str(path)))) == {"bad.png"}


@pytest.mark.parametrize("offset", [1, 40, 2**31])
def test_a_central_directory_in_another_place_than_stated(offset: int, tmp_path: Path) -> None:
    path = containers.zipped(tmp_path / "x.zip", GOOD)
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\5\6")
    (start,) = struct.unpack("<L", data[end + 16 : end + 20])
    data[end + 16 : end + 20] = struct.pack("<L", start + offset)
    path.write_bytes(data)
    assert_refused(Zip(str(path)), "is not a complete zip|different readable images")


def test_a_vast_directory_and_too_many_members_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = in_zip(tmp_path, GOOD)
    monkeypatch.setattr(zip_archive, "MAX_MEMBERS", 2)
    assert_refused(source, "3 members")
    monkeypatch.setattr(zip_archive, "MAX_DIRECTORY_BYTES", 100)
    assert_refused(source, "directory alone")


# Npz


def npz_of(path: Path, *, kind: int = zipfile.ZIP_STORED, **members: bytes) -> Npz:
    containers.zipped(path, {f"{name}.npy": data for name, data in members.items()}, kind)
    return Npz(str(path))


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def header(shape: str, kind: str = "|u1", order: bool = False) -> bytes:
    return array(f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}}}", bytes(400))


PIXELS = npy(np.stack([noise(8, 8, seed=i) for i in range(3)]))


@pytest.mark.parametrize(
    "shape",
    [
        "(3, 8, 8, 99)",
        "(-3, 8, 8, 3)",
        "(3, -8, 8, 3)",
        "(3, 4294967296, 4294967296, 1)",
        "(99999999999999, 4294967296, 4294967296, 1)",
        "(9999999999999999999999, 1, 1, 1)",
        "(0, 8, 8, 3)",
        "(3, 0, 8, 3)",
        "()",
        "(3,)",
        "(3, 8)",
        "(1, 1, 1, 1, 1)",
        "(3.0, 8, 8, 3)",
        "'x'",
        "(True, " + "(" * 150 + "1" + ")" * 150 + ")",
        "(" + "-" * 9000 + "1, 2, 3)",
        "(" + "[" * 500,
        "",
    ],
    ids=lambda shape: shape[:30],
)
@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_npz_whose_header_lies_is_refused(shape: str, kind: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is cut short|is not a complete \.npz|pixels of shape"):
        npz_of(tmp_path / "x.npz", kind=kind, images=header(shape)).listing()


@pytest.mark.parametrize(
    "dtype", ["|O", "<c8", "|b1", "|V8", "<U9", "[('a', '|u1'), ('b', '|O')]", "|u1, os"]
)
def test_pixels_that_are_not_numbers_are_refused(dtype: str, tmp_path: Path) -> None:
    assert_refused(
        npz_of(tmp_path / "x.npz", images=header("(1, 2, 2, 3)", dtype)), "pixels of|plain numbers"
    )


def test_floats_with_nan_and_infinity_are_refused(tmp_path: Path) -> None:
    values = np.full((3, 4, 4, 3), np.nan, np.float32)
    values[1] = np.inf
    np.savez(tmp_path / "x.npz", images=values)
    assert_refused(Npz(str(tmp_path / "x.npz")), "48 of its values are not finite")


@pytest.mark.parametrize("member", ["images", "labels"])
def test_pickled_objects_in_an_npz_are_not_opened(
    member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARKER", str(tmp_path / "unpickled"))
    assert_refused(
        npz_of(tmp_path / "x.npz", **({"images": PIXELS} | {member: pickled_array()})),
        "Python objects",
    )
    assert not (tmp_path / "unpickled").exists()
    np.load(io.BytesIO(pickled_array()), allow_pickle=True)  # the attack is real
    assert (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (npy(np.arange(4)), "4 labels for 3 images"),
        (header("(9999999999999,)"), "plain numbers"),
        (header("(99999999999999999999999999,)"), "plain numbers"),
        (header("(3,)", "<U0"), "plain numbers"),
        (npy(np.arange(3))[:-5], "plain numbers"),
        (
            array("{'descr': '<U1', 'fortran_order': False, 'shape': (3,)}", b"\xff" * 12),
            "plain numbers",
        ),
        (b"", "plain numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: bytes, what: str, tmp_path: Path) -> None:
    assert_refused(npz_of(tmp_path / "x.npz", images=PIXELS, labels=labels), what)


def test_labels_may_be_of_no_known_writing(tmp_path: Path) -> None:
    labels = npy(np.array([b"\xff\xfe", b"\x1b[2J", b"cat"]))
    dataset = opened(npz_of(tmp_path / "x.npz", images=PIXELS, labels=labels))
    assert sorted(dataset.categories) == ["\\x1b[2J", "\\xff\\xfe", "cat"]


@pytest.mark.parametrize("member", ["images", "labels"])
def test_a_bomb_in_an_npz_is_not_unpacked(
    member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    bomb = array(
        "{'descr': '|u1', 'fortran_order': False, 'shape': (40, 1024, 1024, 1)}", bytes(40 << 20)
    )
    assert_refused(
        npz_of(
            tmp_path / "x.npz", kind=zipfile.ZIP_DEFLATED, **({"images": PIXELS} | {member: bomb})
        ),
        "times its size",
    )


def test_an_npz_of_too_many_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "MAX_IMAGES", 2)
    assert_refused(npz_of(tmp_path / "x.npz", images=PIXELS), "at most 2|pixels of shape")


def test_an_npz_cut_after_it_was_listed_gives_unreadable_images(tmp_path: Path) -> None:
    entries = npz_of(tmp_path / "x.npz", images=PIXELS).listing().entries
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:300])
    with pytest.raises(OSError, match="cut short"):
        entries[2].image.read()


# Metadata

OUTSIDE = [name for name in NAMES if "\n" not in name and "\x1b" not in name] + [
    "secret.png",
    "link.png",
    "",
    " ",
    "\0",
    ".",
]


def as_csv(names: list) -> bytes:
    return ("file_name,text\n" + "".join(f'"{name}",x\n' for name in names)).encode()


def as_jsonl(names: list) -> bytes:
    return "\n".join(json.dumps({"file_name": name, "text": "x"}) for name in names).encode()


def as_parquet(names: list) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"file_name": names, "text": ["x"] * len(names)}), buffer)
    return buffer.getvalue()


METADATA = {"metadata.csv": as_csv, "metadata.jsonl": as_jsonl, "metadata.parquet": as_parquet}


@pytest.mark.parametrize("column", ["file_name", "doodle_file_name"])
@pytest.mark.parametrize("kind", METADATA)
def test_metadata_cannot_name_what_is_outside(kind: str, column: str, tmp_path: Path) -> None:
    outside = put(tmp_path, {"up.png": IMAGE, "secret.png": IMAGE})
    root = put(tmp_path / "photos", GOOD)
    (root / "link.png").symlink_to(outside / "secret.png")
    names = [*GOOD, *(name for name in OUTSIDE if kind != "metadata.csv" or "\0" not in name)]
    data = METADATA[kind](names)
    if column != "file_name":
        names = [name for name in names if name.strip()]
        rows = [{"file_name": name} for name in GOOD] + [
            {"file_name": "good0.png", column: name} for name in names[3:]
        ]
        kind, data = "metadata.jsonl", "\n".join(map(json.dumps, rows)).encode()
    put(root, {kind: data})
    dataset = opened(Folder(str(root)))
    assert {entry.name for entry in dataset.entries} == set(GOOD)
    assert all(entry.doodle is None for entry in dataset.entries)
    places = [reject.name for reject in dataset.rejects if reject.part]
    assert len(places) == len(names) - len(GOOD)
    assert all(reject.reason.isprintable() for reject in dataset.rejects)


@pytest.mark.parametrize(
    "value", [None, 3, 3.5, True, [], ["good0.png"], {"a": "good0.png"}, float("nan")]
)
def test_a_file_name_that_is_no_text_is_left_out(value: object, tmp_path: Path) -> None:
    files = GOOD | {"metadata.jsonl": as_jsonl([*GOOD, value])}
    assert set(rejected(in_folder(tmp_path, files))) == {"metadata.jsonl, line 4"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("metadata.csv", b'file_name,text\ngood0.png,"' + b"x" * (2 << 20) + b'"\n'),
        ("metadata.csv", b"\0" * 100),
        ("metadata.csv", b""),
        ("metadata.csv", b"\xff\xfe\x00\xd8"),
        ("metadata.csv", b"," * (1 << 20)),
        ("metadata.jsonl", b"[" * 10_000),
        ("metadata.jsonl", b'{"a":' * 10_000),
        ("metadata.jsonl", b"{}\n[]\n1\nnull\n"),
        ("metadata.jsonl", b'{"file_name": "good0.png"\n'),
        ("metadata.jsonl", b'{"file_name": ' + b"9" * 5000 + b"}\n"),
        ("metadata.jsonl", b"\xff\xfe\xfd"),
        ("metadata.parquet", b""),
        ("metadata.parquet", b"PAR1" + bytes(100) + b"PAR1"),
        ("metadata.parquet", as_parquet(list(GOOD))[:-30]),
        ("metadata.parquet", b"PAR1" + struct.pack("<L", 0xFFFFFFF0) + b"PAR1"),
        ("dataset.json", b"[" * 10_000),
        ("dataset.json", b""),
        ("dataset.json", b"\xff\xfe\xfd"),
        ("dataset.json", b'{"labels": 3}'),
        ("dataset.json", b'{"labels": [["good0.png"]]}'),
        ("dataset.json", b'{"labels": [[["a"], 1], null]}'),
        ("dataset.json", b'{"labels": [["good0.png", ' + b"[" * 5000 + b"]" * 5000 + b"]]}"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else value,
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_damaged_descriptions_of_a_whole_set_are_refused(
    kind: str, name: str, data: bytes, tmp_path: Path
) -> None:
    assert_refused(
        PACKED[kind](tmp_path, GOOD | {name: data}), "cannot be read|name no existing image"
    )


@pytest.mark.parametrize("data", [b"[]", b"{}", b'{"name": "mine", "version": 1}'])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_dataset_json_that_is_not_a_label_file_is_left_out(
    kind: str, data: bytes, tmp_path: Path
) -> None:
    found = rejected(PACKED[kind](tmp_path, GOOD | {"dataset.json": data}))
    assert found.keys() == {"dataset.json"}
    assert "not a label file" in found["dataset.json"]


def test_a_label_file_names_only_what_is_there(tmp_path: Path) -> None:
    labels = [["../up.png", 1], ["/etc/passwd", 2], *([name, 3] for name in GOOD)]
    put(tmp_path, {"up.png": IMAGE})
    source = in_folder(
        tmp_path,
        GOOD | {"more.png": IMAGE, "dataset.json": json.dumps({"labels": labels}).encode()},
    )
    assert rejected(source) == {"more.png": "not named in dataset.json"}
    assert {entry.category for entry in opened(source).entries} == {"3"}


# Texts beside images

HARMLESS_TEXTS = {
    b"\xff\xfe": (),
    b"caf\xe9": ("café",),
    "caf\u00e9 \U0001f408".encode("utf-16"): ("café 🐈",),
    b"\x80\x81\xff": ("€\ufffdÿ",),
    b"$(touch x) ../ <img onerror=x>": ("$(touch x) ../ <img onerror=x>",),
}


@pytest.mark.parametrize("data", HARMLESS_TEXTS)
@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_captions_of_any_writing_are_read(kind: str, data: bytes, tmp_path: Path) -> None:
    listing = PACKED[kind](tmp_path, {"good0.png": IMAGE, "good0.txt": data}).listing()
    assert listing.entries[0].captions == HARMLESS_TEXTS[data]
    assert listing.rejects == []


BAD_JSON = {
    "nested lists": b"[" * 10_000,
    "nested objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "long": b'{"caption": "' + b"x" * (2 << 20) + b'"}',
    "no object": b'["a caption"]',
    "cut": b'{"caption": "a',
    "vast number": b'{"label": ' + b"9" * 5000 + b"}",
    "binary": bytes(range(256)),
    "empty": b"",
}


@pytest.mark.parametrize("name", BAD_JSON)
@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_bad_json_beside_a_image_costs_the_json_only(kind: str, name: str, tmp_path: Path) -> None:
    source = PACKED[kind](tmp_path, {"good0.json": BAD_JSON[name]} | GOOD)
    found = rejected(source)
    assert all(reason.startswith((".json left out", "JSON left out")) for reason in found.values())
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_a_huge_caption_is_left_out_and_listed(kind: str, tmp_path: Path) -> None:
    found = rejected(PACKED[kind](tmp_path, {"good0.txt": b"x" * (2 << 20)} | GOOD))
    assert ["text of more than 1024 KiB" in reason for reason in found.values()] == [True]


ODD_RECORDS = [
    {"caption": "\ud800 lone"},
    {"caption": ["a", None, {"b": 1}, ["c"], 3, float("nan"), float("inf"), True]},
    {"caption": {"text": "x"}, "label": [1, 2]},
    {"label": float("nan"), "caption": float("-inf")},
    {"label": "\x1b]0;title\x07", "holdout": "\u202etest"},
    {"label": "\udc80", "holdout": "\udfff"},
    {"label": 10**400},
    {"holdout": 3, "label": True},
    {"__proto__": {}, "caption": "a\0b"},
]


@pytest.mark.parametrize("kind", ["folder", "tar", "jsonl"])
def test_odd_values_in_json_reach_nobody(kind: str, tmp_path: Path) -> None:
    files = {}
    for number, record in enumerate(ODD_RECORDS):
        files[f"good{number}.json"] = json.dumps(record).encode()
        files[f"good{number}.png"] = encode(noise(8, 8, seed=number))
    if kind == "jsonl":
        rows = [
            json.dumps({"file_name": f"good{number}.png"} | record)
            for number, record in enumerate(ODD_RECORDS)
        ]
        files = {name: data for name, data in files.items() if name.endswith("png")} | {
            "metadata.jsonl": "\n".join(rows).encode()
        }
    dataset = opened(PACKED["folder" if kind == "jsonl" else kind](tmp_path, files))
    assert len(dataset.entries) == len(ODD_RECORDS)
    assert len(dataset.fingerprint) == 64
    assert json.dumps(dataset.summary(), ensure_ascii=False).encode()
    assert all(name.isprintable() for name in (*dataset.categories, *dataset.named_holdouts))
    assert not any(
        "nan" in caption or "inf" in caption or "{" in caption
        for e in dataset.entries
        for caption in e.captions
    )


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".json"])
def test_texts_are_not_read_through_links_to_elsewhere(suffix: str, tmp_path: Path) -> None:
    secret = put(tmp_path, {"secret": b'{"caption": "root:x:0:0"}'}) / "secret"
    root = put(tmp_path / "photos", GOOD)
    (root / f"good0{suffix}").symlink_to(secret)
    (root / f"good1{suffix}").symlink_to("/dev/zero")
    assert "link to somewhere else" in rejected(Folder(str(root)))[f"good0{suffix}"]
    assert not any(entry.captions for entry in opened(Folder(str(root))).entries)


# Files that are none


@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".zip", ".npz"])
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)],
)
def test_a_pipe_device_or_loop_in_place_of_a_container_is_refused(
    suffix: str, make: Callable, tmp_path: Path
) -> None:
    make(str(tmp_path / f"x{suffix}"))
    with pytest.raises(DataError) as caught:
        source_at(str(tmp_path / f"x{suffix}")).listing()
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_pipes_loops_and_folders_among_the_files_are_passed_over(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    suffix = {"folder": ".png", "tar": ".tar", "parquet": ".parquet"}[kind]
    PACKED[kind](root if root.mkdir() or kind != "folder" else tmp_path, GOOD)
    os.mkfifo(root / f"pipe{suffix}")
    (root / f"folder{suffix}").mkdir()
    (root / "around").symlink_to(root, target_is_directory=True)
    (root / f"zero{suffix}").symlink_to("/dev/zero")
    assert rejected(source_at(str(root))) == {
        "around": "a link to a folder that is read under its own path",
        f"pipe{suffix}": "a pipe or device",
        f"zero{suffix}": "a pipe or device",
    }


def test_a_link_in_a_circle_is_left_out(tmp_path: Path) -> None:
    source = in_folder(tmp_path, GOOD)
    (tmp_path / "photos" / "a.png").symlink_to("b.png")
    (tmp_path / "photos" / "b.png").symlink_to("a.png")
    assert set(rejected(source)) == {"a.png", "b.png"}


def test_folders_deeper_than_a_path_may_be_long_do_no_harm(tmp_path: Path) -> None:
    source = in_folder(tmp_path, GOOD)
    handle = os.open(source.path, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=handle)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(os.open("deep.png", os.O_CREAT | os.O_WRONLY, dir_fd=handle))
    os.close(handle)
    assert len(rejected(source)) <= 1


@pytest.mark.parametrize("place", ["x" * 5000, "a\0b", "no/such/file.tar", "no.zip", "", "hub"])
def test_places_that_are_nowhere_are_refused(place: str) -> None:
    with pytest.raises(DataError) as caught:
        source_at(place).listing()
    assert caught.value.hint


# Parquet


def parquet_of(path: Path, columns: dict | list, **options) -> Parquet:
    names = None if isinstance(columns, dict) else [name for name, _ in columns]
    found = (
        pa.table(columns)
        if names is None
        else pa.Table.from_arrays([pa.array(v) for _, v in columns], names=names)
    )
    pq.write_table(found, path, **options)
    return Parquet(str(path))


GOOD_COLUMN = [{"bytes": data, "path": name} for name, data in GOOD.items()]


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"text": ["a"]}, "its columns are text"),
        ({"image": pa.array([], pa.binary())}, "holds no rows"),
        (
            [("image", GOOD_COLUMN), ("text", ["a"] * 3), ("text", ["b"] * 3)],
            "has two columns 'text'",
        ),
        ([("image", GOOD_COLUMN), ("image", GOOD_COLUMN)], "has two columns 'image'"),
        ({"a": [b"x"], "b": [b"y"]}, "name the column of encoded images"),
    ],
)
def test_tables_without_one_column_of_images_are_refused(
    columns: dict | list, what: str, tmp_path: Path
) -> None:
    assert_refused(parquet_of(tmp_path / "x.parquet", columns), what)


def test_columns_that_say_nothing_of_images_are_not_read(tmp_path: Path) -> None:
    broken = pa.array([b"\xff\xfe", b"a", b"b"], pa.binary()).view(pa.string())
    late = pa.array([2**62, 0, -(2**62)], pa.timestamp("us"))
    columns = {"image": GOOD_COLUMN, "when": late, "notes": broken, "deep": [[[[["x"]]]]] * 3}
    assert rejected(parquet_of(tmp_path / "x.parquet", columns)) == {}


def test_texts_that_are_no_utf8_refuse_the_table(tmp_path: Path) -> None:
    broken = pa.array([b"\xff\xfe", b"a", b"b"], pa.binary()).view(pa.string())
    assert_refused(
        parquet_of(tmp_path / "x.parquet", {"image": GOOD_COLUMN, "text": broken}), "utf-8"
    )


@pytest.mark.parametrize(
    "values",
    [
        [float("nan"), 1.0, None],
        [[None], [], ["a"]],
        [{"a": 1}] * 3,
        [b"x", b"", None],
        [[["deep"]], [], None],
    ],
)
@pytest.mark.parametrize("column", ["text", "label", "holdout"])
def test_columns_of_odd_types_do_no_harm(column: str, values: list, tmp_path: Path) -> None:
    dataset = opened(parquet_of(tmp_path / "x.parquet", {"image": GOOD_COLUMN, column: values}))
    assert len(dataset.entries) == 3
    assert "nan" not in dataset.categories


def test_a_label_that_became_a_float_for_gaps_keeps_its_name(tmp_path: Path) -> None:
    dataset = opened(
        parquet_of(tmp_path / "x.parquet", {"image": GOOD_COLUMN, "label": [3.0, None, 10.0]})
    )
    assert [entry.category for entry in dataset.entries] == ["3", None, "10"]


def test_a_row_with_a_huge_caption_is_listed(tmp_path: Path) -> None:
    column = [*GOOD_COLUMN, {"bytes": IMAGE, "path": "more.png"}]
    source = parquet_of(
        tmp_path / "x.parquet", {"image": column, "text": ["a", "b", "c", "x" * (2 << 20)]}
    )
    assert rejected(source) == {"more.png": "text of more than 1024 KiB"}


@pytest.mark.parametrize(
    "features",
    [
        b"\xff",
        b"[" * 10_000,
        b"[]",
        b"{}",
        b'{"info": {"features": 3}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": {"a": 1}}}}}',
    ],
)
def test_damaged_notes_on_label_names_leave_numbers(features: bytes, tmp_path: Path) -> None:
    found = pa.table({"image": GOOD_COLUMN, "label": [0, 1, 99]}).replace_schema_metadata(
        {"huggingface": features}
    )
    pq.write_table(found, tmp_path / "x.parquet")
    assert opened(Parquet(str(tmp_path / "x.parquet"))).categories == ("0", "1", "99")


def test_empty_cells_and_paths_to_elsewhere_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, {"secret.png": IMAGE})
    odd = [
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"", "path": "e"},
    ]
    found = rejected(parquet_of(tmp_path / "x.parquet", {"image": [*GOOD_COLUMN, *odd]}))
    assert sorted(found.values()) == ["empty file", *["the cell holds no bytes"] * 3]


def test_a_table_of_too_many_rows_or_too_large_groups_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parquet_of(tmp_path / "x.parquet", {"image": GOOD_COLUMN})
    monkeypatch.setattr(parquet, "MAX_ROWS", 2)
    assert_refused(source, "over 2 rows")
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    assert_refused(source, "row group 0 is over")


# Hugging Face's save_to_disk


def saved(path: Path, column: list[dict]) -> HuggingFace:
    """A dataset folder as an attacker writes it: any cells."""
    import datasets

    path.mkdir()
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    found = pa.table(
        {"image": pa.array(column, features["image"].pa_type), "text": ["x"] * len(column)}
    )
    with pa.ipc.new_stream(path / "data.arrow", found.schema) as stream:
        stream.write_table(found)
    state = {
        "_data_files": [{"filename": "data.arrow"}],
        "_fingerprint": "x",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {
        "features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    }
    put(
        path,
        {"state.json": json.dumps(state).encode(), "dataset_info.json": json.dumps(info).encode()},
    )
    return HuggingFace(path=str(path))


def test_cells_of_a_saved_dataset_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    put(tmp_path, {"secret.png": IMAGE})
    paths = [
        tmp_path / "secret.png",
        "/dev/zero",
        tmp_path / "pipe",
        "../secret.png",
        "/etc/passwd",
        tmp_path / "ds" / ".." / "secret.png",
    ]
    column = [
        *({"bytes": data, "path": None} for data in GOOD.values()),
        *({"bytes": None, "path": str(path)} for path in paths),
    ]
    entries = saved(tmp_path / "ds", column).listing().entries
    assert [entry.image.read() for entry in entries[:3]] == [*GOOD.values()]
    for entry in entries[3:]:
        with pytest.raises(OSError, match="is not a file of the dataset"):
            entry.image.read()


def test_cells_of_a_saved_dataset_may_name_files_beside_it(tmp_path: Path) -> None:
    source = saved(
        tmp_path / "ds", [{"bytes": None, "path": str(tmp_path / "ds" / name)} for name in GOOD]
    )
    put(tmp_path / "ds", GOOD)
    assert len(opened(source).entries) == 3


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data.arrow"])
@pytest.mark.parametrize("damage", ["empty", "cut", "nested", "noise"])
def test_a_damaged_saved_dataset_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "ds", [{"bytes": data, "path": None} for data in GOOD.values()])
    path = tmp_path / "ds" / name
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": data[: len(data) // 3],
            "nested": b"[" * 10_000,
            "noise": bytes(range(256)) * 9,
        }[damage]
    )
    assert_refused(source, "cannot be loaded|one of them must")


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"b": datasets.Dataset.from_dict({"x": [1]})}).save_to_disk(
        str(tmp_path / "ds")
    )
    assert_refused(HuggingFace(path=str(tmp_path / "ds")), "no split 'train'; it has b")


# Damage anywhere

WHOLE = {
    "tar": lambda root: containers.webdataset(root / "x.tar"),
    "zip": lambda root: containers.edm_zip(root / "x.zip"),
    "deflated zip": lambda root: containers.zipped(
        root / "x.zip", containers.images() | containers.sidecars("json"), zipfile.ZIP_DEFLATED
    ),
    "npz": lambda root: containers.npz(root / "x.npz"),
    "deflated npz": lambda root: containers.npz(root / "x.npz", compressed=True),
    "parquet": lambda root: containers.table(root / "x.parquet"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_container_cut_anywhere_is_refused_or_rejects_are_listed(
    kind: str, tmp_path: Path
) -> None:
    path = WHOLE[kind](tmp_path)
    whole = path.read_bytes()
    # a tar ends in zeros, which nobody misses
    end = len(whole.rstrip(b"\0")) if kind == "tar" else len(whole)
    for share in (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999):
        path.write_bytes(whole[: int(end * share)])
        try:
            dataset = opened(source_at(str(path)))
        except DataError as error:
            assert str(path) in error.where  # noqa: PT017
            assert error.hint  # noqa: PT017
        else:
            assert dataset.rejects, share


@pytest.mark.parametrize("kind", WHOLE)
def test_bytes_changed_anywhere_raise_nothing_but_errors_with_a_remedy(
    kind: str, tmp_path: Path
) -> None:
    path = WHOLE[kind](tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for round_ in range(60):
        data = bytearray(whole)
        for _ in range(1 + round_ % 4):
            place = (
                int(rng.integers(len(data)))
                if round_ % 2
                else len(data) - 1 - int(rng.integers(min(len(data), 900)))
            )
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            opened(source_at(str(path)))
        except DataError as error:
            assert error.hint  # noqa: PT017


# Memory


def repeated(value: bytes | str, times: int) -> pa.DictionaryArray:
    """A column that is one value over and over, and takes its room once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), pa.array([value]))


def bombs(root: Path) -> dict[str, str]:
    """Small files that stand for much, and what is said of each."""
    small = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    parquet_of(root / "images.parquet", {"image": repeated(IMAGE + bytes(60_000_000), 40)}, **small)
    parquet_of(
        root / "texts.parquet",
        {"image": repeated(IMAGE, 20_000), "text": repeated("x" * 1_000_000, 20_000)},
        **small,
    )
    npz_of(root / "shape.npz", images=header("(99999999999999, 4294967296, 4294967296, 1)"))
    npz_of(root / "labels.npz", images=PIXELS, labels=header("(99999999999,)"))
    (root / "zip").mkdir()
    in_deflated_zip(root / "zip", {"bomb.png": bytes(250 << 20)})
    (root / "tar").mkdir()
    tar_of(root / "tar" / "x.tar", signed_size(10**13))
    return {
        "images.parquet": "40 entries, 40 read, 0 rejects",
        "texts.parquet": "texts unpack to over 200 times",
        "shape.npz": "pixels of shape",
        "labels.npz": "is not a complete .npz",
        "zip/x.zip": "holds no images",
        "tar/x.tar": "holds no images",
    }


PROGRAM = """
import resource, sys
from sfumato.data import source_at
from sfumato.errors import DataError
import pyarrow.parquet
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29),) * 2)
for name in sys.argv[1:]:
    try:
        found = source_at(name).listing()
        read = sum(len(entry.image.read()) > 0 for entry in found.entries)
        print(len(found.entries), "entries,", read, "read,", len(found.rejects), "rejects")
    except DataError as error:
        print(error.what)
"""


def test_bombs_stay_below_a_cap_on_memory(tmp_path: Path) -> None:
    """1.5 GiB above what importing takes, of which threads reserve some; let through, each would
    need far more.
    """
    expected = bombs(tmp_path)
    command = [sys.executable, "-c", PROGRAM, *(str(tmp_path / name) for name in expected)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for said, what in zip(result.stdout.splitlines(), expected.values(), strict=True):
        assert re.search(what, said), (said, what)
