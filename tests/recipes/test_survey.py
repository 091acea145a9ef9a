"""Every reason that a preset gives for its images is true of the files, whatever their container
and depth.
"""

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from sfumato.data import index
from sfumato.recipes import resolve
from sfumato.recipes.presets import Choice, choose
from sfumato.recipes.resolver import resolve_config
from sfumato.runs.preparation import conditioning_info

SIDE, COUNT = 28, 12
KINDS = {  # bands, type, alpha, channels and bits that fit
    "gray": (1, np.uint8, False, 1, 8),
    "colour": (3, np.uint8, False, 3, 8),
    "clear": (4, np.uint8, True, 4, 8),
    "gray and clear": (2, np.uint8, True, 2, 8),
    "opaque": (4, np.uint8, False, 3, 8),
    "deep gray": (1, np.uint16, False, 1, 16),
    "deep colour": (3, np.uint16, False, 3, 16),
    "five": (5, np.uint16, False, 5, 16),
    "float": (1, np.float32, False, 1, 16),
    "scan": (1, np.int16, False, 1, 16),
}
FITS = {
    "png": ("gray", "colour", "clear", "gray and clear", "opaque", "deep gray"),
    "jpg": ("gray", "colour"),
    "tif": ("gray", "colour", "clear", "deep gray", "deep colour", "five", "float", "scan"),
    "npy": ("gray", "colour", "deep gray", "deep colour", "five", "float", "scan"),
    "npz": ("gray", "colour", "deep gray", "five", "float", "scan"),
    "zip": ("gray", "clear", "deep gray"),
    "parquet": ("gray", "colour", "clear", "deep gray"),
}


def values(kind: str, seed: int) -> np.ndarray:
    bands, dtype, alpha, *_ = KINDS[kind]
    grain = np.random.default_rng(seed).random((SIDE, SIDE, bands))
    if bands in (2, 4):
        grain[..., -1] = np.arange(SIDE) % 2 if alpha else 1
    span = 1 if dtype == np.float32 else np.iinfo(dtype).max
    return (grain * span).astype(dtype)


def encoded(kind: str, suffix: str, seed: int) -> bytes:
    array, buffer = values(kind, seed), io.BytesIO()
    squeezed = array[..., 0] if array.shape[2] == 1 else array
    if suffix == "npy":
        np.save(buffer, squeezed)
    elif suffix == "tif":
        rgb = array.shape[2] in (3, 4)
        extra = {"extrasamples": ["unassalpha"]} if array.shape[2] == 4 else {}
        photometric = "rgb" if rgb else "minisblack"
        tifffile.imwrite(
            buffer,
            squeezed,
            photometric=photometric,
            planarconfig="contig" if squeezed.ndim == 3 else None,
            **extra,
        )
    else:
        Image.fromarray(squeezed).save(buffer, "JPEG" if suffix == "jpg" else "PNG")
    return buffer.getvalue()


