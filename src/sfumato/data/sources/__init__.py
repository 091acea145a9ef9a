"""Sources of images, one class per file. To add one, derive a dataclass from `Source`, and import
it here.
"""

from sfumato.data.sources.detect import source_at
from sfumato.data.sources.digits import Digits
from sfumato.data.sources.emoji import Emoji
from sfumato.data.sources.folder import Folder
from sfumato.data.sources.huggingface import HuggingFace
from sfumato.data.sources.npz import Npz
from sfumato.data.sources.parquet import Parquet
from sfumato.data.sources.solids import Solids
from sfumato.data.sources.webdataset import WebDataset
from sfumato.data.sources.zip_archive import Zip

__all__ = [
    "Digits",
    "Emoji",
    "Folder",
    "HuggingFace",
    "Npz",
    "Parquet",
    "Solids",
    "WebDataset",
    "Zip",
    "source_at",
]
