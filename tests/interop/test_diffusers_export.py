"""Runs as folders of diffusers: what its own pipelines make of them, and what rounding loses."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato import load
from sfumato.adapters import WholeNetwork, adapted_layers
from sfumato.errors import CheckpointError, ConfigError, OutputError
from sfumato.interop.diffusers_export import write_diffusers
from sfumato.sampling import DDIM, DPMSolverPP2M, Even, KeyedNoise, Leading
from tests.helpers.diffusers_models import (
    pixart,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)
from tests.helpers.trained_models import line_with, tuned

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT = "a red cat on a mat"
MAKE = {
    "SD": partial(stable_diffusion, steps_offset=1),
    "SDXL": stable_diffusion_xl,
    "SD3": stable_diffusion_3,
    "PixArt": pixart,
}
CALLS = {"PixArt": {"use_resolution_binning": False, "clean_caption": False}}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("base") / "model")


def theirs(folder: Path, *, steps: int = 4, **call: object) -> torch.Tensor:
    """What diffusers' own pipeline makes of a folder from our noise of seed 3, (1, C, H, W)."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPT, latents=KeyedNoise(3)(torch.empty(1, 4, 16, 16)), num_inference_steps=steps,
        output_type="np", height=32, width=32, **call,
    ).images  # fmt: skip
    return torch.as_tensor(images).permute(0, 3, 1, 2)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", MAKE)
def test_diffusers_makes_the_images_of_the_run(name: str, tmp_path: Path) -> None:
    model = tuned(MAKE[name](tmp_path / "base"), tmp_path / "run")
    lines = write_diffusers(model, tmp_path / "out", torch.float32)
    own = model.pipeline.sample(1, prompt=PROMPT, seed=3, guidance=5.0)
    call = {"guidance_scale": 5.0, **CALLS.get(name, {})}
    assert difference(theirs(tmp_path / "out", **call), own) < 1e-5
    assert difference(theirs(tmp_path / "base", **call), own) > 1e-3
    again = load(tmp_path / "out").sample(1, prompt=PROMPT, seed=3, steps=4, guidance=5.0)
    assert difference(again, own) < 1e-5
    printed = float(re.search(r"at most (\S+) \(", line_with(lines, "reopened"))[1])
    assert 0 < printed < 1e-5


@pytest.mark.parametrize(
    ("strength", "dtype", "advised"),
    [(0.05, torch.bfloat16, False), (0.002, torch.bfloat16, True), (0.02, torch.float16, False)],
)
def test_what_rounding_loses_is_measured_and_said(
    base: Path, tmp_path: Path, strength: float, dtype: torch.dtype, advised: bool
) -> None:
    model = tuned(base, tmp_path / "run", strength=strength)
    lines = write_diffusers(model, tmp_path / "out", dtype)
    before = load_file(base / "unet" / WEIGHTS)
    written = load_file(tmp_path / "out" / "unet" / WEIGHTS)
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    left, change = [], []
    for name, layer in adapted_layers(model.pipeline.model.network.model).items():
        delta = (layer.lora_B.flatten(1) @ layer.lora_A.flatten(1)).flatten() * layer.scale
        key = f"{name}.weight"
        moved = written[key].float() - before[key].to(dtype).float()
        left.append(moved.flatten() - delta)
        change.append(delta)
    lost = float(torch.cat(left).norm() / torch.cat(change).norm())
    line = line_with(lines, "of the change")
    assert float(re.search(r"loses (\S+)%", line)[1]) / 100 == pytest.approx(lost, rel=0.1)
    assert lost > 1e-4
    assert ("--dtype float16 or float32 keeps more" in line) == advised == (lost > 0.05)


