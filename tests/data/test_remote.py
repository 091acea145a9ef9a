"""Any source behind a URL reads as it does on this machine; what is fetched is bounded, and no
secret of the address is told.
"""

import json
import os
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sfumato.data import (
    DataConfig,
    Dataset,
    Folder,
    Npz,
    Parquet,
    WebDataset,
    Zip,
    files,
    index,
    remote,
    source_at,
)
from sfumato.data.listing import File
from sfumato.errors import DataError, redact_secrets
from tests.helpers import containers
from tests.helpers.containers import SAMPLES, SIDE
from tests.helpers.image_bytes import encode, noise

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "remote"


@pytest.fixture
def memory(home: Path) -> Iterator["fsspec.AbstractFileSystem"]:
    """Storage of nobody else's, behind memory://."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were fetched, in order."""
    from fsspec.implementations.memory import MemoryFileSystem

    seen: list[str] = []
    real = MemoryFileSystem._open

    def spy(self, path: str, mode: str = "rb", **options):
        if "r" in mode:
            seen.append(path)
        return real(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", spy)
    return seen


def upload(memory, local: Path, name: str) -> str:
    """A file or folder, in the storage."""
    if local.is_file():
        memory.pipe_file(f"/bucket/{name}", local.read_bytes())
    else:
        for path in local.rglob("*"):
            if path.is_file():
                memory.pipe_file(
                    f"/bucket/{name}/{path.relative_to(local).as_posix()}", path.read_bytes()
                )
    return f"memory://bucket/{name}"


def opened(place: str) -> Dataset:
    return index(DataConfig(source=source_at(place), resolution=SIDE, cache="off"))


def folder(root: Path, more: dict[str, bytes]) -> Path:
    return containers.put(root / "photos", containers.images() | more)


def shards(root: Path) -> Path:
    (root / "shards").mkdir()
    return containers.webdataset(root / "shards" / "shard-000000.tar").parent


SOURCES: dict[str, tuple[Callable[[Path], Path], str, type]] = {
    "folder": (lambda root: folder(root, containers.sidecars("txt")), "photos", Folder),
    "folder with metadata": (
        lambda root: folder(root, {"metadata.jsonl": containers.metadata_jsonl()}),
        "photos",
        Folder,
    ),
    "folder with a table": (
        lambda root: folder(root, {"metadata.parquet": containers.metadata_parquet()}),
        "photos",
        Folder,
    ),
    "tar": (lambda root: containers.webdataset(root / "x.tar"), "x.tar", WebDataset),
    "folder of tars": (shards, "shards", WebDataset),
    "parquet": (lambda root: containers.table(root / "x.parquet"), "x.parquet", Parquet),
    "zip": (lambda root: containers.edm_zip(root / "x.zip"), "x.zip", Zip),
    "deflated zip": (
        lambda root: containers.zipped(root / "x.zip", containers.images(), zipfile.ZIP_DEFLATED),
        "x.zip",
        Zip,
    ),
    "npz": (lambda root: containers.npz(root / "x.npz"), "x.npz", Npz),
    "deflated npz": (lambda root: containers.npz(root / "x.npz", compressed=True), "x.npz", Npz),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_behind_a_url_reads_as_on_this_machine(name: str, memory, tmp_path: Path) -> None:
    make, place, kind = SOURCES[name]
    local = make(tmp_path)
    url = upload(memory, local, place)
    assert isinstance(source_at(url), kind)
    here, there = opened(str(local)), opened(url)
    assert there.fingerprint == here.fingerprint
    assert [entry.name for entry in there.entries] == [entry.name for entry in here.entries]
    assert [entry.captions for entry in there.entries] == [entry.captions for entry in here.entries]
    assert there.categories == here.categories == ("cat", "dog")
    assert (
        there.images(np.arange(len(SAMPLES)))[0] == here.images(np.arange(len(SAMPLES)))[0]
    ).all()
    assert there.rejects == []


@pytest.mark.parametrize("name", SOURCES)
def test_each_file_is_fetched_once(name: str, memory, tmp_path: Path, fetched: list[str]) -> None:
    make, place, _ = SOURCES[name]
    url = upload(memory, make(tmp_path), place)
    opened(url)
    assert fetched
    assert len(fetched) == len(set(fetched))
    before = len(fetched)
    opened(url)
    assert len(fetched) == before


@pytest.mark.parametrize("name", SOURCES)
def test_what_had_to_leave_the_cache_is_fetched_again(
    name: str, memory, home: Path, tmp_path: Path
) -> None:
    make, place, _ = SOURCES[name]
    url = upload(memory, make(tmp_path), place)
    dataset = index(DataConfig(source=source_at(url), resolution=SIDE, cache="off", memory_gib=0.0))
    for path in home.iterdir():
        path.unlink()
    pixels, bad = dataset.images(np.arange(len(SAMPLES)))[:2]
    assert bad == []
    assert (pixels.numpy().transpose(0, 2, 3, 1) == np.stack([s.values for s in SAMPLES])).all()


def test_derived_notes_of_a_remote_tar_and_array_are_made_once(
    memory, home: Path, tmp_path: Path
) -> None:
    tar = upload(memory, containers.webdataset(tmp_path / "x.tar"), "x.tar")
    array = upload(memory, containers.npz(tmp_path / "x.npz", compressed=True), "x.npz")
    for _ in range(3):
        opened(tar)
        opened(array)
        time.sleep(0.01)
    assert len(list((home.parent / "tar-index").iterdir())) == 1
    assert len(list((home.parent / "arrays").iterdir())) == 1


def kept(home: Path) -> int:
    return sum(path.stat().st_size for path in home.iterdir())


def test_the_cache_stays_below_its_limit(
    memory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_REMOTE_GIB", str(25_000 / 2**30))
    for number in range(20):
        memory.pipe_file(f"/bucket/{number:02d}.png", encode(noise(40, 40, seed=number)))
        files.local(f"memory://bucket/{number:02d}.png")
        assert kept(home) <= 25_000
    assert kept(home) > 15_000


def test_the_file_used_longest_ago_leaves_first(
    memory, home: Path, monkeypatch: pytest.MonkeyPatch, fetched: list[str]
) -> None:
    monkeypatch.setenv("SFUMATO_REMOTE_GIB", str(3500 / 2**30))
    for name in "abcd":
        memory.pipe_file(f"/bucket/{name}", bytes(1000))
    for name in "abcadbc":
        files.local(f"memory://bucket/{name}")
        time.sleep(0.01)
    assert [path[-1] for path in fetched] == ["a", "b", "c", "d", "b", "c"]


def test_a_source_larger_than_the_cache_is_read_all_the_same(
    memory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_REMOTE_GIB", str(9000 / 2**30))
    for number in range(60):
        memory.pipe_file(f"/bucket/many/{number:02d}.png", encode(noise(30, 30, seed=number)))
    dataset = index(
        DataConfig(source=source_at("memory://bucket/many"), resolution=SIDE, cache="off")
    )
    assert len(dataset.entries) == 60
    assert dataset.rejects == []


def test_a_file_that_has_to_leave_before_it_is_opened_is_fetched_again(
    memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/bucket/a.png", b"image")
    real, told = files.local, []

    def local(path: str) -> Path:
        told.append(real(path))
        if len(told) == 1:
            told[0].unlink()
        return told[-1]

    monkeypatch.setattr(files, "local", local)
    assert File("memory://bucket/a.png").read() == b"image"
    assert len(told) == 2


def test_hidden_files_and_folders_behind_a_url_are_left_out(memory) -> None:
    for name in ("a.png", "b.png", ".hidden.png", ".git/x.png", "__MACOSX/y.png"):
        memory.pipe_file(f"/bucket/f/{name}", encode(noise(SIDE, SIDE, seed=len(name))))
    assert [entry.name for entry in source_at("memory://bucket/f/").listing().entries] == [
        "a.png",
        "b.png",
    ]


def test_metadata_behind_a_url_cannot_lead_elsewhere(memory) -> None:
    names = [
        "a.png",
        "../secret.png",
        "memory://bucket/secret.png",
        "/bucket/secret.png",
        "file:///etc/passwd",
    ]
    memory.pipe_file("/bucket/secret.png", encode(noise(SIDE, SIDE)))
    memory.pipe_file("/bucket/f/a.png", encode(noise(SIDE, SIDE, seed=1)))
    memory.pipe_file(
        "/bucket/f/metadata.jsonl",
        "\n".join(json.dumps({"file_name": name}) for name in names).encode(),
    )
    listing = source_at("memory://bucket/f").listing()
    assert [entry.name for entry in listing.entries] == ["a.png"]
    assert len(listing.rejects) == 4


@pytest.mark.parametrize("kind", [Folder, WebDataset, Parquet, Zip, Npz])
def test_what_is_not_there_is_an_error_that_names_it(kind: type, memory) -> None:
    with pytest.raises(DataError, match="no such") as caught:
        kind("memory://bucket/nothing").listing()
    assert "memory://bucket/nothing" in caught.value.where
    assert caught.value.hint


@pytest.mark.parametrize(
    "place",
    ["memory://bucket/nothing", "memory://bucket/no.tar", "memory://", "memory://bucket/no.zip"],
)
def test_an_address_of_nothing_is_refused(place: str, memory) -> None:
    with pytest.raises(DataError) as caught:
        source_at(place).listing()
    assert caught.value.hint


def test_a_image_that_vanishes_is_left_out(memory, home: Path) -> None:
    for number in range(4):
        memory.pipe_file(f"/bucket/f/{number}.png", encode(noise(SIDE, SIDE, seed=number)))
    source = Folder("memory://bucket/f")
    listing = source.listing()
    memory.rm("/bucket/f/2.png")
    with pytest.raises(FileNotFoundError):
        listing.entries[2].image.read()
    assert len(opened("memory://bucket/f").entries) == 3


@pytest.mark.parametrize("place", ["nosuch://bucket/photos", "nosuch://bucket/x.tar"])
def test_an_unknown_protocol_names_what_to_install(place: str, home: Path) -> None:
    with pytest.raises(DataError, match=r"nothing here can open nosuch:// addresses") as caught:
        source_at(place).listing()
    assert "sfumato[remote]" in caught.value.hint


SECRETS = ("hunter2", "SIGNED123", "AKIA999")
URL = "vault://alice:hunter2@host/photos{}?X-Amz-Signature=SIGNED123&access_key=AKIA999&part=1"


class Denied(Exception):
    """What a storage raises on its own account, no OSError."""


def vault(error: Callable[[str], Exception], *, at: str) -> type:
    """A storage that fails at one question, and repeats the address while it does."""

    class Vault(fsspec.AbstractFileSystem):
        protocol = "vault"
        cachable = False

        def _fail(self, question: str) -> None:
            if at in ("everything", question):
                raise error(URL.format(""))

        def info(self, path: str, **_: object) -> dict:
            self._fail("info")
            kind = (
                "file"
                if path.endswith((".png", ".tar", ".zip", ".npz", ".parquet")) or "?" in path[:-80]
                else "directory"
            )
            return {
                "name": path,
                "size": 10,
                "type": "file" if "." in path.partition("?")[0][-8:] else kind,
            }

        def isdir(self, path: str) -> bool:
            self._fail("isdir")
            return self.info(path)["type"] == "directory"

        def exists(self, path: str, **_: object) -> bool:
            self._fail("exists")
            return True

        def find(self, path: str, **_: object) -> list[str]:
            self._fail("find")
            return [f"{path}/{number}.png" for number in range(3)]

        def _open(self, path: str, mode: str = "rb", **_: object):
            self._fail("open")
            raise error(URL.format(""))

    return Vault


@pytest.fixture
def failing(home: Path) -> Iterator[Callable[..., None]]:
    def install(error: Callable[[str], Exception], at: str) -> None:
        remote.filesystem.cache_clear()
        fsspec.register_implementation("vault", vault(error, at=at), clobber=True)

    yield install
    remote.filesystem.cache_clear()
    fsspec.register_implementation("vault", fsspec.AbstractFileSystem, clobber=True)


ERRORS: list[Callable[[str], Exception]] = [
    PermissionError,
    Denied,
    TimeoutError,
    RuntimeError,
    lambda url: FileNotFoundError(2, "gone", url),
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("at", ["exists", "isdir", "find", "open", "everything"])
@pytest.mark.parametrize("suffix", ["", ".tar", ".parquet", ".zip", ".npz"])
def test_a_storage_that_refuses_is_an_error_without_its_secrets(
    suffix: str, at: str, error: Callable, failing: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)
    failing(error, at)
    with pytest.raises(DataError) as caught:
        opened(URL.format(suffix))
    shown = (
        "".join(traceback.format_exception_only(caught.value))
        + repr(caught.value.args)
        + caught.value.where
    )
    assert not any(secret in shown for secret in SECRETS), shown
    assert "vault://***@host/photos" in shown
    assert caught.value.hint


@pytest.mark.parametrize("error", ERRORS)
def test_a_image_that_cannot_be_fetched_is_an_error_without_secrets(
    error: Callable, failing: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)
    failing(error, "open")
    entries = Folder(URL.format("")).listing().entries
    assert len(entries) == 3
    for entry in entries:
        with pytest.raises((DataError, OSError), match="vault") as caught:
            entry.image.read()
        # a store that lacks or refuses one file is not one that cannot be reached
        assert isinstance(caught.value, OSError) == (error in (ERRORS[0], ERRORS[-1]))
        assert not any(secret in str(caught.value) for secret in SECRETS)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/a", "s3://***@bucket/a"),
        ("https://host/a?sig=abc%3D&x=1", "https://host/a?sig=***&x=1"),
        (
            "https://host/a?x=1&X-Amz-Credential=abc&X-Amz-Security-Token=d/e",
            "https://host/a?x=1&X-Amz-Credential=***&X-Amz-Security-Token=***",
        ),
        ("simplecache::https://u:p@host/a", "simplecache::https://***@host/a"),
        ("two: ftp://a:b@c/d and sftp://e:f@g/h", "two: ftp://***@c/d and sftp://***@g/h"),
        ("photos/me@home.png", "photos/me@home.png"),
        ("https://host/@me/photo?name=x", "https://host/@me/photo?name=x"),
        ("", ""),
    ],
)
def test_only_secrets_are_struck_out(text: str, shown: str) -> None:
    assert redact_secrets(text) == shown


def test_an_interrupted_download_leaves_nothing(
    memory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/bucket/a", bytes(5000))
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)

    def broken(*_: object) -> None:
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "_make_room", broken)
        with pytest.raises(DataError, match="reset by peer"):
            files.local("memory://bucket/a")
    assert list(home.iterdir()) == []
    assert files.local("memory://bucket/a").read_bytes() == bytes(5000)


def test_addresses_in_chains_are_opened(memory, tmp_path: Path, home: Path) -> None:
    path = containers.zipped(tmp_path / "x.zip", containers.images())
    url = upload(memory, path, "x.zip")
    listing = source_at(f"simplecache::{url}").listing()
    assert [entry.image.read() for entry in listing.entries] == [s.image for s in SAMPLES]


def test_paths_that_look_like_addresses_are_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("C:", "a:b", "x"):
        containers.put(tmp_path / name, containers.images())
        assert len(opened(name).entries) == len(SAMPLES)
    assert len(opened(f"{tmp_path}//x").entries) == len(SAMPLES)
    assert os.listdir(tmp_path)


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    remote.filesystem.cache_clear()
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(DataError, match="nothing here can open memory://") as caught:
        source_at("memory://bucket/f")
    assert "sfumato[remote]" in caught.value.hint
    remote.filesystem.cache_clear()
