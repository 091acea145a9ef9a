"""How fast do images reach the training loop?

Samples a second of sfumato's loader, a torch DataLoader over a PIL image folder and Hugging Face's
`datasets`, each giving shuffled
batches of 64 float tensors in [-1, 1]: small PNGs (32 px) and one-megapixel JPEGs trained at 64 px;
folder, parquet and tar; no
worker and two; then sfumato from its cache, and how long a training step waits.

    python benchmarks/loading.py [--quick] [--json FILE] [--source FILE.parquet] [--cases "large
    folder"]

Images come from FILE.parquet if it is given (CIFAR-10), else they are made.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from machine import interleaved, options
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler

from sfumato.data import (
    BatchPlan,
    DataConfig,
    Folder,
    Parquet,
    WebDataset,
    batches,
    index,
    source_at,
)
from sfumato.data.convert import convert

BATCH = 64
arguments = options(__doc__.splitlines()[0], source="", cases="", rounds=5)
SMALL, LARGE = (2_000, 128) if arguments.quick else (10_000, 512)
PASSES = 3  # over the images each time the clock runs, so that starting workers is a small part
ROUNDS = 2 if arguments.quick else arguments.rounds


def small_images() -> Iterator[Image.Image]:
    """32 x 32 images: real ones, or smooth noise."""
    if arguments.source:
        for entry in source_at(arguments.source).listing().entries[:SMALL]:
            yield Image.open(io.BytesIO(entry.image.read())).convert("RGB")
        return
    rng = np.random.default_rng(0)
    for _ in range(SMALL):
        yield Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
            (32, 32), Image.Resampling.BICUBIC
        )


def make(root: Path) -> dict[str, Path]:
    """Folders `small` and `large` with two categories, and the same as parquet and tar."""
    rng = np.random.default_rng(1)
    texture = rng.normal(0, 12, (1024, 1024, 3))
    for number, image in enumerate(small_images()):
        for kind in ("small", "large"):
            (root / kind / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        image.save(root / "small" / "ab"[number % 2] / f"{number:05d}.png")
        if number < LARGE:
            big = np.asarray(image.resize((1024, 1024), Image.Resampling.BICUBIC)) + np.roll(
                texture, number * 7, axis=0
            )
            Image.fromarray(big.clip(0, 255).astype(np.uint8)).save(
                root / "large" / "ab"[number % 2] / f"{number:05d}.jpg", quality=90
            )
    paths = {}
    for kind in ("small", "large"):
        paths[f"{kind} folder"] = root / kind
        for suffix in ("parquet", "tar"):
            paths[f"{kind} {suffix}"] = root / f"{kind}.{suffix}"
            convert(Folder(str(root / kind)).listing(), paths[f"{kind} {suffix}"])
    return paths


def read(loader: Iterator[object], count: int) -> None:
    """Take `count` samples' worth of batches, and look at each."""
    for batch in itertools.islice(loader, count // BATCH):
        float(_images(batch)[0, 0, 0, 0])


def _images(batch) -> torch.Tensor:
    return batch.groups[0].images if hasattr(batch, "groups") else batch


def ours(path: Path, resolution: int, workers: int, cache: str = "off") -> Callable[[], None]:
    """sfumato's loader; decoding as it goes, or from the cache."""
    source = {"": Folder, ".parquet": Parquet, ".tar": WebDataset}[path.suffix](str(path))
    dataset = index(
        DataConfig(source=source, resolution=resolution, cache=cache, memory_gib=0, workers=workers)
    )
    plan = BatchPlan(seed=0, shapes=dataset.shapes[dataset.training], batch_size=BATCH)
    count = (PASSES if cache == "off" else 40) * len(dataset.training)
    begun = itertools.count()

    def run() -> None:
        loader = batches(dataset, plan, start=1000 * next(begun))
        read(loader, count)
        loader.close()

    run.count = count // BATCH * BATCH
    return run


class PILFolder(torch.utils.data.Dataset):
    """What people write: open, convert, resize the shorter side, crop, to a float tensor."""

    def __init__(self, root: Path, resolution: int) -> None:
        self.paths, self.resolution = sorted(root.rglob("*.*")), resolution

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.paths[number]) as image:
            return tensor(image.convert("RGB"), self.resolution)


