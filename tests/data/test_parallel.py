"""Work in threads and in processes gives the same, in order, whatever happens to a process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from sfumato.data import DataConfig, Folder, index, parallel
from sfumato.data.parallel import Tally, forked_map, ordered_map
from sfumato.errors import DataError
from tests.helpers.image_bytes import encode, noise

ITEMS = list(range(500))


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "MIN_FORKED", 5)
    monkeypatch.setattr(parallel, "cpu_count", lambda: 2)


def test_results_come_in_order_from_other_processes() -> None:
    found = list(forked_map(lambda item: (item * item, os.getpid()), ITEMS))
    assert [square for square, _ in found] == [item * item for item in ITEMS]
    assert os.getpid() not in {pid for _, pid in found}
    assert not multiprocessing.active_children()


def test_few_items_are_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "MIN_FORKED", len(ITEMS) + 1)
    assert set(forked_map(lambda item: os.getpid(), ITEMS)) == {os.getpid()}


def test_threads_do_the_work_where_forking_is_not_safe() -> None:
    found: list[int] = []
    thread = threading.Thread(
        target=lambda: found.extend(forked_map(lambda item: os.getpid(), ITEMS))
    )
    thread.start()
    thread.join()
    assert set(found) == {os.getpid()}


def test_another_process_does_the_work_of_one_that_is_killed(tmp_path: Path) -> None:
    def work(item: int) -> int:
        marker = tmp_path / str(item)
        if item in (17, 170, 333) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    assert list(forked_map(work, ITEMS)) == ITEMS
    assert len(list(tmp_path.iterdir())) == 3


def test_processes_that_die_each_time_are_an_error() -> None:
    def work(item: int) -> int:
        if item == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(DataError, match="died 4 times in a row"):
        list(forked_map(work, ITEMS))


@pytest.mark.parametrize("map_", [ordered_map, forked_map])
def test_an_error_of_the_work_is_raised(map_) -> None:  # type: ignore[no-untyped-def]
    def work(item: int) -> int:
        if item == 99:
            raise ValueError("ninety-nine")
        return item

    done = []
    with pytest.raises(ValueError, match="ninety-nine"):
        done.extend(map_(work, ITEMS))
    assert not multiprocessing.active_children()


def test_an_error_of_ours_arrives_whole() -> None:
    def work(item: int) -> int:
        raise DataError("is damaged", where="a.tar", hint="download it again")

    with pytest.raises(DataError, match="is damaged") as caught:
        list(forked_map(work, ITEMS, chunk=1))
    assert (caught.value.where, caught.value.hint) == ("a.tar", "download it again")


def test_an_index_made_by_processes_is_that_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "set"
    place.mkdir()
    for number in range(60):
        (place / f"{number:02d}.png").write_bytes(encode(noise(16, 16, seed=number // 2)))
    (place / "cut.png").write_bytes(b"\x89PNG cut")
    found = []
    for most in (10**9, 5):
        monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / f"cache {most}"))
        monkeypatch.setattr(parallel, "MIN_FORKED", most)
        dataset = index(DataConfig(source=Folder(str(place)), resolution=16))
        pixels = dataset.images(np.arange(60)).pixels.numpy().tobytes()
        found.append((dataset.fingerprint, dataset.ids, pixels, dataset.summary()))
    assert found[0] == found[1]


def test_a_process_that_is_killed_while_it_counts_holds_up_no_other() -> None:
    tally, context = Tally(), multiprocessing.get_context("fork")

    def count(times: int) -> None:
        while times:
            tally.add()
            times -= 1

    endless = context.Process(target=count, args=(-1,))
    endless.start()
    while not tally.count:
        pass
    endless.kill()
    endless.join()
    before = tally.count
    others = [context.Process(target=count, args=(1000,)) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join(30)
        assert process.exitcode == 0
    assert tally.count == before + 3000
    assert tally.add()
    tally.stop()
    assert not tally.add()
