"""What opening an index of many images costs, and taking batches from it.

    python benchmarks/many_rows.py [--rows 100000000] [--json FILE]

The index of 8,000 images in tar shards is written out again and again into one table, as if they were
others; images, categories and hold-out repeat. 100 million rows take 22 GB of disk, twice while they are
written. Opening is measured in a process of its own, once with the table in the system's memory and once
without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from machine import machine, options, report

BASE = 8_000  # a multiple of 8, so that bits repeat by bytes
SIDE, BATCH, BATCHES = 32, 256, 20


def settings(folder: str) -> Any:
    """The set as it is trained on."""
    from sfumato.data import DataConfig, WebDataset

    return DataConfig(source=WebDataset(folder), resolution=SIDE, near_duplicates="off")


class Tiled:
    """Buffers that repeat, in files that are memory-mapped."""

    def __init__(self, folder: Path, times: int) -> None:
        self._folder, self._times, self._count = folder, times, 0

    def _file(self, kind: Any, size: int) -> Any:
        self._count += 1
        return np.memmap(self._folder / f"{self._count}", kind, "w+", shape=(size,))

    def repeated(self, data: np.ndarray, step: int = 0, end: int | None = None) -> pa.Buffer:
        """The values again and again, each time `step` higher, and one last value."""
        out = self._file(data.dtype, len(data) * self._times + (end is not None))
        for number in range(self._times):
            span = slice(number * len(data), (number + 1) * len(data))
            np.add(data, data.dtype.type(step * number), out=out[span])
        if end is not None:
            out[-1] = end * self._times
        return pa.py_buffer(out)

    def array(self, array: pa.Array) -> pa.Array:
        """An array, again and again."""
        kind, length = array.type, len(array) * self._times
        if pa.types.is_dictionary(kind):
            return pa.DictionaryArray.from_arrays(self.array(array.indices), array.dictionary)
        bits, *others = array.buffers()
        bits = (
            None if bits is None else self.repeated(np.frombuffer(bits, np.uint8, len(array) // 8))
        )
        if pa.types.is_fixed_size_list(kind):
            return pa.FixedSizeListArray.from_arrays(self.array(array.flatten()), kind.list_size)
        if pa.types.is_large_list(kind) or pa.types.is_large_string(kind):
            ends = np.frombuffer(others[0], np.int64, len(array) + 1)
            offsets = self.repeated(ends[:-1], int(ends[-1]), int(ends[-1]))
            if pa.types.is_large_list(kind):
                child = self.array(array.flatten())
                return pa.Array.from_buffers(kind, length, [bits, offsets], children=[child])
            letters = b"" if others[1] is None else others[1][: int(ends[-1])]
            data = (
                self.repeated(np.frombuffer(letters, np.uint8))
                if len(letters)
                else pa.py_buffer(b"")
            )
            return pa.Array.from_buffers(kind, length, [bits, offsets, data])
        values = np.frombuffer(others[0], f"V{kind.bit_width // 8}", len(array))
        return pa.Array.from_buffers(kind, length, [bits, self.tiled(values)])

    def tiled(self, data: np.ndarray) -> pa.Buffer:
        """The same bytes again and again."""
        out = self._file(data.dtype, len(data) * self._times)
        for number in range(self._times):
            out[number * len(data) : (number + 1) * len(data)] = data
        return pa.py_buffer(out)


def grow(cache: Path, times: int, scratch: Path) -> int:
    """Write the table of the only index out many times over; return its size in bytes."""
    from sfumato.data.index_store import CHECK, FACTS, TABLE, _check

    (folder,) = (cache / "indexes").glob("*/*")
    table = pa.ipc.open_file(pa.memory_map(str(folder / TABLE))).read_all().combine_chunks()
    facts = json.loads(table.schema.metadata[FACTS])
    tiles = Tiled(scratch, times)
    columns = {name: tiles.array(table.column(name).chunk(0)) for name in table.column_names}
    order, sizes = table.column("order").to_numpy(), facts["part_sizes"]
    repeats = np.arange(times)[:, None] * table.num_rows
    parts = [(part + repeats).reshape(-1) for part in np.split(order, np.cumsum(sizes)[:-1])]
    columns["order"] = pa.array(np.concatenate(parts))
    facts["part_sizes"] = [size * times for size in sizes]
    grown = pa.table(columns).replace_schema_metadata({FACTS: json.dumps(facts)})
    with pa.OSFile(str(folder / "grown"), "wb") as file, pa.ipc.new_file(file, grown.schema) as out:
        out.write_table(grown, max_chunksize=grown.num_rows)
    (folder / "grown").replace(folder / TABLE)
    (folder / CHECK).write_text(_check(folder / TABLE))
    return (folder / TABLE).stat().st_size


def opening(folder: str) -> None:
    """Open the index in this process, and take batches from it."""
    import pyarrow.parquet  # noqa: F401  # what is imported is no part of the figures
    import torch  # noqa: F401
    from growth import Peak

    from sfumato.data import index, loader

    config = settings(folder)
    peak, begun = Peak(), time.perf_counter()
    dataset = index(config)
    opened_s, begun = time.perf_counter() - begun, time.perf_counter()
    parts = len(dataset.training), len(dataset.holdout)
    plan = dataset.plan(seed=0, batch_size=BATCH)
    batches = loader.batches(dataset, plan, start=0)
    next(batches)
    first_s = time.perf_counter() - begun
    taken = []
    for _ in range(BATCHES):
        begun = time.perf_counter()
        next(batches)
        taken.append(time.perf_counter() - begun)
    print(json.dumps({
        "rows": len(dataset.entries), "training and held out": parts, "kept": dataset.is_kept,
        "open_s": opened_s, "first_batch_s": first_s, "batch_ms": 1000 * sorted(taken)[BATCHES // 2],
        "peak_mb": peak.mb,
    }))  # fmt: skip


def main() -> None:
    """Make an index, let it grow, and open it."""
    if sys.argv[1] == "--open" if len(sys.argv) > 1 else False:
        opening(sys.argv[2])
        return
    asked = options(__doc__.splitlines()[0], rows=100_000_000)
    rows = 4_000_000 if asked.quick else asked.rows
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        place = Path(name)
        os.environ["SFUMATO_CACHE"] = str(place / "cache")
        from growth import write_shards

        from sfumato.data import index

        photos = np.random.default_rng(0).integers(0, 256, (500, SIDE, SIDE, 3), np.uint8)
        write_shards(BASE, place / "shards", photos)
        time.sleep(3)  # files that were changed just now are not trusted
        count = len(index(settings(str(place / "shards"))).entries)
        assert count == BASE
        (place / "scratch").mkdir()
        size = grow(place / "cache", rows // BASE, place / "scratch")
        for path in (place / "scratch").iterdir():
            path.unlink()
        result: dict[str, Any] = {"table_gb": size / 1e9}
        for kind in ("cold", "warm"):
            if kind == "cold":
                (table,) = (place / "cache" / "indexes").glob("*/*/table.arrow")
                with table.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            command = [sys.executable, __file__, "--open", str(place / "shards")]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result[kind] = json.loads(out.splitlines()[-1])
    report({"machine": machine(), **result}, asked.json)


if __name__ == "__main__":
    main()
