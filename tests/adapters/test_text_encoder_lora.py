"""LoRA of the text encoders of Stable Diffusion, beside that of the network, against peft and
diffusers.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato import config as configuration
from sfumato.adapters import ControlLoRA, LoRA, adapted_layers, without_adapters
from sfumato.errors import ConfigError
from sfumato.interop.diffusers_export import write_diffusers
from sfumato.interop.embedding import with_embedding
from sfumato.interop.lora_export import lora_diffusers, lora_kohya, lora_peft
from sfumato.interop.single_file import write_single_file
from sfumato.interop.trained_model import TrainedModel
from sfumato.recipes import Run
from sfumato.runs.finetuning import choose_finetuning
from sfumato.sampling import KeyedNoise
from tests.adapters.test_textual_inversion import learning, write_embedding
from tests.helpers.cli import sfumato as cli
from tests.helpers.diffusers_models import pixart, stable_diffusion
from tests.helpers.lora import disturb, largest_difference, of_peft, theirs
from tests.helpers.runs import fingerprint
from tests.helpers.trained_models import line_with, sdxl_of_two_widths, tuned
from tests.parity.test_finetune import SHORT, photos
from tests.training.test_resume import interrupted

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
F32 = torch.float32
PROMPT = "a red cat on a mat"
ASKED: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "steps": 4, "guidance": 5.0}
FAMILIES = {
    "sd": partial(stable_diffusion, steps_offset=1),
    "sdxl": sdxl_of_two_widths,
}
TUNED = (*SHORT, "adapter.text_encoders=true", "adapter.rank=4", "optimizer.learning_rate=0.02")
PLACE = "conditioner.parts.text.encoders."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: make(root / name) for name, make in FAMILIES.items()}


def trained(folder: Path, place: Path, **settings: Any) -> TrainedModel:
    """A base whose network and text encoders have a LoRA that says something."""
    adapter = LoRA(**{"rank": 3, "alpha": 2.0, "text_encoders": True, **settings})
    model = tuned(folder, place, adapter=adapter)
    disturb(model.pipeline.model, 0.2)
    return model


def text_factors(model: torch.nn.Module) -> dict[str, Any]:
    """The adapted layers of text encoders, by encoder and name."""
    return {
        name.removeprefix(PLACE): layer
        for name, layer in adapted_layers(model).items()
        if name.startswith(PLACE)
    }


def with_peft(folder: Path, model: torch.nn.Module) -> Any:
    """diffusers' pipeline whose text encoders have the same factors by peft."""
    pipeline = theirs(folder)
    for part in [name for name in pipeline.components if name.startswith("text_encoder")]:
        own = {
            name.removeprefix(f"{part}."): layer
            for name, layer in text_factors(model).items()
            if name.startswith(f"{part}.")
        }
        config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=sorted(own))
        encoder = peft.inject_adapter_in_model(config, getattr(pipeline, part))
        for name, layer in own.items():
            module = encoder.get_submodule(name)
            module.lora_A["default"].weight.data = layer.lora_A.detach().clone()
            module.lora_B["default"].weight.data = layer.lora_B.detach().clone()
    return pipeline


def encoded(pipeline: Any, prompt: str) -> list[torch.Tensor]:
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    result = pipeline.encode_prompt(prompt, **arguments)
    return [result[number] for number in ((0, 2) if len(result) == 4 else (0,))]


