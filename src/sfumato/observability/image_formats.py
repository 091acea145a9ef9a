"""Image files that preserve what a model generates: alpha, 16 bits, any number of channels, and the
values of the source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.observability.images import Alpha, save_png, to_pil
from sfumato.observability.png_tiff_encoders import (
    DESCRIPTION,
    png16,
    png16_pixels,
    tiff,
    tiff_tags,
)
from sfumato.storage.atomic import atomic_file

SETTINGS = "settings.json"  # of a folder of arrays, which carry no text
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, kw_only=True)
class PixelEncoding:
    """What the values of an image (C, H, W) in [0, 1] stand for.

    Attributes:
        channels: C.
        bits: of each value in the training set, 8 or 16.
        alpha: what the last of 2 or 4 channels is.
        value_range: values of the source that 0 and 1 of the colours stand for; None where they are
            those of its integers.
    """

    channels: int
    bits: Literal[8, 16] = 8
    alpha: Alpha = "straight"
    value_range: tuple[float, float] | None = None

    @property
    def has_alpha(self) -> bool:
        """Whether the last channel is alpha."""
        return self.channels in (2, 4) and self.alpha != "none"

    @property
    def colours(self) -> int:
        """The number of channels that are not alpha."""
        return self.channels - self.has_alpha

    def holds_source_values(self, bits: int) -> bool:
        """Return whether unsigned integers of `bits` bits hold the values of the source exactly."""
        if self.value_range is None:
            return False
        low, high = self.value_range
        return (
            0 <= low < high <= 2**bits - 1 and float(low).is_integer() and float(high).is_integer()
        )

    def to_straight_alpha(self, image: Tensor, *, levels: int) -> NDArray[np.float64]:
        """Return an image (C, H, W) in [0, 1] with straight alpha.

        The colours are 0 where alpha rounds to 0 of `levels`.
        """
        values = image.detach().cpu().double().clamp(0, 1).numpy()
        if not self.has_alpha:
            return values
        colours, alpha = values[:-1], values[-1:]
        visible = np.rint(alpha * levels) > 0
        if self.alpha == "premultiplied":
            colours = np.divide(
                colours,
                alpha,
                out=np.zeros_like(colours),
                where=np.broadcast_to(visible, colours.shape),
            ).clip(0, 1)
        return np.concatenate([np.where(visible, colours, 0.0), alpha])

    def to_source_values(
        self, image: Tensor, *, levels: int, alpha_scale: float
    ) -> NDArray[np.float64]:
        """Return (C, H, W) with colours in source values and alpha in [0, `alpha_scale`].

        Without a `value_range`, the colours stay in [0, 1].
        """
        low, high = self.value_range or (0.0, 1.0)
        values = self.to_straight_alpha(image, levels=levels)
        colours = low + values[: self.colours] * (high - low)
        return np.concatenate([colours, values[self.colours :] * alpha_scale])

    def to_integers(self, image: Tensor, bits: int) -> NDArray[Any]:
        """Return (H, W, C), uint8 or uint16, in the values of the source if `bits` bits hold them.

        Otherwise [0, 1] is scaled to the full range of the integers.
        """
        levels = 2**bits - 1
        if self.holds_source_values(bits):
            values = self.to_source_values(image, levels=levels, alpha_scale=levels)
        else:
            values = self.to_straight_alpha(image, levels=levels) * levels
        return np.rint(values).astype(np.uint8 if bits == 8 else np.uint16).transpose(1, 2, 0)

    def to_unit_range(self, values: NDArray[Any]) -> Tensor:
        """Convert stored values (H, W, C) to (C, H, W) in [0, 1]; straight alpha stays straight."""
        bits = 8 * values.dtype.itemsize if values.dtype.kind == "u" else 0
        unit = torch.from_numpy(values.astype(np.float64)).permute(2, 0, 1) / (
            2**bits - 1 if bits else 1
        )
        if self.value_range is not None and (not bits or self.holds_source_values(bits)):
            low, high = self.value_range
            stored = torch.from_numpy(values.astype(np.float64)).permute(2, 0, 1)[: self.colours]
            unit = torch.cat([(stored - low) / (high - low), unit[self.colours :]])
        return unit.clamp(0, 1).float()


class ImageFormat(Protocol):
    """A file format to which images are written atomically, with the settings that they were made
    with.
    """

    def require(self, encoding: PixelEncoding) -> None:
        """Raise ConfigError if the format cannot hold images with these values."""
        ...

    def holds_source_values(self, encoding: PixelEncoding) -> bool:
        """Return whether files of this format hold the values of the source."""
        ...

    def write(
        self, image: Tensor, path: Path, encoding: PixelEncoding, settings: dict[str, Any]
    ) -> Path:
        """Write an image (C, H, W) in [0, 1] to `path`, and return `path`."""
        ...

    def read(self, path: Path, encoding: PixelEncoding) -> Tensor:
        """Read an image that `write` wrote, (C, H, W) in [0, 1] with straight alpha."""
        ...

    def settings(self, path: Path) -> Any:
        """Return the settings that a file carries; None if it carries none."""
        ...


def _parse_json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError):
        return None


def _refuse(message: str, hint: str) -> ConfigError:
    return ConfigError(message, where="--format", hint=hint)


def _pixels(path: Path, encoding: PixelEncoding) -> Tensor:
    """Read a file of 8-bit values with Pillow: (C, H, W) in [0, 1]."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert(MODES[encoding.channels]))
    return encoding.to_unit_range(pixels if pixels.ndim == 3 else pixels[..., None])


