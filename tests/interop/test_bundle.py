"""Bundles: a run in one folder, which gives the run's images bit for bit wherever it is opened."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato import load
from sfumato.conditioners import CategoryConfig
from sfumato.config import load_yaml_file
from sfumato.contexts import ContextConfig
from sfumato.errors import ConfigError, OutputError, RunError
from sfumato.interop.bundle import write_bundle
from sfumato.interop.trained_model import TrainedModel
from sfumato.recipes import resolve
from sfumato.storage import checkpoint
from tests.helpers.diffusers_models import stable_diffusion
from tests.helpers.runs import images, tiny_run
from tests.helpers.trained_models import line_with, tuned

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of our own U-Net, steered by categories."""
    place = tmp_path_factory.mktemp("runs")
    return sfumato.train(tiny_run(images(place / "photos")), run=place / "run")


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return TrainedModel(pipeline=load(run), run=resolve(run), directory=run, step=14)


def test_a_moved_bundle_gives_the_images_of_the_run_bit_for_bit(
    run: Path, model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_bundle(model, tmp_path / "bundle", torch.float32)
    line_with(lines, "reopened: one image differs from the run's by 0.0e+00")
    moved = shutil.move(tmp_path / "bundle", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for asked in ({"category": "odd", "guidance": 2.0}, {}):
        own = load(run).sample(3, seed=5, steps=4, **asked)
        assert torch.equal(load("elsewhere").sample(3, seed=5, steps=4, **asked), own)
    assert load(moved).sampling == load(run).sampling
    assert load(moved).categories == ("even", "odd")


def test_it_holds_the_averaged_weights_alone_and_no_path_of_this_machine(
    run: Path, model: TrainedModel, tmp_path: Path
) -> None:
    write_bundle(model, tmp_path / "bundle", torch.float32)
    newest = checkpoint.read_newest(tmp_path / "bundle" / "checkpoints")[0]
    averaged = checkpoint.read_newest(run / "checkpoints")[0].tensors["ema"]
    assert list(newest.tensors) == ["ema"]
    assert newest.tensors["ema"].keys() == averaged.keys()
    assert all(torch.equal(newest.tensors["ema"][key], one) for key, one in averaged.items())
    texts = [
        path.read_text()
        for path in (tmp_path / "bundle").rglob("*")
        if path.suffix in (".json", ".yaml", ".md")
    ]
    assert len(texts) >= 5
    assert not [text for text in texts if str(run.parent) in text or "000.png" in text]
    assert load_yaml_file(tmp_path / "bundle" / "config.yaml")["data"]["source"]["path"] == "photos"
    card = (tmp_path / "bundle" / "README.md").read_text()
    record = json.loads((run / "data.json").read_text())
    counts = f"{record['training']} for training and {record['holdout']} held out"
    assert f"images: 40, of which {counts}" in card


def test_it_is_not_trained_further_and_has_one_set_of_weights(
    model: TrainedModel, tmp_path: Path
) -> None:
    write_bundle(model, tmp_path / "bundle", torch.float32)
    with pytest.raises(RunError, match="is a bundle: it has the averaged weights only"):
        sfumato.resume(tmp_path / "bundle")
    with pytest.raises(ConfigError, match="has no raw weights"):
        load(tmp_path / "bundle", weights="raw")
    with pytest.raises(OutputError, match="exists already"):
        write_bundle(model, tmp_path / "bundle", torch.float32)


def test_other_precisions_are_rounded_and_said(model: TrainedModel, tmp_path: Path) -> None:
    lines = write_bundle(model, tmp_path / "bundle", torch.float16)
    line_with(lines, "by rounding")
    tensors = checkpoint.read_newest(tmp_path / "bundle" / "checkpoints")[0].tensors["ema"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    own = model.pipeline.sample(2, seed=5, steps=4)
    again = load(tmp_path / "bundle").sample(2, seed=5, steps=4)
    assert 0 < float((own - again).abs().max()) < 0.02
    damaged = replace(model, pipeline=load(model.directory))
    damaged.pipeline.model.network.input.bias.data[0] = 1e6
    with pytest.raises(ConfigError, match=r"network.input.bias has values up to 1e\+06"):
        write_bundle(damaged, tmp_path / "other", torch.float16)
    assert not (tmp_path / "other").exists()


def test_a_tuned_folder_takes_its_text_encoders_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    base = stable_diffusion(tmp_path / "base")
    model = tuned(base, tmp_path / "run")
    lines = write_bundle(model, tmp_path / "bundle", torch.float32)
    line_with(lines, "copies of those of base")
    asked = {"prompt": "a red cat", "seed": 3, "guidance": 5.0}
    own = model.pipeline.sample(1, **asked)
    shutil.move(tmp_path / "bundle", tmp_path / "elsewhere")
    for gone in ("base", "run"):
        shutil.rmtree(tmp_path / gone)
    monkeypatch.chdir("/")
    again = load(tmp_path / "elsewhere")
    assert torch.equal(again.sample(1, **asked), own)
    with pytest.raises(ConfigError, match="is a bundle, which holds the text encoders of its base"):
        sfumato.export(tmp_path / "elsewhere", "diffusers", tmp_path / "folder")
    settings = load_yaml_file(tmp_path / "elsewhere" / "config.yaml")
    assert settings["network"]["path"] == ""
    assert not Path(settings["conditioner"]["text"]["path"]).is_absolute()
    record = json.loads((tmp_path / "elsewhere" / "data.json").read_text())
    assert str(tmp_path) not in json.dumps([settings, record])


def test_a_fault_in_what_was_written_is_seen(
    model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.interop import bundle

    def damaged(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return tensor + 1e-3 if name == "network.output.bias" else tensor

    monkeypatch.setattr(bundle, "round_tensor", damaged)
    with pytest.raises(OutputError, match="gives other images than the run"):
        write_bundle(model, tmp_path / "bundle", torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_category_models_without_a_record_of_data_are_bundled(tmp_path: Path) -> None:
    """The card says what it does not know."""
    from tests.helpers.pipelines import tiny_pipeline

    pipeline = tiny_pipeline("category")
    run = tiny_run(tmp_path / "photos", conditioner=ContextConfig(category=CategoryConfig(size=8)))
    run = replace(run, network=pipeline.model.network.config, sampling=pipeline.sampling)
    model = TrainedModel(pipeline=pipeline, run=run, directory=tmp_path / "run", step=3)
    write_bundle(model, tmp_path / "bundle", torch.float32)
    own = pipeline.sample(2, seed=1, category="dog")
    assert torch.equal(load(tmp_path / "bundle").sample(2, seed=1, category="dog"), own)
    assert "number of images: unknown" in (tmp_path / "bundle" / "README.md").read_text()
