"""`sfumato finetune MODEL IMAGES --lora FILE`: somebody's LoRA as the first values."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.adapters import (
    Factors,
    LoRA,
    adaptable_layers,
    adapted_layers,
    sharing_tensors,
    without_adapters,
)
from sfumato.errors import CheckpointError, ConfigError
from sfumato.interop.initial_lora import lora_settings, patterns
from sfumato.recipes.resolver import resolve
from sfumato.runs.finetuning import choose_finetuning
from sfumato.runs.preparation import prepare
from tests.helpers import cli
from tests.helpers.diffusers_models import stable_diffusion, unet
from tests.helpers.lora import random_changes
from tests.parity.test_finetune import SHORT, photos

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TINY = (*SHORT, "budget.steps=2", "validation.samples=4")
ALPHA = 1.1  # over a rank of 3: neither a power of two, nor the rank


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of kohya: linear layers of rank 3, 3 x 3 convolutions of rank 2, one alpha."""
    tensors = {}
    network = unet(32)
    layers = adaptable_layers(network)
    for name, factors in random_changes(network, ranks=(3,)).items():
        rank = 2 if layers[name].weight.ndim == 4 and layers[name].weight.shape[-1] == 3 else 3
        path = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{path}.lora_down.weight"] = factors.down[:rank].contiguous()
        tensors[f"{path}.lora_up.weight"] = factors.up[:, :rank].contiguous()
        tensors[f"{path}.alpha"] = torch.tensor(ALPHA, dtype=torch.float64)
    target = tmp_path_factory.mktemp("loras") / "style.safetensors"
    save_file(tensors, target, metadata={"ss_clip_skip": "2"})
    return target


def test_step_0_is_the_model_with_that_lora_bit_for_bit(
    model: Path, images: Path, file: Path
) -> None:
    chosen = choose_finetuning(model, str(images), TINY, lora=file)
    run, lines = chosen.run, chosen.lines
    assert f"goes on from {file}" in lines[0]
    assert "measured against the base without this LoRA" in lines[1]
    assert any("conditioner.text.clip_skip=1" in line for line in lines)
    assert any("no preservation: it would draw the model to the base" in line for line in lines)
    adapter = run.adapter
    assert isinstance(adapter, LoRA)
    assert (adapter.rank, adapter.convolutions, adapter.layers) == (3, True, ("",))
    assert set(adapter.rank_pattern.values()) == {2}
    network = prepare(resolve(run, TINY)).model.eval()
    base = sfumato.load(model)
    theirs = sfumato.with_lora(base, file)
    ours = replace(base, model=network)
    asked = {"prompt": "a thing", "seed": 1, "steps": 2}
    expected = theirs.sample(1, **asked)
    assert torch.equal(ours.sample(1, **asked), expected)
    plain = base.sample(1, **asked)
    assert float((expected - plain).abs().max()) > 1e-3
    with without_adapters(network):
        assert torch.equal(ours.sample(1, **asked), plain)


