"""Aspect-ratio buckets: a few shapes of about the same area, so that cropping takes little from
tall and wide images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sfumato.config.bounds import Positive, Size
from sfumato.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """Let images keep about their own aspect ratio.

    Attributes:
        count: how many shapes at most: the square one, and as many tall as wide.
        step: sides are multiples of it, in pixels; the autoencoder must divide it, and the network
            pads others.
        max_ratio: of the longer to the shorter side.
    """

    count: Size = 9
    step: Size = 8
    max_ratio: Positive = 2.0

    def __post_init__(self) -> None:
        if self.count < 1 or self.step < 1 or not 1 <= self.max_ratio <= 8:
            raise ConfigError(
                f"count = {self.count}, step = {self.step}, max_ratio = {self.max_ratio}",
                where="data.buckets",
                hint="count and step are at least 1, max_ratio from 1 to 8",
            )

    def shapes(self, resolution: int) -> tuple[tuple[int, int], ...]:
        """Return (height, width) of each bucket, from tall to wide; areas are at most resolution^2.

        Raises:
            ConfigError: if `resolution` is below `step`.
        """
        square = resolution // self.step * self.step
        if not square:
            raise ConfigError(
                f"no shape with sides that are multiples of {self.step}",
                where="data.buckets.step",
                hint=f"divide {resolution} by it",
            )
        area, wide = resolution**2, {0.0: (square, square)}
        for width in range(
            square + self.step, int(resolution * math.sqrt(self.max_ratio)) + 1, self.step
        ):
            height = area // width // self.step * self.step
            if height and width / height <= self.max_ratio:
                wide[math.log(width / height)] = (height, width)
        per_orientation = (self.count - 1) // 2
        target_aspects = [
            math.log(self.max_ratio) * i / max(1, per_orientation)
            for i in range(per_orientation + 1)
        ]
        chosen = sorted(
            {min(wide, key=lambda aspect: abs(aspect - target)) for target in target_aspects}
        )
        tall = [wide[aspect][::-1] for aspect in reversed(chosen) if aspect]
        return (*tall, *(wide[aspect] for aspect in chosen))
