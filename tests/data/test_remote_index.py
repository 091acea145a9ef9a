"""A second start on images behind an address fetches nothing that has not changed, and nothing stale is
used.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from sfumato.data import (
    DataConfig,
    Dataset,
    Folder,
    WebDataset,
    files,
    index,
    index_store,
    loader,
    parallel,
    remote,
    source_at,
    source_state,
)
from sfumato.data.pixel_store import PartTask
from sfumato.errors import DataError
from sfumato.storage.cache_folder import cache_folder
from tests.helpers import containers
from tests.helpers.image_bytes import encode, noise

URL, SHARDS, EACH = "memory://bucket/set", 3, 4


def tar(first: int) -> bytes:
    """A shard of images with captions."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for number in range(first, first + EACH):
            image = encode(noise(16, 16, seed=number))
            for suffix, data in (("png", image), ("txt", f"image {number:03d}".encode())):
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def keeps_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep what is made fast, of files that were changed just now."""
    monkeypatch.setattr(index_store, "SLOW_S", -1.0)
    monkeypatch.setattr(source_state, "RECENT_NS", -(10**18))
    monkeypatch.setattr(parallel, "MIN_FORKED", 10**9)
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_signs", {})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the files of the store that were opened."""
    from fsspec.implementations.memory import MemoryFileSystem

    system, real = fsspec.filesystem("memory"), MemoryFileSystem._open
    system.store.clear()
    names: list[str] = []

    def spied(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        if "r" in mode:
            names.append(path.rpartition("/")[2])
        return real(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", spied)
    for number in range(SHARDS):
        put(f"{number}.tar", tar(10 * number))
    yield names
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def put(name: str, data: bytes) -> None:
    fsspec.filesystem("memory").pipe_file(f"/bucket/set/{name}", data)


def indexed(**options: Any) -> Dataset:
    return index(DataConfig(source=WebDataset(URL), resolution=16, holdout=0.3, **options))


def test_a_second_start_fetches_nothing(opened: list[str]) -> None:
    first = indexed()
    assert Counter(opened) == {f"{number}.tar": 1 for number in range(SHARDS)}
    opened.clear()
    again = indexed()
    assert again.is_kept
    assert not opened
    assert again.fingerprint == first.fingerprint
    assert list(again.entries) == list(first.entries)
    assert list(again.captions()) == list(first.captions())


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_changed_shard_alone_is_fetched_again_and_no_stale_copy_is_used(
    opened: list[str], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = indexed(cache=cache)
    before = fsspec.filesystem("memory").info("/bucket/set/1.tar")
    put("1.tar", tar(50))
    assert fsspec.filesystem("memory").info("/bucket/set/1.tar")["size"] == before["size"]
    opened.clear()
    again = indexed(cache=cache)
    assert opened == ["1.tar"]
    assert not again.is_kept
    assert again.fingerprint != first.fingerprint
    names = {text for texts in again.captions() for text in texts}
    assert names == {f"image {n:03d}" for begin in (0, 50, 20) for n in range(begin, begin + EACH)}
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "other"))
    assert indexed(cache=cache).fingerprint == again.fingerprint


def test_added_and_removed_shards_are_found(opened: list[str]) -> None:
    indexed()
    put("7.tar", tar(70))
    fsspec.filesystem("memory").rm("/bucket/set/0.tar")
    opened.clear()
    again = indexed()
    assert opened == ["7.tar"]
    assert len(again.entries) == SHARDS * EACH
    assert {entry.image.path for entry in again.entries} == {f"{URL}/{n}.tar" for n in (1, 2, 7)}


def test_a_store_that_does_not_say_when_its_files_change_is_read_again(
    opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TIMES", ())
    first = indexed()
    again = indexed()
    assert not again.is_kept
    assert again.fingerprint == first.fingerprint
    assert max(Counter(opened).values()) == 1  # from the copies


def test_identities_are_of_the_place_and_its_sign(opened: list[str]) -> None:
    put("8.tar", tar(0))  # as 0.tar is
    entries = indexed().entries
    numbers = {source_state.Identities().of(entry.image) for entry in entries}
    assert None not in numbers
    assert len(numbers) == len(entries) == (SHARDS + 1) * EACH
    remote._signs.clear()
    assert source_state.Identities().of(entries[0].image) is None


def test_settings_of_a_source_share_keys_wherever_a_command_runs(
    opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed()
    opened.clear()
    monkeypatch.chdir(tmp_path)
    assert indexed().is_kept
    assert not opened


KINDS = {
    "zip": lambda path: containers.zipped(path, containers.images(), zipfile.ZIP_DEFLATED),
    "parquet": containers.table,
    "npz": containers.npz,
    "tar": containers.webdataset,
}


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize("options", [{}, {"cache": "off"}, {"verify": "always"}])
def test_what_was_replaced_is_read_anew_in_the_same_process(
    kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = KINDS[kind](tmp_path / f"x.{kind}")
    config = DataConfig(source=source_at(f"file://{place}"), resolution=8, **options)
    first = index(config)
    time.sleep(0.01)
    original = list(containers.SAMPLES)
    turned = [replace(sample, values=255 - sample.values) for sample in original]
    monkeypatch.setattr(containers, "SAMPLES", turned)
    place.unlink()
    KINDS[kind](place)
    again = index(config)
    assert not again.is_kept
    assert not set(again.ids) & set(first.ids)
    monkeypatch.setattr(remote, "_signs", {})  # as in another process
    assert list(index(config).ids) == list(again.ids)


def test_a_look_whether_anything_has_changed_changes_nothing_that_is_read(
    opened: list[str],
) -> None:
    state = source_state.state_of(WebDataset(URL))
    assert state is not None
    before = remote.known_signs()
    put("1.tar", tar(50))
    assert source_state.state_of(WebDataset(URL), notes=False) != state
    assert remote.known_signs() == before


def test_other_processes_read_the_same_versions(opened: list[str]) -> None:
    dataset = indexed(cache="off", memory_gib=0.0)
    known = remote.known_signs()
    assert len(known) == SHARDS
    reader = loader._Batches(dataset, dataset.plan(seed=0, batch_size=2), 0, 1)
    state = reader.__getstate__()
    remote._signs.clear()
    reader.__setstate__(dict(state))
    assert remote.known_signs() == known
    blobs = [entry.image for entry in dataset.entries]
    task = PartTask(blobs, dataset.pixel_format, str(cache_folder() / "pixels" / "x"), known)
    remote._signs.clear()
    opened.clear()
    assert task.read().count == len(blobs)
    assert not opened  # from the copies of this version


def test_images_that_a_store_refuses_are_asked_for_again(
    opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("memory").store.clear()
    for number in range(6):
        put(f"{number}.png", encode(noise(16, 16, seed=number)))
    config = DataConfig(source=Folder(URL), resolution=16)
    real = remote._fetch_once

    def refused(url: str, *others: Any) -> None:
        if url.endswith("3.png"):
            raise PermissionError("access denied")
        real(url, *others)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "_fetch_once", refused)
        assert len(index(config).entries) == 5
    whole = index(config)
    assert not whole.is_kept
    assert len(whole.entries) == 6
    assert index(config).is_kept


def test_nothing_is_kept_of_an_address_with_a_secret(opened: list[str]) -> None:
    source = WebDataset("memory://user:secret@bucket/set")
    assert source_state.state_of(source) is None


@pytest.mark.parametrize(
    ("facts", "text", "newest"),
    [
        ({"size": 3, "ETag": "abc", "LastModified": 5}, "size=3 ETag=abc", 0),
        ({"size": 3, "mtime": 1.5}, "size=3 mtime=1.5", 1_500_000_000),
        (
            {"size": 3, "Last-Modified": "Thu, 01 Jan 1970 00:00:02 GMT"},
            "size=3 Last-Modified=Thu, 01 Jan 1970 00:00:02 GMT",
            2_000_000_000,
        ),
        ({"size": 3, "modified": "lately"}, "", 0),
        ({"size": 3}, "", 0),
    ],
)
def test_signs_are_hashes_or_times_that_can_be_compared(
    facts: dict[str, Any], text: str, newest: int
) -> None:
    assert remote._sign(facts) == (text, newest)


class Served(SimpleHTTPRequestHandler):
    """A server that counts the bytes of files that it sends."""

    sent: ClassVar[Counter[str]] = Counter()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send a file."""
        data = source.read()
        self.sent[self.path] += len(data)
        outputfile.write(data)


def test_a_tar_behind_http_is_fetched_once_until_it_changes(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    place = tmp_path / "served"
    place.mkdir()
    (place / "a.tar").write_bytes(tar(0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Served, directory=str(place)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = DataConfig(
        source=WebDataset(f"http://127.0.0.1:{server.server_port}/a.tar"), resolution=16
    )
    try:
        first = index(config)
        sent = Served.sent["/a.tar"]
        assert sent >= (place / "a.tar").stat().st_size
        assert index(config).is_kept
        assert Served.sent["/a.tar"] == sent
        (place / "a.tar").write_bytes(tar(30))
        os.utime(place / "a.tar", (1e9, 1e9))
        changed = index(config)
        assert changed.fingerprint != first.fingerprint
        assert Served.sent["/a.tar"] > sent
        address = f"http://127.0.0.1:{server.server_port}"
        assert not files.exists(f"{address}/missing.tar")
        assert files.exists(f"{address}/a.tar")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(DataError, match="cannot be reached: ClientConnectorError"):
        files.exists(f"{address}/a.tar")


def test_single_files_behind_an_address_are_known_one_by_one(opened: list[str]) -> None:
    fsspec.filesystem("memory").store.clear()
    for number in range(6):
        put(f"{number}.png", encode(noise(16, 16, seed=number)))
    config = DataConfig(source=Folder(URL), resolution=16)
    index(config)
    opened.clear()
    assert index(config).is_kept
    put("3.png", encode(noise(16, 16, seed=90)))
    put("9.png", encode(noise(16, 16, seed=91)))
    assert len(index(config).entries) == 7
    assert sorted(set(opened)) == ["3.png", "9.png"]
    assert (cache_folder() / "keys").is_dir()