def test_all_weights_are_compared_with_those_that_the_run_began_with(
    base: Path, tmp_path: Path
) -> None:
    model = tuned(base, tmp_path / "run", adapter=WholeNetwork(), strength=0.01)
    lines = write_diffusers(model, tmp_path / "out", torch.bfloat16)
    before = load_file(base / "unet" / WEIGHTS)
    written = load_file(tmp_path / "out" / "unet" / WEIGHTS)
    now = model.pipeline.model.network.model.state_dict()
    left = [
        (written[name].float() - old.bfloat16().float()) - (now[name] - old)
        for name, old in before.items()
    ]
    lost = (
        torch.cat([part.flatten() for part in left]).norm()
        / torch.cat([(now[name] - old).flatten() for name, old in before.items()]).norm()
    )
    said = float(re.search(r"loses (\S+)%", line_with(lines, "of the change"))[1]) / 100
    assert said == pytest.approx(float(lost), rel=0.1)
    model.run.network.__dict__["path"] = str(tmp_path / "elsewhere" / "unet")
    shutil.copytree(base, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere" / "unet")
    lines = write_diffusers(model, tmp_path / "again", torch.float32)
    line_with(lines, "is gone, so that the change is not measured")


def test_overflow_is_refused_by_name_and_nothing_is_written(base: Path, tmp_path: Path) -> None:
    model = tuned(base, tmp_path / "run")
    model.pipeline.model.network.model.conv_in.bias[0] = 1e5
    with pytest.raises(ConfigError, match=r"conv_in.bias has values up to 1e\+05.*6\.55e\+04"):
        write_diffusers(model, tmp_path / "out", torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    write_diffusers(model, tmp_path / "out", torch.bfloat16)


def test_text_encoders_have_the_names_that_every_program_knows(tmp_path: Path) -> None:
    base = stable_diffusion_xl(tmp_path / "base")
    write_diffusers(tuned(base, tmp_path / "run"), tmp_path / "out", torch.float32)
    for part in ("text_encoder", "text_encoder_2"):
        before = load_file(base / part / "model.safetensors")
        after = load_file(tmp_path / "out" / part / "model.safetensors")
        assert all(name.startswith(("text_model.", "text_projection.")) for name in after)
        same = {name.removeprefix("text_model."): tensor for name, tensor in after.items()}
        assert len(before) == len(after)
        for name, tensor in before.items():
            assert torch.equal(same[name.removeprefix("text_model.")], tensor)


def test_only_what_is_needed_is_taken_from_a_downloaded_folder(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
        "_name_or_path": "/home/somebody/models",
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("unet/diffusion_pytorch_model.bin", "vae/model.ckpt", "text_encoder/model.bin"):
        (folder / name).write_bytes(b"\x80\x02")
    (folder / "text_encoder" / "modeling.py").write_text("raise SystemExit")
    variant = "diffusion_pytorch_model.fp16.safetensors"
    shutil.copyfile(folder / "vae" / WEIGHTS, folder / "vae" / variant)
    (folder / "README.md").write_text("---\nlicense: openrail\n---\n# A model")
    model = tuned(folder, tmp_path / "run")
    write_diffusers(model, tmp_path / "out", torch.float32)
    names = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")
    }
    assert not [name for name in names if name.endswith((".bin", ".ckpt", ".py", variant))]
    written = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert written["safety_checker"] == written["feature_extractor"] == [None, None]
    assert written["requires_safety_checker"] is False
    assert "somebody" not in json.dumps(written)
    own = model.pipeline.sample(1, prompt=PROMPT, seed=3, guidance=5.0)
    assert difference(theirs(tmp_path / "out", guidance_scale=5.0), own) < 1e-5
    vae = (tmp_path / "out" / "vae" / WEIGHTS).read_bytes()
    assert vae == (folder / "vae" / WEIGHTS).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "openrail"' in card


@pytest.mark.parametrize(
    ("sampler", "spacing", "kind"),
    [
        (DPMSolverPP2M(), Even(), "DPMSolverMultistepScheduler"),
        (DDIM(), Leading(offset=1, end="first"), "DDIMScheduler"),
    ],
)
def test_the_folder_samples_as_the_run_does(
    base: Path, tmp_path: Path, sampler: object, spacing: object, kind: str
) -> None:
    model = tuned(base, tmp_path / "run", sampler=sampler, spacing=spacing, steps=5)
    lines = write_diffusers(model, tmp_path / "out", torch.float32)
    line_with(lines, f"scheduler: {kind} in the place of DDIMScheduler, since the run has another")
    own = model.pipeline.sample(1, prompt=PROMPT, seed=3, guidance=5.0)
    again = theirs(tmp_path / "out", steps=5, guidance_scale=5.0)
    assert difference(again, own) < 1e-5
    assert difference(theirs(base, steps=5, guidance_scale=5.0), own) > 1e-3


def test_the_comparison_is_made_at_the_guidance_of_the_run(base: Path, tmp_path: Path) -> None:
    """A folder holds neither scale nor interval of guidance, so that its own are others."""
    model = tuned(base, tmp_path / "run", guidance=2.0, interval=(-1.0, 1.0))
    lines = write_diffusers(model, tmp_path / "out", torch.float32)
    line_with(
        lines, "arguments of the pipeline's call, as in the run: num_inference_steps=4, guida"
    )
    assert load(tmp_path / "out").sampling.guidance != 2.0
    same = {"prompt": PROMPT, "seed": 3, "guidance": 2.0, "interval": (-1.0, 1.0), "steps": 4}
    own = model.pipeline.sample(1, **same)
    assert difference(load(tmp_path / "out").sample(1, **same), own) < 1e-5
    assert difference(load(tmp_path / "out").sample(1, **{**same, "guidance": 7.5}), own) > 1e-3


def test_latents_with_measured_statistics_go_with_the_autoencoder_of_the_run(
    base: Path, tmp_path: Path
) -> None:
    model = tuned(base, tmp_path / "run")
    object.__setattr__(model.run.autoencoder, "statistics", "measured")
    lines = write_diffusers(model, tmp_path / "out", torch.float32)
    line_with(lines, "vae: the run's own autoencoder")
    own = model.pipeline.sample(1, prompt=PROMPT, seed=3, guidance=5.0)
    assert difference(theirs(tmp_path / "out", guidance_scale=5.0), own) < 1e-5


def test_a_base_that_is_gone_and_a_place_that_is_taken_are_refused(
    base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    model = tuned(tmp_path / "base", tmp_path / "run")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_diffusers(model, tmp_path / "taken", torch.float32)
    with pytest.raises(ConfigError, match="not a precision of exported weights"):
        write_diffusers(model, tmp_path / "out", torch.float64)
    (tmp_path / "base" / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="fine-tuned from this folder"):
        write_diffusers(model, tmp_path / "out", torch.float32)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_written_model_that_gives_other_images_is_not_left_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison sees a fault: here, one tensor that is written wrong."""
    model = tuned(base, tmp_path / "run")
    from sfumato.interop import diffusers_export

    write = diffusers_export.write_folder

    def damaged(model, plan, merged, folder) -> None:
        write(model, plan, merged, folder)
        tensors = load_file(folder / "unet" / WEIGHTS)
        tensors["conv_in.weight"] = tensors["conv_in.weight"] * 1.1
        save_file(tensors, folder / "unet" / WEIGHTS)

    monkeypatch.setattr(diffusers_export, "write_folder", damaged)
    with pytest.raises(OutputError, match="gives other images than the run"):
        write_diffusers(model, tmp_path / "out", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_sampler_that_the_run_replaced_is_said(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    scheduler = diffusers.PNDMScheduler(
        skip_prk_steps=True, steps_offset=1, beta_end=0.012, beta_schedule="scaled_linear"
    )
    scheduler.save_pretrained(tmp_path / "base" / "scheduler")
    lines = write_diffusers(
        tuned(tmp_path / "base", tmp_path / "run"), tmp_path / "out", torch.float32
    )
    assert any("scheduler: PNDMScheduler, as in the base" in line for line in lines)
    replaced = "in the run, PNDMScheduler is replaced by the sampler dpm-solver++2m"
    assert any(replaced in line for line in lines)
