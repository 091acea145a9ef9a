"""What a set costs before its first step, and how that grows with its images.

    python benchmarks/growth.py PHOTOS.parquet [--sizes 10000,50000,200000] [--full] [--json FILE]

Images of 32 px in tar shards of 10,000, each a toned mixture of two photographs, with category and
caption. Every start is a process of its own with a cache of its own: the first one, the second one,
two bare processes that read and decode the same shards with tarfile and Pillow, and the library
`datasets`, first and second. Bytes are those that processes asked the system for (rchar); mapped files
do not count there. `--full 1` adds a million images (4 GB of disk).
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

    before, read = _resident_mb(), _read_bytes()
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
        "peak_mb": _peak_mb() - before,
        "read_mb": read / 1e6,
        "first_batch_s": time.perf_counter() - begun,
    }


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def in_process(*arguments: str, cache: Path) -> dict[str, float]:
    """Start in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--start", *arguments],
        env={**os.environ, "SFUMATO_CACHE": str(cache)}, capture_output=True, text=True, check=True,
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
        print(json.dumps(start(sys.argv[2])))
    else:
        main(sys.argv.pop(1))
