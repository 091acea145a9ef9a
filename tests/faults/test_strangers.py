"""A run, or a recipe, that a stranger made: whatever is in it gives one error with a hint, in little
memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.recipes.run_config import HEADER
from tests.faults.conftest import Case
from tests.faults.injector import newest

MIB = 1024


def require_refused(case: Case, *arguments: object) -> str:
    """Run a command, and require one message, in little memory and without hanging; return it."""
    child = case.lab.start(*arguments, limit_mib=2 * MIB)
    code, said = child.wait(60), child.said()
    assert code == 2, f"exit {code}: {said[-800:]}"
    assert "Traceback" not in said
    assert "report it" not in said
    assert "hint: " in said
    assert child.added_mib < MIB / 2  # the program itself takes the other half
    return said


def reseal(step: Path) -> None:
    """Make the manifest fit what was changed, as a stranger would."""
    manifest = json.loads((step / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (step / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(manifest))


def edit(step: Path, **changes: Any) -> None:
    state = json.loads((step / "state.json").read_text())
    for key, value in changes.items():
        if value is None:
            state.pop(key)
        elif isinstance(value, dict) and isinstance(state.get(key), dict):
            state[key] |= value
        else:
            state[key] = value
    (step / "state.json").write_text(json.dumps(state))


def poison(step: Path) -> None:
    tensors = load_file(step / "ema.safetensors")
    save_file(
        {
            name: torch.full_like(value, math.nan) if value.is_floating_point() else value
            for name, value in tensors.items()
        },
        step / "ema.safetensors",
    )


def head(text: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + body


def write(step: Path, data: bytes) -> None:
    (step / "ema.safetensors").write_bytes(data)


MANY = {
    f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
    for i in range(400_000)
}
TWICE = (
    b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
)
HUGE = json.dumps({"w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}}).encode()
EMPTY = json.dumps({"w": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}}).encode()


def named_elsewhere(step: Path) -> None:
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["../../config.yaml"] = {"bytes": 1, "sha256": ""}
    (step / "manifest.json").write_text(json.dumps(manifest))


CRAFTED: dict[str, Callable[[Path], object]] = {
    "NaN weights": poison,
    "state nested": lambda s: (s / "state.json").write_text("[" * 100_000 + "]" * 100_000),
    "image_shape of words": lambda s: edit(s, image_shape=["a", 1, 2]),
    "image_shape of two": lambda s: edit(s, image_shape=[1, 8]),
    "image_shape huge": lambda s: edit(s, image_shape=[1, 10**6, 10**6]),
    "image_shape negative": lambda s: edit(s, image_shape=[1, -8, 8]),
    "no facts": lambda s: edit(s, facts=None),
    "facts with a million words": lambda s: edit(
        s, facts={"channels": 1, "categories": ["x" * 100] * 10**6}
    ),
    "facts with other types": lambda s: edit(s, facts={"channels": [1], "categories": "even"}),
    "digits without end": lambda s: (s / "state.json").write_text(
        '{"facts": ' + "9" * 10_000 + "}"
    ),
    "head of 100 MB": lambda s: write(s, head(b'{"a":' + b" " * 99_000_000)),
    "head says 2^63": lambda s: write(s, struct.pack("<Q", 2**63) + b"{}"),
    "400,000 tensors": lambda s: write(s, head(json.dumps(MANY).encode(), bytes(1_600_000))),
    "a shape of 2^62": lambda s: write(s, head(HUGE, b"1234")),
    "a name twice": lambda s: write(s, head(TWICE, bytes(8))),
    "a shape of 0": lambda s: write(s, head(EMPTY)),
}
CRAFTED_MANIFESTS: dict[str, Callable[[Path], object]] = {
    "manifest nested": lambda s: (s / "manifest.json").write_text("[" * 100_000 + "]" * 100_000),
    "a file named ../../x": named_elsewhere,
    "files is a list": lambda s: (s / "manifest.json").write_text(
        '{"schema": 2, "files": [["model.safetensors", 3]]}'
    ),
    "bytes is text": lambda s: (s / "manifest.json").write_text(
        '{"schema": 2, "files": {"model.safetensors": 3}}'
    ),
}


@pytest.mark.parametrize("name", [*CRAFTED, *CRAFTED_MANIFESTS])
def test_a_crafted_checkpoint_is_refused(pixel: Case, name: str) -> None:
    run = pixel.lab.new("crafted")
    shutil.copytree(pixel.lab.place / "alone", run)
    for older in (run / "checkpoints").glob("step-*"):
        if older != newest(run):
            shutil.rmtree(older)
    step = newest(run)
    if name in CRAFTED:
        CRAFTED[name](step)
        reseal(step)
    else:
        CRAFTED_MANIFESTS[name](step)
    require_refused(pixel, "sample", run, "--num", "1", "--out", pixel.lab.new("out"))


def reconfigured(run: Path, change: Callable[[str], str]) -> None:
    """Change a run's configuration in both places where it is written, hashes included."""
    file = run / "config.yaml"
    body = change(file.read_text().partition(HEADER)[2].partition("\n")[2])
    digest = hashlib.sha256(body.encode()).hexdigest()
    file.write_text(f"{HEADER}{digest}\n{body}")


