"""ControlNet: a trained branch beside a frozen U-Net, against diffusers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato import config as configuration
from sfumato.adapters import ControlNet, without_adapters
from sfumato.conditioners import DoodleConfig
from sfumato.contexts import ContextConfig
from sfumato.errors import CheckpointError, ConfigError
from sfumato.interop.controlnet_export import write_controlnet
from sfumato.interop.diffusers_folder import read_folder
from sfumato.interop.trained_model import TrainedModel
from sfumato.networks import DiTConfig
from sfumato.recipes import Run
from sfumato.recipes.model import build_model
from sfumato.runs.finetuning import choose_finetuning
from sfumato.sampling import KeyedNoise
from tests.helpers.cli import sfumato as cli
from tests.helpers.diffusers_models import stable_diffusion, stable_diffusion_xl
from tests.helpers.runs import fingerprint
from tests.parity.test_finetune import SHORT, photos
from tests.training.test_resume import interrupted

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT, STEPS, GUIDANCE = "a cat", 3, 5.0
TUNED = (*SHORT, "sampling.steps=4", "adapter.kind=controlnet", "optimizer.learning_rate=0.01")
FAMILIES = {
    "sd": partial(stable_diffusion, steps_offset=1, set_alpha_to_one=False),
    "sdxl": stable_diffusion_xl,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: make(root / name) for name, make in FAMILIES.items()}


def controlled(folder: Path, *, disturbed: float = 0.0, **doodle: Any) -> TrainedModel:
    """A base with a control branch, all of whose weights are moved at random by `disturbed`."""
    content = read_folder(folder)
    settings = DoodleConfig(**{"guided": False, **doodle})
    own = content.run.conditioner
    conditioner = ContextConfig(text=own.text, resizing=own.resizing, doodle=settings)
    run = replace(content.run, adapter=ControlNet(), conditioner=conditioner)
    model = build_model(run, content.info).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.network.control.parameters():
            parameter += disturbed * torch.randn(parameter.shape, generator=generator)
    pipeline = replace(sfumato.load(folder), model=model)
    return TrainedModel(pipeline=pipeline, run=run, directory=folder.parent / "run", step=7)


def drawing(seed: int = 9) -> torch.Tensor:
    """A doodle (1, 32, 32), dark on light."""
    return (torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(seed)) > 0.2).float()


def sampled(pipeline: Any, **asked: Any) -> torch.Tensor:
    settings = {"prompt": PROMPT, "seed": 5, "steps": STEPS, "guidance": GUIDANCE, **asked}
    return pipeline.sample(1, **settings)


def by_diffusers(folder: Path, branch: Any, doodle: torch.Tensor, family: str) -> torch.Tensor:
    """The same image by diffusers' own pipeline: red is ink, and green says that it is given."""
    kind = "StableDiffusionXLControlNetPipeline" if family == "sdxl" else (
        "StableDiffusionControlNetPipeline"
    )  # fmt: skip
    pipeline = getattr(diffusers, kind).from_pretrained(folder, controlnet=branch)
    pipeline.set_progress_bar_config(disable=True)
    image = torch.cat([1 - doodle, torch.ones_like(doodle), torch.zeros_like(doodle)])[None]
    return pipeline(
        PROMPT, image=image, latents=KeyedNoise(5)(torch.empty(1, 4, 16, 16)), height=32,
        width=32, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt",
    ).images  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_branch_changes_nothing_at_the_start_and_only_it_is_trained(
    folders: dict[str, Path], family: str
) -> None:
    trained, base = controlled(folders[family]), sfumato.load(folders[family])
    before = sampled(base)
    for asked in ({}, {"doodle": drawing()}):
        assert torch.equal(sampled(trained.pipeline, **asked), before)
    model = trained.pipeline.model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.startswith("network.control.branch.model.") for name in trainable)
    own = base.model.network.state_dict()
    state = model.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in own.items())
    assert state.keys() - own.keys() == {name.removeprefix("network.") for name in trainable}
    moved = controlled(folders[family], disturbed=0.05).pipeline.model
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = moved.conditioner({"text": ["a", "b"], "doodle": drawing().expand(2, 1, 32, 32)}, 2)
    moved.network(x, torch.full((2,), 500.0), condition).square().mean().backward()
    missing = {name for name, p in moved.named_parameters() if (p.grad is None) == p.requires_grad}
    assert not missing


