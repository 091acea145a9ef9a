"""Names of images that data.json would be too long with: in a table beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.data.arrow import arrow
from sfumato.data.dataset_diff import MAX_LISTED_IMAGES
from sfumato.errors import redact_secrets
from sfumato.storage.atomic import atomic_path

LISTED = 100  # names of a kind in data.json
FILE = "data-names.parquet"
Names = dict[str, Sequence[tuple[str, str]]]  # names by kind, each with a reason or ""


def shortened(record: Mapping[str, Any]) -> tuple[dict[str, Any], Names]:
    """Cut the long lists of names in what `Dataset.summary` returns.

    Returns:
        The record with at most LISTED names in each list, and under `counts` how many there are; and all
        names of the lists that were cut.
    """
    names: Names = {}
    for kind, listed in record["notes"].items():
        if len(listed) > LISTED:
            names[kind] = [(name, "") for name in listed]
    if len(record["rejects"]) > LISTED:
        names["left_out"] = [(row["file"], row["reason"]) for row in record["rejects"]]
    if record["images"] > MAX_LISTED_IMAGES and len(record["holdout_files"]) > LISTED:
        names["holdout"] = [(name, "") for name in record["holdout_files"]]
    if not names:
        return dict(record), names
    held_out = record["holdout_files"]
    return {
        **record,
        "notes": {kind: listed[:LISTED] for kind, listed in record["notes"].items()},
        "rejects": record["rejects"][:LISTED],
        "holdout_files": held_out[:LISTED] if "holdout" in names else held_out,
        "counts": {kind: len(listed) for kind, listed in names.items()},
        "all_names": FILE,
    }, names


def write_names(folder: Path, names: Names) -> None:
    """Write all names as a table of kinds, names and reasons; without any, remove an older table."""
    if not names:
        (folder / FILE).unlink(missing_ok=True)
        return
    pa = arrow()
    kinds = [kind for kind, listed in names.items() for _ in listed]
    rows = [row for listed in names.values() for row in listed]
    table = pa.table(
        {
            "kind": pa.array(kinds).dictionary_encode(),
            "name": [redact_secrets(name) for name, _ in rows],
            "reason": [redact_secrets(reason) or None for _, reason in rows],
        }
    )
    with atomic_path(folder / FILE, durable=True) as temporary:
        pa.parquet.write_table(table, temporary)
