"""From fine-tuning to other programs: `sfumato export`, and `sfumato sample --lora`."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.adapters import LoRA, adapted_layers, without_adapters
from sfumato.autoencoders import Pixels
from sfumato.conditioners import ConditioningInfo
from sfumato.errors import CheckpointError, ConfigError
from sfumato.generation.pipeline import Pipeline
from sfumato.interop import lora_export
from sfumato.interop.trained_model import TrainedModel
from sfumato.networks import DiTConfig, UNetConfig
from sfumato.observability.image_formats import settings_of
from sfumato.runs import export, loading
from sfumato.runs.finetuning import choose_finetuning
from sfumato.runs.preparation import build_model
from sfumato.sampling import KeyedNoise
from sfumato.training import Budget
from tests.helpers.cli import sfumato as cli
from tests.helpers.diffusers_models import stable_diffusion
from tests.helpers.lora import disturb, largest_difference, of_peft, own_changes
from tests.helpers.runs import images, tiny_run
from tests.parity.test_finetune import SHORT, photos

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FORMATS = {"lora-diffusers": "", "lora-kohya": ".safetensors", "lora-peft": ""}
ASKED = {"prompt": "a thing number 3", "steps": 3}


def best_step(run: Path) -> int:
    """The step whose weights are exported."""
    return int(json.loads((run / "best" / "verdict.json").read_text())["best_step"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a run that was tuned from it with a LoRA that has learned a lot."""
    root = tmp_path_factory.mktemp("tuned")
    model = stable_diffusion(root / "model")
    settings = (
        *SHORT, "adapter.rank=4", "adapter.alpha=2.0", "optimizer.learning_rate=0.05",
        "adapter.convolutions=true", "optimizer.warmup_steps=0",
    )  # fmt: skip
    chosen = choose_finetuning(model, str(photos(root / "photos")), settings)
    sfumato.train(chosen.resolved(settings).run, run=root / "run")
    return root


def test_a_run_is_exported_and_makes_the_same_images_in_diffusers(place: Path) -> None:
    base = sfumato.load(place / "model").sample(1, seed=3, **ASKED)
    tuned = sfumato.load(place / "run")
    expected = tuned.sample(1, seed=3, **ASKED)
    assert float((expected - base).abs().max()) > 0.02
    learned = {
        name.removeprefix("network.model."): layer.delta().detach()
        for name, layer in adapted_layers(tuned.model).items()
    }
    for name, suffix in FORMATS.items():
        result = cli("export", place / "run", "--format", name)
        assert result.code == 0, result.err
        path = place / "run" / "exports" / f"{name}-{best_step(place / 'run')}{suffix}"
        assert result.out == f"{path}\n"
        assert f"{len(learned)} of {len(learned)} layers" in result.err
        assert "largest difference of a weight's change 0\n" in result.err
        assert "of model, float32" in result.err
        pipeline = diffusers.DiffusionPipeline.from_pretrained(place / "model")
        pipeline.set_progress_bar_config(disable=True)
        if name == "lora-peft":
            pipeline.unet = peft.PeftModel.from_pretrained(pipeline.unet, path)
        else:
            pipeline.load_lora_weights(str(path))
        assert largest_difference(of_peft(pipeline.unet), learned) == 0.0
        theirs = pipeline(
            ASKED["prompt"], latents=KeyedNoise(3)(torch.empty(1, 4, 16, 16)), height=32, width=32,
            num_inference_steps=3, guidance_scale=7.5, output_type="np",
        ).images  # fmt: skip
        theirs = torch.as_tensor(theirs).permute(0, 3, 1, 2)
        assert float((theirs - expected).abs().max()) < 1e-5
        added = sfumato.with_lora(sfumato.load(place / "model"), path)
        assert float((added.sample(1, seed=3, **ASKED) - expected).abs().max()) < 1e-5
    assert not list((place / "run" / "exports").glob(".tmp*"))


def pixels(folder: Path) -> torch.Tensor:
    files = sorted(folder.glob("0*.png"))
    return torch.stack([torch.as_tensor(np.asarray(Image.open(file)).copy()) for file in files])