@dataclass(frozen=True)
class Png:
    """PNG of 8 or 16 bits: gray or RGB, with or without alpha."""

    def require(self, encoding: PixelEncoding) -> None:
        """Raise ConfigError unless there are 1 or 3 colour channels."""
        if encoding.colours not in (1, 3):
            raise _refuse(f"PNG cannot hold {encoding.colours} colour channels", "use tiff or npy")

    def holds_source_values(self, encoding: PixelEncoding) -> bool:
        """Return whether integers of the training set's depth hold the values of the source."""
        return encoding.holds_source_values(encoding.bits)

    def write(
        self, image: Tensor, path: Path, encoding: PixelEncoding, settings: dict[str, Any]
    ) -> Path:
        """Write a PNG of `encoding.bits` bits, with the settings as JSON in its text `sfumato`."""
        pixels = encoding.to_integers(image, encoding.bits)
        if encoding.bits == 8:
            return save_png(_pillow(pixels), path, settings)
        with atomic_file(path) as file:
            file.write(png16(pixels, {"sfumato": json.dumps(settings)}))
        return path

    def read(self, path: Path, encoding: PixelEncoding) -> Tensor:
        """Read it with Pillow if it has 8 bits, else with `png16_pixels`."""
        return (
            _pixels(path, encoding)
            if encoding.bits == 8
            else encoding.to_unit_range(png16_pixels(path.read_bytes()))
        )

    def settings(self, path: Path) -> Any:
        """Parse the text field `sfumato`; None if it is absent or not JSON."""
        with Image.open(path) as image:
            return _parse_json(image.info.get("sfumato"))


@dataclass(frozen=True)
class EightBitFormat:
    """A format of 8 bits per value that Pillow writes, with settings in EXIF; `alpha` is whether it
    holds alpha.
    """

    name: str
    alpha: bool
    options: tuple[tuple[str, Any], ...]

    def require(self, encoding: PixelEncoding) -> None:
        """Raise ConfigError for 16 bits, other than 1 or 3 colours, or unsupported alpha."""
        if encoding.bits != 8:
            raise _refuse(
                f"{self.name} holds 8 bits a value, and the model generates {encoding.bits}",
                "use png, tiff or npy",
            )
        if encoding.colours not in (1, 3):
            raise _refuse(
                f"{self.name} cannot hold {encoding.colours} colour channels", "use tiff or npy"
            )
        if encoding.has_alpha and not self.alpha:
            raise _refuse(
                f"{self.name} cannot hold alpha, which the model generates",
                "use png, webp, tiff or npy",
            )

    def holds_source_values(self, encoding: PixelEncoding) -> bool:
        """Return whether 8-bit integers hold the values of the source."""
        return encoding.holds_source_values(8)

    def write(
        self, image: Tensor, path: Path, encoding: PixelEncoding, settings: dict[str, Any]
    ) -> Path:
        """Write it with this format's options; the settings are JSON in EXIF's ImageDescription."""
        exif = Image.Exif()
        exif[DESCRIPTION] = json.dumps(settings)
        with atomic_file(path) as file:
            _pillow(encoding.to_integers(image, 8)).save(
                file, self.name, exif=exif.tobytes(), **dict(self.options)
            )
        return path

    def read(self, path: Path, encoding: PixelEncoding) -> Tensor:
        """Read it with Pillow; a lossy file comes back as it was compressed."""
        return _pixels(path, encoding)

    def settings(self, path: Path) -> Any:
        """Parse ImageDescription in EXIF; None if it is absent or not JSON."""
        with Image.open(path) as image:
            return _parse_json(image.getexif().get(DESCRIPTION))