def image_of(pipeline: Any) -> torch.Tensor:
    """diffusers' image from our noise, with guidance."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT, latents=KeyedNoise(3)(torch.empty(1, 4, 16, 16)), num_inference_steps=4,
        output_type="pt", guidance_scale=5.0, height=32, width=32,
    ).images  # fmt: skip


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_conditions_and_gradients_are_those_of_peft(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    model = trained(folders[family], tmp_path / "run").pipeline.model
    layers = text_factors(model)
    blocks = {name.split(".", 1)[1].rpartition("layers.")[2] for name in layers}
    ends = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    assert {f"{number}.{end}" for number in (0, 1) for end in ends} <= blocks
    for layer in layers.values():
        layer.requires_grad_(True).weight.requires_grad_(False)
    condition = model.conditioner({"text": [PROMPT, "a dog"]}, 2)
    pipeline = with_peft(folders[family], model)
    expected = encoded(pipeline, PROMPT)
    pooled = [] if len(expected) == 1 else [condition.vector[:, : expected[1].shape[1]]]
    slots = [condition.tokens, *pooled]
    for slot, other in zip(slots, expected, strict=True):
        assert difference(slot[:1].detach(), other.detach()) < 1e-5
    sum(slot[0].square().sum() for slot in slots).backward()
    sum(slot.square().sum() for slot in expected).backward()
    reached = 0
    for name, layer in layers.items():
        part, _, path = name.partition(".")
        other = getattr(pipeline, part).get_submodule(path)
        for factor in ("lora_A", "lora_B"):
            own, their = getattr(layer, factor).grad, getattr(other, factor)["default"].weight.grad
            assert (own is None) == (their is None)
            if own is not None:
                reached += 1
                torch.testing.assert_close(own, their, rtol=1e-3, atol=1e-4)
    # SDXL never reads the last block of its first encoder: six layers of two factors
    assert reached == 2 * len(layers) - (12 if family == "sdxl" else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_lora_begins_as_the_base_and_is_the_base_when_it_is_off(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    base = sfumato.load(folders[family])
    expected = base.sample(1, **ASKED)
    new = tuned(folders[family], tmp_path / "new", adapter=LoRA(rank=2, text_encoders=True))
    for layer in adapted_layers(new.pipeline.model).values():
        layer.lora_B.data.zero_()
    model = trained(folders[family], tmp_path / "run").pipeline
    # runs have their own copy of the autoencoder, whose statistics are folded into its weights
    assert difference(new.pipeline.sample(1, **ASKED), expected) < 1e-5
    assert difference(model.sample(1, **ASKED), expected) > 1e-3
    own = {name: layer.adapted for name, layer in text_factors(model.model).items()}
    with without_adapters(model.model):
        assert difference(model.sample(1, **ASKED), expected) < 1e-5
        assert torch.equal(
            model.model.conditioner({"text": [PROMPT]}, 1).tokens,
            base.model.conditioner({"text": [PROMPT]}, 1).tokens,
        )
    assert {name: layer.adapted for name, layer in text_factors(model.model).items()} == own
    # the null condition is read by the changed encoders too, unless it is zeros
    changed = difference(
        model.model.conditioner.null(1).tokens, base.model.conditioner.null(1).tokens
    )
    assert (changed > 1e-3) == (family == "sd")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_gives_the_images_of_the_run_in_diffusers(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """Ranks differ by pattern, and alpha is not the rank."""
    patterns = {r"text_encoder.*fc1": 2, r"attn1": 4}
    run = trained(folders[family], tmp_path / "run", rank_pattern=patterns)
    own = run.pipeline.sample(1, **ASKED)
    deltas = {
        name: layer.delta().detach() for name, layer in text_factors(run.pipeline.model).items()
    }
    for write, place in ((lora_diffusers, "d"), (lora_kohya, "k.safetensors"), (lora_peft, "p")):
        lines = write(run, tmp_path / place, F32)
        assert f"({len(deltas)} of them of text encoders)" in lines[0]
        assert "largest difference of a weight's change 0" in lines[1]
        pipeline = theirs(folders[family])
        if write is lora_peft:
            for part in ("unet", *sorted({name.partition(".")[0] for name in deltas})):
                loaded = peft.PeftModel.from_pretrained(
                    getattr(pipeline, part), tmp_path / place / part
                )
                setattr(pipeline, part, loaded.base_model.model)
        else:
            pipeline.load_lora_weights(str(tmp_path / place))
        found = {
            f"{part}.{name}": change
            for part in ("text_encoder", "text_encoder_2")
            if hasattr(pipeline, part)
            for name, change in of_peft(getattr(pipeline, part)).items()
        }
        assert largest_difference(found, deltas) == 0.0
        assert difference(image_of(pipeline), own) < 1e-5
        again = sfumato.with_lora(sfumato.load(folders[family]), tmp_path / place)
        assert difference(again.sample(1, **ASKED), own) < 1e-5
    assert all("text_model" in key for key in load_file(tmp_path / "k.safetensors") if "_te" in key)
    lines = write_diffusers(run, tmp_path / "folder", F32)
    adapted = len(adapted_layers(run.pipeline.model))
    line_with(lines, f"{adapted} adapted layers merged in float32")
    assert difference(image_of(theirs(tmp_path / "folder")), own) < 1e-5
    plain = theirs(tmp_path / "folder")
    for part in {name.partition(".")[0] for name in deltas}:
        setattr(plain, part, getattr(theirs(folders[family]), part))
    assert difference(image_of(plain), own) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_holds_the_changed_encoders(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    run = trained(folders[family], tmp_path / "run")
    lines = write_single_file(run, tmp_path / "one.safetensors", torch.float16)
    lost = float(line_with(lines, "rounding to float16 loses").split("loses ")[1].split("%")[0])
    assert 0 < lost < 5
    opened = sfumato.load(tmp_path / "one.safetensors", like=folders[family])
    assert difference(opened.sample(1, **ASKED), run.pipeline.sample(1, **ASKED)) < 0.02
    base = sfumato.load(folders[family])
    tokens = [
        pipeline.model.conditioner({"text": [PROMPT]}, 1).tokens
        for pipeline in (opened, run.pipeline, base)
    ]
    assert difference(tokens[0], tokens[1]) < 0.1 * difference(tokens[2], tokens[1])


@pytest.fixture(scope="module")
def run(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    root = tmp_path_factory.mktemp("tuned")
    result = cli("finetune", folders["sd"], photos(root / "photos"), *TUNED, "--run", root / "run")
    assert result.code == 0, result.err
    assert "LoRA of rank 4, text encoders too" in result.err
    assert "parameters freed" not in result.err
    return root / "run"


def test_training_changes_encoders_and_network_and_keeps_no_base(
    run: Path, folders: dict[str, Path]
) -> None:
    newest = max((run / "checkpoints").glob("step-*"))
    tensors = load_file(newest / "model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_A", "lora_B"}
    up = {name: value for name, value in tensors.items() if name.endswith("lora_B")}
    assert all(float(value.abs().max()) > 1e-4 for value in up.values())
    assert sum(name.startswith(PLACE) for name in up) == 12  # two blocks of six layers
    encoders = sfumato.load(folders["sd"]).model.conditioner.text_encoders()
    own = sfumato.load(run).model.conditioner.text_encoders()["text_encoder"].state_dict()
    for name, value in encoders["text_encoder"].state_dict().items():
        assert torch.equal(own[name], value)
    report = json.loads((run / "finetuning" / "report.json").read_text())
    assert report["levels"]


def test_a_stopped_run_goes_on_bit_for_bit(
    run: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = str(run.parent / "photos")
    proposed = choose_finetuning(folders["sd"], images, TUNED).run
    plain = configuration.with_overrides(
        configuration.plain(proposed), (*TUNED, "checkpoint.every_steps=2")
    )
    settings = configuration.parse(Run, plain)
    first = interrupted(settings, tmp_path / "first", monkeypatch, after=3)
    assert fingerprint(sfumato.resume(first)) == fingerprint(run)


def test_a_bundle_and_a_lora_file_go_on_from_what_was_learned(
    run: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    own = sfumato.load(run)
    bundle = sfumato.export(run, "bundle", tmp_path / "bundle")
    assert torch.equal(sfumato.load(bundle).sample(1, **ASKED), own.sample(1, **ASKED))
    file = sfumato.export(run, "lora-kohya", tmp_path / "toy.safetensors")
    again = cli(
        "finetune", folders["sd"], run.parent / "photos", *SHORT, "--lora", file, "--run",
        tmp_path / "again", "optimizer.learning_rate=1e-12", "budget.steps=1",
    )  # fmt: skip
    assert again.code == 0, again.err
    config = configuration.load_yaml_file(tmp_path / "again" / "config.yaml")
    assert config["adapter"]["text_encoders"] is True
    assert (config["adapter"]["rank"], config["adapter"]["layers"]) == (4, [""])
    expected = {name: layer.delta() for name, layer in adapted_layers(own.model).items()}
    continued = sfumato.load(tmp_path / "again", weights="raw").model
    found = {name: layer.delta() for name, layer in adapted_layers(continued).items()}
    assert largest_difference(found, expected) < 1e-6
    # without them, where memory is short
    plain = cli(
        "finetune", folders["sd"], run.parent / "photos", *SHORT, "--lora", file, "--partial", "--run",
        tmp_path / "plain", "budget.steps=1", "adapter.text_encoders=false",
    )  # fmt: skip
    assert plain.code == 0, plain.err
    assert not text_factors(sfumato.load(tmp_path / "plain").model)
    resumed = cli("resume", tmp_path / "plain", "budget.steps=2")
    assert resumed.code == 0, resumed.err
    texts = {name: value for name, value in load_file(file).items() if name.startswith("lora_te")}
    save_file(texts, tmp_path / "texts.safetensors")
    alone = cli(
        "finetune", folders["sd"], run.parent / "photos", "--lora", tmp_path / "texts.safetensors"
    )
    assert alone.code == 2
    assert "changes text encoders only" in alone.err
    contradicted = cli(
        "finetune", folders["sd"], run.parent / "photos", "--lora", file, "--run",
        tmp_path / "other", "adapter.text_encoders=false",
    )  # fmt: skip
    assert contradicted.code == 2
    assert "50 of 62 layers" in contradicted.err
    assert "--partial (partial=True) uses what fits" in contradicted.err


def test_a_token_and_another_lora_are_added_to_changed_encoders(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = trained(folders["sd"], tmp_path / "run")
    own = model.pipeline.sample(1, **ASKED)
    lora_kohya(model, tmp_path / "k.safetensors", F32)
    token = learning(folders["sd"], spread=0.3)
    write_embedding(token, tmp_path / "e.safetensors", F32)
    first = sfumato.with_lora(sfumato.load(folders["sd"]), tmp_path / "k.safetensors")
    asked = {**ASKED, "prompt": "a photo of <sks>"}
    expected = with_embedding(first, tmp_path / "e.safetensors").sample(1, **asked)
    both = with_embedding(model.pipeline, tmp_path / "e.safetensors")
    assert difference(both.sample(1, **asked), expected) < 1e-5
    assert difference(expected, with_embedding(
        sfumato.load(folders["sd"]), tmp_path / "e.safetensors"
    ).sample(1, **asked)) > 1e-3  # fmt: skip
    removed = sfumato.with_lora(model.pipeline, tmp_path / "k.safetensors", -1.0)
    base = sfumato.load(folders["sd"]).sample(1, **ASKED)
    assert difference(removed.sample(1, **ASKED), base) < 1e-4
    assert torch.equal(model.pipeline.sample(1, **ASKED), own)


def test_encoders_that_cannot_be_trained_are_refused_before_work(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    model, images = pixart(tmp_path / "pixart"), photos(tmp_path / "photos")
    result = cli("finetune", model, images, *SHORT, TUNED[-3], "--run", tmp_path / "run")
    assert result.code == 2
    assert "the model has no text encoders that can be trained" in result.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="cannot be trained by control-lora"):
        ControlLoRA(text_encoders=True)
    with pytest.raises(ConfigError, match="none of 12 layers fits 'to_q'"):
        trained(folders["sd"], tmp_path / "t", layers=("to_q",))