def tensor(image: Image.Image, resolution: int) -> torch.Tensor:
    if image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR
        )
        left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
        image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def loader_of(dataset, workers: int) -> Callable[[], None]:
    order = RandomSampler(dataset, num_samples=PASSES * len(dataset))
    loader = DataLoader(
        dataset, batch_size=BATCH, sampler=order, num_workers=workers, drop_last=True
    )

    def run() -> None:
        read(iter(loader), PASSES * len(dataset))

    run.count = PASSES * len(dataset) // BATCH * BATCH
    return run


def huggingface(path: Path, resolution: int, workers: int, cache: Path) -> Callable[[], None]:
    """Hugging Face's library on the same files, with its image decoding."""
    import datasets

    datasets.disable_progress_bars()
    kind = {"": "imagefolder", ".parquet": "parquet", ".tar": "webdataset"}[path.suffix]
    where = {"data_dir": str(path)} if kind == "imagefolder" else {"data_files": str(path)}
    data = datasets.load_dataset(kind, split="train", cache_dir=str(cache), **where)
    column = next(name for name in ("image", "png", "jpg") if name in data.column_names)
    data = data.select_columns([column])
    data.set_transform(
        lambda rows: {
            "pixels": [tensor(image.convert("RGB"), resolution) for image in rows[column]]
        }
    )

    class Pixels(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, number: int) -> torch.Tensor:
            return data[number]["pixels"]

    return loader_of(Pixels(), workers)


def waiting(path: Path) -> float:
    """Share of a training step of a small U-Net that waits for data, from the cache."""
    from sfumato import recipes
    from sfumato.runs.cost import trial_trainer
    from sfumato.runs.preparation import prepare

    overrides = {"precision": "bfloat16", "batch_size": BATCH}
    settings = recipes.resolve(str(path), overrides)
    prepared = prepare(settings)
    dataset = prepared.dataset
    with tempfile.TemporaryDirectory() as place:
        trainer = trial_trainer(prepared, Path(place) / "run")
        step = trainer.measure_step(steps=3)
    plan = BatchPlan(seed=0, shapes=dataset.shapes[dataset.training], batch_size=BATCH)
    supply = batches(dataset, plan, start=0)
    next(supply)
    begun = time.perf_counter()
    for _ in range(20):
        next(supply)
    return (time.perf_counter() - begun) / 20 / step


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        os.environ["SFUMATO_CACHE"] = str(root / "cache")
        paths = make(root)
        result: dict[str, dict] = {
            "ours": {},
            "peers": {"PIL folder": {}, "datasets": {}},
            "ratio": {},
        }
        for name, path in paths.items():
            if not name.startswith(arguments.cases):
                continue
            resolution = 32 if name.startswith("small") else 64
            for workers in (0, 2):
                folder = root / name.split()[0]
                candidates = {
                    "ours": ours(path, resolution, workers),
                    "PIL folder": loader_of(PILFolder(folder, resolution), workers),
                    "datasets": huggingface(path, resolution, workers, root / "hf"),
                }
                if workers == 0:
                    candidates["cache"] = ours(path, resolution, 0, cache="auto")
                times = interleaved(candidates, ROUNDS)
                speed = {
                    who: candidates[who].count / float(np.median(taken))
                    for who, taken in times.items()
                }
                best = max(speed["PIL folder"], speed["datasets"])
                case = f"{name}, {workers} workers"
                result["ours"][case] = speed["ours"]
                for peer in result["peers"]:
                    result["peers"][peer][case] = speed[peer]
                result["ratio"][case] = speed["ours"] / best
                line = f"{case:26} ours {speed['ours']:8.0f}  PIL folder {speed['PIL folder']:8.0f}  datasets {speed['datasets']:8.0f}"
                print(f"{line}  ours / faster peer {speed['ours'] / best:5.2f}", flush=True)
                if "cache" in speed:
                    result["ours"][f"{name}, cache"] = speed["cache"]
                    result["ratio"][f"{name}, cache"] = speed["cache"] / best
                    print(
                        f"{name + ', cache':26} ours {speed['cache']:8.0f}  {'':41} ours / "
                        f"faster peer {speed['cache'] / best:5.1f}",
                        flush=True,
                    )
        result["ours"]["waiting, share of a step"] = waiting(paths["small folder"])
        print(
            f"a training step waits for data {result['ours']['waiting, share of a step']:.3%} of "
            "its time"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