def test_a_lora_that_is_added_to_its_base_makes_the_runs_own_images(
    place: Path, tmp_path: Path
) -> None:
    file = sfumato.export(place / "run", "lora-kohya", tmp_path / "toy.safetensors")
    asked = ("--num", 2, "--steps", 3, "--prompt", "a thing number 3", "--seed", 5)
    for model, folder, lora in (
        (place / "run", "own", ()),
        (place / "model", "added", ("--lora", file)),
        (place / "model", "halves", ("--lora", f"{file}:0.25", "--lora", f"{file}:0.75")),
        (place / "model", "plain", ()),
        (place / "run", "taken", ("--lora", f"{file}:-1")),
    ):
        result = cli("sample", model, *asked, *lora, "--out", tmp_path / folder)
        assert result.code == 0, result.err
        assert ("layers" in result.err) == bool(lora)
    own, plain = pixels(tmp_path / "own").int(), pixels(tmp_path / "plain").int()
    assert (own - plain).abs().max() > 5
    for folder, expected in (("added", own), ("halves", own), ("taken", plain)):
        assert (pixels(tmp_path / folder).int() - expected).abs().max() <= 1  # a rounding
    # the images say which file made them
    recorded = settings_of(tmp_path / "halves" / "00000.png")["lora"]
    assert [(lora["file"], lora["strength"]) for lora in recorded] == [
        ("toy.safetensors", 0.25),
        ("toy.safetensors", 0.75),
    ]
    assert settings_of(tmp_path / "plain" / "00000.png")["lora"] is None


def test_a_lora_that_does_not_fit_is_refused_by_sample(place: Path, tmp_path: Path) -> None:
    file = sfumato.export(place / "run", "lora-diffusers", tmp_path / "toy.safetensors")
    tensors = load_file(file)
    tensors["unet.nowhere.lora_A.weight"] = torch.ones(4, 8)
    tensors["unet.nowhere.lora_B.weight"] = torch.ones(8, 4)
    save_file(tensors, file)
    command = ("sample", place / "model", "--num", 1, "--steps", 1, "--lora", file, "--out")
    result = cli(*command, tmp_path / "out")
    assert result.code == 2
    assert "unet.nowhere" in result.err
    assert not (tmp_path / "out").exists()
    result = cli(*command, tmp_path / "out", "--partial")
    assert result.code == 0, result.err
    assert "2 tensors are left out" in result.err


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7)])
def test_rounding_is_told_and_is_what_the_precision_gives(
    place: Path, dtype: str, bits: int, tmp_path: Path
) -> None:
    file = tmp_path / "f.safetensors"
    result = cli("export", place / "run", "--format", "lora-kohya", "--dtype", dtype, "--out", file)
    assert result.code == 0, result.err
    stored = {str(value.dtype) for key, value in load_file(file).items() if "alpha" not in key}
    assert stored == {f"torch.{dtype}"}
    said = re.search(rf"rounding to {dtype} loses up to (\S+)% of a layer's change", result.err)
    assert said is not None
    assert 0.05 < float(said[1]) / 100 * 2**bits < 1


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    place: Path, tmp_path: Path
) -> None:
    run, out = place / "run", tmp_path / "out"
    for arguments, sentence in (
        ((run, "--format", "lora-kohya2"), "did you mean 'lora-kohya'?"),
        ((place / "model", "--format", "lora-peft"), "holds a diffusers model"),
        ((place, "--format", "lora-peft"), "is not a run"),
    ):
        result = cli("export", *arguments, "--out", out)
        assert result.code == 2
        assert sentence in result.err
        assert not out.exists()
    out.write_text("mine")
    result = cli("export", run, "--format", "lora-peft", "--out", out)
    assert result.code == 2
    assert "exists already" in result.err
    assert out.read_text() == "mine"