def written(root: Path, container: str, kind: str, count: int = COUNT) -> str:
    """A set of one kind; returns its place."""
    if container == "npz":
        np.savez(root / "set.npz", images=np.stack([values(kind, seed) for seed in range(count)]))
        return str(root / "set.npz")
    files = (
        {f"{seed}.png": encoded(kind, "png", seed) for seed in range(count)}
        if container in ("zip", "parquet")
        else {}
    )
    if container == "zip":
        with zipfile.ZipFile(root / "set.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return str(root / "set.zip")
    if container == "parquet":
        pq.write_table(pa.table({"image": list(files.values())}), root / "set.parquet")
        return str(root / "set.parquet")
    (root / "set").mkdir(exist_ok=True)
    for seed in range(count):
        (root / "set" / f"{kind}-{seed}.{container}").write_bytes(encoded(kind, container, seed))
    return str(root / "set")


def line(choice: Choice, word: str) -> str:
    return next((reason for reason in choice.reasons if word in reason), "")


@pytest.mark.parametrize(
    ("container", "kind"),
    [(container, kind) for container, kinds in FITS.items() for kind in kinds],
)
def test_the_preset_fits_the_files_and_its_reasons_are_true_of_them(
    container: str, kind: str, tmp_path: Path
) -> None:
    bands, dtype, _, channels, bits = KINDS[kind]
    choice = choose(written(tmp_path, container, kind))
    data = choice.run.data
    assert (data.channels, data.bits, data.resolution) == (channels, bits, 24)
    assert "shorter sides are 28 px" in line(choice, " px:")
    said = line(choice, "channel(s)")
    assert said.startswith(f"{channels} channel(s): ")
    assert ("gray" in said) == (channels in (1, 2))
    assert ("in colour" in said) == (channels in (3, 4))
    assert ("transparent" in said) == (channels in (2, 4))
    assert (f"have {bands} channels" in said) == (channels > 4)
    assert ("100% of the sampled images have more than 8" in line(choice, "bits a value")) == (
        dtype != np.uint8
    )


def test_what_training_refuses_does_not_sway_the_choice(tmp_path: Path) -> None:
    place = Path(written(tmp_path, "png", "gray"))
    for number in range(5):
        (place / f"html-{number}.png").write_bytes(b"<html>404</html>")
        np.save(place / f"sliver-{number}.npy", np.zeros((2, 900, 3), np.float32))
    choice = choose(str(place))
    assert choice.run.data.channels == 1
    assert choice.run.data.bits == 8
    assert choice.run.data.resolution == 24


def test_a_few_transparent_images_are_laid_on_the_background_and_said(tmp_path: Path) -> None:
    written(tmp_path, "png", "colour")
    said = line(choose(written(tmp_path, "png", "clear", count=4)), "channel(s)")
    assert (
        said == "3 channel(s): the images are in colour; 25% are transparent somewhere and "
        "composited over data.background"
    )


@pytest.mark.parametrize(("key", "value"), [("channels", 3), ("bits", 8), ("resolution", 16)])
def test_what_is_set_is_said_to_be_set(key: str, value: int, tmp_path: Path) -> None:
    place = written(tmp_path, "png", "deep gray")
    reasons = resolve_config(place, [f"data.{key}={value}"]).reasons
    said = [reason for reason in reasons if reason.endswith("as set")]
    assert len(said) == 1
    assert re.search(rf"\b{value} (channel|bits|px)", said[0])
    assert getattr(resolve(place, [f"data.{key}={value}"]).data, key) == value


def test_frames_that_are_taken_count(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for seed in range(3):
        stack = np.stack([values("deep gray", 10 * seed + page)[..., 0] for page in range(4)])
        tifffile.imwrite(tmp_path / "set" / f"{seed}.tif", stack, photometric="minisblack")
    assert (
        resolve_config(str(tmp_path / "set"), ["data.frames=all"])
        .reasons[0]
        .startswith("chosen: 12 images")
    )
    assert resolve_config(str(tmp_path / "set"), []).reasons[0].startswith("chosen: 3 images")


@pytest.mark.parametrize(
    ("container", "kind", "settings", "value_range", "alpha"),
    [
        ("png", "gray", [], None, "straight"),
        ("png", "clear", [], None, "premultiplied"),
        ("npy", "gray", ["data.range=[0,100]"], (0.0, 100.0), "straight"),
        ("tif", "scan", ["data.range=[-1000,1000]"], (-1000.0, 1000.0), "straight"),
        ("png", "clear", ["data.alpha=off"], None, "none"),
    ],
)
def test_what_was_decided_about_values_is_a_fact_of_the_run(
    container: str,
    kind: str,
    settings: list[str],
    value_range: tuple | None,
    alpha: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    run = resolve(written(tmp_path, container, kind), settings)
    info = conditioning_info(run, index(run.data))
    assert info.value_range == value_range
    assert info.alpha == alpha
    assert info.bits == KINDS[kind][4]
