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

SAMPLED = 200  # some 200 images, spread evenly over the set, have their headers read
DECODED = 32  # some 32 of them are decoded, to find transparent pixels
MOST = 0.5  # fraction of the images from which on the preset adopts their property


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The contents of a source, estimated from a sample of its images.

    Images that training would leave out do not count.

    Attributes:
        count: number of listed images.
        categories: number of images of each, named hold-outs excluded; {} without categories.
        captions: statistics of the captions.
        side: median length of the shorter side in pixels; 0 if no image could be read.
        channels: channels that fit most of the images; 3 if no image could be read.
        why: the reason for the channels, as half a sentence.
        high_bit_depth: fraction of images with more than 8 bits per value.
    """

    count: int
    categories: dict[str, int]
    captions: CaptionSurvey
    side: int
    channels: int
    why: str
    high_bit_depth: float

    @classmethod
    def of(cls, listing: Listing) -> Survey:
        """Survey a source by its entries, and by the headers of some 200 images spread over it."""
        entries = listing.entries
        spread = entries[:: max(1, len(entries) // SAMPLED)]
        with quiet():
            pairs = [(entry, head) for entry in spread if (head := _header(entry)) is not None]
            channels, why = _channels(pairs)
        headers = [header for _, header in pairs]
        return cls(
            count=len(entries),
            categories=dict(
                Counter(
                    entry.category for entry in entries if entry.category and entry.holdout is None
                )
            ),
            captions=CaptionSurvey.of(entries),
            side=int(statistics.median(min(head.size) for head in headers)) if headers else 0,
            channels=channels,
            why=why,
            high_bit_depth=sum(head.dtype != np.uint8 for head in headers) / max(1, len(headers)),
        )


def _header(entry: Entry) -> ImageHeader | None:
    try:
        return read_header(entry.image.read())
    except (RejectedImage, OSError):  # indexing reports the reason
        return None


def _channels(pairs: Sequence[tuple[Entry, ImageHeader]]) -> tuple[int, str]:
    """Choose the channels that fit most images, and say why."""
    if not pairs:
        return 3, "no image could be read"
    multichannel, count = Counter(_multichannel(header) for _, header in pairs).most_common(1)[0]
    if multichannel:
        others = len(pairs) - count
        excluded = (
            f"; the other {others} of {len(pairs)} sampled images cannot be used with them"
            if others
            else ""
        )
        return multichannel, (
            f"the images have {multichannel} channels, none of which is marked as alpha{excluded}"
        )
    ordinary = [(entry, header) for entry, header in pairs if not _multichannel(header)]
    gray = all(header.bands - header.alpha == 1 for _, header in ordinary)
    colours = "all sampled images are gray" if gray else "the images are in colour"
    clear = _transparent(ordinary)
    if clear >= MOST:
        return (2 if gray else 4), f"{colours}, and {clear:.0%} of them are transparent somewhere"
    return (1 if gray else 3), colours + (
        f"; {clear:.0%} are transparent somewhere and composited over data.background"
        if clear
        else ""
    )


def _multichannel(header: ImageHeader) -> int:
    """Return the channels of an image that is neither gray nor in colour, and 0 for any other."""
    return 0 if header.bands - header.alpha in (1, 3) else header.bands


def _transparent(pairs: Sequence[tuple[Entry, ImageHeader]]) -> float:
    """Estimate the fraction of images with a pixel that is not opaque.

    Only some of those whose container has alpha are decoded.
    """
    marked = [entry for entry, header in pairs if header.alpha]
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
