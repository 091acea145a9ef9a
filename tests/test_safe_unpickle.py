"""Nothing is unpickled but by the converter, which knows its files by their hash and runs apart.
Rule S1 of docs/threat-model.md.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfumato import safe_unpickle
from sfumato.errors import CheckpointError

SOURCES = Path(safe_unpickle.__file__).parent


def hashed(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_that_runs_code_is_refused_even_if_its_hash_is_known(tmp_path: Path) -> None:
    source, target = tmp_path / "bad.pth", tmp_path / "out.safetensors"
    for save in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))):
        save({"weight": Payload(tmp_path / "mark")}, source)
        with pytest.raises(CheckpointError, match="cannot be converted"):
            safe_unpickle.convert(source, target, sha256=hashed(source))
    assert not (tmp_path / "mark").exists()
    assert not target.exists()


def test_tensors_come_through_as_they_are_and_leave_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "good.pth", tmp_path / "out" / "good.safetensors"
    target.parent.mkdir()
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(4, 3).T, "c": torch.arange(5)}
    torch.save(tensors, source)
    safe_unpickle.convert(source, target, sha256=hashed(source))
    found = load_file(target)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert list(target.parent.iterdir()) == [target]


def test_missing_and_changed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        safe_unpickle.convert(tmp_path / "nowhere.pth", tmp_path / "out", sha256="")
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="SHA-256"):
        safe_unpickle.convert(tmp_path / "other.pth", tmp_path / "out", sha256="0" * 64)
    assert not (tmp_path / "out").exists()


def test_no_other_file_can_unpickle() -> None:
    ways = (
        r"torch\.load",
        r"\bpickle\.",
        r"import (pickle|dill|joblib|shelve|marshal)\b",
        "allow_pickle=True",
        r"yaml\.(unsafe_|full_)?load\(",
    )
    forbidden = re.compile("|".join(ways))
    found = {path.name for path in SOURCES.rglob("*.py") if forbidden.search(path.read_text())}
    assert found == {"safe_unpickle.py"}