@pytest.mark.slow
def test_it_trains_and_resumes_without_the_file(
    model: Path, images: Path, file: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(file, tmp_path / "copy.safetensors"))
    run = tmp_path / "run"
    result = cli.sfumato("finetune", model, images, *TINY, "--lora", copy, "--run", run)
    assert result.code == 0, result.err
    digest = re.search(r"goes on from \S+ \(hash (\w{12})\)", result.err)
    copy.unlink()
    adapter = resolve(run).adapter
    assert isinstance(adapter, LoRA)
    assert digest is not None
    assert adapter.initial_hash.startswith(digest[1])
    resumed = cli.sfumato("resume", run, "budget.steps=3")
    assert resumed.code == 0, resumed.err
    layers = adapted_layers(sfumato.load(run, weights="raw").model)
    tensors = load_file(file)
    for name, layer in layers.items():
        path = f"lora_unet_{name.removeprefix('network.model.').replace('.', '_')}"
        began = tensors[f"{path}.lora_up.weight"].view_as(layer.lora_B)
        assert layer.scale == pytest.approx(ALPHA / layer.lora_A.shape[0], rel=1e-6)
        # three steps of 1e-4 each move it a little
        assert 0 < float((layer.lora_B - began).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["adapter.rank=8"], r"adapter\.rank: 8 contradicts style\.safetensors, which has 3"),
        (["adapter.layers=[to_q]"], r"adapter\.layers: \['to_q'\] contradicts style"),
        (["adapter.kind=controlnet"], r"adapter\.kind=controlnet cannot begin with a LoRA"),
    ],
)
def test_what_contradicts_the_file_is_refused_by_name(
    model: Path, images: Path, file: Path, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        choose_finetuning(model, str(images), [*TINY, *overrides], lora=file)


def test_changes_of_text_encoders_are_trained_or_left_out(
    model: Path, images: Path, file: Path, tmp_path: Path
) -> None:
    more = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 32),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(64, 2),
    }
    save_file(load_file(file) | more, tmp_path / "f.safetensors")
    trained = choose_finetuning(model, str(images), TINY, lora=tmp_path / "f.safetensors").run
    assert isinstance(trained.adapter, LoRA)
    assert trained.adapter.text_encoders
    left_out = [*TINY, "adapter.text_encoders=false"]
    with pytest.raises(CheckpointError, match=r"2 tensors do not: lora_te_text_model"):
        choose_finetuning(model, str(images), left_out, lora=tmp_path / "f.safetensors")
    whole = choose_finetuning(model, str(images), TINY, lora=file).run
    chosen = choose_finetuning(
        model, str(images), left_out, lora=tmp_path / "f.safetensors", partial=True
    )
    partial, lines = chosen.run, chosen.lines
    assert any("2 tensors are left out" in line for line in lines)
    # a hash of what is used, not of the file
    assert isinstance(partial.adapter, LoRA)
    assert isinstance(whole.adapter, LoRA)
    assert partial.adapter.initial_hash == whole.adapter.initial_hash


@pytest.mark.parametrize("chosen", ["attention", "some", "alphas"])
def test_settings_of_a_lora_are_those_of_its_factors(chosen: str) -> None:
    network = unet(32)
    layers = adaptable_layers(network)
    kept = {"attention": r"\.to_(q|out\.0)$", "some": r"^down_.*(to_k|conv1)$", "alphas": ""}[
        chosen
    ]
    factors = {
        name: replace(one, scale=0.7 / one.rank if chosen == "alphas" and "to_k" in name else 1.0)
        for name, one in random_changes(network).items()
        if re.search(kept, name)
    }
    adapter = lora_settings(factors, layers)
    copy = sharing_tensors(network)
    adapter.apply(copy, copy)
    adapted = adapted_layers(copy)
    assert adapted.keys() == factors.keys()
    for name, layer in adapted.items():
        assert layer.lora_A.shape == factors[name].down.shape
        assert layer.scale == factors[name].scale
    assert len(layers) > len(adapted) or chosen == "alphas"


def test_patterns_are_few_and_exact() -> None:
    names = ["a.0.to_q", "a.1.to_q", "b.to_q", "a.0.to_out.0", "a.0.proj", "x.b.c.d", "y.b.c.d"]
    assert patterns(names, names) == ("",)
    assert patterns(["a.0.to_q", "a.1.to_q", "b.to_q"], names) == (r"(^|\.)to_q$",)
    assert patterns(["a.0.to_out.0"], names) == (r"(^|\.)to_out\.0$",)
    assert patterns(["b.to_q"], names) == (r"(^|\.)b\.to_q$",)
    assert patterns(["x.z.b.c.d"], [*names, "x.z.b.c.d"]) == (r"^x\.z\.b\.c\.d$",)


def test_factors_keep_their_scale_apart() -> None:
    factors = Factors(torch.ones(2, 3), torch.ones(4, 2), 0.3)
    assert torch.equal(factors.delta(), torch.full((4, 3), 0.3 * 2))
    assert torch.equal(factors.times(2).folded().up, torch.full((4, 2), 0.6))
    assert factors.folded().scale == 1
