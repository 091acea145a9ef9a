"""Line charts as SVG, to be put into a page: they print, scale and need no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sfumato.observability.plot import ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 270, 52, 12, 8, 42
STRIP = 10  # height of the strip of states


@dataclass(frozen=True)
class Curve:
    """A curve with a band.

    Attributes:
        name: also the CSS class that colours it.
        low, high: ends of the band at each x; none without.
    """

    name: str
    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word."""

    x: float
    label: str


@dataclass(frozen=True)
class Stretch:
    """A state that held from one x to another."""

    start: float
    stop: float
    state: str


class Axis:
    """A linear or logarithmic axis, from values to pixels."""

    def __init__(
        self, low: float, high: float, start: float, stop: float, *, log: bool = False
    ) -> None:
        self._change = math.log10 if log else float
        self.log, self.low, self.high = log, low, high
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self._change(self.low), self._change(self.high)
        share = (self._change(value) - low) / ((high - low) or 1.0)
        return self._start + share * (self._stop - self._start)

    def ticks(self) -> list[float]:
        """Return round values along the axis: 1, 2, 5, 10, ... where it is logarithmic."""
        if not self.log:
            return [tick for tick in ticks(self.low, self.high) if self.low <= tick <= self.high]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        few = math.log10(self.high / self.low) > 2
        steps = (1,) if few else (1, 2, 5)
        values = [step * 10.0**power for power in powers for step in steps]
        return [value for value in values if self.low <= value <= self.high]


def chart(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    marks: Sequence[Mark] = (),
    states: Sequence[Stretch] = (),
) -> str:
    """Draw curves over a common x axis, with bands, marks and a strip of states, as SVG."""
    xs = [x for curve in curves for x in curve.xs]
    ys = [y for curve in curves for y in (*curve.ys, *curve.low, *curve.high) if math.isfinite(y)]
    if not xs or not ys:
        return ""
    x_axis = Axis(min(xs), max(xs) + (max(xs) == min(xs)), LEFT, WIDTH - RIGHT, log=log_x)
    # of values that are all 0, the axis begins there too
    round_ys = ticks(min(0.0, *ys), max(ys) if any(ys) else 1.0)
    top = TOP + (STRIP + 6 if states else 0)
    y_axis = Axis(round_ys[0], round_ys[-1], HEIGHT - BOTTOM, top)
    parts = [*_grid(x_axis, y_axis, top), *(_stretch(state, x_axis) for state in states)]
    for curve in curves:
        parts += _curve(curve, x_axis, y_axis)
    parts += [line for mark in marks for line in _mark(mark, x_axis, top)]
    parts += [
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" '
        f'text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="label" transform="translate(14 {(top + HEIGHT - BOTTOM) / 2:.0f}) '
        f'rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    legend = "".join(
        f'<span class="key {curve.name}">{escape(curve.label)}</span>' for curve in curves
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over '
        f'{escape(x_label)}">{"".join(parts)}</svg><p class="legend">{legend}</p>'
    )


def _grid(x_axis: Axis, y_axis: Axis, top: float) -> list[str]:
    parts = []
    for value in x_axis.ticks():
        x = x_axis(value)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:g}</text>'
        )
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    return parts


def _curve(curve: Curve, x_axis: Axis, y_axis: Axis) -> list[str]:
    def path(xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in zip(xs, ys, strict=True))

    parts = []
    if curve.low:
        limits = y_axis.low, y_axis.high
        low, high = (
            [min(max(y, limits[0]), limits[1]) for y in ys] for ys in (curve.low, curve.high)
        )
        band = f"{path(curve.xs, high)} {path(list(reversed(curve.xs)), list(reversed(low)))}"
        parts.append(f'<polygon class="band {curve.name}" points="{band}"/>')
    parts.append(f'<polyline class="line {curve.name}" points="{path(curve.xs, curve.ys)}"/>')
    parts += [
        f'<circle class="{curve.name}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="2.4"/>'
        for x, y in zip(curve.xs, curve.ys, strict=True)
    ]
    return parts


def _mark(mark: Mark, x_axis: Axis, top: float) -> list[str]:
    x = x_axis(mark.x)
    side = "end" if x > WIDTH / 2 else "start"
    at = x - 5 if side == "end" else x + 5
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{HEIGHT - BOTTOM}"/>',
        f'<text class="marked" x="{at:.1f}" y="{top + 12}" text-anchor="{side}">'
        f"{escape(mark.label)}</text>",
    ]


def _stretch(stretch: Stretch, x_axis: Axis) -> str:
    start, stop = x_axis(stretch.start), x_axis(stretch.stop)
    name = stretch.state.replace(" ", "-")
    return (
        f'<rect class="state {name}" x="{start:.1f}" y="{TOP}" '
        f'width="{max(2.0, stop - start):.1f}" height="{STRIP}"><title>{escape(stretch.state)}'
        "</title></rect>"
    )
