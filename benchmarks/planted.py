"""Does `sfumato data check` find what was planted, and nothing else?

Plants exact and near-duplicates, dark, bright, blurred, empty, odd-sized and odd-shaped images and
missing, overlong and broken
captions into a folder of real ones, and prints recall and false alarms by kind. An image that is
flagged and was not planted is a
false alarm, unless the same image was flagged before anything was planted: CIFAR-10 holds real
near-duplicates and dark images.
The share flagged before is printed too.

    python benchmarks/planted.py emoji | FILE.parquet [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from sfumato.data import Folder, source_at
from sfumato.data.check import IntendedModel, inspect_data

KINDS = (
    "duplicate",
    "near_duplicate",
    "dark",
    "bright",
    "blurry",
    "low_information",
    "odd_size",
    "odd_aspect",
)
TEXTS = ("caption_missing", "caption_truncated", "caption_damaged")
Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def _jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(60, 90)))
    return Image.open(buffer).convert("RGB")


def _resized(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    factor = rng.choice([0.9, 1.12])
    return image.resize(
        (round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC
    )


def _toned(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(float(rng.choice([0.92, 1.08])))


def _cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.crop((1, 1, image.width - 1, image.height - 1)).resize(
        image.size, Image.Resampling.BICUBIC
    )


def _noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(
        (np.asarray(image) + rng.normal(0, 5, (image.height, image.width, 3)))
        .clip(0, 255)
        .astype(np.uint8)
    )


NEAR: tuple[Change, ...] = (_jpeg, _resized, _toned, _cropped, _noisy)
CHANGES: dict[str, Change] = {
    "dark": lambda image, rng: ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.1, 0.3))),
    "bright": lambda image, rng: Image.fromarray(
        (255 - (255 - np.asarray(image, float)) * rng.uniform(0.05, 0.15)).astype(np.uint8)
    ),
    "blurry": lambda image, rng: image.filter(
        ImageFilter.GaussianBlur(float(rng.uniform(1.6, 3)) * image.width / 40)
    ),
    "low_information": lambda image, rng: Image.new(
        "RGB", image.size, tuple(int(v) for v in rng.integers(0, 256, 3))
    ),
    "odd_size": lambda image, rng: image.resize(
        (image.width * 3, image.height * 3), Image.Resampling.BICUBIC
    ),
    "odd_aspect": lambda image, rng: image.crop((0, 0, image.width, image.height // 4)),
}


def plant(
    folder: Path,
    images: list[Image.Image],
    captions: list[str],
    *,
    each: int,
    duplicates: int,
    rng: np.random.Generator,
) -> dict[str, set[str]]:
    """Write copies and defects into `folder`, which holds image i as i.png; returns the planted
    names by kind.
    """
    planted: dict[str, set[str]] = {kind: set() for kind in (*KINDS, *TEXTS)}
    order = iter(rng.permutation(len(images)).tolist())
    for kind, count in (("duplicate", duplicates), ("near_duplicate", each)):
        for number in range(count):
            source = next(order)
            name = f"{kind}-{number}.png"
            if kind == "duplicate":
                shutil.copy(folder / f"{source:05d}.png", folder / name)
            else:
                NEAR[number % len(NEAR)](images[source], rng).save(folder / name)
            (folder / name).with_suffix(".txt").write_text(captions[source])
            planted[kind] |= {name, f"{source:05d}.png"}
    for kind, change in CHANGES.items():
        for _ in range(each):
            name = f"{next(order):05d}.png"
            change(Image.open(folder / name).convert("RGB"), rng).save(folder / name)
            planted[kind].add(name)
    for kind in TEXTS:
        for _ in range(each):
            name = f"{next(order):05d}"
            text = {
                "caption_missing": "",
                "caption_truncated": "a very long description, " * 40,
                "caption_damaged": "un cafÃ© Ã  lâ€™ancienne",
            }[kind]
            (folder / f"{name}.txt").write_text(text)
            planted[kind].add(f"{name}.png")
    return planted


def flagged(folder: Path) -> dict[str, set[str]]:
    """Names by kind, as `data check` finds them."""
    found = inspect_data(
        Folder(str(folder)).listing(), source=str(folder), plan=IntendedModel(resolution=1)
    ).files()
    return {kind: set(found.get(kind, ())) for kind in (*KINDS, *TEXTS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", default="emoji")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="800 images and 10 defects a kind instead of 4,000 and 50",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    total, each, duplicates = (800, 10, 40) if arguments.quick else (4000, 50, 200)
    rng = np.random.default_rng(arguments.seed)
    entries = source_at(arguments.source).listing().entries
    chosen = [entries[i] for i in np.sort(rng.permutation(len(entries))[:total])]
    images, captions = [], []
    for number, entry in enumerate(chosen):
        with Image.open(io.BytesIO(entry.image.read())) as image:
            rgba = image.convert("RGBA")
        images.append(
            Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        )
        captions.append(
            entry.captions[0] if entry.captions else f"{entry.category} number {number}"
        )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            image.save(folder / f"{number:05d}.png")
            (folder / f"{number:05d}.txt").write_text(caption)
        before = flagged(folder)
        planted = plant(folder, images, captions, each=each, duplicates=duplicates, rng=rng)
        after = flagged(folder)
        names = {path.name for path in folder.glob("*.png")}
    rows = {}
    print(
        f"{arguments.source}: {len(names)} images\n{'kind':20} planted  recall  false alarms  "
        "flagged before"
    )
    for kind in (*KINDS, *TEXTS):
        recall = len(after[kind] & planted[kind]) / len(planted[kind])
        false = len(after[kind] - planted[kind] - before[kind]) / len(names - planted[kind])
        rows[kind] = {
            "planted": len(planted[kind]),
            "recall": recall,
            "false_alarms": false,
            "flagged_before": len(before[kind]) / len(images),
        }
        print(
            f"{kind:20} {len(planted[kind]):7d}  {recall:6.1%}  {false:12.2%}  "
            f"{rows[kind]['flagged_before']:14.2%}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"ours": rows, "peers": {}, "ratio": {}}, indent=1))


if __name__ == "__main__":
    main()
