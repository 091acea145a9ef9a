"""Images that a pipeline has made, with the settings that they were made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.observability.image_formats import FORMATS, PixelEncoding, usual_format


@dataclass(frozen=True, kw_only=True, eq=False)
class Generated:
    """Images and their settings.

    Attributes:
        images: (num, C, H, W) in [0, 1].
        settings: plain data; of arguments of `Pipeline.sample` those that are words or numbers.
        values: what the images' values stand for.
    """

    images: Tensor
    settings: Mapping[str, Any]
    values: PixelEncoding

    def save(self, folder: str | Path, *, format: str | None = None) -> list[Path]:
        """Write each image to a file with the settings and the image's number; return the paths.

        Args:
            format: a name in `sfumato.observability.image_formats.FORMATS`; by default PNG, or TIFF
                where PNG cannot hold the channels.
        Raises:
            ConfigError: for an unknown format, or one that cannot hold such images.
        """
        kind = format or usual_format(self.values)
        if kind not in FORMATS:
            raise ConfigError(
                f"format {kind!r}", where="save", hint=f"choose among {', '.join(FORMATS)}"
            )
        FORMATS[kind].require(self.values)
        Path(folder).mkdir(parents=True, exist_ok=True)
        return [
            FORMATS[kind].write(
                image,
                Path(folder) / f"{number:05d}.{kind}",
                self.values,
                {**self.settings, "index": number},
            )
            for number, image in enumerate(self.images)
        ]
