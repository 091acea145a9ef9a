"""Model folders of diffusers, made here from configurations with random weights: our images beside
those of diffusers' own pipelines from the same noise.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato import load
from sfumato.errors import CheckpointError, ConfigError
from sfumato.interop.diffusers_folder import read_folder
from sfumato.interop.schedulers import read_scheduler
from sfumato.sampling import DPMSolverPP2M, KeyedNoise, Leading, grid, sample
from tests.helpers.cli import sfumato

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]
SIDE = 16
TOLERANCE = 1e-5  # of the largest value; a timestep off by one moves the result by more than 1e-3
UNCLIPPED = {"clip_sample": False}


def unet(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {
        "sample_size": SIDE,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }
    return diffusers.UNet2DModel(**{**settings, **changes}).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDPM pipeline as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("models") / "ddpm"
    diffusers.DDPMPipeline(
        unet=unet(), scheduler=diffusers.DDPMScheduler(**UNCLIPPED)
    ).save_pretrained(path)
    return path


def with_scheduler(folder: Path, target: Path, scheduler: object) -> Path:
    """Copy a model folder with another scheduler."""
    shutil.copytree(folder, target)
    scheduler.save_pretrained(target / "scheduler")
    return target


def noise(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def theirs(model: torch.nn.Module, scheduler: object, steps: int) -> torch.Tensor:
    """The loop of diffusers' pipelines, without clamping at the end."""
    scheduler.set_timesteps(steps)
    x = noise() * scheduler.init_noise_sigma
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = model(scheduler.scale_model_input(x, timestep), timestep).sample
            x = scheduler.step(output, timestep, x).prev_sample
    return x


