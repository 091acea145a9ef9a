"""Count of the frames of a GIF, without decoding them."""

from __future__ import annotations

IMAGE, EXTENSION = 0x2C, 0x21


def frames(data: bytes) -> int:
    """Count the images in a GIF, as far as its blocks are intact; at least 1.

    Source: GIF89a (CompuServe 1990), sections 15 to 27.
    """
    place = 13 + _table(data, 10)
    count = 0
    while place < len(data):
        if data[place] == IMAGE and place + 10 < len(data):
            count += 1
            place = _after(data, place + 11 + _table(data, place + 9))
        elif data[place] == EXTENSION:
            place = _after(data, place + 2)
        else:
            break
    return max(1, count)


def _table(data: bytes, place: int) -> int:
    """Return the size in bytes of the colour table that the flags at `place` announce."""
    flags = data[place] if place < len(data) else 0
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after(data: bytes, place: int) -> int:
    """Return where the sub-blocks that begin at `place` end."""
    while place < len(data) and data[place]:
        place += 1 + data[place]
    return place + 1
