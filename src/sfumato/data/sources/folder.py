"""A folder of images, and everything that people put beside them.

cat.png  cat.txt | cat.caption | cat.png.txt | cat.json   a caption, or captions and category
cat.doodle.png  cat.mask.png  cat.points.npy              annotations that lie over the image
cats/cat.png                                              the category is the top folder's name
10_sks dog/1.png                                          kohya's: repeats and caption
train/cats/cat.png  test/cats/dog.png                     folders named like splits: all but the
                                                          training ones are held out
metadata.csv | .tsv | .jsonl | .json | .parquet           Hugging Face's ImageFolder:
                                                          `file_name`, any other columns
captions.csv, labels.tsv, ...                             any table whose rows name images that
                                                          exist
dataset.json                                              EDM's:
    {"labels": [["00000/img00000000.png", 6], ...]}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from sfumato.data import files
from sfumato.data.file_types import HEAD_BYTES
from sfumato.data.listing import File, Listing, Reject, Source, printable_name, read
from sfumato.data.sources.image_folder import ImageFolderReader
from sfumato.data.sources.kohya import Folders
from sfumato.errors import DataError


@dataclass(frozen=True)
class Folder(Source):
    """A folder of images: flat, or one sub-folder for each category (images deeper down belong to
    the top-most one).

    Attributes:
        path: of the folder.
        metadata: `auto` reads metadata files and tables that name images; `off` reads neither.
        unnamed: images that the metadata do not name: `leave_out`, or `use` without a caption.
        folders: `categories`, or those of `kohya`, named REPEATS_CAPTION; `auto` takes them for
            kohya's if all are named so and are not merely numbered one after another.
    """

    is_of_files: ClassVar[bool] = True

    path: str
    metadata: Literal["auto", "off"] = "auto"
    unnamed: Literal["leave_out", "use"] = "leave_out"
    folders: Folders = "auto"

    def listing(self) -> Listing:
        """List the images below the folder, with what lies beside them.

        Raises:
            DataError: if there is no such folder, it holds no images, or its metadata are unusable.
        """
        if not files.exists(self.path):
            raise DataError(
                "no such folder",
                where=self.path,
                hint="check the path; it is relative to where you run sfumato",
            )
        if not files.is_folder(self.path):
            raise DataError(
                "is a file, not a folder",
                where=self.path,
                hint="name the folder that holds the images",
            )
        root = self.path.rstrip("/") or "/"
        walk = files.explore(root)
        names = outside_runs(walk.names)
        runs = len(walk.names) - len(names)
        return ImageFolderReader(
            where=self.path, names=names,
            blob=lambda name: File(f"{root}/{name}"),
            head=lambda name: read(f"{root}/{name}", 0, HEAD_BYTES),
            check=lambda name: files.check_contained(root, name),
            check_text=lambda name: files.check_link(root, name),
            metadata=self.metadata, unnamed=self.unnamed, folders=self.folders,
            rejects=[Reject(printable_name(name), reason) for name, reason in walk.passed_over],
            other_files={"files of runs": runs} if runs else {},
        ).listing()  # fmt: skip


def outside_runs(names: Sequence[str]) -> Sequence[str]:
    """Return the names that do not lie in run directories.

    `sfumato train .` puts runs among the images, and their samples must not be trained on.
    """
    all_names = set(names)
    places = {name.rpartition("/")[0] for name in names if name.endswith("/status.json")}
    runs = tuple(f"{place}/" for place in places if f"{place}/config.yaml" in all_names)
    return [name for name in names if not name.startswith(runs)]
