"""Small runs that two processes train, beside what one process makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sfumato import config
from sfumato.data import BucketConfig
from sfumato.networks import DiTConfig
from sfumato.recipes import Run
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder
from sfumato.training import Budget, MuonConfig, PreviewConfig, ValidationConfig
from tests.faults.conftest import AUTOENCODER
from tests.faults.injector import Lab, newest
from tests.helpers.runs import images, tiny_run

DIT = DiTConfig(patch_size=2, hidden_size=64, depth=2, head_dim=32)


@dataclass
class Runs:
    """Configurations by name, and the runs that one process has made of them."""

    lab: Lab
    configs: Mapping[str, Run]
    _alone: dict[str, Path] = field(default_factory=dict)

    def recipe(self, name: str) -> Path:
        """Return a configuration as a file."""
        path = self.lab.place / f"{name}.yaml"
        path.write_text(config.dump_yaml(config.plain(self.configs[name])))
        return path

    def alone(self, name: str) -> Path:
        """Return what one process makes of a configuration."""
        if name not in self._alone:
            self._alone[name] = self.train(name)
        return self._alone[name]

    def train(self, name: str, *arguments: object, **options: Any) -> Path:
        """Train a configuration; return the run."""
        run = self.lab.new(name)
        code, said = self.lab.call("train", self.recipe(name), "--run", run, *arguments, **options)
        assert code == 0, said
        return run

    def resume(self, run: Path, *arguments: object) -> str:
        """Resume a run; return what was said."""
        code, said = self.lab.call("resume", run, *arguments)
        assert code == 0, said
        return said


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("distributed")
    folder = images(place / "images", size=8)
    # micro-batches of one process are the shares of two
    pixel = tiny_run(
        folder,
        micro_batch=4,
        budget=Budget(steps=20),
        validation=ValidationConfig(every_steps=20, samples=10, copy_samples=0),
        preview=PreviewConfig(every_steps=10, num=2),
    )
    dit = replace(pixel, network=DIT)
    shapes = replace(
        dit,
        data=replace(pixel.data, resolution=16, buckets=BucketConfig(count=3, step=4)),
    )
    several = images(place / "several", size=16)
    for number, path in enumerate(sorted(several.rglob("*.png"))):
        if number % 3:
            _crop(path, (12, 16) if number % 3 == 1 else (16, 12))
    shapes = replace(
        shapes, data=replace(shapes.data, source=replace(pixel.data.source, path=str(several)))
    )
    stage = replace(AUTOENCODER, micro_batch=4, preview=PreviewConfig(every_steps=4, num=2))
    assert isinstance(stage, TrainedAutoencoder)
    configs = {
        "pixel": pixel,
        "dit": dit,
        "muon": replace(dit, optimizer=replace(pixel.optimizer, muon=MuonConfig())),
        "latent": replace(pixel, autoencoder=stage),
        "shapes": shapes,
        "validated": replace(
            dit, validation=ValidationConfig(every_steps=5, samples=40, copy_samples=4)
        ),
    }
    return Runs(Lab(place), configs)


def _crop(path: Path, size: tuple[int, int]) -> None:
    from PIL import Image

    with Image.open(path) as image:
        image.crop((0, 0, *size)).save(path)


def losses(run: Path) -> dict[int, float]:
    """Return the losses of a run by step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def difference(run: Path, other: Path) -> float:
    """Return the largest difference of two runs' weights, averages and moments."""
    found = 0.0
    assert newest(run).name == newest(other).name
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (load_file(newest(each) / f"{name}.safetensors") for each in (run, other))
        assert ours.keys() == theirs.keys()
        found = max(found, *(float((ours[key] - theirs[key]).abs().max()) for key in ours))
    return found


def largest_gap(run: Path, other: Path) -> float:
    """Return the largest difference of two runs' losses, and require the same steps."""
    ours, theirs = losses(run), losses(other)
    assert ours.keys() == theirs.keys()
    return max(abs(ours[step] - theirs[step]) for step in ours)


def shown(run: Path) -> dict[str, bytes]:
    """Return the previews of a run."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted((run / "samples").rglob("*.png"))
    }
