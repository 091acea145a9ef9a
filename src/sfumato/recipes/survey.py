"""A survey of a source, from the headers of a few images."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sfumato.data import Listing
from sfumato.data.decoding import (
    ImageHeader,
    PixelFormat,
    RejectedImage,
    decode,
    quiet,
    read_header,
)
from sfumato.data.listing import Entry
from sfumato.recipes.caption_statistics import CaptionSurvey

LOOKED_AT = 200  # images whose header is read
DECODED = 32  # those of them that are decoded, to see whether anything is transparent
MOST = 0.5  # share of the images from which on the preset follows them


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a source holds, as far as a few images tell.

    Images that training would leave out do not count.

    Attributes:
        count: images listed.
        categories: how many images each has, named hold-outs aside; {} where there are none.
        captions: how many images have captions, and what these are good for.
        side: median length of the shorter side in pixels; 0 if none could be looked at.
        channels: that fit most of the images; 3 if none could be looked at.
        why: the reason for the channels, as half a sentence.
        deep: share of images with more than 8 bits a value.
    """

    count: int
    categories: dict[str, int]
    captions: CaptionSurvey
    side: int
    channels: int
    why: str
    deep: float

    @classmethod
    def of(cls, listing: Listing) -> Survey:
        """Survey a source by its entries, and by the headers of some 200 images spread over it."""
        entries = listing.entries
        spread = entries[:: max(1, len(entries) // LOOKED_AT)]
        with quiet():
            pairs = [(entry, found) for entry in spread if (found := _look(entry)) is not None]
            channels, why = _channels(pairs)
        looks = [found for _, found in pairs]
        return cls(
            count=len(entries),
            categories=dict(
                Counter(
                    entry.category for entry in entries if entry.category and entry.holdout is None
                )
            ),
            captions=CaptionSurvey.of(entries),
            side=int(statistics.median(min(found.size) for found in looks)) if looks else 0,
            channels=channels,
            why=why,
            deep=sum(found.dtype != np.uint8 for found in looks) / max(1, len(looks)),
        )


def _look(entry: Entry) -> ImageHeader | None:
    try:
        return read_header(entry.image.read())
    except (RejectedImage, OSError):  # what is wrong with it is said when it is indexed
        return None


def _channels(pairs: Sequence[tuple[Entry, ImageHeader]]) -> tuple[int, str]:
    """Choose the channels that fit most images, and say why."""
    if not pairs:
        return 3, "no image could be looked at"
    usual, count = Counter(_unusual(found) for _, found in pairs).most_common(1)[0]
    if usual:
        others = len(pairs) - count
        rest = (
            f"; the other {others} of {len(pairs)} looked at cannot be used with them"
            if others
            else ""
        )
        return usual, f"the images have {usual} channels, none of which is marked as alpha{rest}"
    ordinary = [(entry, found) for entry, found in pairs if not _unusual(found)]
    gray = all(found.bands - found.alpha == 1 for _, found in ordinary)
    colours = "all images looked at are gray" if gray else "the images are in colour"
    clear = _transparent(ordinary)
    if clear >= MOST:
        return (2 if gray else 4), f"{colours}, and {clear:.0%} of them are transparent somewhere"
    return (1 if gray else 3), colours + (
        f"; {clear:.0%} are transparent somewhere and composited over data.background"
        if clear
        else ""
    )


def _unusual(found: ImageHeader) -> int:
    """Return the channels of an image that is neither gray nor in colour, and 0 for any other."""
    return 0 if found.bands - found.alpha in (1, 3) else found.bands


def _transparent(pairs: Sequence[tuple[Entry, ImageHeader]]) -> float:
    """Estimate the share of images with a pixel that is not opaque.

    Only some of those whose container has alpha are decoded.
    """
    marked = [entry for entry, found in pairs if found.alpha]
    if not marked:
        return 0.0
    chosen = marked[:: max(1, len(marked) // DECODED)]
    form = PixelFormat(shapes=((32, 32),), channels=4)
    clear = 0
    for entry in chosen:
        try:
            clear += bool(decode(entry.image.read(), form).pixels[3].min() < 255)
        except (RejectedImage, OSError):
            continue
    return clear / len(chosen) * len(marked) / len(pairs)
