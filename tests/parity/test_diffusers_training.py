"""Networks of diffusers, trained by our loop: from scratch, and from the weights of a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato.errors import ConfigError
from sfumato.networks import DiffusersConfig
from tests.helpers.runs import fingerprint, images, tiny_run
from tests.training.test_resume import interrupted

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SETTINGS = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
}


def run(folder: Path, **changes: object):
    """A run of a small UNet2DModel without any context."""
    settings = tiny_run(folder, **changes)
    network = DiffusersConfig(architecture="UNet2DModel", settings=SETTINGS)
    return dataclasses.replace(settings, network=network, conditioner=type(settings.conditioner)())


def test_a_network_of_diffusers_trains_from_scratch_resumes_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run(images(tmp_path / "set"))
    whole = sfumato.train(settings, run=tmp_path / "whole")
    first = interrupted(settings, tmp_path / "first", monkeypatch, after=6)
    assert fingerprint(sfumato.resume(first)) == fingerprint(whole)
    samples = sfumato.load(whole).sample(2, steps=2)
    assert samples.shape == (2, 1, 8, 8)


def test_training_goes_on_from_the_weights_of_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = diffusers.UNet2DModel(**SETTINGS, in_channels=1, out_channels=1)
    model.save_pretrained(tmp_path / "unet")
    settings = run(images(tmp_path / "set"))
    network = dataclasses.replace(settings.network, path=str(tmp_path / "unet"))
    built = network.build(image_channels=1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(built.state_dict()[f"model.{name}"], tensor)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architecture": "UNet2DModle"}, "did you mean 'UNet2DModel'"),
        ({"settings": {**SETTINGS, "layers": 3}}, "cannot be built: .*layers"),
        ({"settings": {**SETTINGS, "in_channels": 9}}, "reads 9 channels, and the data have 1"),
        ({"architecture": "UNet2DConditionModel"}, "and the conditioner gives"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, sentence: str) -> None:
    settings = {"architecture": "UNet2DModel", "settings": SETTINGS, **changes}
    if settings["architecture"] == "UNet2DConditionModel":
        settings["settings"] = {}
    with pytest.raises(ConfigError, match=sentence):
        DiffusersConfig(**settings).build(image_channels=1)
