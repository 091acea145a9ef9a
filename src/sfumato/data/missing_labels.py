"""The caption and the category of images that have none."""

from __future__ import annotations

from dataclasses import replace

from sfumato.data.listing import Listing


def fill_missing(
    listing: Listing, *, caption: str | None = None, category: str | int | None = None
) -> Listing:
    """Return a listing whose images without a caption or a category have these.

    What an image has of its own is left as it is, and so is the listing if both are None or blank.
    Remarks say how many images got one.
    """
    text = (caption or "").strip()
    name = "" if category is None else str(category).strip()
    if not text and not name:
        return listing
    entries, remarks = list(listing.entries), list(listing.remarks)
    if text:
        without = sum(not entry.captions for entry in entries)
        remarks.append(_remark("caption", text, without, len(entries)))
        entries = [e if e.captions else replace(e, captions=(text,)) for e in entries]
    if name:
        without = sum(entry.category is None for entry in entries)
        remarks.append(_remark("category", name, without, len(entries)))
        entries = [e if e.category is not None else replace(e, category=name) for e in entries]
    return replace(listing, entries=entries, remarks=tuple(remarks))


def _remark(kind: str, value: str, without: int, count: int) -> str:
    if not without:
        return f"data.{kind} is not used: all {count} images have one of their own"
    return f"data.{kind}: {without} of {count} images have no {kind} of their own and get {value!r}"
