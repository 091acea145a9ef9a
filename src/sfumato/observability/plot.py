"""Line plots as PNG, for curves that can be viewed without installing a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLOURS = ((31, 97, 171), (204, 85, 0), (34, 139, 84), (140, 60, 160), (110, 110, 110))
PAPER, INK, RULE = (255, 255, 255), (40, 40, 40), (225, 225, 225)
# drawn at twice the size, for smooth lines
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1280, 760, 124, 32, 68, 92


@dataclass(frozen=True)
class Line:
    """One curve; points that are not finite are gaps."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]


def line_plot(title: str, x_label: str, lines: Sequence[Line]) -> Image.Image:
    """Plot curves over a common x axis, with round ticks and a legend."""
    points = [
        (x, y)
        for line in lines
        for x, y in zip(line.xs, line.ys, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    points = points or [(0.0, 0.0)]
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    sheet = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(26)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    draw.text((LEFT, 16), title, fill=INK, font=ImageFont.load_default(30))
    draw.text(((WIDTH + LEFT) / 2, HEIGHT - 24), x_label, fill=INK, anchor="mm", font=font)
    for x in x_ticks:
        draw.line([place(x, y_ticks[0]), place(x, y_ticks[-1])], fill=RULE, width=2)
        draw.text(
            (place(x, 0)[0], HEIGHT - BOTTOM + 24), f"{x:g}", fill=INK, anchor="mm", font=font
        )
    for y in y_ticks:
        draw.line([place(x_ticks[0], y), place(x_ticks[-1], y)], fill=RULE, width=2)
        draw.text((LEFT - 16, place(0, y)[1]), f"{y:g}", fill=INK, anchor="rm", font=font)
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        for run in _runs(line):
            draw.line([place(x, y) for x, y in run], fill=colour, width=4, joint="curve")
        draw.line(
            [(WIDTH - 340, TOP + 24 + 36 * number), (WIDTH - 290, TOP + 24 + 36 * number)],
            fill=colour,
            width=6,
        )
        draw.text(
            (WIDTH - 276, TOP + 24 + 36 * number), line.label, fill=INK, anchor="lm", font=font
        )
    return sheet.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.LANCZOS)


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers that enclose [low, high]."""
    if high - low <= 1e-14 * max(abs(low), abs(high), 1e-100):
        margin = max(0.5, abs(low) / 1000)
        low, high = low - margin, high + margin
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [
        round(step * number, 2 - math.floor(math.log10(step))) for number in range(first, last + 1)
    ]


def _runs(line: Line) -> list[list[tuple[float, float]]]:
    """Split a curve at points that are not finite; isolated points are dropped."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.xs, line.ys, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1]
