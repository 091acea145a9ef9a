"""The data pipeline, from images anywhere to training batches: sources, safe decoding, the cache,
splits that do not leak, and the stateless batch plan.
"""

from sfumato.data.augment import AugmentConfig
from sfumato.data.batch_plan import BatchPlan
from sfumato.data.buckets import BucketConfig
from sfumato.data.data_config import DataConfig
from sfumato.data.dataset import Dataset, PrecomputedLatents
from sfumato.data.index_store import listed
from sfumato.data.indexing import index, is_indexed, prepare_by, prepare_part, sampled
from sfumato.data.listing import Blob, Entry, File, Inline, Listing, Reject, Source
from sfumato.data.loader import Batch, ShapeGroup, batches, to_float
from sfumato.data.sources import (
    Digits,
    Emoji,
    Folder,
    HuggingFace,
    Npz,
    Parquet,
    Solids,
    WebDataset,
    Zip,
    source_at,
)

__all__ = [
    "AugmentConfig",
    "Batch",
    "BatchPlan",
    "Blob",
    "BucketConfig",
    "DataConfig",
    "Dataset",
    "Digits",
    "Emoji",
    "Entry",
    "File",
    "Folder",
    "HuggingFace",
    "Inline",
    "Listing",
    "Npz",
    "Parquet",
    "PrecomputedLatents",
    "Reject",
    "ShapeGroup",
    "Solids",
    "Source",
    "WebDataset",
    "Zip",
    "batches",
    "index",
    "is_indexed",
    "listed",
    "prepare_by",
    "prepare_part",
    "sampled",
    "source_at",
    "to_float",
]  # fmt: skip
