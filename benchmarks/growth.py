"""What a set costs before its first step, and how that grows with its images.

    python benchmarks/growth.py PHOTOS.parquet [--sizes 10000,50000,200000] [--full] [--json FILE]

Images of 32 px in tar shards of 10,000, each a toned mixture of two photographs, with category and
caption. Every start is a process of its own with a cache of its own: the first one, the second one, a
training of 20 steps that is resumed for 10 more, two bare processes that read and decode the same
shards with tarfile and Pillow, and the library `datasets`, first and second. Bytes are those that
processes asked the system for (rchar); mapped files do not count there, nor in peaks of memory.
`--full 1` adds a million images (4 GB of disk, and 7 GB for the cache).
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PER_SHARD = 10_000
BARE = """
import io, sys, tarfile
from PIL import Image
for path in sys.argv[1:]:
    with tarfile.open(path) as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            if member.name.endswith(".jpg"):
                Image.open(io.BytesIO(data)).convert("RGB").tobytes()
"""
PEER = """
import glob, sys
from datasets import load_dataset
load_dataset("webdataset", data_files=sorted(glob.glob(sys.argv[1] + "/*.tar")), split="train", cache_dir=sys.argv[2])
"""


def photographs(path: str) -> np.ndarray:
    """Photographs (N, 32, 32, 3) of a table of images."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    name = next(name for name in table.column_names if "im" in name)
    cells = [row["bytes"] if isinstance(row, dict) else row for row in table[name].to_pylist()]
    return np.stack([np.asarray(Image.open(io.BytesIO(cell)).convert("RGB")) for cell in cells])


