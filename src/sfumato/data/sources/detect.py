"""Detection of the source that a path, URL or name refers to."""

from __future__ import annotations

from collections.abc import Callable

from sfumato.data import files
from sfumato.data.file_types import is_image
from sfumato.data.sources.digits import Digits
from sfumato.data.sources.emoji import Emoji
from sfumato.data.sources.folder import Folder, outside_runs
from sfumato.data.sources.huggingface import HuggingFace
from sfumato.data.sources.metadata import is_authoritative
from sfumato.data.sources.npz import Npz
from sfumato.data.sources.parquet import Parquet
from sfumato.data.sources.solids import Solids
from sfumato.data.sources.webdataset import WebDataset
from sfumato.data.sources.zip_archive import Zip
from sfumato.errors import DataError

BUILT_IN: dict[str, Callable[[], Digits | Emoji | Solids]] = {
    "digits": Digits,
    "emoji": Emoji,
    "solids": Solids,
}
BY_SUFFIX: dict[str, Callable[[str], Npz | Parquet | WebDataset | Zip]] = {
    ".tar": WebDataset,
    ".parquet": Parquet,
    ".zip": Zip,
    ".npz": Npz,
}


def source_at(
    place: str,
) -> Digits | Emoji | Folder | HuggingFace | Npz | Parquet | Solids | WebDataset | Zip:
    """Return the source that `place` refers to.

    `place` is a folder, a .tar, .zip, .npz or .parquet, a URL, `hub:owner/name`, or a built-in
    name.

    Raises:
        DataError: if there is none.
    """
    if place.startswith("hub:"):
        return HuggingFace(path=place.removeprefix("hub:"))
    for suffix, kind in BY_SUFFIX.items():
        if place.lower().endswith(suffix) and not files.is_folder(place):
            return kind(place)
    if files.is_folder(place):
        return _folder(place)
    if place in BUILT_IN:
        return BUILT_IN[place]()
    if files.exists(place):
        raise DataError(
            "is not a file type that holds images",
            where=place,
            hint=f"name a folder, or a file ending in {', '.join(BY_SUFFIX)}",
        )
    raise DataError(
        "no such file, folder or built-in set",
        where=place,
        hint=f"check the path; built in are {', '.join(BUILT_IN)}; `hub:owner/name` is a dataset "
        "on the hub",
    )


def _folder(place: str) -> Folder | HuggingFace | Parquet | WebDataset:
    """Return the source that a folder is, by what it holds.

    Tars or tables count as the set only if no images of the folder's own lie beside them.
    """
    names = outside_runs(files.walk(place.rstrip("/") or "/"))
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names):
        return HuggingFace(path=place)
    if any(is_authoritative(name) or is_image(name) for name in names):
        return Folder(place)
    if any(name.lower().endswith(".tar") for name in names):
        return WebDataset(place)
    if any(name.lower().endswith(".parquet") for name in names):
        return Parquet(place)
    return Folder(place)
