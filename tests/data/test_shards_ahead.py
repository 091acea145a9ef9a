"""Shards behind an address while a run trains: fetched ahead, each once in an epoch, retried, and never
another sample in silence.
"""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from sfumato.data import DataConfig, Dataset, WebDataset, files, index, parallel, remote
from sfumato.data.loader import batches
from sfumato.data.shards_ahead import ShardsAhead
from sfumato.distributed import World
from sfumato.errors import DataError
from sfumato.storage.cache_folder import cache_folder
from sfumato.training.supply import Supply
from tests.helpers.image_bytes import encode, noise

fsspec = pytest.importorskip("fsspec")
SHARDS, EACH, SIDE, BATCH = 8, 12, 8, 4
URL = "memory://bucket/set"


def tar(number: int, *, first: int = 0) -> bytes:
    """A shard of images, none of which is in another."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for place in range(EACH):
            data = encode(noise(SIDE, SIDE, seed=1000 * number + place + first))
            info = tarfile.TarInfo(f"{number:02d}{place:02d}.png")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Store:
    """A store behind memory://, whose answers to reads may be harmed."""

    def __init__(self, system: Any) -> None:
        self.system = system
        self.fetched: list[str] = []
        self.harm: Callable[[str, Any], Any] = lambda name, file: file

    def put(self, number: int, data: bytes) -> None:
        self.system.pipe_file(f"/bucket/set/{number:02d}.tar", data)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)
    monkeypatch.setattr(parallel, "MIN_FORKED", 10**9)  # what is fetched here is counted
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    result, real = Store(system), MemoryFileSystem._open

    def spied(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        file = real(self, path, mode, **options)
        if "r" not in mode:
            return file
        name = path.rpartition("/")[2]
        result.fetched.append(name)
        return result.harm(name, file)

    monkeypatch.setattr(MemoryFileSystem, "_open", spied)
    for number in range(SHARDS):
        result.put(number, tar(number))
    yield result
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def opened(**options: Any) -> Dataset:
    """The set, whose images are decoded as they are used."""
    return index(
        DataConfig(
            source=WebDataset(URL), resolution=SIDE, cache="off", memory_gib=0.0, holdout=0.1,
            near_duplicates="off", **options,
        )
    )  # fmt: skip


def limit(monkeypatch: pytest.MonkeyPatch, shards: float) -> None:
    """Let the disk hold so many shards."""
    monkeypatch.setenv("SFUMATO_REMOTE_GIB", str(shards * len(tar(0)) / 2**30))


def epochs(dataset: Dataset, count: int, say: Callable[[str], None] = print) -> list[np.ndarray]:
    """The batches of some epochs, as training gets them."""
    plan = dataset.plan(seed=0, batch_size=BATCH)
    supply = Supply(dataset, plan, start=0, say=say, world=World())
    found = []
    for _ in range(count * plan.size // BATCH):
        batch = next(supply)
        assert not batch.bad
        for future in supply._ahead._begun.values():  # a step takes a while
            future.exception(30)
        found.append(np.concatenate([group.images.numpy() for group in batch.groups]))
    supply.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_each_shard_is_fetched_once_in_an_epoch_where_the_disk_holds_two_windows(
    store: Store, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    dataset = opened(shuffle="window", window=2, workers=workers)
    assert dataset.shards.tolist() == sorted(dataset.shards)
    assert len(dataset.shards) == SHARDS
    limit(monkeypatch, 4.5)
    shutil.rmtree(cache_folder() / "remote")
    store.fetched.clear()
    said: list[str] = []
    epochs(dataset, 3, said.append)
    times = Counter(store.fetched)
    assert not said
    # the last window of the third epoch is followed by the first of the fourth, and a shard that is in
    # the last window of an epoch and the first of the next stays
    assert sum(times.values()) <= 3 * SHARDS + 2
    assert max(times.values()) <= 4
    if not workers:  # which fetch what they come to before this process
        assert sum(times.values()) >= 3 * SHARDS - 2 * 4


def test_in_one_random_order_shards_are_fetched_again_and_again_and_it_is_said(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened()
    limit(monkeypatch, 4.5)
    shutil.rmtree(cache_folder() / "remote")
    store.fetched.clear()
    said: list[str] = []
    epochs(dataset, 1, said.append)
    assert len(store.fetched) > 2 * SHARDS
    assert "data.shuffle=window" in said[0]


def test_a_disk_that_does_not_hold_two_windows_is_said(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(shuffle="window", window=3)
    shutil.rmtree(cache_folder() / "remote")
    limit(monkeypatch, 3.5)
    said: list[str] = []
    epochs(dataset, 2, said.append)
    assert len(said) == 1
    assert "lower data.window" in said[0]


def test_windows_and_ways_of_reading_give_the_same_batches(store: Store) -> None:
    expected = epochs(opened(shuffle="window", window=2), 2)
    for options in ({"workers": 2}, {"cache": "auto"}):
        config = DataConfig(
            source=WebDataset(URL), resolution=SIDE, holdout=0.1, near_duplicates="off",
            memory_gib=0.0, shuffle="window", window=2, **{"cache": "off"} | options,
        )  # fmt: skip
        found = epochs(index(config), 2)
        assert all((ours == theirs).all() for ours, theirs in zip(found, expected, strict=True))


class Cut:
    """A file that ends early."""

    def __init__(self, file: Any, most: int) -> None:
        self.size, self._data = file.size, io.BytesIO(file.read()[:most])

    def read(self, count: int = -1) -> bytes:
        return self._data.read(count)

    def __enter__(self) -> Cut:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Reset(Cut):
    """A file whose connection is lost."""

    def read(self, count: int = -1) -> bytes:
        if data := super().read(1000):
            return data
        raise ConnectionResetError("reset by peer")


@pytest.mark.parametrize("kind", [Cut, Reset])
def test_what_a_store_breaks_off_is_fetched_again(store: Store, kind: type[Cut]) -> None:
    expected = epochs(opened(shuffle="window", window=2), 1)
    shutil.rmtree(cache_folder() / "remote")
    failed: Counter[str] = Counter()

    def harm(name: str, file: Any) -> Any:
        failed[name] += 1
        return file if failed[name] > 2 else kind(file, 2000)

    store.harm = harm
    found = epochs(opened(shuffle="window", window=2), 1)
    assert all((ours == theirs).all() for ours, theirs in zip(found, expected, strict=True))
    assert min(failed.values()) == 3


def test_files_are_fetched_where_there_are_no_locks(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfumato.platform.fcntl", None)
    assert files.local(f"{URL}/00.tar").read_bytes() == tar(0)


def test_a_store_that_is_gone_ends_reading_and_leaves_out_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(shuffle="window", window=2)
    shutil.rmtree(cache_folder() / "remote")
    store.harm = lambda name, file: Reset(file, 0)
    with pytest.raises(DataError, match="cannot be reached: ConnectionResetError"):
        epochs(dataset, 1)
    with pytest.raises(DataError, match="cannot be reached"):
        opened()


def test_a_shard_that_has_changed_gives_no_other_samples_in_silence(store: Store) -> None:
    dataset = opened(shuffle="window", window=2)
    shutil.rmtree(cache_folder() / "remote")
    known = {
        image.tobytes() for image in dataset.images(np.arange(len(dataset.entries))).pixels.numpy()
    }
    shutil.rmtree(cache_folder() / "remote")
    store.put(3, tar(3, first=500))
    plan = dataset.plan(seed=0, batch_size=BATCH)
    bad, supply = [], Supply(dataset, plan, start=0, say=print, world=World())
    for _ in range(plan.size // BATCH):
        batch = next(supply)
        bad += batch.bad
        for group in batch.groups:
            pixels = np.rint((group.images.numpy() + 1) * 127.5).astype(np.uint8)
            assert all(image.tobytes() in known for image in pixels)
    supply.close()
    assert {reject.name.partition(":")[0] for reject in bad} == {"03.tar"}
    trained = [dataset.entries[place].name for place in dataset.training]
    assert len({reject.name for reject in bad}) == sum("03.tar" in name for name in trained)


def test_a_shard_that_is_gone_is_a_loss_that_is_listed(store: Store) -> None:
    dataset = opened(shuffle="window", window=2)
    shutil.rmtree(cache_folder() / "remote")
    store.system.rm("/bucket/set/03.tar")
    plan = dataset.plan(seed=0, batch_size=BATCH)
    bad = []
    for _, batch in zip(range(plan.size // BATCH), batches(dataset, plan, start=0), strict=False):
        bad += batch.bad
    assert {reject.name.partition(":")[0] for reject in bad} == {"03.tar"}


def test_shards_come_before_they_are_needed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened(shuffle="window", window=2)
    shutil.rmtree(cache_folder() / "remote")
    plan = dataset.plan(seed=0, batch_size=BATCH)
    store.fetched.clear()
    ahead = ShardsAhead(dataset, plan, say=print)
    ahead.follow(0)
    for future in ahead._begun.values():
        future.result(30)
    ahead.close()
    order = [f"{shard:02d}.tar" for shards in plan.upcoming(0, 2) for shard in shards]
    assert sorted(store.fetched) == sorted(order)
    monkeypatch.setattr(remote, "_fetch_once", lambda *arguments: pytest.fail("fetched late"))
    for step in range(plan.upcoming(0, 1)[0].size * EACH // 2 // BATCH):
        dataset.images(dataset.epoch[plan.batch(step)])


class Quiet(SimpleHTTPRequestHandler):
    """A server whose first answers to each path are cut short."""

    asked: ClassVar[Counter[str]] = Counter()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send half of a file at first, and then all of it."""
        self.asked[self.path] += 1
        data = source.read()
        outputfile.write(data[: len(data) // 2] if self.asked[self.path] == 1 else data)


def test_a_tar_behind_http_that_is_cut_short_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)
    place = tmp_path / "served"
    place.mkdir()
    (place / "a.tar").write_bytes(tar(0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(place)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/a.tar"
        config = DataConfig(source=WebDataset(url), resolution=SIDE, cache="off")
        there = index(config)
    finally:
        server.shutdown()
    here = index(DataConfig(source=WebDataset(str(place / "a.tar")), resolution=SIDE, cache="off"))
    assert there.fingerprint == here.fingerprint
    assert Quiet.asked["/a.tar"] >= 2


def test_readers_that_are_killed_while_they_hold_a_lock_hold_nothing_up(store: Store) -> None:
    dataset = opened(shuffle="window", window=2, workers=2)
    plan = dataset.plan(seed=0, batch_size=BATCH)
    supply = Supply(dataset, plan, start=0, say=print, world=World())
    next(supply)
    iterator: Any = supply._batches
    held = iterator._workers_done_event._cond  # as by a reader that looks whether it shall end
    assert held.acquire(timeout=30)
    closing = threading.Thread(target=supply.close, daemon=True)
    del iterator
    closing.start()
    closing.join(30)
    assert not closing.is_alive()


class Gated:
    """A file whose bytes come while a gate is open."""

    def __init__(self, file: Any, gate: threading.Event, begun: threading.Event) -> None:
        self._file, self._gate, self._begun, self.size = file, gate, begun, None

    def read(self, count: int = -1) -> bytes:
        self._begun.set()
        self._gate.wait(30)
        return self._file.read(100)

    def __enter__(self) -> Gated:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def gated(store: Store) -> tuple[ShardsAhead, threading.Event]:
    """A set whose first window is being fetched, and the gate by which the bytes come."""
    dataset = opened(shuffle="window", window=2)
    shutil.rmtree(cache_folder() / "remote")
    gate, begun = threading.Event(), threading.Event()
    store.harm = lambda name, file: Gated(file, gate, begun)
    ahead = ShardsAhead(dataset, dataset.plan(seed=0, batch_size=BATCH), say=print)
    ahead.follow(0)
    assert begun.wait(30)
    return ahead, gate


def test_a_pause_waits_also_for_what_is_no_longer_wanted(store: Store) -> None:
    ahead, gate = gated(store)
    running = set(ahead._running)
    ahead.follow(ahead._plan.size - 1)  # which wants other shards
    threading.Timer(0.1, gate.set).start()
    ahead.pause()
    assert all(future.done() for future in running)
    ahead.close()


def test_what_is_being_fetched_at_the_end_is_given_up(store: Store) -> None:
    ahead, gate = gated(store)
    store.harm = lambda name, file: pytest.fail("fetched after the end")
    closing = threading.Thread(target=ahead.close)
    closing.start()
    while not ahead._stop.is_set():
        pass
    gate.set()
    closing.join(30)
    assert not closing.is_alive()
    assert [*(cache_folder() / "remote").iterdir()] == []


@pytest.mark.parametrize(
    ("window", "begun", "words"),
    [(SHARDS, 2, "a window holds"), (2, 1, "before there were windows"), (2, 2, "")],
)
def test_windows_that_change_nothing_are_said(
    store: Store, window: int, begun: int, words: str
) -> None:
    dataset = opened(shuffle="window", window=window)
    plan = replace(dataset.plan(seed=0, batch_size=BATCH), version=begun)
    said: list[str] = []
    ShardsAhead(dataset, plan, say=said.append)
    assert plan.is_windowed == (not words)
    assert len(said) == bool(words)
    assert all(words in line for line in said)


class Refused(Exception):
    """An answer to an HTTP request, as aiohttp raises it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, message='no'")
        self.status = status


@pytest.mark.parametrize(
    "error",
    [
        SimpleNamespace(status=403),
        SimpleNamespace(code=403),
        SimpleNamespace(code="AccessDenied", response=SimpleNamespace(status_code=403)),
    ],
)
def test_the_status_of_an_answer_is_found_as_libraries_name_it(error: Any) -> None:
    assert remote._status_of(error) == 403
    assert remote._status_of(SimpleNamespace(status="403")) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://host/images/", True),
        ("https://host/a.tar", False),
        ("https://host/a.tar?version=3", False),
        ("simplecache::https://host/images/", True),
        ("zip://x::https://host/a.zip", False),
        ("s3://bucket/images", False),
    ],
)
def test_pages_that_list_files_say_nothing_of_these(url: str, expected: bool) -> None:
    assert files.is_page(url) == expected


@pytest.mark.parametrize("status", [400, 403, 404, 410, 451])
def test_a_file_that_a_server_refuses_is_asked_for_once_and_is_one_that_cannot_be_read(
    store: Store, status: int
) -> None:
    store.fetched.clear()

    def harm(name: str, file: Any) -> Any:
        raise Refused(status)

    store.harm = harm
    with pytest.raises(OSError, match=rf"memory://bucket/set/00.tar: {status}"):
        files.local(f"{URL}/00.tar")
    assert store.fetched == ["00.tar"]


@pytest.mark.parametrize("status", [401, 408, 425, 429, 500, 503])
def test_an_answer_that_may_pass_is_waited_for(store: Store, status: int) -> None:
    left = [Refused(status)] * (remote.ATTEMPTS - 1)

    def harm(name: str, file: Any) -> Any:
        if left:
            raise left.pop()
        return file

    store.harm = harm
    assert files.local(f"{URL}/00.tar").read_bytes() == tar(0)
    left += [Refused(status)] * remote.ATTEMPTS
    with pytest.raises(DataError, match="cannot be reached"):
        files.local(f"{URL}/01.tar")


def test_a_full_disk_is_said_as_such(store: Store) -> None:
    def harm(name: str, file: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.harm = harm
    with pytest.raises(DataError, match="cannot be saved, since the disk is full") as caught:
        files.local(f"{URL}/00.tar")
    assert "SFUMATO_REMOTE_GIB" in caught.value.hint


def test_locks_are_a_fixed_number_of_files(store: Store) -> None:
    names = {hashlib.sha256(f"{URL}/{n}".encode()).hexdigest() for n in range(20_000)}
    assert len({name[: remote.LOCK_DIGITS] for name in names}) <= 4096
    files.local(f"{URL}/00.tar")
    assert {len(path.name) for path in (cache_folder() / "remote-locks").iterdir()} == {3}
