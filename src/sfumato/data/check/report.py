"""The findings as files: data.json for programs, rejects.txt for `data.exclude`, and
data_report.html for people.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from sfumato.data.check.findings import KINDS
from sfumato.data.check.inspect import Inspection
from sfumato.data.check.measure import to_display_rgb
from sfumato.data.decoding import PixelFormat, RejectedImage, decode, fit_within
from sfumato.data.listing import Entry
from sfumato.errors import DataError
from sfumato.storage.atomic import write_text

MAX_TILES, MAX_GROUPS, THUMBNAIL = 24, 12, 96


def write(inspection: Inspection, folder: Path) -> list[Path]:
    """Write data_report.html, data.json and rejects.txt to `folder`, and return their paths.

    Raises:
        DataError: if the folder cannot be written to.
    """
    rejects = inspection.rejects()
    lines = [
        "# pass this file to training as data.exclude; a name, a tab, and why",
        *_of_a_sample(inspection),
        *(f"{name}\t{reason}" for name, reason in rejects.items()),
    ]
    paths = {
        "data_report.html": _page(inspection, rejects),
        "data.json": json.dumps(plain(inspection), indent=1, ensure_ascii=False) + "\n",
        "rejects.txt": "\n".join(line.replace("\n", " ").replace("\r", " ") for line in lines)
        + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in paths.items():
            write_text(folder / name, content)
    except OSError as error:
        raise DataError(
            f"cannot be written: {error}", where=str(folder), hint="name another folder with --out"
        ) from None
    return [folder / name for name in paths]


def _of_a_sample(inspection: Inspection) -> list[str]:
    """Return a comment line about a measured sample; [] if all images were measured."""
    measured, total = (inspection.figures[name] for name in ("measured", "images"))
    if measured == total:
        return []
    return [
        f"# of the {measured:,} images that were measured, of {total:,}: training finds unreadable and "
        "equal images among the others by itself"
    ]


def plain(inspection: Inspection) -> dict[str, Any]:
    """Return the contents of data.json."""
    files = inspection.files()
    return {
        "source": inspection.source,
        **inspection.figures,
        "counts": {kind: len(names) for kind, names in files.items()},
        "issues": files,
        "reasons": inspection.reasons_by_name(),
        "groups": {
            kind: [[inspection.entries[i].name for i in group] for group in groups]
            for kind, groups in inspection.groups.items()
        },
        "remarks": inspection.remarks,
    }


def thumbnail(entry: Entry, form: PixelFormat | None = None) -> str:
    """Return a small image, as training sees it, as a data: URL; "" if it cannot be read."""
    try:
        data = entry.image.read()
        form = fit_within(data, THUMBNAIL, form)
        decoded = decode(data, form)
    except (RejectedImage, OSError):
        return ""
    pixels = to_display_rgb(decoded.pixels, form, alpha="no_alpha" not in decoded.notes)
    image = Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))
    image.thumbnail((3 * THUMBNAIL, 3 * THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _page(inspection: Inspection, rejects: dict[str, str]) -> str:
    files = inspection.files()
    sections = []
    for kind, names in files.items():
        groups = inspection.groups.get(kind, [])[:MAX_GROUPS]
        of = (
            "images" if kind in ("unnamed", "left_out") else "measured"
        )  # said by the listing alone
        rows = [[_tile(inspection, i) for i in group[:6]] for group in groups]
        if not rows and kind in inspection.issues:
            rows = [[_tile(inspection, i) for i in inspection.issues[kind][:MAX_TILES]]]
        sections.append(
            {
                "kind": kind,
                "about": KINDS[kind],
                "names": names,
                "rows": rows,
                "share": len(names) / max(1, inspection.figures[of]),
            }
        )
    clusters = [
        {"share": share, "row": [_tile(inspection, i) for i in typical]}
        for typical, share in inspection.clusters
    ]
    spread = range(0, len(inspection.entries), max(1, len(inspection.entries) // MAX_TILES))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    here = Path(__file__)
    script = here.with_name("report.js").read_text(encoding="utf-8")
    return environment.from_string(
        here.with_name("report.html").read_text(encoding="utf-8")
    ).render(
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        source=inspection.source,
        figures=inspection.figures,
        remarks=inspection.remarks,
        sections=sections,
        clusters=clusters,
        risk=_risk(inspection),
        rejects=rejects,
        reasons=inspection.reasons_by_name(),
        ledger=inspection.ledger,
        sample=[tile for i in list(spread)[:MAX_TILES] if (tile := _tile(inspection, i))["src"]],
        categories=_bars(inspection.figures.get("categories", {}).get("counts", {})),
    )


def _risk(inspection: Inspection) -> dict[str, Any] | None:
    """Return what the section on memorization shows; None without it."""
    risk = inspection.risk
    if risk is None or not (risk.sparse or risk.repeated):
        return None
    names = [entry.name for entry in inspection.entries]
    sparse = [
        {
            **_tile(inspection, image.position),
            "words": f"{risk.times(image):.1f} × · {names[image.position]}",
        }
        for image in risk.sparse
    ]
    repeated = [
        {**_tile(inspection, group[0]), "words": f"{len(group)} times · {names[group[0]]}"}
        for group in risk.repeated
    ]
    return {
        "sentence": inspection.memorized_first(),
        "median": risk.median,
        "sparse": sparse,
        "repeated": repeated,
    }


def _tile(inspection: Inspection, position: int) -> dict[str, str]:
    entry = inspection.entries[position]
    words = " · ".join([*([entry.category] if entry.category else []), *entry.captions[:1]])
    return {"src": thumbnail(entry, inspection.form), "name": entry.name, "words": words[:120]}


def _bars(counts: dict[str, int]) -> list[tuple[str, int, float]]:
    most = max(counts.values(), default=1)
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return [
        (name, count, 100 * count / most)
        for name, count in (ranked if len(ranked) <= 30 else [*ranked[:15], *ranked[-15:]])
    ]
