"""The choice of the values that are black and white: one range for the whole set, from a look at a
few of its images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from sfumato.data.decoding import RejectedImage, quiet, read_header, read_raw
from sfumato.data.listing import Entry
from sfumato.data.parallel import ordered_map
from sfumato.data.pixel_format import Kind, Range, RawImage, Scale, kind_of

HEADERS_READ, MEASURED = 200, 48  # images whose header is read, and whose values are
# values looked at in an image, and the share of them at either end that does not count
PLACES, SHARE = 65_536, 1e-4
OUTSHINES, DIM = 8.0, 1 / 3  # times the usual span of an image; share of what the values could span
TOPS = (255.0, 1023.0, 4095.0, 16383.0)  # of 8, 10, 12 and 14 bits
DEEP = 65535.0
GOLDEN = (5**0.5 - 1) / 2


class ChosenScale(NamedTuple):
    """A scale, and the explanation of it for a person, one sentence per line."""

    scale: Scale
    lines: tuple[str, ...] = ()


class MeasuredRange(NamedTuple):
    """The range of the values of one image: all but the outermost ones lie from `low` to `high`."""

    low: float
    high: float
    least: float
    largest: float
    dtype: np.dtype

    @classmethod
    def of(cls, raw: RawImage) -> MeasuredRange | None:
        """Measure an image's colours; None if none of them is finite."""
        flat = raw.colours().reshape(-1)
        if flat.dtype.kind == "f":
            flat = flat[np.isfinite(flat)]
        if not flat.size:
            return None
        places = (
            flat
            if flat.size <= PLACES
            else flat[np.arange(PLACES, dtype=np.uint64) * 2_654_435_761 % np.uint64(flat.size)]
        )
        places = np.sort(places)
        margin = int(len(places) * SHARE)
        low, high = float(places[margin]), float(places[-1 - margin])
        return cls(low, high, float(flat.min()), float(flat.max()), raw.array.dtype)


def choose_scale(setting: Literal["auto"] | Range, entries: Sequence[Entry]) -> ChosenScale:
    """Choose the scale of a set, from the setting or from its values.

    8-bit integers are from 0 to 255. Of other types, integers that fit into 8, 10, 12, 14 or 16
    bits and floats from 0 to 1 keep those ends, unless the set is dim all the same; everything else
    gets the ends of what its images hold, except for images that far outshine the usual one.
    """
    sample = _sample(entries, HEADERS_READ)
    with quiet():
        kinds = list(ordered_map(_kind, sample))
        if setting != "auto":
            return _from_setting(setting, set(kinds) - {None})
        scale: dict[str, Range] = {}
        lines = []
        for kind in ("integers", "floats"):
            chosen = [entry for entry, its in zip(sample, kinds, strict=True) if its == kind]
            ends = [
                measured
                for measured in ordered_map(_measure, _sample(chosen, MEASURED))
                if measured is not None
            ]
            if ends:
                limits, line = _choose_range(ends)
                lines.append(line)
                if limits is not None:
                    scale[kind] = limits
    return ChosenScale(Scale(**scale), tuple(lines))


def _sample(entries: Sequence[Entry], most: int) -> Sequence[Entry]:
    """Choose at most `most` entries, always the same, out of step with the set's own order."""
    if len(entries) <= most:
        return entries
    return [
        entries[place]
        for place in sorted({int((number * GOLDEN % 1) * len(entries)) for number in range(most)})
    ]


def _kind(entry: Entry) -> Kind | None:
    try:
        return kind_of(read_header(entry.image.read()).dtype)
    except (RejectedImage, OSError):
        return None


def _measure(entry: Entry) -> MeasuredRange | None:
    try:
        return MeasuredRange.of(read_raw(entry.image.read()))
    except (RejectedImage, OSError):
        return None


def _from_setting(limits: Range, kinds: set[Kind | None]) -> ChosenScale:
    line = f"values: {_number(limits[0])} is black and {_number(limits[1])} white, as set by data.range"
    if "bytes" in kinds and len(kinds) > 1:
        line += "; 8-bit images keep 0 and 255"
    return ChosenScale(
        Scale(integers=limits, floats=limits, bytes=limits if kinds == {"bytes"} else None), (line,)
    )


def _choose_range(measured: Sequence[MeasuredRange]) -> tuple[Range | None, str]:
    """Return the range of one kind of number, None where it is the default, and a remark on it."""
    floats = measured[0].dtype.kind == "f"
    name = "floating-point values" if floats else "integer values"
    largest = max(ends.largest for ends in measured)
    natural = _range_of_dtype(measured)
    low, high = _typical_range(measured)
    if natural is not None and high >= DIM * natural[1]:
        default = (
            natural == (0, 1)
            if floats
            else natural[1] == DEEP and all(ends.dtype == np.uint16 for ends in measured)
        )
        values = name if floats else f"{int(natural[1]).bit_length()}-bit values"
        sentence = f"{values}: {_number(natural[0])} is black and {_number(natural[1])} white"
        return (
            None if default else natural,
            f"{sentence} (the largest value in {len(measured)} sampled images is {_number(largest)})",
        )
    if high <= low:
        low, high = low, low + 1
    sentence = f"{name}: {_number(low)} is black and {_number(high)} white, measured on {len(measured)} images"
    if brighter := sum(ends.high > high for ends in measured):
        sentence += f", {brighter} of which are brighter and clipped"
    return (low, high), f"{sentence} (data.range sets others)"


def _range_of_dtype(measured: Sequence[MeasuredRange]) -> Range | None:
    """Return the ends that values of this kind usually have; None where the values do not tell."""
    least, largest = min(ends.least for ends in measured), max(ends.largest for ends in measured)
    if least < 0:
        return None
    if measured[0].dtype.kind == "f":
        return (0.0, 1.0) if largest <= 1 else None
    signed = any(ends.dtype == np.int16 for ends in measured)
    return next(
        ((0.0, top) for top in (*TOPS, 32767.0 if signed else DEEP) if largest <= top), None
    )


def _typical_range(measured: Sequence[MeasuredRange]) -> Range:
    """Return the darkest and brightest value of the images.

    Images far outside of what the usual image spans do not count.
    """
    lows, highs = (
        np.array([ends.low for ends in measured]),
        np.array([ends.high for ends in measured]),
    )
    low, high = float(np.median(lows)), float(np.median(highs))
    room = (OUTSHINES - 1) * (high - low)
    return float(lows[lows >= low - room].min()), float(highs[highs <= high + room].max())


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
