"""Embeddings of texts outlive the process that made them, and what is damaged or cannot be written
is made again.
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfumato.data import text_embedding_cache
from sfumato.data.segment_records import HEAD, ROWS
from sfumato.data.text_embedding_cache import COMMIT_EVERY, Embedding, EmbeddingStore

TEXTS = ["", "a cat", "eine Katze", "猫 🐈", "x" * 100_000, "\ud800", "a\0b\n\x1b[2J"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "embeddings"


def embedded(text: str) -> Embedding:
    """Numbers that depend on the text; as many tokens as it has letters, up to five."""
    seed = int(hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8], 16)
    generator = torch.Generator().manual_seed(seed)
    return Embedding(
        torch.randn(4, generator=generator),
        torch.randn(min(5, len(text) + 1), 4, generator=generator),
    )


def filled(texts: list[str], encoder: str = "e") -> EmbeddingStore:
    store = EmbeddingStore(encoder)
    for text in texts:
        store[text] = embedded(text)
    return store


def holds(store: EmbeddingStore, texts: list[str]) -> bool:
    return all(
        text in store
        and torch.equal(store[text].vector, embedded(text).vector)
        and torch.equal(store[text].tokens, embedded(text).tokens)
        for text in texts
    )


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/segment-*"))


def test_what_is_put_in_comes_out_before_and_after_it_is_written(folder: Path) -> None:
    store = filled(TEXTS)
    assert holds(store, TEXTS)
    assert segments(folder) == []
    store.commit()
    assert len(segments(folder)) == 1
    assert holds(store, TEXTS)
    assert holds(EmbeddingStore("e"), TEXTS)


def test_another_process_finds_them() -> None:
    filled(TEXTS[:4]).commit()
    code = "from sfumato.data.text_embedding_cache import EmbeddingStore; print(EmbeddingStore('e')['a cat'].tokens.tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == str(embedded("a cat").tokens.tolist())


def test_a_text_that_is_unknown_is_not_there() -> None:
    store = filled(["a cat"])
    store.commit()
    for one in (store, EmbeddingStore("e")):
        assert "a dog" not in one
        with pytest.raises(KeyError):
            _ = one["a dog"]


def test_another_encoder_knows_nothing_of_them() -> None:
    filled(["a cat"]).commit()
    assert "a cat" not in EmbeddingStore("other")


def test_so_many_new_ones_become_a_segment_and_the_rest_is_made_again(folder: Path) -> None:
    texts = [f"text {i}" for i in range(2 * COMMIT_EVERY + 3)]
    filled(texts)
    assert len(segments(folder)) == 2
    again = EmbeddingStore("e")
    assert [text in again for text in texts] == [True] * 2 * COMMIT_EVERY + [False] * 3
    assert holds(again, texts[::50])


def test_committing_nothing_writes_nothing(folder: Path) -> None:
    store = filled(["a cat"])
    store.commit()
    store.commit()
    assert len(segments(folder)) == 1
    assert list(folder.glob("*/.tmp-*")) == []


def test_two_that_write_at_once_lose_nothing() -> None:
    one, two = filled(TEXTS[:3]), filled(TEXTS[2:])
    one.commit()
    two.commit()
    assert holds(EmbeddingStore("e"), TEXTS)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_embedding_cache, "COMMIT_EVERY", 5)
    texts = [f"text {i}" for i in range(60)]
    each = filled(texts[:1])[texts[0]]
    monkeypatch.setattr(
        text_embedding_cache, "RECENT_BYTES", 10 * (each.vector.nbytes + each.tokens.nbytes)
    )
    store = filled(texts)
    assert holds(store, texts)
    assert len(store._recent) <= 15


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "no records": lambda segment: (segment / ROWS).unlink(),
    "records cut short": lambda segment: _cut(segment / ROWS),
    "records of nonsense": lambda segment: (segment / HEAD).write_bytes(b"\xff[[["),
    "arrays cut short": lambda segment: [_cut(path) for path in segment.glob("*.bin")],
    "arrays gone": lambda segment: [path.unlink() for path in segment.glob("*.bin")],
    "arrays empty": lambda segment: [path.write_bytes(b"") for path in segment.glob("*.bin")],
    "segment gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_segment_is_made_again_and_others_are_kept(folder: Path, damage: str) -> None:
    store = filled(["a cat"])
    store.commit()
    (segment,) = segments(folder)
    store["a dog"] = embedded("a dog")
    store.commit()
    DAMAGE[damage](segment)
    after = EmbeddingStore("e")
    assert "a cat" not in after
    assert holds(after, ["a dog"])
    after["a cat"] = embedded("a cat")
    after.commit()
    assert holds(EmbeddingStore("e"), ["a cat", "a dog"])


def test_a_disk_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "file" / "cache"))
    store = filled(["a cat"])
    store.commit()
    assert holds(store, ["a cat"])


@pytest.mark.parametrize("place", ["replace", "open"])
def test_a_disk_that_fills_up_while_it_is_written_to_costs_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    store = filled(TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace" if place == "replace" else "pathlib.Path.open", full)
        store.commit()
    assert holds(store, TEXTS)
    assert list(folder.glob("*/.tmp-*")) == []
    store["later"] = embedded("later")
    store.commit()
    assert holds(EmbeddingStore("e"), ["later"])


def test_another_process_is_heard_of_after_a_refresh() -> None:
    store, other = filled([]), filled(["a cat"])
    assert "a cat" not in store
    other.commit()
    assert "a cat" not in store
    store.refresh()
    assert holds(store, ["a cat"])
