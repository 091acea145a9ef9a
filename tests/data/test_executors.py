"""Parts of a source that workers decode, in any order, anywhere, killed and begun again: the index is the
one that a single process makes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.data import (
    DataConfig,
    Dataset,
    Folder,
    index,
    indexing,
    parallel,
    pixel_store,
    prepare_by,
)
from sfumato.data.executors import Cluster, run_on_cluster
from sfumato.data.pixel_store import PartTask, ReadPart
from sfumato.errors import ConfigError, DataError
from tests.helpers.image_bytes import encode, noise
from tests.helpers.tasks import fail, killed_once

COUNT, SIDE = 60, 16
CLUSTERS = ["dask", "ray"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images, two of which are equal, and a file that is none."""
    place = tmp_path / "photos"
    place.mkdir()
    for number in range(COUNT):
        (place / f"{number:02d}.png").write_bytes(encode(noise(SIDE, SIDE, seed=number or 1)))
    (place / "cut.png").write_bytes(b"\x89PNG cut")
    return place


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "MIN_PART", 7)


def config(photos: Path) -> DataConfig:
    return DataConfig(source=Folder(str(photos)), resolution=SIDE)


def content(dataset: Dataset) -> Any:
    pixels = dataset.images(np.arange(len(dataset.entries))).pixels.numpy().tobytes()
    groups = dataset.clusters.tolist()
    return dataset.fingerprint, list(dataset.ids), pixels, groups, dataset.summary()


@pytest.fixture
def expected(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What one process finds; what follows has a cache of its own."""
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "alone"))
    found = content(index(config(photos)))
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The images that are decoded in this process."""
    seen: list[bytes] = []
    real = pixel_store.decode

    def noted(data: bytes, *arguments: Any, **options: Any) -> Any:
        seen.append(data)
        return real(data, *arguments, **options)

    monkeypatch.setattr(pixel_store, "decode", noted)
    return seen


def in_any_order(seed: int, repeats: int = 1) -> indexing.Executor:
    """An executor that does all tasks here, each perhaps several times."""

    def run(
        work: Callable[[PartTask], ReadPart], tasks: Sequence[PartTask]
    ) -> Iterator[tuple[int, ReadPart]]:
        for number in random.Random(seed).sample(range(len(tasks)), len(tasks)):
            for _ in range(repeats):
                result = work(tasks[number])
            yield number, result

    return run


@pytest.mark.parametrize("seed", range(3))
def test_parts_in_any_order_and_again_are_the_whole(
    photos: Path, expected: Any, decoded: list[bytes], seed: int
) -> None:
    steps: list[tuple[int, int]] = []
    done = prepare_by(
        in_any_order(seed, repeats=1 + seed % 2), config(photos),
        on_progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert done == (COUNT + 1, 1)
    assert steps[-1] == (COUNT + 1, COUNT + 1)
    decoded.clear()
    assert content(index(config(photos))) == expected
    assert decoded == [b"\x89PNG cut"]


def test_parts_by_hand_in_any_order_are_the_whole(
    photos: Path, expected: Any, decoded: list[bytes]
) -> None:
    for number in (3, 1, 4, 2, 3):
        indexing.prepare_part(config(photos), number, 4)
    decoded.clear()
    assert content(index(config(photos))) == expected
    assert decoded == [b"\x89PNG cut"]


def test_workers_with_another_cache_are_an_error(photos: Path, tmp_path: Path) -> None:
    def elsewhere(
        work: Callable[[PartTask], ReadPart], tasks: Sequence[PartTask]
    ) -> Iterator[tuple[int, ReadPart]]:
        for number, task in enumerate(tasks):
            yield number, work(replace(task, cache=str(tmp_path / "other")))

    with pytest.raises(DataError, match="60 of 61 images were decoded by workers") as caught:
        prepare_by(elsewhere, config(photos))
    assert "SFUMATO_CACHE" in str(caught.value)


def test_a_set_that_is_not_kept_is_refused_before_work(photos: Path) -> None:
    with pytest.raises(DataError, match="nothing can be prepared"):
        prepare_by(in_any_order(0), replace(config(photos), cache="off"))


@pytest.fixture
def findable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers that Ray starts import the tasks of these tests."""
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))


@pytest.mark.parametrize("cluster", ["dask", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_cluster_whose_worker_is_killed_makes_the_same_index(
    cluster: Cluster, photos: Path, expected: Any, decoded: list[bytes], tmp_path: Path, findable: None,
) -> None:  # fmt: skip
    pytest.importorskip({"dask": "distributed"}.get(cluster, cluster))

    def executor(work: Any, tasks: Sequence[PartTask]) -> Iterator[tuple[int, ReadPart]]:
        return run_on_cluster(cluster, killed_once, tasks)

    assert prepare_by(executor, config(photos)) == (COUNT + 1, 1)
    assert list((tmp_path / "cache" / "pixels").glob("killed"))
    assert decoded == []
    assert content(index(config(photos))) == expected
    assert decoded == [b"\x89PNG cut"]
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


@pytest.mark.parametrize(
    "cluster", [pytest.param(each, marks=pytest.mark.slow) for each in CLUSTERS]
)
def test_an_error_of_a_worker_arrives_whole(cluster: Cluster, findable: None) -> None:
    pytest.importorskip({"dask": "distributed"}.get(cluster, cluster))
    with pytest.raises(DataError, match="is damaged") as caught:
        list(run_on_cluster(cluster, fail, [1, 2]))
    assert (caught.value.where, caught.value.hint) == ("a.tar", "download it again")


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_missing_package_is_named_with_its_extra(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, {"dask": "distributed"}.get(cluster, cluster), None)
    monkeypatch.delitem(sys.modules, f"sfumato.data.{cluster}_executor", raising=False)
    with pytest.raises(ConfigError, match="needs the package") as caught:
        run_on_cluster(cluster, fail, [1])
    assert f"sfumato[{cluster}]" in str(caught.value)


@pytest.mark.parametrize(
    ("cluster", "address"),
    [("dask", "tcp://127.0.0.1:1"), ("dask", "nonsense"), ("ray", "nonsense")],
)
def test_a_cluster_that_cannot_be_reached_is_said(
    cluster: Cluster, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"dask": "distributed"}.get(cluster, cluster))
    monkeypatch.setattr("sfumato.data.dask_executor.CONNECT_S", 0.5)
    with pytest.raises(ConfigError, match="cannot be reached") as caught:
        list(run_on_cluster(cluster, fail, [1], address=address))
    assert address in str(caught.value)


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_as_if_left_alone(
    photos: Path, expected: Any, tmp_path: Path, decoded: list[bytes], kills: int
) -> None:
    """The process that indexes, with the processes that read for it."""
    generator, cache = random.Random(0), tmp_path / "cache"
    for _ in range(kills):
        child = os.fork()
        if not child:
            _index_here(photos)
        time.sleep(generator.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if generator.random() < 0.3:
            shutil.rmtree(cache, ignore_errors=True)
    assert content(index(config(photos))) == expected
    decoded.clear()
    assert content(index(config(photos))) == expected
    assert decoded in ([], [b"\x89PNG cut"])
    time.sleep(0.1)
    index(config(photos))
    assert not list(cache.rglob(".tmp-*"))


def _index_here(photos: Path) -> None:
    """Index in this process, which then ends."""
    try:
        parallel.MIN_FORKED = 5
        decode = pixel_store.decode

        def slowed(*arguments: Any, **options: Any) -> Any:
            time.sleep(0.004)
            return decode(*arguments, **options)

        pixel_store.decode = slowed
        index(config(photos))
    finally:
        os._exit(0)