def ours(
    path: Path, steps: int, *, off_by: float = 0.0, first: float | None = None
) -> torch.Tensor:
    """The same trajectory by our loop.

    `off_by` shifts the timestep that the network is given; `first` is the deviation of the first
    state over alpha, where diffusers chooses another one.
    """
    pipeline = load(path)
    denoiser, sampling = pipeline.model.denoiser(), pipeline.sampling
    if off_by:
        inner = pipeline.model.config.noise_input
        object.__setattr__(denoiser, "noise_input", lambda level: inner(level) + off_by)
    levels = sampling.spacing.levels(sampling.schedule, steps, strength=1.0)
    x = noise() / pipeline.model.config.input_scale(levels.at(0)).to(torch.float32)
    if first is not None:
        x = noise() * first * levels.alpha[0].to(torch.float32)
    return sample(sampling.sampler, denoiser, x, levels)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler(**UNCLIPPED),
    "DDIM, offset 1, to the first entry": diffusers.DDIMScheduler(
        set_alpha_to_one=False, steps_offset=1, beta_schedule="scaled_linear", **UNCLIPPED
    ),
    "DDIM trailing": diffusers.DDIMScheduler(timestep_spacing="trailing", **UNCLIPPED),
    "DDIM, zero terminal SNR, v": diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        **UNCLIPPED,
    ),
    "DDIM, cosine": diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", **UNCLIPPED),
    "DDIM, sample": diffusers.DDIMScheduler(prediction_type="sample", **UNCLIPPED),
    "DDIM, 100 timesteps": diffusers.DDIMScheduler(num_train_timesteps=100, **UNCLIPPED),
    "Euler": diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    "Euler leading": diffusers.EulerDiscreteScheduler(
        timestep_spacing="leading",
        steps_offset=1,
        beta_end=0.012,
        beta_start=0.00085,
        beta_schedule="scaled_linear",
    ),
    "Euler Karras": diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **LEADING),
    "Euler exponential": diffusers.EulerDiscreteScheduler(use_exponential_sigmas=True, **LEADING),
    "Euler beta": diffusers.EulerDiscreteScheduler(use_beta_sigmas=True, **LEADING),
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler(),
    "DPM-Solver++ trailing": diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing"),
}


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_trailing_timesteps_are_those_of_diffusers_for_every_number_of_steps(kind: str) -> None:
    for size, counts in ((1000, range(1, 100)), (50, range(1, 51))):
        scheduler = getattr(diffusers, kind)(num_train_timesteps=size, timestep_spacing="trailing")
        read = read_scheduler({**scheduler.config, "_class_name": kind}, where="here")
        for count in counts:
            scheduler.set_timesteps(count)
            levels = grid(read.sampling.schedule, count, spacing=read.sampling.spacing)
            told = read.denoiser.noise_input(levels.at(slice(0, -1)))
            # for some counts, numpy.arange gives diffusers a further timestep, -1
            assert torch.allclose(told.float(), scheduler.timesteps[:count].float(), atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_trajectory_is_that_of_diffusers(folder: Path, tmp_path: Path, name: str) -> None:
    path = with_scheduler(folder, tmp_path / "model", SCHEDULERS[name])
    x = theirs(unet(), SCHEDULERS[name], 10)
    # diffusers' Euler begins at sigma, not sqrt(1 + sigma^2), unless its spacing is leading
    first = float(SCHEDULERS[name].init_noise_sigma) if name == "Euler" else None
    assert difference(ours(path, 10, first=first), x) < TOLERANCE
    assert difference(ours(path, 10, first=first, off_by=1.0), x) > 1e-3


class Unrounded:
    """A scheduler whose timesteps are those of its levels, which it rounds otherwise."""

    def __init__(self, scheduler: object) -> None:
        self.scheduler = scheduler

    def __getattr__(self, name: str) -> object:
        return getattr(self.scheduler, name)

    def set_timesteps(self, steps: int) -> None:
        scheduler = self.scheduler
        scheduler.set_timesteps(steps)
        levels = scheduler.sigmas[:-1].double().numpy()
        if scheduler.config.use_flow_sigmas:
            times = levels * scheduler.config.num_train_timesteps
        else:
            bars = scheduler.alphas_cumprod.double()
            table = torch.log(((1 - bars) / bars).sqrt()).numpy()
            times = np.array([scheduler._sigma_to_t(level, table) for level in levels])
        scheduler.timesteps = torch.from_numpy(times)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_levels_whose_timesteps_diffusers_rounds_are_visited(
    folder: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**changes)
    path = with_scheduler(folder, tmp_path / "model", scheduler)
    assert any("which diffusers rounds" in remark for remark in read_folder(path).remarks)
    model = unet()
    if "use_flow_sigmas" in changes:  # our network of a flow is told times from 0 to 1
        inner = model
        model = lambda x, time: inner(x, time / 1000)  # noqa: E731
    x = theirs(model, Unrounded(scheduler), 10)
    assert difference(ours(path, 10), x) < TOLERANCE
    off_by = 0.2 if "use_flow_sigmas" in changes else 1.0  # of times from 0 to 1, or timesteps
    assert difference(ours(path, 10, off_by=off_by), x) > 1e-3


def test_the_pipeline_samples_from_the_folder_as_diffusers_does(
    folder: Path, tmp_path: Path
) -> None:
    path = with_scheduler(folder, tmp_path / "model", SCHEDULERS["DDIM"])
    images = load(path).sample(2, steps=5, seed=3)
    noisy = KeyedNoise(3)(torch.empty(2, 3, SIDE, SIDE))
    scheduler, model, x = SCHEDULERS["DDIM"], unet(), noisy
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(model(x, timestep).sample, timestep, x).prev_sample
    assert float((images - ((x + 1) / 2).clamp(0, 1)).abs().max()) < TOLERANCE


def test_the_command_samples_a_folder_and_leaves_it_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in folder.rglob("*"))
    result = sfumato("sample", folder, "--num", 2, "--steps", 2)
    assert (result.code, result.out) == (0, "generated/ddpm/seed-0/grid.png\n"), result.err
    assert len(list(Path("generated/ddpm/seed-0").glob("0*.png"))) == 2
    assert sorted(path for path in folder.rglob("*")) == before


def test_a_sampler_that_is_replaced_is_named(folder: Path, tmp_path: Path) -> None:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    path = with_scheduler(folder, tmp_path / "model", scheduler)
    content = read_folder(path)
    assert content.remarks == (
        "PNDMScheduler is replaced by the sampler dpm-solver++2m on the same levels",
    )
    assert content.run.sampling.sampler == DPMSolverPP2M()
    assert content.run.sampling.spacing == Leading(offset=1, end="first")


