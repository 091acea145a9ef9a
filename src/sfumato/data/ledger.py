"""The account of everything that a source holds: total = used + sidecars + left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.data.listing import Listing, Reject

MAX_REASONS, MAX_NAMES = 3, 1000
NOTES = {
    "animated_first_frame_used": "several frames, of which the first is used",
    "cmyk_converted": "converted from CMYK to RGB",
    "exif_damaged": "damaged EXIF data, so that the orientation is not known",
    "exif_rotated": "turned upright by the orientation tag",
    "icc_converted_to_srgb": "converted from a colour profile to sRGB",
    "icc_profile_ignored": "a colour profile that cannot be read and is ignored",
    "no_alpha": "2 or 4 channels, none of which is alpha",
    "palette_converted": "converted from a palette",
    "sixteen_bit_reduced": "reduced from 16 bits to 8",
    "transparency_filled": "transparent somewhere, and composited over data.background",
    "upscaled": "smaller than the training resolution, and upscaled",
    "values_outside_range": "values outside data.range, which are clipped",
}  # what decoding does to images, by note


def _singular(kind: str) -> str:
    """Return the singular of a kind: "files of the system" becomes "file of the system"."""
    first, *words = kind.split(" ")
    return " ".join([first.removesuffix("s"), *words])


def describe_note(note: str, names: Sequence[str]) -> str:
    """Describe what decoding did to images, with their number and an example."""
    count = f"{len(names):,} image{'s' if len(names) > 1 else ''}"
    return f"{NOTES.get(note, note.replace('_', ' '))}: {count}, e.g. {names[0]}"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The account of a source.

    Attributes:
        unit: what is counted: "files", "members" of an archive, "rows" of a table or "images" of an
            array.
        total: how many there are.
        used: those that became images.
        unread: of these, how many were not opened, since a sample was measured.
        beyond: images that `data.limit` leaves out.
        sidecars: those that say something about images, by kind.
        left_out: names by reason.
        remarks: how the source was read, in whole sentences: folders, encodings, metadata.
    """

    unit: str
    total: int
    used: int
    sidecars: Mapping[str, int]
    left_out: Mapping[str, Sequence[str]]
    remarks: Sequence[str] = ()
    unread: int = 0
    beyond: int = 0

    @classmethod
    def of(
        cls,
        listing: Listing,
        unreadable: Sequence[Reject] = (),
        *,
        unread: int = 0,
        beyond: int = 0,
    ) -> Ledger:
        """Draw up the account of a listing, some of whose entries were unreadable or excluded."""
        left_out: dict[str, list[str]] = {}
        for reject in (*(reject for reject in listing.rejects if not reject.part), *unreadable):
            left_out.setdefault(reject.reason, []).append(reject.name)
        used = len(listing.entries) - len(unreadable) - beyond
        return cls(
            unit=listing.unit,
            total=listing.total,
            used=used,
            sidecars=listing.sidecars,
            left_out=left_out,
            remarks=listing.remarks,
            unread=unread,
            beyond=beyond,
        )

    @property
    def balanced(self) -> bool:
        """Whether nothing is unaccounted for."""
        beside = sum(self.sidecars.values()) + sum(map(len, self.left_out.values()))
        return self.total == self.used + beside + self.beyond

    def line(self) -> str:
        """Summarize the account in one line."""
        unread = f" ({self.unread:,} of them were not opened)" if self.unread else ""
        parts = [f"{self.total:,} {self.unit}: {self.used:,} images used{unread}"]
        parts += [
            f"{count:,} {_singular(kind) if count == 1 else kind}"
            for kind, count in self.sidecars.items()
        ]
        if self.beyond:
            parts.append(f"{self.beyond:,} beyond data.limit")
        if self.left_out:
            parts.append(f"{sum(map(len, self.left_out.values())):,} left out ({self._reasons()})")
        return ", ".join(parts)

    def _reasons(self) -> str:
        """Summarize the most common reasons.

        What differs from file to file follows a colon in a reason, and is left to the full list.
        """
        counts: Counter[str] = Counter()
        for reason, names in self.left_out.items():
            counts[reason.partition(":")[0]] += len(names)
        common = [f"{count:,} {reason}" for reason, count in counts.most_common(MAX_REASONS)]
        others = sum(counts.values()) - sum(count for _, count in counts.most_common(MAX_REASONS))
        return "; ".join([*common, *([f"{others:,} for other reasons"] if others else [])])

    def lines(self) -> list[str]:
        """Return the whole account, one line per reason, each with the first names."""
        lines = [self.line(), *self.remarks]
        for reason, names in sorted(self.left_out.items(), key=lambda item: -len(item[1])):
            lines.append(
                f"  {len(names):,} left out: {reason} "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            )
        return lines

    def plain(self) -> dict[str, Any]:
        """Return the account for data.json, with at most MAX_NAMES names for each reason."""
        left_out = {
            reason: {"count": len(names), "names": list(names[:MAX_NAMES])}
            for reason, names in self.left_out.items()
        }
        return {
            "unit": self.unit,
            "found": self.total,
            "used": self.used,
            **({"unread": self.unread} if self.unread else {}),
            **({"beyond_limit": self.beyond} if self.beyond else {}),
            "beside": dict(self.sidecars),
            "left_out": left_out,
            "remarks": list(self.remarks),
        }
