"""The parts of a base outside its network: their identity, and text encoders freed while training."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import CheckpointError
from sfumato.interop.base_identity import base_parts
from sfumato.recipes.model import build_model
from sfumato.recipes.resolver import resolve
from sfumato.runs.finetuning import choose_finetuning
from sfumato.runs.preparation import prepare
from sfumato.runs.training import build_trainer
from sfumato.storage import checkpoint
from sfumato.storage.base_parts import PARTS, weights_digest
from sfumato.storage.manifest import file_digest
from sfumato.storage.run_directory import RunDirectory
from tests.helpers.diffusers_models import stable_diffusion, stable_diffusion_xl
from tests.parity.test_finetune import SHORT, photos

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TINY = (*SHORT, "budget.steps=1", "sampling.steps=1", "preservation.prompts=[a dog]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("base") / "model")


def prepared(model: Path, folder: Path):
    images = photos(folder / "photos")
    return prepare(resolve(choose_finetuning(model, str(images), TINY).run, TINY))


def parts(model: Path, images: Path) -> dict[str, str]:
    run = choose_finetuning(model, str(images), TINY).run
    from sfumato.interop.diffusers_folder import read_folder

    return base_parts(run, build_model(run, read_folder(model).info).conditioner)


def change(file: Path, name: str) -> None:
    tensors = load_file(file)
    (key,) = [key for key in tensors if key.endswith(name)]
    tensors[key] = tensors[key] + 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_base_that_was_saved_again_is_the_same_and_each_part_counts(tmp_path: Path) -> None:
    model, images = stable_diffusion_xl(tmp_path / "model"), photos(tmp_path / "photos")
    before = parts(model, images)
    assert set(before) == {"text_encoder", "text_encoder_2", "vae", "scheduler"}
    assert before["text_encoder"] != before["text_encoder_2"]
    again = tmp_path / "again"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
    pipeline.save_pretrained(again, max_shard_size="20KB")
    files = [
        len(list((folder / "text_encoder").glob("*.safetensors"))) for folder in (model, again)
    ]
    assert files[0] == 1 < files[1]
    assert parts(again, images) == before
    for place, name, part in (
        ("text_encoder_2/model", "final_layer_norm.bias", "text_encoder_2"),
        ("vae/diffusion_pytorch_model", "decoder.conv_out.bias", "vae"),
    ):
        change(model / f"{place}.safetensors", name)
        after = parts(model, images)
        assert {key for key in before if after[key] != before[key]} == {part}
        before = after
    config = model / "scheduler" / "scheduler_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "_diffusers_version": "0.1", "trained_betas": None}))
    assert parts(model, images) == before  # a default written out
    config.write_text(json.dumps({**settings, "beta_end": 0.02}))
    assert parts(model, images)["scheduler"] != before["scheduler"]


def test_names_shapes_and_values_count_and_files_do_not(tmp_path: Path) -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.ones(2)

    def digest(*files: dict[str, torch.Tensor], **options) -> str:
        paths = [tmp_path / f"{number}.safetensors" for number in range(len(files))]
        for path, tensors in zip(paths, files, strict=True):
            save_file(tensors, path)
        return weights_digest(paths, **options)

    whole = digest({"a": a, "b": b})
    assert digest({"b": b}, {"a": a}) == whole
    assert digest({"a": a.half(), "b": b.bfloat16()}) == whole  # these values are exact in it
    assert digest({"a": a, "c": b}) != whole
    assert digest({"a": a.view(3, 2), "b": b}) != whole
    assert digest({"a": a, "b": b + 1e-6}) != whole
    assert digest({"x.a": a, "b": b}, rename=lambda name: name.removeprefix("x.")) == whole
    assert digest({"a": a, "b": b, "ids": b + 0}, rename=lambda n: "" if n == "ids" else n) == whole


def test_a_changed_part_is_refused_and_named_and_older_runs_open(
    model: Path, tmp_path: Path
) -> None:
    chosen = choose_finetuning(model, str(photos(tmp_path / "photos")), TINY)
    run = sfumato.train(chosen.resolved(TINY).run, run=tmp_path / "run")
    state = checkpoint.read_newest(run / "checkpoints")[0].state
    assert set(state[PARTS]) == {"text_encoder", "vae", "scheduler"}
    file = model / "text_encoder" / "model.safetensors"
    before = file.read_bytes()
    change(file, "final_layer_norm.bias")
    with pytest.raises(CheckpointError, match="the part text_encoder of the base is not the one"):
        sfumato.load(run)
    with pytest.raises(CheckpointError, match="the part text_encoder of the base is not the one"):
        sfumato.resume(run, overrides=["budget.steps=2"])
    # a checkpoint of before these hashes were kept
    newest = checkpoint.paths(run / "checkpoints")[0]
    path, manifest = newest / "state.json", json.loads((newest / "manifest.json").read_text())
    path.write_text(json.dumps({key: value for key, value in state.items() if key != PARTS}))
    manifest["files"]["state.json"] = {
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
    }
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert sfumato.load(run).sample(1, prompt="a thing", steps=1).isfinite().all()
    file.write_bytes(before)


def test_the_encoders_are_freed_while_training_and_back_for_a_new_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = prepared(model, tmp_path)
    conditioner = ready.model.conditioner
    (encoder,) = conditioner.text_encoders().values()
    alive, size = weakref.ref(encoder), sum(p.numel() for p in encoder.parameters())
    known = ["a thing number 3", "a dog"]
    with torch.no_grad():
        expected = conditioner({"text": known}, 2).tokens
    del encoder
    directory = RunDirectory.create(tmp_path / "run")
    trainer = build_trainer(ready, directory)
    gc.collect()
    assert alive() is None
    assert f"text encoders: {size / 1e6:.1f}M parameters freed, since all" in " ".join(
        capsys.readouterr().err.split()
    )
    trainer.run()  # with previews, validation, preservation and the comparison with the base
    gc.collect()
    own = trainer.state.average.conditioner.parts["text"]._encoder[0]
    assert "_pipeline" not in own.__dict__  # never loaded again
    with torch.no_grad():
        conditioner = trainer.state.model.conditioner
        assert torch.equal(conditioner({"text": known}, 2).tokens, expected)
        assert conditioner({"text": ["something else"]}, 1).tokens.isfinite().all()
    assert "_pipeline" in own.__dict__