def broken(folder: Path, target: Path, change: str) -> Path:
    """A copy of a model folder with one fault."""
    shutil.copytree(folder, target)
    weights = target / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    if change == "no weights":
        weights.rename(weights.with_suffix(".bin"))
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "a tensor less":
        del tensors["conv_in.weight"]
        save_file(tensors, weights)
    elif change == "another shape":
        save_file(tensors | {"conv_in.weight": torch.zeros(16, 3, 1, 1)}, weights)
    elif change == "not finite":
        save_file(tensors | {"conv_in.bias": torch.full((16,), torch.nan)}, weights)
    elif change == "two variants":
        for variant in ("fp16", "non_ema"):
            shutil.copy(weights, weights.with_suffix(f".{variant}.safetensors"))
        weights.unlink()
    else:
        file, key, value = {
            "unknown network": ("model_index.json", "unet", ["diffusers", "UNet3DModel"]),
            "no network": ("model_index.json", "unet", [None, None]),
            "a part more": ("model_index.json", "vqvae", ["diffusers", "VQModel"]),
            "karras": ("scheduler/scheduler_config.json", "use_karras_sigmas", True),
            "scheduler": ("scheduler/scheduler_config.json", "_class_name", "TCDScheduler"),
            "prediction": ("scheduler/scheduler_config.json", "prediction_type", "score"),
            "classes": ("unet/config.json", "num_class_embeds", 10),
            "nine channels": ("unet/config.json", "in_channels", 9),
            "last level": ("scheduler/scheduler_config.json", "final_sigmas_type", "sigma_min"),
            "setting": ("unet/config.json", "down_block_types", ["DownBlock3D", "DownBlock2D"]),
        }[change]
        content = json.loads((target / file).read_text())
        (target / file).write_text(json.dumps(content | {key: value}))
    return target


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("no weights", r"has no diffusion_pytorch_model\.safetensors \(there are .*\.bin\)"),
        ("cut", "cannot be read: .*\n.*download it again"),
        ("a tensor less", "1 tensors are missing and 0 are unknown, e.g. conv_in.weight"),
        ("another shape", r"conv_in.weight has shape \(16, 3, 1, 1\)"),
        ("not finite", "conv_in.bias has values that are not finite"),
        ("two variants", "name one with --variant"),
        ("unknown network", "unsupported network class 'UNet3DModel'"),
        ("no network", "names neither unet nor transformer"),
        ("a part more", "has parts that cannot be read yet: vqvae"),
        ("karras", "use_karras_sigmas = True is not supported"),
        ("scheduler", "unsupported scheduler class 'TCDScheduler'"),
        ("prediction", "prediction_type = 'score' is not supported"),
        ("classes", "num_class_embeds = 10 is not supported"),
        ("nine channels", r"conv_in.weight has shape \(16, 3, 3, 3\)"),
        ("last level", "final_sigmas_type = 'sigma_min' is not supported"),
        ("setting", "UNet2DModel cannot be built"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_by_name(
    folder: Path, tmp_path: Path, change: str, sentence: str
) -> None:
    path = broken(folder, tmp_path / "model", change)
    with pytest.raises((CheckpointError, ConfigError), match=sentence):
        load(path)


def test_the_only_variant_is_taken(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    name = "model.conv_in.weight"
    assert torch.equal(
        load(tmp_path / "model").model.network.state_dict()[name],
        load(folder).model.network.state_dict()[name],
    )


def test_weights_are_loaded_without_a_random_initialization(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialized: list[torch.Tensor] = []
    fill = torch.nn.init.kaiming_uniform_
    monkeypatch.setattr(
        torch.nn.init, "kaiming_uniform_", lambda x, *a, **k: initialized.append(x) or fill(x)
    )
    network = load(folder).model.network
    assert initialized
    assert all(tensor.is_meta for tensor in initialized)
    assert not any(tensor.is_meta for tensor in network.state_dict().values())
    initialized.clear()
    unet()
    assert not any(tensor.is_meta for tensor in initialized)


def test_changes_of_the_file_do_not_reach_loaded_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    network = load(tmp_path / "model").model.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with weights.open("r+b") as file:
        file.seek(-1000, 2)
        file.write(bytes(1000))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
