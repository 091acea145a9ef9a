"""The images of a run's report, as data: URLs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sfumato.reporting.run_files import RunFiles

MAX_SHEETS, MAX_SIDE, QUALITY = 10, 900, 82  # of images in the page
SMALL_SIDE = 640  # up to which small images are enlarged


@dataclass(frozen=True)
class Sheet:
    """A sheet of samples of one step, as a data: URL."""

    step: int
    source: str


def sample_sheets(files: RunFiles) -> list[Sheet]:
    """Return sheets of samples, evenly over the steps that have one, the last included."""
    paths = sorted(files.directory.samples.glob("step-*/grid.png"))
    if len(paths) > MAX_SHEETS:
        last = len(paths) - 1
        paths = [paths[round(n * last / (MAX_SHEETS - 1))] for n in range(MAX_SHEETS)]
    return [Sheet(int(path.parent.name.removeprefix("step-")), image_url(path)) for path in paths]


def evaluation_images(files: RunFiles, folder: str) -> list[tuple[str, str]]:
    """Return the name and the data: URL of each image of a fine-tuning and an evaluation."""
    root = files.directory.path
    paths = [
        *sorted((root / "finetuning").glob("*.png")),
        *sorted((root / folder).glob("*.png")),
    ]
    return [(path.stem.replace("-", " "), image_url(path)) for path in paths]


def image_url(path: Path) -> str:
    """Return an image as a data: URL of WebP, without metadata; "" if it cannot be read.

    Small images are enlarged without smoothing, so that each pixel can be seen.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError:
        return ""
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    factor = max(1, SMALL_SIDE // max(image.size))
    image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=QUALITY, lossless=factor > 1)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
