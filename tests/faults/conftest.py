"""What the tests of faults share: two small runs, what they end as when nothing happens, and copies of
them that were killed on the way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sfumato import config
from sfumato.autoencoders import KLConfig
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder
from sfumato.training import (
    Budget,
    CheckpointConfig,
    LogConfig,
    PreviewConfig,
    ValidationConfig,
)
from tests.faults.injector import Lab, has_step
from tests.helpers.runs import fingerprint, images, tiny_run

AUTOENCODER = TrainedAutoencoder(
    network=KLConfig(channels=(8, 8), latent_channels=2, blocks=1, groups=4),
    features="random",
    augmented_copies=2,
    batch_size=8,
    precision="float32",
    budget=Budget(steps=8),
    log=LogConfig(every_steps=1),
    checkpoint=CheckpointConfig(every_steps=3),
    validation=ValidationConfig(every_steps=8, samples=8, copy_samples=0),
    preview=PreviewConfig(every_steps=8, num=2),
)
STEPS = 16


@dataclass
class Case:
    """A recipe, its images, what it ends as, and a lab to break it in."""

    lab: Lab
    recipe: Path
    folder: Path
    end: dict[str, str]
    _killed: dict[str, Path]

    def killed(self, *, step: int = 9, stage: str = "") -> Path:
        """Return a new copy of a run that was killed soon after a step."""
        key = f"{step} {stage}"
        if key not in self._killed:
            run = self.lab.new("killed")
            child = self.lab.start("train", self.recipe, "--run", run)
            child.until(lambda: has_step(run / stage, step))
            child.kill()
            assert child.code == -9, child.said()
            self._killed[key] = run
        copy = self.lab.new("copy")
        shutil.copytree(self._killed[key], copy)
        return copy

    def ends_equal(self, run: Path, *overrides: str) -> str:
        """Resume a run, require that it ends as if nothing had happened; return what it wrote."""
        code, said = self.lab.call("resume", run, *overrides)
        assert code == 0, said
        assert fingerprint(run) == self.end, said
        return said


def case(place: Path, *, latent: bool) -> Case:
    folder = images(place / "images", size=8)
    run = tiny_run(
        folder,
        budget=Budget(steps=STEPS),
        checkpoint=CheckpointConfig(every_steps=4, keep=2),
        validation=ValidationConfig(every_steps=8, samples=8, copy_samples=0),
        preview=PreviewConfig(every_steps=8, num=2),
    )
    if latent:
        run = replace(run, autoencoder=AUTOENCODER)
    recipe = place / "recipe.yaml"
    recipe.write_text(config.dump_yaml(config.plain(run)))
    lab = Lab(place)
    code, said = lab.call("train", recipe, "--run", place / "alone")
    assert code == 0, said
    return Case(lab, recipe, folder, fingerprint(place / "alone"), {})


@pytest.fixture(scope="session")
def pixel(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("pixel"), latent=False)


@pytest.fixture(scope="session")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("latent"), latent=True)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Derived data of this test go to a folder of its own, which is returned."""
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    return lambda: tmp_path / "cache"
