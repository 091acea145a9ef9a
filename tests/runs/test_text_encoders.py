"""Texts are encoded once on each machine, by all of its processes, as one process encodes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfumato.conditioners import pretrained_text
from sfumato.conditioners.pretrained_text import TextEmbedding, TextEncoder
from sfumato.data.text_embedding_cache import EmbeddingStore
from sfumato.distributed import World
from sfumato.runs import text_encoders

CPU = torch.device("cpu")
TEXTS = [f"text {number:03}" for number in range(200)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


@dataclass
class Counting(TextEncoder):
    """An encoder whose embedding of a text depends on the texts that it reads with it."""

    def __post_init__(self) -> None:
        self.read: list[str] = []

    def _encode(self, texts: Sequence[str], device: torch.device) -> list[TextEmbedding]:
        self.read += texts
        total = float(sum(int(text[-3:]) for text in texts))
        return [TextEmbedding(torch.tensor([total]), torch.zeros(1, 1)) for _ in texts]

    def release(self) -> int:
        return 7_000_000


class Steered:
    """A conditioner with one encoder, whose embeddings are on disk."""

    def __init__(self, name: str) -> None:
        self.encoder = Counting(None, Path(), EmbeddingStore(name))

    def encode_ahead(self, texts: Sequence[str]) -> None:
        self.encoder.encode_ahead(texts, CPU)

    def release_encoders(self) -> int:
        return self.encoder.release()

    def vectors(self) -> list[float]:
        return [float(found.vector) for found in self.encoder(TEXTS, CPU)]


class Peer(World):
    """A process of a machine, for which another works when all work together."""

    def __init__(self, local_rank: int, others: Callable[[], None]) -> None:
        super().__init__(local_rank)
        self.size = self.per_machine = 2
        self.local_rank, self.others = local_rank, others

    def together(self, work: Callable[[], Any]) -> Any:
        result = work()
        self.others()
        return result


def released(conditioner: Steered, world: World, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(text_encoders, "texts_of", lambda *_: TEXTS)
    monkeypatch.setattr(text_encoders, "current", lambda: world)
    prepared: Any = SimpleNamespace(run=None, info=None, dataset=None, prior=None)
    return text_encoders.release_encoders(prepared, conditioner)  # type: ignore[arg-type]


def test_processes_of_a_machine_share_the_texts_and_find_what_one_would_have_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    single = Steered("single")
    assert released(single, World(), monkeypatch) == (
        "text encoders: 7.0M parameters freed, since all 200 texts are encoded"
    )
    assert sorted(single.encoder.read) == TEXTS
    first, second = Steered("shared"), Steered("shared")
    # the second does its share while the first waits, and then reads what both have made
    released(
        first, Peer(0, lambda: released(second, Peer(1, lambda: None), monkeypatch) and None),
        monkeypatch,
    )  # fmt: skip
    assert first.vectors() == second.vectors() == single.vectors()
    assert sorted(first.encoder.read + second.encoder.read) == TEXTS
    assert min(len(first.encoder.read), len(second.encoder.read)) >= 64


def test_a_later_process_encodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    released(Steered("kept"), World(), monkeypatch)
    later = Steered("kept")
    released(later, World(), monkeypatch)
    assert later.encoder.read == []
    assert len(set(later.vectors())) == 4


def test_without_a_disk_each_process_encodes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Steered("none")
    alone.encoder.cache = pretrained_text.EmbeddingsInMemory()
    released(alone, Peer(1, lambda: None), monkeypatch)
    assert sorted(alone.encoder.read) == TEXTS
