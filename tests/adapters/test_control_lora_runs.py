"""Runs that are tuned by adapter.kind=control-lora, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sfumato
from sfumato import config as configuration
from sfumato.adapters import ControlLoRA, LoRA
from sfumato.conditioners import DoodleConfig
from sfumato.contexts import ContextConfig
from sfumato.errors import CheckpointError, ConfigError
from sfumato.interop.diffusers_folder import read_folder
from sfumato.interop.safetensors_files import read_safetensors
from sfumato.recipes import Run
from sfumato.recipes.model import build_model
from sfumato.runs.finetuning import _adapter, _require_new_contexts, choose_finetuning
from tests.helpers.cli import sfumato as cli
from tests.helpers.diffusers_models import pixart
from tests.helpers.runs import fingerprint
from tests.parity.test_finetune import SHORT, photos
from tests.training.test_resume import interrupted

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
MAPS = 2


def test_a_base_that_reads_doodles_already_is_refused() -> None:
    base = Run(name="x", conditioner=ContextConfig(doodle=DoodleConfig()))
    with pytest.raises(ConfigError, match="base is steered by doodles already"):
        _require_new_contexts(base, Path("base"), ControlLoRA())
    _require_new_contexts(replace(base, conditioner=ContextConfig()), Path("base"), ControlLoRA())


def test_another_kind_keeps_the_proposed_settings_that_it_shares() -> None:
    proposed = Run(name="x", adapter=LoRA(rank=32, convolutions=True))
    kind = "adapter.kind=control-lora"
    assert _adapter(proposed, [kind]) == ControlLoRA(rank=32, convolutions=True)
    chosen = _adapter(proposed, [kind, "adapter.rank=4"])
    assert chosen == ControlLoRA(rank=4, convolutions=True)


TUNED = (*SHORT, "adapter.kind=control-lora", "adapter.rank=2", "optimizer.learning_rate=0.01")
ASKED = {"prompt": "a cat", "seed": 5, "steps": 3, "guidance": 3.0}


def drawing() -> torch.Tensor:
    """A doodle (1, 32, 32), dark on light."""
    return (torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(9)) > 0.2).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pixart(tmp_path_factory.mktemp("bases") / "pixart")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def run(folder: Path, captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("tuned") / "run"
    result = cli("finetune", folder, captioned, *TUNED, "--run", path)
    assert result.code == 0, result.err
    assert "a LoRA of rank 2" in result.err
    assert "doodles steer the model too (conditioner.doodle)" in result.err
    assert "no preservation, since nothing that the base knows can change" in result.err
    return path


def newest(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").glob("step-*")) / "ema.safetensors")


def test_a_transformer_is_steered_by_doodles_and_is_its_base_without(
    run: Path, folder: Path
) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [key for line in lines for key in line if "adherence/doodle" in key]
    tuned, base = sfumato.load(run), sfumato.load(folder)
    assert tuned.reads == ("text", "doodle")
    before = base.sample(1, **ASKED)
    blank = tuned.sample(1, doodle=torch.ones(1, 32, 32), **ASKED)
    assert torch.equal(tuned.sample(1, **ASKED), blank)
    # the run holds its own copy of the autoencoder, with the statistics inside its weights
    assert float((blank - before).abs().max()) < 1e-5
    assert float((tuned.sample(1, doodle=drawing(), **ASKED) - blank).abs().max()) > 1e-4
    tensors = newest(run)
    assert all(name.endswith((".control", ".lora_A", ".lora_B")) for name in tensors)
    control = tensors["network.model.pos_embed.proj.control"]
    assert control.shape == (32, MAPS * 4, 2, 2)
    assert float(control.abs().max()) > 0


def test_a_bundle_is_compared_with_a_doodle_and_other_formats_refuse(run: Path) -> None:
    result = cli("export", run, "--format", "bundle")
    assert result.code == 0, result.err
    assert "differs from the run's by 0.0e+00" in result.err
    (bundle,) = (run / "exports").glob("bundle-*")
    images = [sfumato.load(path).sample(1, doodle=drawing(), **ASKED) for path in (run, bundle)]
    assert torch.equal(*images)
    for format in ("lora-diffusers", "diffusers"):
        refused = cli("export", run, "--format", format)
        assert refused.code == 2
        assert "use bundle" in refused.err


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    result = cli("export", run, "--format", "control-lora")
    assert result.code == 0, result.err
    assert "control by doodle" in result.err
    assert "largest difference 0" in result.err
    (file,) = (run / "exports").glob("control-lora-*.safetensors")
    assert "with_control" in file.with_suffix(".md").read_text()
    return file


def test_a_control_file_steers_the_base_as_the_run_is_steered(
    exported: Path, run: Path, folder: Path, tmp_path: Path
) -> None:
    base, tuned = sfumato.load(folder), sfumato.load(run)
    again = sfumato.with_control(base, exported)
    assert again.reads == ("text", "doodle")
    before = base.sample(1, **ASKED)
    assert torch.equal(again.sample(1, **ASKED), before)
    steered = again.sample(1, doodle=drawing(), **ASKED)
    assert float((steered - tuned.sample(1, doodle=drawing(), **ASKED)).abs().max()) < 1e-5
    assert float((steered - before).abs().max()) > 1e-4
    with pytest.raises(ConfigError, match="steered by something over the image already"):
        sfumato.with_control(again, exported)
    tensors, header = read_safetensors(exported)
    added = {key.removeprefix("network."): value for key, value in newest(run).items()}
    assert tensors.keys() == added.keys()
    save_file(dict(list(tensors.items())[1:]), tmp_path / "part.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors do not fit the model"):
        sfumato.with_control(base, tmp_path / "part.safetensors")
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is not a control file of sfumato"):
        sfumato.with_control(base, tmp_path / "other.safetensors")


def test_a_control_file_is_sampled_from_the_command_line(
    exported: Path, folder: Path, tmp_path: Path
) -> None:
    doodle = tmp_path / "doodle.png"
    Image.fromarray((drawing()[0] * 255).byte().numpy()).save(doodle)
    asked = ["--prompt", "a cat", "--steps", "2", "--num", "1", "--seed", "5"]
    files = ["--control", exported, "--doodle", doodle]
    result = cli("sample", folder, *asked, *files, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    refused = cli("sample", folder, *asked, "--doodle", doodle, "--out", tmp_path / "none")
    assert refused.code == 2


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(
    run: Path, folder: Path, captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposed = choose_finetuning(folder, str(captioned), TUNED).run
    plain = configuration.with_overrides(
        configuration.plain(proposed), (*TUNED, "checkpoint.every_steps=2")
    )
    first = interrupted(configuration.parse(Run, plain), tmp_path / "first", monkeypatch, after=3)
    assert fingerprint(sfumato.resume(first)) == fingerprint(run)


def test_another_lora_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="acts on images with a doodle alone"):
        sfumato.with_lora(sfumato.load(run), tmp_path / "style.safetensors")


def test_contexts_of_a_pipeline_reach_the_model(folder: Path) -> None:
    content = read_folder(folder)
    both = ContextConfig(text=content.run.conditioner.text, doodle=DoodleConfig(guided=False))
    settings = replace(content.run, adapter=ControlLoRA(), conditioner=both)
    model = build_model(settings, content.info)
    assert model.network.context.spatial == MAPS * 2**2
    with pytest.raises(ConfigError, match="needs a context that lies over the image"):
        build_model(replace(settings, conditioner=content.run.conditioner), content.info)
