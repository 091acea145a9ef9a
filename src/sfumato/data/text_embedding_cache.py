"""Embeddings of texts by a frozen text encoder, kept on disk under the hash of the text, with a
folder for each encoder.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.data.array_cache import ArrayCache, Writer
from sfumato.errors import DataError

COMMIT_EVERY = 256
RECENT_BYTES = 256 << 20  # of embeddings held in memory, beside those that are not on disk yet


class Embedding(NamedTuple):
    """A text's summary vector (D,) and its token embeddings (n, D), float32."""

    vector: Tensor
    tokens: Tensor


class EmbeddingStore:
    """Embeddings by text. Every COMMIT_EVERY new ones become a segment on disk; any that are not
    committed at the end are computed again the next time.
    """

    def __init__(self, encoder: str) -> None:
        """Open the store of `encoder`, a hash of what an embedding depends on besides the text."""
        self.encoder = encoder
        self._recent: OrderedDict[str, Embedding] = OrderedDict()
        self._held = 0
        self._new: list[str] = []

    @cached_property
    def _cache(self) -> ArrayCache:
        return ArrayCache.open("embeddings", self.encoder)

    def __getitem__(self, text: str) -> Embedding:
        if text in self._recent:
            return self._recent[text]
        record = self._cache.records[_key(text)]
        vector, tokens = (
            torch.from_numpy(self._cache.array(record.arrays[name]))
            for name in ("vector", "tokens")
        )
        self._hold(text, Embedding(vector, tokens))
        return Embedding(vector, tokens)

    def __setitem__(self, text: str, embedding: Embedding) -> None:
        self._hold(text, embedding)
        self._new.append(text)
        if len(self._new) >= COMMIT_EVERY:
            self.commit()

    def refresh(self) -> None:
        """Find what other processes have committed."""
        self._cache.refresh()

    def commit(self) -> None:
        """Write the new embeddings to disk; if that fails, only time is lost.

        They are computed again by the next process.
        """
        with contextlib.suppress(OSError, DataError):
            writer = Writer(self._cache)
            try:
                for text in self._new:
                    vector, tokens = self._recent[text]
                    writer.add(_key(text), {}, {"vector": vector.numpy(), "tokens": tokens.numpy()})
                writer.commit()
            except OSError:
                writer.discard()
        self._new.clear()

    def __contains__(self, text: object) -> bool:
        return text in self._recent or _key(str(text)) in self._cache.records

    def _hold(self, text: str, embedding: Embedding) -> None:
        """Keep an embedding in memory; if there are too many, drop the oldest that are on disk."""
        if text not in self._recent:
            self._held += _size(embedding)
        self._recent[text] = embedding
        while (
            self._held > RECENT_BYTES
            and _key(old := next(iter(self._recent))) in self._cache.records
        ):
            self._held -= _size(self._recent.pop(old))


def _size(embedding: Embedding) -> int:
    return embedding.vector.nbytes + embedding.tokens.nbytes


def _key(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]
