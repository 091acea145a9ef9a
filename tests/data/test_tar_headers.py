"""What is read of a tar is what the standard library alone would have found, whole and damaged."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfumato.data.sources import webdataset

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = [
    "a.png",
    "b/" + 60 * "deep/" + "c.png",
    60 * "long" + ".png",
    "größer/ü.png",
    "./d.png",
    "with space .png",
    "e" * 100,
]


def packed(kind: str, *, names: list[str], mtime: float = 1.5) -> bytes:
    """A tar of small members, links, folders and a member with a record of its own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind]) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 37 * number, mtime  # type: ignore[assignment]
            if kind == "pax" and number == 1:
                info.pax_headers = {"comment": "kept"}
            try:
                tar.addfile(info, io.BytesIO(bytes(37 * number)))
            except ValueError:  # too long for this format
                continue
        for name, type_ in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type_, "a.png"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("last.png"), io.BytesIO())
    return buffer.getvalue()


def found(path: Path, monkeypatch: pytest.MonkeyPatch, *, fast: bool) -> object:
    with monkeypatch.context() as patch:
        if not fast:
            patch.setattr(webdataset, "plain_member", lambda *of: None)
        try:
            return webdataset._index(path)
        except (tarfile.TarError, OSError, ValueError) as error:
            return repr(error)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mtime", [1.5, 2.0, -1.0, 1e12])
def test_members_are_those_of_the_standard_library(
    kind: str, mtime: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(packed(kind, names=NAMES, mtime=mtime if kind == "pax" else 2))
    expected = found(path, monkeypatch, fast=False)
    assert found(path, monkeypatch, fast=True) == expected
    assert len(expected[0]) >= len(NAMES) - 2 + 1  # type: ignore[index]


def test_most_members_are_read_without_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "a.tar", []
    path.write_bytes(packed("pax", names=[f"{n}.png" for n in range(50)]))
    real = tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, "next", lambda tar: asked.append(1) or real(tar))
    assert len(webdataset._index(path)[0]) == 51
    assert len(asked) <= 6  # the first, the one with a record of its own, folder, link, and the end


def test_records_for_all_members_are_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(
        path, "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "other.png"}
    ) as tar:
        for name in ("a.png", "b.png"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    expected = found(path, monkeypatch, fast=False)
    assert found(path, monkeypatch, fast=True) == expected
    assert {member.name for member in expected[0]} == {"other.png"}  # type: ignore[index]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(sorted(FORMATS)),
    places=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    header=st.integers(0, 12),
    cut=st.none() | st.integers(0, 12_000),
)
def test_damaged_headers_are_read_as_the_standard_library_reads_them(
    kind: str, places: list[tuple[int, int]], header: int, cut: int | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = bytearray(packed(kind, names=NAMES[:4]))
    for place, value in places:
        data[min(len(data) - 1, 512 * header + place)] = value
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(data[:cut]))
    assert found(path, monkeypatch, fast=True) == found(path, monkeypatch, fast=False)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    field=st.sampled_from([(0, 100), (124, 12), (156, 1), (257, 8), (345, 155)]),
    content=st.binary(max_size=12) | st.sampled_from([b"-00000000017", b"0o17", b"1_0", b"\x80\0\0\0\0\0\0\0\0\0\0\x11", b"00000000009"]),
    number=st.integers(1, 4),
)  # fmt: skip
def test_any_header_with_a_right_checksum_is_read_as_the_standard_library_reads_it(
    field: tuple[int, int], content: bytes, number: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = bytearray(packed("ustar", names=["a.png", "b.png", "c.png", "d.png"], mtime=2))
    begin = sum(512 + -(-37 * before // 512) * 512 for before in range(number))
    place, length = field
    header = data[begin : begin + 512]
    header[place : place + length] = content[:length].ljust(length, b"\0")
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    data[begin : begin + 512] = header
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(data))
    assert found(path, monkeypatch, fast=True) == found(path, monkeypatch, fast=False)