@dataclass(frozen=True)
class Tiff:
    """Uncompressed TIFF of any number of channels: integers as in the source, else float32 in its
    values.
    """

    def require(self, encoding: PixelEncoding) -> None:
        """Accept any number of channels, with or without alpha."""

    def holds_source_values(self, encoding: PixelEncoding) -> bool:
        """Return whether `value_range` is set; float32 holds what integers cannot."""
        return encoding.value_range is not None

    def _bits(self, encoding: PixelEncoding) -> int:
        """Return the bits of the integers that are written; 0 for float32."""
        if encoding.value_range is None:
            return encoding.bits
        return next(
            (
                bits
                for bits in (8, 16)
                if bits >= encoding.bits and encoding.holds_source_values(bits)
            ),
            0,
        )

    def write(
        self, image: Tensor, path: Path, encoding: PixelEncoding, settings: dict[str, Any]
    ) -> Path:
        """Write uint8, uint16 or float32; the settings are JSON in ImageDescription."""
        bits = self._bits(encoding)
        pixels = encoding.to_integers(image, bits) if bits else _floats(image, encoding)
        with atomic_file(path) as file:
            file.write(tiff(pixels, json.dumps(settings), alpha=encoding.has_alpha))
        return path

    def read(self, path: Path, encoding: PixelEncoding) -> Tensor:
        """Read a TIFF that `write` wrote for the same `values`."""
        data = path.read_bytes()
        tags = tiff_tags(data)
        kind = np.dtype({0: "<f4", 8: "u1", 16: "<u2"}[self._bits(encoding)])
        shape = (tags[257], tags[256], encoding.channels)
        return encoding.to_unit_range(
            np.frombuffer(data, kind, int(np.prod(shape)), offset=8).reshape(shape)
        )

    def settings(self, path: Path) -> Any:
        """Parse ImageDescription; None if it is absent or not JSON."""
        return _parse_json(tiff_tags(path.read_bytes()).get(DESCRIPTION))


@dataclass(frozen=True)
class Npy:
    """float32 arrays (H, W, C), or (H, W) for one channel, in the values of the source; the
    settings are in one file per folder.
    """

    def require(self, encoding: PixelEncoding) -> None:
        """Accept any number of channels, with or without alpha."""

    def holds_source_values(self, encoding: PixelEncoding) -> bool:
        """Return whether `value_range` is set; without one, the arrays are in [0, 1]."""
        return encoding.value_range is not None

    def write(
        self, image: Tensor, path: Path, encoding: PixelEncoding, settings: dict[str, Any]
    ) -> Path:
        """Write a float32 array; `settings` is ignored, since arrays carry no text."""
        pixels = _floats(image, encoding)
        with atomic_file(path) as file:
            np.save(file, pixels[..., 0] if encoding.channels == 1 else pixels, allow_pickle=False)
        return path

    def read(self, path: Path, encoding: PixelEncoding) -> Tensor:
        """Read an array that `write` wrote, without unpickling."""
        pixels = np.load(path, allow_pickle=False)
        return encoding.to_unit_range(pixels if pixels.ndim == 3 else pixels[..., None])

    def settings(self, path: Path) -> Any:
        """Parse settings.json in the folder of the array; None if it is absent or not JSON."""
        settings_file = path.with_name(SETTINGS)
        return _parse_json(settings_file.read_text()) if settings_file.is_file() else None


FORMATS: dict[str, ImageFormat] = {
    "png": Png(),
    "tiff": Tiff(),
    "npy": Npy(),
    "webp": EightBitFormat("WEBP", True, (("lossless", True), ("exact", True))),
    "jpg": EightBitFormat("JPEG", False, (("quality", 95), ("subsampling", 0))),
}


def usual_format(encoding: PixelEncoding) -> str:
    """Return "png" if PNG can hold the images, else "tiff"."""
    return "png" if encoding.colours in (1, 3) else "tiff"


def settings_of(path: Path) -> Any:
    """Return the settings that an image file of any format carries; never raise.

    None if it carries none or cannot be read.
    """
    form = FORMATS.get(path.suffix[1:])
    try:
        return None if form is None else form.settings(path)
    except (
        Exception
    ):  # a file of another's, of whatever kind and condition: whatever the parser raises
        return None


def _pillow(pixels: NDArray[np.uint8]) -> Image.Image:
    return to_pil(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 255)


def _floats(image: Tensor, encoding: PixelEncoding) -> NDArray[np.float32]:
    """Return (H, W, C) in the values of the source, with alpha in [0, 1]."""
    units = encoding.to_source_values(image, levels=2**encoding.bits - 1, alpha_scale=1.0)
    return np.ascontiguousarray(units.transpose(1, 2, 0).astype(np.float32))
