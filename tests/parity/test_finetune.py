"""`sfumato finetune`: a model folder of diffusers, tuned on a few images by LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.adapters import adapted_layers, without_adapters
from sfumato.config import load_yaml_file
from tests.helpers import cli
from tests.helpers.diffusers_models import stable_diffusion, stable_diffusion_xl

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SHORT = (
    "budget.steps=4",
    "validation.samples=8",
    "validation.bins=2",
    "preview.num=2",
    "precision=float32",
    "sampling.steps=2",
)


def photos(folder: Path, *, captions: bool = True) -> Path:
    folder.mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(f"a thing number {number}")
    return folder


@pytest.mark.parametrize(
    "make", [stable_diffusion, pytest.param(stable_diffusion_xl, marks=pytest.mark.slow)]
)
def test_a_folder_is_tuned_by_lora_and_its_base_stays_as_it_was(tmp_path: Path, make) -> None:
    model, images = make(tmp_path / "model"), photos(tmp_path / "photos")
    result = cli.sfumato("finetune", model, images, *SHORT, "--run", tmp_path / "run")
    assert result.code == 0, result.err
    assert result.out == f"{tmp_path / 'run'}\n"
    assert "chosen: 8 images, 8 with a caption" in result.err
    assert "LoRA of rank 16, learning rate" in result.err
    base, tuned = sfumato.load(model), sfumato.load(tmp_path / "run")
    own = tuned.model.network.state_dict()
    assert all(
        torch.equal(own[name], value) for name, value in base.model.network.state_dict().items()
    )
    asked = {"prompt": "a thing number 3", "seed": 1, "steps": 3}
    before = base.sample(2, **asked)
    with without_adapters(tuned.model):
        # the run holds its own copy of the autoencoder, with the statistics inside its weights
        assert float((tuned.sample(2, **asked) - before).abs().max()) < 1e-5
    assert float((tuned.sample(2, **asked) - before).abs().max()) > 1e-5
    assert len(adapted_layers(tuned.model)) > 10
    settings = load_yaml_file(tmp_path / "run" / "config.yaml")
    assert (settings["adapter"]["kind"], settings["sampling"]["guidance"]) == (
        "lora",
        base.sampling.guidance,
    )
    report = json.loads((tmp_path / "run" / "finetuning" / "report.json").read_text())
    assert 0 < report["parity"]["difference"] < 1e-5
    assert "diffusers makes the same image from the exported folder, up to" in result.err
    pair = np.asarray(Image.open(tmp_path / "run" / "finetuning" / "parity.png").convert("RGB"))
    assert pair.std() > 0
    assert not list((tmp_path / "run").glob("tmp*"))
    resumed = cli.sfumato("resume", tmp_path / "run", "budget.steps=6")
    assert resumed.code == 0, resumed.err


@pytest.mark.slow
def test_all_weights_are_trained_if_that_is_set(tmp_path: Path) -> None:
    model = stable_diffusion(tmp_path / "model")
    run = sfumato.finetune(
        model,
        str(photos(tmp_path / "photos")),
        overrides=["adapter=none", *SHORT],
        run=tmp_path / "run",
    )
    base, tuned = (sfumato.load(path).model.network.state_dict() for path in (model, run))
    assert base.keys() == tuned.keys()
    assert not torch.equal(base["model.conv_in.weight"], tuned["model.conv_in.weight"])


@pytest.mark.parametrize(
    ("captions", "place", "sentence"),
    [
        (False, "model", "none of 8 images has a caption"),
        (True, "photos", "is neither a run, since it has no config.yaml"),
        (True, "nowhere", "is neither a run, since it has no config.yaml"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_work(
    tmp_path: Path, captions: bool, place: str, sentence: str
) -> None:
    stable_diffusion(tmp_path / "model")
    images = photos(tmp_path / "photos", captions=captions)
    result = cli.sfumato("finetune", tmp_path / place, images, "--run", tmp_path / "run")
    assert result.code == 2
    assert sentence in result.err
    assert not (tmp_path / "run").exists()
