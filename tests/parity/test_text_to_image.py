"""Text-to-image pipelines of several families, sampled by us and by diffusers from the same noise."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from sfumato import load
from sfumato.contexts.text import Truncated
from sfumato.diffusion import MatchDeviation
from sfumato.errors import CheckpointError
from sfumato.generation.pipeline import Pipeline
from sfumato.sampling import KeyedNoise, StepInfo
from tests.helpers.diffusers_models import (
    pixart,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT = "a red cat on a mat"
MODELS = {
    "SD, DDIM leading": partial(stable_diffusion, steps_offset=1, set_alpha_to_one=False),
    "SD, v, zero terminal SNR, trailing": partial(
        stable_diffusion,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "SDXL": stable_diffusion_xl,
    "SD3": stable_diffusion_3,
    "PixArt": pixart,
}
CALLS = {"PixArt": {"use_resolution_binning": False, "clean_caption": False}}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[name](tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Pipeline:
    return load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path, name: str):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return partial(pipeline, **CALLS.get(name, {}))


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


def test_guidance_is_rescaled_as_diffusers_does(ours: Pipeline, theirs, name: str) -> None:
    if not name.startswith("SD, ") and name != "SDXL":
        pytest.skip("its pipeline has no guidance_rescale")
    same = expected(partial(theirs, guidance_rescale=0.7), prompt=PROMPT, guidance=7.5)
    assert difference(rescaled(ours, 0.7), same) < 1e-5
    assert difference(rescaled(ours, 0.6), same) > 1e-3
    assert difference(latents_of(ours, prompt=PROMPT, guidance=7.5), same) > 1e-2


def rescaled(ours: Pipeline, share: float) -> torch.Tensor:
    sampling = replace(ours.sampling, guidance_rescale=MatchDeviation(share=share))
    return latents_of(replace(ours, sampling=sampling), prompt=PROMPT, guidance=7.5)


def test_other_guidance_and_another_prompt_are_seen(ours: Pipeline, theirs) -> None:
    own = expected(theirs, prompt=PROMPT, guidance=7.5)
    assert difference(latents_of(ours, prompt=PROMPT, guidance=7.6), own) > 1e-4
    assert difference(latents_of(ours, prompt="a blue cat", guidance=7.5), own) > 1e-3


def test_without_a_negative_prompt_sdxl_leads_away_from_zeros(tmp_path: Path) -> None:
    """Not from the encoded empty text, which is what a negative prompt of "" means."""
    ours = load(stable_diffusion_xl(tmp_path / "model"))
    zeros = latents_of(ours, prompt=PROMPT, guidance=5.0)
    empty = latents_of(ours, prompt=PROMPT, negative="", guidance=5.0)
    assert difference(zeros, empty) > 1e-2


def test_a_long_prompt_is_truncated_and_said(ours: Pipeline) -> None:
    with pytest.warns(Truncated, match="of which the model reads the first"):
        ours.sample(1, prompt="word " * 400, seed=3, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Truncated)
        ours.sample(1, prompt=PROMPT, seed=3, steps=1)


def test_a_folder_without_its_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    with pytest.raises(CheckpointError, match="has no folder tokenizer"):
        load(tmp_path / "model")
