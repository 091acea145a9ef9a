"""A pipeline of Stable Diffusion's layout, sampled by us and by diffusers from the same noise."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from sfumato import load
from sfumato.contexts.text import Truncated
from sfumato.errors import CheckpointError
from sfumato.generation.pipeline import Pipeline
from sfumato.sampling import KeyedNoise, StepInfo
from tests.helpers.diffusers_models import stable_diffusion

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT = "a red cat on a mat"
CASES = {
    "DDIM leading": {"steps_offset": 1, "set_alpha_to_one": False},
    "v, zero terminal SNR, trailing": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pipeline")
    return stable_diffusion(place / "model", **CASES[request.param])


@pytest.fixture(scope="module")
def ours(folder: Path) -> Pipeline:
    return load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(ours: Pipeline, *, guidance: float, **prompts: str) -> torch.Tensor:
    """The last latents of our own call, of seed 3."""
    steps: list[StepInfo] = []
    ours.sample(1, seed=3, steps=8, guidance=guidance, on_step=steps.append, **prompts)
    return steps[-1].x


def expected(theirs, *, guidance: float, output: str = "latent", **prompts: str) -> torch.Tensor:
    """What diffusers' own call gives from our noise of seed 3."""
    result = theirs(
        **prompts, latents=KeyedNoise(3)(torch.empty(1, 4, 16, 16)), num_inference_steps=8,
        guidance_scale=guidance, output_type=output, height=32, width=32,
    ).images  # fmt: skip
    return torch.as_tensor(result)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_latents_are_those_of_diffusers(ours: Pipeline, theirs, guidance: float) -> None:
    own = latents_of(ours, prompt=PROMPT, guidance=guidance)
    assert difference(own, expected(theirs, prompt=PROMPT, guidance=guidance)) < 1e-5


def test_images_are_those_of_diffusers(ours: Pipeline, theirs) -> None:
    images = ours.sample(1, prompt=PROMPT, seed=3, steps=8, guidance=5.0)
    own = expected(theirs, prompt=PROMPT, guidance=5.0, output="np").permute(0, 3, 1, 2)
    assert images.shape == (1, 3, 32, 32)
    assert float((images - own).abs().max()) < 0.01 / 255


def test_a_negative_prompt_takes_the_place_of_the_empty_one(ours: Pipeline, theirs) -> None:
    own = latents_of(ours, prompt=PROMPT, negative="dogs", guidance=5.0)
    same = expected(theirs, prompt=PROMPT, negative_prompt="dogs", guidance=5.0)
    assert difference(own, same) < 1e-5
    assert difference(own, expected(theirs, prompt=PROMPT, guidance=5.0)) > 1e-3


def test_other_guidance_and_another_prompt_are_seen(ours: Pipeline, theirs) -> None:
    own = expected(theirs, prompt=PROMPT, guidance=7.5)
    assert difference(latents_of(ours, prompt=PROMPT, guidance=7.6), own) > 1e-4
    assert difference(latents_of(ours, prompt="a blue cat", guidance=7.5), own) > 1e-3


def test_a_long_prompt_is_truncated_and_said(ours: Pipeline) -> None:
    with pytest.warns(Truncated, match="of which the model reads the first"):
        ours.sample(1, prompt="word " * 100, seed=3, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Truncated)
        ours.sample(1, prompt=PROMPT, seed=3, steps=1)


def test_a_folder_without_its_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    with pytest.raises(CheckpointError, match="has no folder `tokenizer`"):
        load(tmp_path / "model")