CONFIGURATIONS: dict[str, Callable[[str], str]] = {
    "10^12 weights": lambda text: text.replace("channels: 16", "channels: 1000000", 1),
    "depth without end": lambda text: re.sub("blocks: 1", "blocks: 100000000", text, count=1),
    "an object": lambda text: text + "\n_target_: os.system\n",
    "an encoder of a hub": lambda text: text.replace(
        "  text: null", "  text: {kind: pretrained-text, encoder: evil/repository}"
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_crafted_configuration_is_refused(pixel: Case, name: str) -> None:
    run = pixel.lab.new("crafted")
    shutil.copytree(pixel.lab.place / "alone", run)
    before = (run / "config.yaml").read_text()
    reconfigured(run, CONFIGURATIONS[name])
    assert (run / "config.yaml").read_text() != before
    require_refused(pixel, "sample", run, "--num", "1", "--out", pixel.lab.new("out"))


YAML = {
    "aliases": "a: &a [1,1]\nb: &b [*a,*a]\nname: *b",
    "tag": "name: !!python/object/apply:os.system [id]",
    "deep": "name: " + "[" * 2000,
    "digits": "recipe: digits\nseed: " + "9" * 5000,
    "hex digits": "recipe: digits\nseed: 0x" + "f" * 5000,
    "octal digits": "recipe: digits\nseed: 0" + "7" * 5000,
    "sexagesimal": "recipe: digits\nbatch_size: 1:30",
    "sexagesimal float": "recipe: digits\nbudget: {minutes: 1:30.5}",
    "binary": "recipe: digits\nname: !!binary aGk=",
    "many keys": "\n".join(f"k{i}: 1" for i in range(60_000)),
    "nul": "name: a\0b",
    "duplicate": "recipe: digits\nseed: 1\nseed: 2",
    "float of digits": "recipe: digits\nbudget: {minutes: " + "9" * 400 + ".0}",
    "infinity": "recipe: digits\nbudget: {minutes: .inf}",
    "recipe of itself": "recipe: self.yaml",
    "empty": "",
}


@pytest.mark.parametrize("name", YAML)
def test_a_crafted_recipe_is_refused(pixel: Case, tmp_path: Path, name: str) -> None:
    file = tmp_path / ("self.yaml" if name == "recipe of itself" else "bomb.yaml")
    file.write_text(YAML[name].replace("self.yaml", str(file)))
    require_refused(pixel, "config", "validate", file)


def test_a_name_cannot_lead_elsewhere(
    pixel: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for name in ("../../escaped", f"{tmp_path}/absolute", "..", "a\u202eb", "x" * 300, "CON"):
        code, said = pixel.lab.call("train", pixel.recipe, f"name='{name}'", "budget.steps=1")
        assert code == 0, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert len(list((tmp_path / "a" / "b" / "runs").iterdir())) == 6
