"""Runs of a network of diffusers without a base, as folders that its pipelines load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato import load
from sfumato.condition import Condition
from sfumato.conditioners import CategoryConfig, ConditioningInfo
from sfumato.contexts import ContextConfig
from sfumato.data import DataConfig
from sfumato.diffusion import (
    Cosine,
    Epsilon,
    Flow,
    FlowTime,
    Linear,
    LinearBetas,
    Objective,
    ScaledLinear,
    Span,
    Timestep,
    UnitSum,
    UnitVariance,
    Velocity,
    Warped,
    ZeroTerminalSNR,
)
from sfumato.errors import ConfigError
from sfumato.generation.diffusion_model import DenoiserConfig, SamplingConfig
from sfumato.interop.diffusers_export import write_diffusers
from sfumato.interop.scheduler_writer import write_scheduler
from sfumato.interop.schedulers import read_scheduler
from sfumato.interop.trained_model import TrainedModel
from sfumato.networks import DiffusersConfig, UNetConfig
from sfumato.recipes import Run
from sfumato.sampling import (
    DDIM,
    DPMSolverPP2M,
    Even,
    KeyedNoise,
    Leading,
    Linspace,
    RoundedLinspace,
    grid,
)
from tests.helpers.trained_models import trained

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def from_scratch(directory: Path, **changes: object) -> TrainedModel:
    """An unconditional run of a UNet2DModel, in the pixels of images of 8 x 8."""
    betas = LinearBetas()
    settings = {
        "layers_per_block": 1,
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8,
    }
    run = Run(
        name="scratch",
        data=DataConfig(resolution=8, channels=3),
        network=DiffusersConfig(architecture="UNet2DModel", settings=settings),
        denoiser=DenoiserConfig(
            parameterization=Epsilon(),
            input_scale=UnitVariance(1.0),
            noise_input=Timestep(schedule=betas),
        ),
        objective=Objective(schedule=betas),
        sampling=SamplingConfig(sampler=DDIM(), schedule=betas, steps=5),
    )
    run = replace(run, **changes)
    return trained(run, ConditioningInfo(channels=3), directory, strength=0.3)


@pytest.mark.parametrize(
    ("sampler", "spacing", "clip", "pipeline", "call"),
    [
        (DDIM(), Even(), False, "DDIMPipeline", {}),
        (DDIM(), Leading(), True, "DDIMPipeline", {"use_clipped_model_output": True}),
        (DPMSolverPP2M(), Even(), False, "DDPMPipeline", {}),
    ],
)
def test_a_run_from_scratch_becomes_a_pipeline_without_text(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampler: object,
    spacing: object,
    clip: bool,
    pipeline: str,
    call: dict,
) -> None:
    betas = LinearBetas()
    sampling = SamplingConfig(sampler=sampler, schedule=betas, spacing=spacing, clip=clip, steps=5)
    model = from_scratch(tmp_path / "run", sampling=sampling)
    lines = write_diffusers(model, tmp_path / "out", torch.float32)
    assert (clip and "use_clipped_model_output=True" in " ".join(lines)) or not clip
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(loaded).__name__ == pipeline
    loaded.set_progress_bar_config(disable=True)
    noise = KeyedNoise(3)(torch.empty(2, 3, 8, 8))
    for module in ("ddim.pipeline_ddim", "ddpm.pipeline_ddpm"):
        monkeypatch.setattr(
            f"diffusers.pipelines.{module}.randn_tensor", lambda *shape, **options: noise.clone()
        )
    images = loaded(batch_size=2, num_inference_steps=5, output_type="np", **call).images
    own = model.pipeline.sample(2, seed=3)
    assert difference(torch.as_tensor(images).permute(0, 3, 1, 2), own) < 1e-5
    assert difference(load(tmp_path / "out").sample(2, seed=3, steps=5), own) < 1e-5


def test_ancestral_steps_are_those_of_diffusers(tmp_path: Path) -> None:
    """Levels, network inputs and the deviation of the noise that is added, step by step."""
    betas = LinearBetas()
    sampling = SamplingConfig(
        sampler=DDIM(eta=1.0), schedule=betas, spacing=Leading(), clip=True, steps=10
    )
    model = from_scratch(tmp_path / "run", sampling=sampling)
    write_diffusers(model, tmp_path / "out", torch.float32)
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    scheduler.set_timesteps(10)
    steps: list = []
    model.pipeline.sample(1, seed=3, on_step=steps.append)
    network = model.pipeline.model.network
    for info, timestep in zip(steps, scheduler.timesteps, strict=True):
        with torch.no_grad():
            output = network(info.before, timestep[None].float(), Condition())
        mean = scheduler.step(output, timestep, info.before, generator=None)
        assert difference(mean.pred_original_sample, info.x0) < 1e-4
        level = scheduler.alphas_cumprod[timestep] ** 0.5
        assert float(info.start.alpha) == pytest.approx(float(level), abs=1e-6)


REFUSED = {
    "own network": ({"network": UNetConfig(channels=32)}, "no class for the network unet"),
    "noise input": (
        {"denoiser": DenoiserConfig(parameterization=Epsilon(), input_scale=UnitVariance(1.0))},
        "are told a timestep, and this one was trained with denoiser.noise_input=angle",
    ),
    "sampler": (
        {"sampling": SamplingConfig(sampler=DDIM(eta=0.5), schedule=LinearBetas())},
        "no scheduler of diffusers takes the steps of ddim on even spacing",
    ),
    "other levels": (
        {"sampling": SamplingConfig(sampler=DDIM(), schedule=LinearBetas(beta_end=0.03))},
        r"sampling.schedule or sampling.spacing would change",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_diffusers_does_not_have_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, sentence = REFUSED[name]
    model = from_scratch(tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=sentence) as caught:
        write_diffusers(model, tmp_path / "out", torch.float32)
    assert name != "own network" or "`bundle`" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_contexts_are_refused_by_name(tmp_path: Path) -> None:
    model = from_scratch(tmp_path / "run")
    category = replace(model.run, conditioner=ContextConfig(category=CategoryConfig(size=8)))
    info = ConditioningInfo(channels=3, categories=("cat", "dog"))
    conditioner = category.conditioner.build(info, encoder=lambda config: config)
    model.pipeline.model.conditioner = conditioner
    with pytest.raises(ConfigError, match="not steered by category"):
        write_diffusers(replace(model, run=category), tmp_path / "out", torch.float32)


SD = ScaledLinear()
ZERO = ZeroTerminalSNR(SD, fixed=1 / 1000)
SCHEDULES = {
    "linear, leading": (LinearBetas(), Epsilon(), DDIM(), Leading(offset=1)),
    "scaled linear, to the first entry": (SD, Epsilon(), DDIM(), Leading(end="first")),
    "zero terminal SNR": (ZERO, Velocity(), DDIM(), Even()),
    "cosine, as a table": (
        Warped(schedule=Cosine(), warp=Span(high=0.99)), Velocity(), DPMSolverPP2M(), RoundedLinspace(),
    ),
    "ddpm": (LinearBetas(steps=100), Epsilon(), DDIM(eta=1.0), Even()),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_and_timesteps_are_those_of_the_scheduler_itself(name: str) -> None:
    schedule, parameterization, sampler, spacing = SCHEDULES[name]
    size = 100 if name == "ddpm" else 1000
    denoiser = DenoiserConfig(
        parameterization=parameterization,
        input_scale=UnitVariance(1.0),
        noise_input=Timestep(schedule=schedule, table_size=size),
    )
    sampling = SamplingConfig(sampler=sampler, schedule=schedule, spacing=spacing, steps=10)
    config = write_scheduler(denoiser, sampling)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(10)
    levels = grid(schedule, 10, spacing=spacing)
    told = denoiser.noise_input(levels.at(slice(0, -1)))
    # of a last step from the first entry to itself, nothing is left to do
    timesteps = scheduler.timesteps[: len(told)]
    assert len(told) == 10 - (spacing == Leading(end="first"))
    assert torch.allclose(told.float(), timesteps.float(), atol=1e-3)
    alphas = scheduler.alphas_cumprod[timesteps].sqrt()
    share = levels.alpha / torch.hypot(levels.alpha, levels.sigma)
    assert torch.allclose(share[:-1].float(), alphas, atol=1e-5)
    read = read_scheduler(config, where="here")
    assert read.sampling.sampler == sampler
    assert read.denoiser.parameterization == parameterization


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_written_as_it_is_read(shift: float) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, num_train_timesteps=500)
    read = read_scheduler(
        dict(theirs.config) | {"_class_name": type(theirs).__name__}, where="here"
    )
    config = write_scheduler(read.denoiser, read.sampling)
    assert (config["shift"], config["num_train_timesteps"]) == (shift, 500)
    again = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    for scheduler in (theirs, again):
        scheduler.set_timesteps(7)
    assert torch.equal(theirs.sigmas, again.sigmas)


@pytest.mark.parametrize(
    ("denoiser", "sampling", "sentence"),
    [
        (
            DenoiserConfig(parameterization=Flow(), input_scale=UnitSum(), noise_input=FlowTime()),
            SamplingConfig(sampler=DDIM(), schedule=Linear(), spacing=Even()),
            "sampling.spacing|sampling.schedule",
        ),
        (
            DenoiserConfig(parameterization=Flow(), noise_input=FlowTime()),
            SamplingConfig(sampler=DDIM(), spacing=Linspace()),
            "denoiser of this run has no equivalent",
        ),
        (
            DenoiserConfig(
                parameterization=Flow(), input_scale=UnitVariance(1.0), noise_input=Timestep()
            ),
            SamplingConfig(sampler=DDIM(), schedule=LinearBetas()),
            "denoiser.parameterization of this run has no equivalent",
        ),
        (
            DenoiserConfig(parameterization=Epsilon(), noise_input=Timestep()),
            SamplingConfig(sampler=DDIM(), schedule=LinearBetas()),
            "denoiser.input_scale of this run has no equivalent",
        ),
    ],
)
def test_settings_without_an_equivalent_are_named(
    denoiser: DenoiserConfig, sampling: SamplingConfig, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        write_scheduler(denoiser, sampling)


@pytest.mark.parametrize(
    ("kind", "spacing", "same"),
    [
        ("DDIMScheduler", "linspace", False),
        ("DDPMScheduler", "linspace", False),
        ("DPMSolverMultistepScheduler", "leading", False),
        ("DDIMScheduler", "leading", True),
        ("DDPMScheduler", "trailing", True),
        ("DPMSolverMultistepScheduler", "linspace", True),
    ],
)
def test_a_spacing_that_means_something_else_in_diffusers_is_said(
    kind: str, spacing: str, same: bool
) -> None:
    scheduler = getattr(diffusers, kind)(timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    read = read_scheduler({**scheduler.config, "_class_name": kind}, where="here")
    levels = grid(read.sampling.schedule, 10, spacing=read.sampling.spacing)
    told = read.denoiser.noise_input(levels.at(slice(0, -1)))
    assert torch.allclose(told.float(), scheduler.timesteps.float(), atol=0.5) == same
    assert any("has other levels" in remark for remark in read.remarks) == (not same)