@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_is_drawn_images_are_those_of_the_base_whatever_was_learned(
    folders: dict[str, Path], family: str
) -> None:
    moved = controlled(folders[family], disturbed=0.05)
    before = sampled(sfumato.load(folders[family]))
    for asked in ({}, {"doodle": torch.ones(1, 32, 32)}, {"doodle": torch.zeros(1, 32, 32)}):
        assert torch.equal(sampled(moved.pipeline, **asked), before)
    network = moved.pipeline.model.network
    blank = torch.cat([drawing(), torch.ones(1, 32, 32)])[:, None]
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    condition = moved.pipeline.model.conditioner({"text": ["a", "a"], "doodle": blank}, 2)
    with torch.no_grad():
        both = network(x, torch.full((2,), 500.0), condition)
        with without_adapters(network):
            base = network(x, torch.full((2,), 500.0), condition)
    assert torch.equal(both[1], base[1])
    assert float((both[0] - base[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_those_of_diffusers_from_the_exported_folder(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    trained = controlled(folders[family], disturbed=0.05)
    lines = write_controlnet(trained, tmp_path / "control", torch.float32)
    assert "differs from the run's by at most 0.0e+00" in lines[1]
    branch = diffusers.ControlNetModel.from_pretrained(tmp_path / "control")
    with_doodle = sampled(trained.pipeline, doodle=drawing())
    theirs = partial(by_diffusers, folders[family], branch, family=family)
    assert float((with_doodle - theirs(doodle=drawing())).abs().max()) < 1e-5
    base = sampled(sfumato.load(folders[family]))
    assert float((with_doodle - base).abs().max()) > 1e-3
    other = sampled(trained.pipeline, doodle=drawing(3))
    assert float((with_doodle - other).abs().max()) > 1e-4
    with without_adapters(trained.pipeline.model):
        assert torch.equal(sampled(trained.pipeline, doodle=drawing()), base)


def test_a_written_branch_that_differs_is_noticed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = controlled(folders["sd"], disturbed=0.05)

    def damaged(tensors: dict[str, torch.Tensor], *arguments: Any, **options: Any) -> None:
        name = "controlnet_mid_block.weight"
        save_file({**tensors, name: tensors[name] + 0.1}, *arguments, **options)

    monkeypatch.setattr("sfumato.interop.controlnet_export.save_file", damaged)
    with pytest.raises(sfumato.errors.OutputError, match="gives other images than the run"):
        write_controlnet(trained, tmp_path / "control", torch.float32)


def test_guidance_on_the_doodle_leads_away_from_its_absence(folders: dict[str, Path]) -> None:
    unguided = controlled(folders["sd"], disturbed=0.05).pipeline
    guided = controlled(folders["sd"], disturbed=0.05, guided=True).pipeline
    images = [sampled(one, doodle=drawing()) for one in (unguided, guided)]
    assert float((images[0] - images[1]).abs().max()) > 1e-4
    plain = [sampled(one, doodle=drawing(), guidance=1.0) for one in (unguided, guided)]
    assert torch.equal(*plain)
    assert torch.equal(sampled(unguided, doodle=drawing(), guidance={"text": 5.0}), images[0])
    with pytest.raises(ConfigError, match="guidance doodle = 2"):
        sampled(unguided, doodle=drawing(), guidance={"doodle": 2.0})


def test_what_cannot_have_a_branch_is_refused(folders: dict[str, Path]) -> None:
    content = read_folder(folders["sd"])
    run = replace(content.run, adapter=ControlNet())
    with pytest.raises(ConfigError, match="needs a context that lies over the image"):
        build_model(run, content.info)
    doodles = ContextConfig(doodle=DoodleConfig())
    run = replace(run, network=DiTConfig(), conditioner=doodles)
    with pytest.raises(ConfigError, match="cannot have a control branch"):
        build_model(run, content.info)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def run(folders: dict[str, Path], captioned: Path, tmp_path_factory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("tuned") / "run"
    result = cli("finetune", folders["sd"], captioned, *TUNED, "--run", path)
    assert result.code == 0, result.err
    assert "ControlNet: a control branch beside the network" in result.err
    assert "doodles steer the model too (conditioner.doodle)" in result.err
    return path


@pytest.mark.slow
def test_a_folder_gets_a_branch_whose_effect_is_measured(
    run: Path, folders: dict[str, Path]
) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [key for line in lines for key in line if "adherence/doodle" in key]
    assert figures
    tuned, base = sfumato.load(run), sfumato.load(folders["sd"])
    assert tuned.reads == ("text", "doodle")
    assert tuned.model.network.control.branch.model.config.conditioning_channels == 3
    tensors = load_file(max((run / "checkpoints").glob("step-*")) / "ema.safetensors")
    assert all(name.startswith("network.control.branch.") for name in tensors)
    with_doodle = sampled(tuned, doodle=drawing())
    assert float((with_doodle - sampled(base)).abs().max()) > 1e-4
    result = cli("export", run, "--format", "controlnet")
    assert result.code == 0, result.err
    (folder,) = (run / "exports").glob("controlnet-*")
    branch = diffusers.ControlNetModel.from_pretrained(folder)
    theirs = by_diffusers(folders["sd"], branch, drawing(), "sd")
    # the run holds its own copy of the autoencoder, with the statistics inside its weights
    assert float((with_doodle - theirs).abs().max()) < 1e-5
    assert "ControlNet" in (folder / "README.md").read_text()
    refused = cli("export", run, "--format", "single-file")
    assert refused.code == 2
    assert "use bundle or controlnet" in refused.err


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(
    run: Path, folders: dict[str, Path], captioned: Path, tmp_path: Path, monkeypatch
) -> None:
    proposed = choose_finetuning(folders["sd"], str(captioned), TUNED).run
    plain = configuration.with_overrides(
        configuration.plain(proposed), (*TUNED, "checkpoint.every_steps=2")
    )
    settings = configuration.parse(Run, plain)
    first = interrupted(settings, tmp_path / "first", monkeypatch, after=3)
    assert fingerprint(sfumato.resume(first)) == fingerprint(run)


def test_another_base_is_refused(run: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    moved = Path(shutil.copytree(folders["sd"], tmp_path / "base"))
    text = (copy / "config.yaml").read_text().replace(str(folders["sd"]), str(moved))
    (copy / "config.yaml").write_text(text)
    assert sfumato.load(copy).reads == ("text", "doodle")
    file = moved / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"] * 1.01}, file)
    with pytest.raises(CheckpointError, match="are not those that this run was trained with"):
        sfumato.load(copy)
