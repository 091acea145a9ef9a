"""Aspect-ratio buckets: a few shapes of about the same area, so that tall and wide pictures lose little."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sfumato.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """Let pictures keep about their own aspect ratio.

    Attributes:
        count: how many shapes at most, the square one included.
        step: sides are multiples of it, in pixels; the network's down-sampling must divide it.
        max_ratio: of the longer to the shorter side.
    """

    count: int = 9
    step: int = 8
    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.count < 1 or self.step < 1 or not 1 <= self.max_ratio <= 8:
            raise ConfigError(
                f"count = {self.count}, step = {self.step}, max_ratio = {self.max_ratio}",
                where="data.buckets",
                mend="count and step are at least 1, max_ratio from 1 to 8",
            )

    def shapes(self, resolution: int) -> tuple[tuple[int, int], ...]:
        """(height, width) of each bucket, from tall to wide; areas are at most resolution^2."""
        area = resolution**2
        steps = range(1, int(resolution * math.sqrt(self.max_ratio)) // self.step + 1)
        found: dict[float, tuple[int, int]] = {}
        for width in (self.step * n for n in steps):
            height = area // width // self.step * self.step
            if height and max(width / height, height / width) <= self.max_ratio:
                found[math.log(width / height)] = (height, width)
        if not found:
            raise ConfigError(
                f"no shape with sides that are multiples of {self.step}",
                where="data.buckets.step",
                mend=f"divide {resolution} by it",
            )
        aspects = sorted(found)
        widest = math.log(self.max_ratio) if self.count > 1 else 0.0
        wanted = [widest * (2 * i / max(1, self.count - 1) - 1) for i in range(self.count)]
        chosen = {min(aspects, key=lambda aspect: (abs(aspect - want), aspect)) for want in wanted}
        return tuple(found[aspect] for aspect in sorted(chosen))
