"""Networks as ONNX: the runner beside the file, without torch, against our own sampling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.autoencoders import LatentAutoencoder
from sfumato.errors import ConfigError, OutputError
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.onnx_export import sampling_plan, write_onnx
from sfumato.interop.trained_model import TrainedModel
from sfumato.networks import DiTConfig
from sfumato.recipes.builtin import recipe
from sfumato.recipes.model import build_model
from sfumato.sampling import DDIM, SAMPLERS, KeyedNoise
from tests.helpers.diffusers_models import stable_diffusion
from tests.helpers.pipelines import INFO, tiny_pipeline
from tests.helpers.trained_models import line_with, tuned

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def with_sampling(pipeline: Pipeline, **changes: object) -> Pipeline:
    return replace(pipeline, sampling=replace(pipeline.sampling, **changes))


def trained(pipeline: Pipeline, place: Path) -> TrainedModel:
    return TrainedModel(pipeline=pipeline, run=recipe("digits"), directory=place, step=3)


def dit_pipeline() -> Pipeline:
    """A pipeline of our own transformer, steered by categories; every weight is awake."""
    run = replace(recipe("digits"), network=DiTConfig(hidden_size=32, depth=2, head_dim=16))
    model = build_model(run, INFO).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return replace(tiny_pipeline("category"), model=model)


def by_runner(folder: Path, rows: list[int], draws: int, like: torch.Tensor, **options: object):
    from sfumato.interop import run_onnx

    noise = KeyedNoise(3)
    drawn = np.stack([noise(like).numpy() for _ in range(draws)])
    return torch.from_numpy(run_onnx.sample(folder, drawn, rows, **options))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pipeline]:
    place = tmp_path_factory.mktemp("onnx")
    pipeline = with_sampling(tiny_pipeline("category"), steps=6, guidance=3.0, interval=(-4.0, 3.0))
    lines = write_onnx(trained(pipeline, place), place / "model", torch.float32)
    line_with(lines, "6 calls of the network for each image, conditions: cat, dog, 7")
    return place / "model", pipeline


def test_the_runner_makes_our_images_of_every_category_and_batch_size(
    exported: tuple[Path, Pipeline],
) -> None:
    folder, pipeline = exported
    own = pipeline.sample(3, seed=3, category=["cat", "dog", "7"])
    like = torch.zeros(3, 1, 8, 8)
    assert float((by_runner(folder, [0, 1, 2], 1, like) - own).abs().max()) < 1e-5
    assert float((by_runner(folder, [0, 2, 1], 1, like) - own).abs().max()) > 1e-2
    alone = pipeline.sample(1, seed=3)
    assert float((by_runner(folder, [-1], 1, like[:1]) - alone).abs().max()) < 1e-5
    plain = pipeline.sample(5, seed=3, category="dog", guidance=1.0)
    five = by_runner(folder, [1] * 5, 1, torch.zeros(5, 1, 8, 8), guidance=1.0)
    assert float((five - plain).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["heun", "unipc", "churn", "ddpm"])
def test_every_sampler_becomes_numbers(name: str, tmp_path: Path) -> None:
    pipeline = with_sampling(
        tiny_pipeline("category"), sampler=SAMPLERS[name], steps=5, clip=name == "ddpm"
    )
    plan = sampling_plan(pipeline)
    calls, draws = len(plan["noise_input"]), int(plan["draws"])
    assert plan["mix"].shape == (calls + 1, calls + draws)
    assert (calls > 5, draws > 1) == (name in ("heun", "churn"), name in ("churn", "ddpm"))
    # a guess that is made later has no part in a state
    assert not [k for k in range(calls) if plan["mix"][k, draws + k :].any()]
    write_onnx(trained(pipeline, tmp_path), tmp_path / "out", torch.float32)
    own = pipeline.sample(2, seed=3, category="dog")
    like = torch.zeros(2, 1, 8, 8)
    assert float((by_runner(tmp_path / "out", [1, 1], draws, like) - own).abs().max()) < 1e-5


def test_our_transformer_is_exported(tmp_path: Path) -> None:
    pipeline = with_sampling(dit_pipeline(), steps=4, guidance=2.0)
    write_onnx(trained(pipeline, tmp_path), tmp_path / "out", torch.float32)
    own = pipeline.sample(3, seed=3, category="7")
    like = torch.zeros(3, 1, 8, 8)
    assert float((by_runner(tmp_path / "out", [2] * 3, 1, like) - own).abs().max()) < 1e-3
    assert float((by_runner(tmp_path / "out", [0] * 3, 1, like) - own).abs().max()) > 1e-2


def test_a_tuned_model_of_latents_is_exported_with_its_decoder(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    model = tuned(stable_diffusion(tmp_path / "base"), tmp_path / "run", sampler=DDIM())
    assert isinstance(model.pipeline.autoencoder, LatentAutoencoder)
    prompts = tmp_path / "run" / "samples" / "step-000000040" / "samples.json"
    prompts.parent.mkdir(parents=True)
    prompts.write_text(json.dumps({"text": ["a cat", "a dog", "a cat"]}))
    lines = write_onnx(model, tmp_path / "out", torch.float32)
    line_with(lines, "conditions: a cat, a dog")
    own = model.pipeline.sample(1, seed=3, prompt="a dog")
    again = by_runner(tmp_path / "out", [1], 1, torch.zeros(1, 4, 16, 16))
    assert again.shape == (1, 3, 32, 32)
    assert float((again - own).abs().max()) < 1e-4


def test_the_runner_needs_neither_torch_nor_sfumato(exported: tuple[Path, Pipeline]) -> None:
    folder, _ = exported
    script = folder / "run_onnx.py"
    assert len(script.read_text().splitlines()) <= 40
    guard = folder / "sitecustomize.py"
    guard.write_text(
        "import sys\nfor name in ('torch', 'sfumato', 'diffusers'): sys.modules[name] = None\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, str(script), "--name", "dog", "--seed", "4"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    noise = np.random.default_rng(4).normal(size=(1, 1, 1, 8, 8))
    from sfumato.interop import run_onnx

    pixels = (run_onnx.sample(folder, noise, [1])[0, 0] * 255).round().astype(np.uint8)
    assert np.array_equal(np.asarray(Image.open(folder / "image.png")), pixels)
    wrong = subprocess.run(
        [*command[:2], "--name", "bird"],
        cwd=folder,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert wrong.returncode == 2


def test_what_cannot_be_computed_beforehand_is_refused(tmp_path: Path) -> None:
    doodle = trained(tiny_pipeline("doodle"), tmp_path)
    with pytest.raises(ConfigError, match="the condition of doodle has to be computed"):
        write_onnx(doodle, tmp_path / "out", torch.float32)
    category = trained(tiny_pipeline("category"), tmp_path)
    with pytest.raises(ConfigError, match="ONNX is written in float32"):
        write_onnx(category, tmp_path / "out", torch.float16)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        write_onnx(category, tmp_path / "out", torch.float32)


def test_a_runner_that_makes_other_images_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.interop import onnx_export

    def wrong(pipeline: Pipeline) -> dict:
        return (plan := sampling_plan(pipeline)) | {"of_output": plan["of_output"] * 1.05}

    monkeypatch.setattr(onnx_export, "sampling_plan", wrong)
    with pytest.raises(OutputError, match="the runner makes other images than the run"):
        write_onnx(trained(tiny_pipeline("category"), tmp_path), tmp_path / "out", torch.float32)
    assert list(tmp_path.iterdir()) == []
