"""Clip skip, guidance rescaling and embedded guidance as options of a call, beside diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato import load, with_clip_skip, with_embedded_guidance
from sfumato.contexts import ContextConfig
from sfumato.diffusion import MatchDeviation, MatchNorm
from sfumato.errors import ConfigError
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.diffusers_folder import read_folder
from sfumato.recipes.model import build_model
from tests.helpers import cli
from tests.helpers.diffusers_families import flux
from tests.helpers.diffusers_models import clip_text, stable_diffusion, stable_diffusion_xl
from tests.parity.test_text_to_image import PROMPT, difference, expected, latents_of

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPTS = {"prompt": PROMPT, "guidance": 5.0}


@pytest.fixture(scope="module", params=["SD", "SDXL"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With text encoders of four layers."""
    place = tmp_path_factory.mktemp("pipeline") / "model"
    if request.param == "SD":
        stable_diffusion(place)
    else:
        stable_diffusion_xl(place)
        second = clip_text("CLIPTextModelWithProjection", "gelu", layers=4)
        second.save_pretrained(place / "text_encoder_2")
    clip_text(layers=4).save_pretrained(place / "text_encoder")
    return place


@pytest.fixture(scope="module")
def ours(folder: Path) -> Pipeline:
    return load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Iterator[Any]:
    import transformers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        # where diffusers (0.42) looks for the norm, which transformers 5 has one level higher
        encoder = transformers.CLIPTextModel
        patch.setattr(encoder, "text_model", property(lambda own: own), raising=False)
        yield pipeline


def test_clip_skip_is_that_of_diffusers(ours: Pipeline, theirs) -> None:
    plain = latents_of(ours, **PROMPTS)
    for count in (1, 2):
        skipping = with_clip_skip(ours, count)
        same = expected(
            partial(theirs, clip_skip=count, negative_prompt="dogs"), prompt=PROMPT, guidance=5.0
        )
        assert difference(latents_of(skipping, **PROMPTS, negative="dogs"), same) < 1e-5
        # the empty prompt is read by all layers, as by diffusers
        same = expected(partial(theirs, clip_skip=count), prompt=PROMPT, guidance=5.0)
        assert difference(latents_of(skipping, **PROMPTS), same) < 1e-5
        assert difference(plain, same) > 1e-3
    assert difference(latents_of(with_clip_skip(ours, 1), **PROMPTS), same) > 1e-3  # of 2
    assert torch.equal(latents_of(ours, **PROMPTS), plain)
    assert torch.equal(latents_of(with_clip_skip(ours, 0), **PROMPTS), plain)


def test_clip_skip_can_be_trained_with(folder: Path, ours: Pipeline) -> None:
    run = read_folder(folder).run
    text = replace(run.conditioner.text, clip_skip=1)
    conditioner = ContextConfig(text=text, resizing=run.conditioner.resizing)
    model = build_model(replace(run, conditioner=conditioner), ours.info)
    context = {"text": [PROMPT]}
    tokens = model.conditioner(context, 1).tokens
    assert tokens is not None
    skipping = with_clip_skip(ours, 1).model.conditioner(context, 1).tokens
    assert torch.equal(tokens, skipping)
    assert not torch.equal(tokens, ours.model.conditioner(context, 1).tokens)


def test_more_layers_than_there_are_cannot_be_left_out(folder: Path, ours: Pipeline) -> None:
    most = 2 if (folder / "text_encoder_2").is_dir() else 3
    with_clip_skip(ours, most)
    with pytest.raises(ConfigError, match=rf"have 4 layers[\s\S]*to {most}"):
        with_clip_skip(ours, most + 1)


def test_a_call_may_rescale_guidance(ours: Pipeline, theirs) -> None:
    request = {"prompt": PROMPT, "seed": 3, "steps": 8, "guidance": 7.5}
    images = ours.sample(1, **request, guidance_rescale=0.7)
    same = expected(partial(theirs, guidance_rescale=0.7), prompt=PROMPT, guidance=7.5, output="np")
    assert float((images - same.permute(0, 3, 1, 2)).abs().max()) < 0.01 / 255
    sampling = replace(ours.sampling, guidance_rescale=MatchDeviation(share=0.7))
    always = replace(ours, sampling=sampling)
    assert torch.equal(always.sample(1, **request), images)
    plain = ours.sample(1, **request)
    assert float((images - plain).abs().max()) > 1e-3
    assert torch.equal(always.sample(1, **request, guidance_rescale=0), plain)  # switched off
    cells = ours.sample(1, **request, guidance_rescale=MatchNorm(parts="cells"))
    assert float((cells - plain).abs().max()) > 1e-3
    assert float((cells - images).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match="guidance rescale has no effect"):
        ours.sample(1, prompt=PROMPT, guidance=1.0, guidance_rescale=0.7)
    with pytest.raises(ConfigError, match=r"guidance_rescale = 1\.5"):
        ours.sample(1, **request, guidance_rescale=1.5)


def test_the_command_has_these_options(folder: Path, ours: Pipeline, tmp_path: Path) -> None:
    asked = ("sample", folder, "--num", 1, "--prompt", PROMPT, "--steps", 2, "--guidance", 3)
    options = ("--clip-skip", 1, "--guidance-rescale", "rows", "--format", "npy")
    result = cli.sfumato(*asked, *options, "--seed", 3, "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    images = with_clip_skip(ours, 1).sample(
        1, prompt=PROMPT, steps=2, guidance=3.0, seed=3, guidance_rescale=MatchNorm(parts="rows")
    )
    made = torch.from_numpy(np.load(tmp_path / "out" / "00000.npy"))
    assert torch.allclose(made.permute(2, 0, 1), images[0], atol=1e-5)
    settings = json.loads(result.out)["settings"]
    assert settings["clip_skip"] == 1
    assert settings["guidance_rescale"] == {"kind": "norm", "parts": "rows"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--embedded-guidance", 3), "the network is told no guidance scale"),
        (("--guidance-rescale", 0.7, "--guidance", 1), "guidance rescale has no effect"),
        (("--guidance-rescale", "columns"), "is neither a number from 0 to 1, nor rows or cells"),
        (("--clip-skip", 9), "clip skip 9, and the text encoders have 4 layers"),
    ],
)
def test_options_without_effect_are_refused(
    folder: Path, tmp_path: Path, options: tuple[object, ...], sentence: str
) -> None:
    asked = ("sample", folder, "--prompt", PROMPT, "--steps", 1, "--num", 1)
    result = cli.sfumato(*asked, *options, "--out", tmp_path / "out")
    assert result.code == 2
    assert sentence in " ".join(result.err.split())


def test_embedded_guidance_is_told_to_the_network(tmp_path: Path) -> None:
    plain = load(flux(tmp_path / "model", guidance_embeds=True))
    told: list[float] = []
    network = plain.model.network.implementation
    network.register_forward_pre_hook(
        lambda module, arguments, named: told.append(float(named["guidance"])), with_kwargs=True
    )
    plain.sample(1, prompt=PROMPT, steps=1)
    stronger = with_embedded_guidance(plain, 7.0)
    changed = stronger.sample(1, prompt=PROMPT, steps=1, seed=1)
    assert told == [3.5, 7.0]
    assert not torch.equal(changed, plain.sample(1, prompt=PROMPT, steps=1, seed=1))
    with pytest.raises(ConfigError, match=r"no layer of the text encoders of FluxPipeline"):
        with_clip_skip(plain, 1)
