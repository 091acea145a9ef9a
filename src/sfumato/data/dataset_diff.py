"""What a data set was when a run began, as recorded in its data.json, and what has changed in it
since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sfumato.data.listing import values

if TYPE_CHECKING:
    from sfumato.data.dataset import Dataset

MAX_EXAMPLES = 5  # names in a message
# images in a set, above which single ones are not recorded: the list would take 20 MB
MAX_LISTED_IMAGES = 200_000
WIDTH = 16  # hexadecimal digits of a hash: enough to tell the images of one set apart
WORDS = {
    "captions": "captions differ",
    "attributes": "attributes differ",
    "repeats": "repeats differ",
    "categories": "categories differ",
    "split": "the split into training and hold-out differs (data.holdout, data.half, or a hold-out "
    "that the source names)",
    "format": "size, channels or bits of the pixels differ",
}


def record_contents(dataset: Dataset) -> dict[str, Any]:
    """Return what data.json keeps for `changes`: a hash of each part of the contents.

    In sets of up to MAX_LISTED_IMAGES images, it also keeps hashes of each image, and of its
    texts, attributes and category, by name.
    """
    entries, ids = dataset.entries, list(dataset.ids)
    captions, attributes, repeats = (
        values(entries, name) for name in ("captions", "attributes", "repeats")
    )
    labels = dataset.labels.tolist()
    names = [dataset.categories[label] if label >= 0 else "" for label in labels]
    parts = {
        "images": _hash(sorted(ids)),
        "captions": _hash(sorted(zip(ids, captions, strict=True))),
        "attributes": _hash(sorted(zip(ids, map(repr, attributes), strict=True))),
        "repeats": _hash(sorted(zip(ids, repeats, strict=True))),
        "categories": _hash(sorted(zip(ids, names, strict=True))),
        "split": _hash(sorted(ids[position] for position in dataset.training)),
        "order": _hash(ids),
        "format": repr(dataset.config.pixel_format()),
    }
    if len(entries) > MAX_LISTED_IMAGES:
        return {"parts": parts}
    rows = zip(values(entries, "name"), ids, captions, attributes, names, strict=True)
    return {
        "parts": parts,
        "files": {
            file: [id_[:WIDTH], _hash((texts, numbers, name))]
            for file, id_, texts, numbers, name in rows
        },
    }


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode(errors="surrogatepass")).hexdigest()[:WIDTH]


def changes(before: Mapping[str, Any], dataset: Dataset) -> list[str]:
    """Return sentences on what differs from what `record_contents` returned before.

    [] if nothing was recorded, or nothing differs.
    """
    if "parts" not in before:
        return []
    now = record_contents(dataset)
    old, new = (set_.get("files", {}) for set_ in (before, now))
    differing = [part for part, was in before["parts"].items() if was != now["parts"].get(part)]
    sentences = (
        list(_of_files(old, new))
        if old and new
        else ["other images"]
        if "images" in differing
        else []
    )
    same_images = "images" not in differing
    for part in differing:
        if part == "format":
            sentences.append(
                f"{WORDS[part]}: {before['parts'][part]} before, {now['parts'][part]} now"
            )
        elif part in WORDS and same_images:  # of other images, these differ anyhow
            edited = [
                name
                for name in old
                if name in new and old[name][0] == new[name][0] and old[name][1] != new[name][1]
            ]
            sentences.append(
                f"{WORDS[part]}{_examples(edited) if edited and part != 'split' else ''}"
            )
    return sentences or (["the order of the images differs"] if "order" in differing else [])


def held_out_after_training(before: Mapping[str, Any], dataset: Dataset) -> list[str]:
    """Return the names of held-out images that were trained on before, as far as is recorded."""
    held_out = set(before.get("holdout_files", ()))
    trained = {row[0] for name, row in before.get("files", {}).items() if name not in held_out}
    return [
        dataset.entries[position].name
        for position in dataset.holdout
        if dataset.ids[position][:WIDTH] in trained
    ]


def _of_files(old: Mapping[str, Sequence[str]], new: Mapping[str, Sequence[str]]) -> Iterator[str]:
    gone, added = (
        [name for name in old if name not in new],
        [name for name in new if name not in old],
    )
    by_content = {new[name][0]: name for name in added}
    renamed = {name: by_content[old[name][0]] for name in gone if old[name][0] in by_content}
    groups = {
        "edited": [name for name in old if name in new and old[name][0] != new[name][0]],
        "gone": [name for name in gone if name not in renamed],
        "new": [name for name in added if name not in renamed.values()],
        "renamed, which changes their order": [
            f"{name} -> {later}" for name, later in renamed.items()
        ],
    }
    for change, names in groups.items():
        if names:
            yield f"{len(names)} image(s) {change}{_examples(names)}"


def _examples(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:MAX_EXAMPLES])}{', ...' if len(names) > MAX_EXAMPLES else ''})"