def write_shards(count: int, folder: Path, photos: np.ndarray) -> None:
    """Write tar shards of mixtures of two photographs, all of which differ."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for begin in range(0, count, PER_SHARD):
        most = min(PER_SHARD, count - begin)
        first, second = rng.integers(0, len(photos), (2, most))
        share = rng.uniform(0.35, 0.65, (most, 1, 1, 1))
        mixed = share * photos[first] + (1 - share) * photos[second][:, :, ::-1]
        toned = (mixed - mixed.mean((1, 2, 3), keepdims=True)) * rng.uniform(1.1, 1.7, share.shape)
        pixels = (toned + rng.uniform(90, 165, (most, 1, 1, 3))).clip(0, 255).astype(np.uint8)
        with tarfile.open(
            folder / f"{begin // PER_SHARD:05d}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as tar:
            for number, image in enumerate(pixels, begin):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "JPEG", quality=92)
                caption = f"two things, number {int(rng.integers(5000))}, in one frame"
                for suffix, data in (
                    ("jpg", buffer.getvalue()),
                    ("cls", str(int(rng.integers(10))).encode()),
                    ("txt", caption.encode()),
                ):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def start(folder: str) -> dict[str, float]:
    """List and index a set in this process, and take the first batch of a plan."""
    from sfumato.data import BatchPlan, DataConfig, WebDataset, index, listed
    from sfumato.data.duplicates import clusters

    peak, before, read = Peak(), _resident_mb(), _read_bytes()
    alike = {"s": 0.0}
    import sfumato.data.indexing as indexing

    def timed(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return clusters(*given, **named)
        finally:
            alike["s"] += time.perf_counter() - begun

    indexing.clusters = timed  # type: ignore[attr-defined]
    source, begun = WebDataset(folder), time.perf_counter()
    listing = listed(source)
    listed_s = time.perf_counter() - begun
    dataset = index(DataConfig(source=source, resolution=32), listing=listing)
    indexed_s = time.perf_counter() - begun
    kept, read = _resident_mb() - before, _read_bytes() - read
    begun = time.perf_counter()
    plan = BatchPlan(seed=0, shapes=dataset.shapes[dataset.epoch], batch_size=256)
    dataset.images(dataset.epoch[plan.batch(0)])
    return {
        "seconds": indexed_s,
        "listing_s": listed_s,
        "alike_s": alike["s"],
        "kept_mb": kept,
        "peak_mb": peak.mb,
        "read_mb": read / 1e6,
        "first_batch_s": time.perf_counter() - begun,
    }


def train(folder: str, place: str) -> dict[str, float]:
    """Train a small model for 20 steps in this process, and go on to 30, as `sfumato resume` does."""
    from sfumato.data import DataConfig, WebDataset
    from sfumato.networks import UNetConfig
    from sfumato.recipes.run import Run
    from sfumato.runs import resume
    from sfumato.runs import train as begin
    from sfumato.training import Budget

    peak, begun = Peak(), time.perf_counter()
    run = Run(
        name="growth",
        data=DataConfig(source=WebDataset(folder), resolution=32),
        network=UNetConfig(channels=16, multipliers=(1, 2), blocks=1, attention_depths=()),
        batch_size=32,
        budget=Budget(steps=20),
    )
    path = begin(run, run=Path(place) / "run")
    trained_s = time.perf_counter() - begun
    begun = time.perf_counter()
    resume(path, overrides=["budget.steps=30"])
    return {
        "train_20_steps_s": trained_s,
        "resume_10_steps_s": time.perf_counter() - begun,
        "peak_mb": peak.mb,
        "data_json_mb": (path / "data.json").stat().st_size / 1e6,
    }


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1e3


class Peak:
    """The most memory of this process itself, without the pages of files that it maps, in MB."""

    def __init__(self) -> None:
        self.before = self.most = _status_mb("RssAnon")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, _status_mb("RssAnon"))
            time.sleep(0.02)

    @property
    def mb(self) -> float:
        """The most since the beginning, beyond what there was then."""
        return self.most - self.before


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def in_process(*arguments: str, cache: Path) -> dict[str, float]:
    """Start in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--start", *arguments],
        env={**os.environ, "SFUMATO_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def seconds(*commands: list[str]) -> float:
    """The time until all of some commands, begun at once, have ended."""
    begun = time.perf_counter()
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    return time.perf_counter() - begun


def measured(folder: Path, count: int, *, peer: bool) -> dict[str, Any]:
    """All figures of one size."""
    shards = sorted(map(str, folder.glob("*.tar")))
    with tempfile.TemporaryDirectory() as place:
        cache = Path(place) / "cache"
        row: dict[str, Any] = {
            "images": count,
            "set_mb": sum(Path(s).stat().st_size for s in shards) / 1e6,
        }
        row["bare_s"] = seconds(
            *([sys.executable, "-c", BARE, *shards[half::2]] for half in range(2))
        )
        row["first"] = in_process(str(folder), cache=cache)
        row["second"] = in_process(str(folder), cache=cache)
        row["train"] = in_process(str(folder), f"{place}/trained", cache=cache)
        if peer:
            command = [sys.executable, "-c", PEER, str(folder), f"{place}/datasets"]
            row["datasets_s"] = [seconds(command) for _ in range(2)]
    row["first_beside_bare"] = row["first"]["seconds"] / row["bare_s"]
    return row


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """How seconds grow between one size and the next: 1 is in proportion."""
    return [
        {
            "from": one["images"],
            "to": other["images"],
            **{
                name: math.log(other["first"][name] / one["first"][name]) / math.log(other["images"] / one["images"])
                for name in ("seconds", "listing_s", "alike_s", "peak_mb")
            },
        }
        for one, other in pairwise(rows)
    ]  # fmt: skip


def main(photos: str) -> None:
    """Take all sizes, smallest first."""
    from machine import machine, options, report

    asked = options(__doc__.splitlines()[0], sizes="10000,50000,200000", full="")
    sizes = [2_000, 4_000] if asked.quick else [int(size) for size in asked.sizes.split(",")]
    sizes += [1_000_000] if asked.full else []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        pictures = photographs(photos)
        for size in sizes:
            folder = Path(place) / str(size)
            write_shards(size, folder, pictures)
            rows.append(measured(folder, size, peer=size <= 200_000))
            print(json.dumps(rows[-1]), flush=True)
    report({"machine": machine(), "ours": rows, "exponents": exponents(rows)}, asked.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        print(json.dumps((train if sys.argv[3:] else start)(*sys.argv[2:])))
    else:
        main(sys.argv.pop(1))
