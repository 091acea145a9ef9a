"""How long training waits for shards behind an address that are not on the disk.

    python benchmarks/remote_shards.py [--steps 150] [--quick] [--json FILE]

A server on this machine answers each request after 50 ms, and sends at most 1.5 MB/s to each reader,
so that a shard of 6 MB takes 4 s. Tars of photographs
of 256 px are indexed, removed from the disk, and read in windows by one process ahead of a training that
takes 20 images a second (its steps sleep). The disk holds two windows. Beside it: without fetching ahead.
The wait for the first batch is not counted.
"""

from __future__ import annotations

import io
import os
import shutil
import statistics
import tarfile
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
from machine import machine, options, report
from PIL import Image

from sfumato.data import DataConfig, WebDataset, index
from sfumato.data.shards_ahead import ShardsAhead
from sfumato.distributed import World
from sfumato.storage.cache_folder import cache_folder
from sfumato.training.supply import Supply

LATENCY_S, BYTES_A_SECOND, IMAGES_A_SECOND, BATCH = 0.05, 1.5e6, 20, 8
SHARDS, EACH, WINDOW = 12, 200, 2


class Slow(SimpleHTTPRequestHandler):
    """A server that is far away."""

    asked: ClassVar[Counter[str]] = Counter()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer after a while."""
        time.sleep(LATENCY_S)
        self.asked[urlsplit(self.path).path] += 1
        super().do_GET()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send a file slowly."""
        while block := source.read(1 << 18):
            outputfile.write(block)
            time.sleep(len(block) / BYTES_A_SECOND)


def write_shards(folder: Path) -> None:
    """Write tars of images with the size of photographs."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number:02d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place in range(EACH):
                coarse = generator.integers(0, 256, (16, 16, 3), np.uint8)
                image = Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC)
                pixels = np.asarray(image, np.int16) + generator.integers(-20, 20, (256, 256, 3))
                buffer = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                    buffer, "JPEG", quality=90
                )
                info = tarfile.TarInfo(f"{number:02d}{place:04d}.jpg")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))


def waits(url: str, steps: int, *, ahead: bool) -> dict[str, Any]:
    """Take batches as training would, and return how long it waited for them."""
    config = DataConfig(
        source=WebDataset(url), resolution=256, cache="off", memory_gib=0.0, workers=1,
        shuffle="window", window=WINDOW, near_duplicates="off",
    )  # fmt: skip
    dataset = index(config)
    remote = cache_folder() / "remote"
    largest = max(path.stat().st_size for path in remote.iterdir())
    shutil.rmtree(remote)
    os.environ["SFUMATO_REMOTE_GIB"] = str((2 * WINDOW + 0.5) * largest / 2**30)
    follow = ShardsAhead.follow
    if not ahead:
        ShardsAhead.follow = lambda self, sample: None  # type: ignore[method-assign]
    Slow.asked.clear()
    plan = dataset.plan(seed=0, batch_size=BATCH)
    supply = Supply(dataset, plan, start=0, say=print, world=World())
    next(supply)
    waited = []
    for _ in range(steps):
        time.sleep(BATCH / IMAGES_A_SECOND)
        begun = time.perf_counter()
        next(supply)
        waited.append(time.perf_counter() - begun)
    supply.close()
    ShardsAhead.follow = follow  # type: ignore[method-assign]
    os.environ.pop("SFUMATO_REMOTE_GIB")
    step_s = BATCH / IMAGES_A_SECOND
    return {
        "share_of_the_step": sum(waited) / (steps * step_s),
        "median_s": statistics.median(waited),
        "longest_s": max(waited),
        "epochs": steps * BATCH / plan.size,
        "shards_fetched": sum(Slow.asked.values()),
        "most_of_one_shard": max(Slow.asked.values()),
        "shard_mb": largest / 1e6,
    }


def main() -> None:
    """Measure both."""
    asked = options(__doc__.splitlines()[0], steps=150)
    steps = 20 if asked.quick else asked.steps
    with tempfile.TemporaryDirectory() as place:
        os.environ["SFUMATO_CACHE"] = f"{place}/cache"
        write_shards(Path(place) / "served")
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=f"{place}/served"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        rows = {
            name: waits(url, steps, ahead=ahead)
            for name, ahead in (("ahead", True), ("when needed", False))
        }
        server.shutdown()
    for name, row in rows.items():
        print(name, row, flush=True)
    report({"machine": machine(), "rows": rows}, asked.json)


if __name__ == "__main__":
    main()
