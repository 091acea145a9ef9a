"""Hugging Face datasets, from a folder that `save_to_disk` wrote or from the hub. The only module
that imports `datasets`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from sfumato.data.file_types import MAPS
from sfumato.data.listing import (
    CATEGORY_KEYS,
    MAX_BYTES,
    Entry,
    Listing,
    Reject,
    Source,
    is_known_column,
    parse_annotations,
    printable_name,
    read,
)
from sfumato.errors import DataError


@dataclass(frozen=True, slots=True)
class Item:
    """The encoded image in one column of one row."""

    path: str
    split: str
    row: int
    column: str

    def read(self) -> bytes:
        """Return the bytes in the cell, or read the file that it names.

        Raises:
            OSError: if the cell holds no image, or names a file outside of the dataset.
        """
        try:
            value = _open(self.path, self.split)[self.row][self.column]
        except Exception as error:  # the library raises whatever its parsers do
            raise OSError(f"cannot be read: {str(error)[:200]}") from None
        if value and value.get("bytes") is not None:
            data: bytes = value["bytes"]
            return data
        if value and value.get("path"):
            return read(_check_contained(str(value["path"]), self.path), 0, MAX_BYTES + 1)
        raise OSError("the cell holds no image")


def _check_contained(path: str, dataset: str) -> str:
    """Return `path` if it is a file of the dataset's folder, or one that the library fetched.

    Raises:
        OSError: if it is not.
    """
    import datasets

    roots = (
        [dataset]
        if Path(dataset).is_dir()
        else [datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE]
    )
    real = Path(path).resolve()
    if not any(real.is_relative_to(Path(root).resolve()) for root in roots) or not real.is_file():
        raise OSError(f"{path[:80]!r} is not a file of the dataset")
    return str(real)


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Source):
    """A dataset of the library `datasets`.

    Attributes:
        path: a folder written by `save_to_disk`, or a name on the hub such as `owner/name`.
        split: of it; other splits are left out.
    """

    kind: ClassVar[str] = "huggingface"
    is_of_files: ClassVar[bool] = True  # of a folder; of a name on the hub, nothing is known

    path: str
    split: str = "train"

    def listing(self) -> Listing:
        """List the rows of the split, with their known columns; images are read later.

        Raises:
            DataError: if `datasets` is missing, the dataset cannot be loaded, or it has no images.
        """
        _open.cache_clear()  # the folder may have been written again
        data = _open(self.path, self.split)
        images = [
            name for name, feature in data.features.items() if type(feature).__name__ == "Image"
        ]
        image = next((name for name in ("image", "img", *images) if name in images), None)
        if image is None:
            raise DataError(
                f"its columns are {', '.join(data.column_names)}",
                where=self.path,
                hint="one of them must have the feature Image",
            )
        names = {
            key: data.features[key].names
            for key in CATEGORY_KEYS
            if hasattr(data.features.get(key), "names")
        }
        annotations = [column for column in MAPS if column in images]
        annotation_columns = data.select_columns(
            [name for name in data.column_names if is_known_column(name) and name not in images]
        )
        width = len(str(max(0, len(data) - 1)))
        entries, rejects = [], []
        for row in range(len(data)):
            record = _record(annotation_columns, row, self.path)
            for key, labels in names.items():
                if isinstance(record.get(key), int) and 0 <= record[key] < len(labels):
                    record[key] = labels[record[key]]
            name = printable_name(f"{self.split}-{row:0{width}d}")
            blobs: dict[str, Any] = {
                annotation: Item(self.path, self.split, row, annotation)
                for annotation in annotations
            }
            try:
                entries.append(
                    Entry(
                        name=name,
                        image=Item(self.path, self.split, row, image),
                        **blobs,
                        **parse_annotations(record),
                    )
                )
            except ValueError as error:
                rejects.append(Reject(name, str(error)))
        if not entries:
            raise DataError(
                "holds no rows", where=self.path, hint="name another split with data.source.split"
            )
        unused = [
            name
            for name in data.column_names
            if name != image and name not in annotations and not is_known_column(name)
        ]
        remarks = (
            [f"columns that are not used: {', '.join(map(printable_name, unused[:12]))[:300]}"]
            if unused
            else []
        )
        others = _other_splits(self.path, self.split)
        remarks += (
            [f"split {self.split!r} is read; not read are {', '.join(others)}"] if others else []
        )
        return Listing(
            entries=entries, rejects=rejects, unit="rows", total=len(data), remarks=tuple(remarks)
        )


def _record(data: Any, row: int, where: str) -> dict[str, Any]:
    try:
        return dict(data[row]) if data.column_names else {}
    except Exception as error:  # as above
        raise DataError(
            f"row {row} cannot be read: {str(error)[:200]}",
            where=where,
            hint="download or recreate it",
        ) from None


def _other_splits(path: str, split: str) -> list[str]:
    """Return the splits of a saved dataset that are not read; [] for datasets on the hub."""
    file = Path(path) / "dataset_dict.json"
    try:
        splits = json.loads(file.read_text()).get("splits", []) if file.is_file() else []
    except (OSError, ValueError, AttributeError):
        return []
    return [printable_name(str(name)) for name in splits if name != split]


@lru_cache(maxsize=4)
def _open(path: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            "needs the package datasets", where=path, hint="pip install 'sfumato[hub]'"
        ) from None
    try:
        if Path(path).is_dir() and any(
            (Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json")
        ):
            loaded = datasets.load_from_disk(path)
            data = loaded if isinstance(loaded, datasets.Dataset) else loaded[split]
        else:
            data = datasets.load_dataset(path, split=split)
    except KeyError:
        raise DataError(
            f"has no split {split!r}; it has {', '.join(loaded)}",
            where=path,
            hint="set data.source.split",
        ) from None
    except Exception as error:  # the library raises whatever its parsers do
        raise DataError(
            f"cannot be loaded: {type(error).__name__}: {str(error)[:200]}",
            where=path,
            hint="check name and network",
        ) from None
    for name, feature in data.features.items():
        if type(feature).__name__ == "Image":
            data = data.cast_column(name, datasets.Image(decode=False))
    return data