def test_a_value_that_float16_cannot_hold_is_refused_by_its_layer(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exploded(*arguments: object, **options: object):
        pipeline = loading.load(*arguments, **options)
        layer = adapted_layers(pipeline.model.network.implementation)["conv_in"]
        layer.lora_B.data[0, 0] = 1e6
        return pipeline

    monkeypatch.setattr("sfumato.runs.export.load", exploded)
    with pytest.raises(CheckpointError) as error:
        sfumato.export(place / "run", "lora-diffusers", tmp_path / "new" / "out", "float16")
    assert "unet.conv_in: has values up to" in str(error.value)
    assert "use --dtype bfloat16 or float32" in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_file_that_differs_from_the_run_is_never_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that scales as diffusers' converter does is found out before its file counts."""
    write = lora_export.write_kohya

    def faulty(path: Path, *arguments: object, **options: object):
        names = write(path, *arguments, **options)
        tensors = load_file(path)
        key = next(key for key in tensors if key.endswith("alpha"))
        save_file(tensors | {key: 2 * tensors[key]}, path)
        return names

    monkeypatch.setattr(lora_export, "write_kohya", faulty)
    with pytest.raises(CheckpointError, match="what was written is not what the run has"):
        sfumato.export(place / "run", "lora-kohya", tmp_path / "f.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sfumato.interop.lora_writing.save_file", full)
    result = cli("export", place / "run", "--format", "lora-peft", "--out", tmp_path / "new" / "p")
    assert result.code == 2
    assert "could not be written: No space left on device" in result.err
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_lora_is_refused_with_what_it_can_have(tmp_path: Path) -> None:
    settings = tiny_run(images(tmp_path / "set"), budget=Budget(steps=1))
    run = sfumato.train(settings, run=tmp_path / "run")
    with pytest.raises(ConfigError) as error:
        sfumato.export(run, "lora-peft")
    assert (
        "lora-peft, which is for adapter.kind=oft or lokr or dora or lora: trained was all"
        in str(error.value)
    )
    assert "train with adapter.kind=lora" in str(error.value)
    assert not (run / "exports").exists()


NETWORKS = {
    "unet": UNetConfig(
        channels=32, multipliers=(1, 1), blocks=1, attention_depths=(1,), head_channels=32
    ),
    "transformer": DiTConfig(hidden_size=32, depth=2, patch_size=2, head_dim=16),
}


@pytest.mark.parametrize("part", NETWORKS)
def test_networks_of_our_own_are_exported_and_changed_by_their_files(
    part: str, tmp_path: Path
) -> None:
    info = ConditioningInfo(channels=1, categories=("a", "b"))
    adapter = LoRA(rank=2, alpha=3.0, convolutions=True)
    run = tiny_run(tmp_path, network=NETWORKS[part], adapter=adapter)
    model = build_model(run, info).eval().requires_grad_(False)
    disturb(model)
    pipeline = Pipeline(
        model=model, autoencoder=Pixels(1), sampling=run.sampling, info=info, image_shape=(1, 8, 8)
    )
    trained = TrainedModel(pipeline=pipeline, run=run, directory=tmp_path, step=1)
    own = own_changes(trained)
    asked = {"seed": 1, "steps": 2}
    with without_adapters(model):
        plain = pipeline.sample(2, **asked)
    tuned = pipeline.sample(2, **asked)
    assert float((tuned - plain).abs().max()) > 1e-3
    for name, suffix in FORMATS.items():
        path = tmp_path / f"{name}{suffix}"
        exporter = export.FORMATS[name].exporter()
        lines = exporter(trained, path, torch.float32)
        assert (
            f"{len(own)} of {len(own)} layers, largest difference of a weight's change 0"
            in lines[1]
        )
        assert any("parameters of the conditioner are not part" in line for line in lines)
        # taken away again, the base is left
        taken = sfumato.with_lora(pipeline, path, -1.0)
        assert float((taken.sample(2, **asked) - plain).abs().max()) < 1e-5
        if name != "lora-peft":
            continue
        bare = NETWORKS[part].build(image_channels=1, context=model.network.context)
        read = of_peft(peft.PeftModel.from_pretrained(bare, path))
        # the scale 3 / 2 is multiplied in, which rounds once
        assert largest_difference(read, own) < 1e-6
        assert largest_difference(read, deltas(trained)) == 0.0


def deltas(trained: TrainedModel) -> dict[str, torch.Tensor]:
    layers = adapted_layers(trained.pipeline.model.network.implementation)
    return {name: layer.delta() for name, layer in layers.items()}
