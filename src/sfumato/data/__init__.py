"""From pictures on disk to training batches: sources, safe decoding, the content split, the stateless plan, the loader."""

from sfumato.data.dataset import DataConfig, Dataset, Reject, index
from sfumato.data.decoding import Channels
from sfumato.data.loader import Batch, batches, to_float
from sfumato.data.plan import Plan
from sfumato.data.sources import Digits, Entry, Folder, Source, SourceConfig

__all__ = [
    "Batch", "Channels", "DataConfig", "Dataset", "Digits", "Entry", "Folder", "Plan", "Reject", "Source", "SourceConfig",
    "batches", "index", "to_float",
]  # fmt: skip
