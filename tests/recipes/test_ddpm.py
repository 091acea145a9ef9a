"""The recipe `ddpm` is the model of Ho et al. 2020 (arXiv:2006.11239), and works over any
images.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image

from sfumato.autoencoders import Pixels
from sfumato.condition import NO_CONDITION
from sfumato.conditioners import ConditioningInfo
from sfumato.diffusion import NoiseLevel
from sfumato.errors import ConfigError
from sfumato.generation.pipeline import Pipeline, to_unit
from sfumato.recipes import resolve
from sfumato.runs.preparation import build_model
from sfumato.sampling import KeyedNoise, grid

TABLE = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


def made(*overrides: str) -> Pipeline:
    """The recipe's model with random weights, strong enough for clipping to matter."""
    small = ["network.channels=32", "network.multipliers=[1]", "network.attention_depths=[]"]
    run = resolve("ddpm", [*small, *overrides])
    info = ConditioningInfo(channels=1)
    model = build_model(run, info).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Pipeline(
        model=model,
        autoencoder=Pixels(1),
        sampling=run.sampling,
        info=info,
        image_shape=(1, 8, 8),
    )


def test_its_levels_are_the_thousand_of_the_paper() -> None:
    sampling = resolve("ddpm").sampling
    alpha_bar = (1 - TABLE).cumprod(0)
    levels = grid(sampling.schedule, sampling.steps)
    torch.testing.assert_close(levels.alpha[:-1], alpha_bar.sqrt().flip(0))
    torch.testing.assert_close(levels.sigma[:-1], (1 - alpha_bar).sqrt().flip(0))
    assert levels.sigma[-1] == 0


def test_its_loss_is_the_mean_squared_error_of_the_noise() -> None:
    pipeline, objective = made(), resolve("ddpm").objective
    x0, eps = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8)
    level = objective.schedule(torch.tensor([0.001, 0.2, 0.5, 0.9, 1.0]))
    denoiser = pipeline.model.denoiser()
    losses = objective(denoiser, x0, level=level, noise=eps)
    said = pipeline.model.network(level.mix(x0, eps), denoiser.noise_input(level), NO_CONDITION)
    torch.testing.assert_close(
        losses.per_sample, (said - eps).square().flatten(1).mean(1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("clip", [True, False])
def test_its_samples_are_those_of_algorithm_2_with_clipped_guesses(clip: bool) -> None:
    """The posterior q(x_{t-1} | x_t, x0) of eqs. 6 and 7, at 20 betas instead of 1,000."""
    table = ["sampling.schedule.steps=20", "sampling.schedule.beta_end=0.3", "sampling.steps=20"]
    pipeline = made(*table, f"sampling.clip={clip}")
    beta = torch.linspace(1e-4, 0.3, 20, dtype=torch.float64)
    alpha, bar = 1 - beta, (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    noise, denoiser = KeyedNoise(3), pipeline.model.denoiser()
    x = noise(torch.empty(4, 1, 8, 8))  # line 1: x_T ~ N(0, I)
    for i in range(19, -1, -1):
        eps = denoiser.predict(x, NoiseLevel(bar[i].sqrt(), (1 - bar[i]).sqrt()), NO_CONDITION)
        x0 = (x - (1 - bar[i]).sqrt() * eps) / bar[i].sqrt()
        x0 = x0.clamp(-1, 1) if clip else x0
        mean = (
            before[i].sqrt() * beta[i] / (1 - bar[i]) * x0
            + alpha[i].sqrt() * (1 - before[i]) / (1 - bar[i]) * x
        )
        x = mean + ((1 - before[i]) / (1 - bar[i]) * beta[i]).sqrt() * noise(x) if i else mean
    torch.testing.assert_close(pipeline.sample(4, seed=3), to_unit(x.float()), rtol=0, atol=2e-4)


def test_clipping_makes_a_difference_to_that_model() -> None:
    table = ["sampling.schedule.steps=20", "sampling.schedule.beta_end=0.3", "sampling.steps=20"]
    clipped, plain = (
        made(*table, f"sampling.clip={clip}").sample(4, seed=3) for clip in (True, False)
    )
    assert (clipped - plain).abs().max() > 0.05


def test_clipping_in_latents_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"sampling\.clip: clamps guesses of the image to \[-1, 1\], and the model works in "
        r"latents",
    ):
        resolve("ddpm", ["autoencoder=TrainedAutoencoder"])
    assert not resolve(
        "ddpm", ["autoencoder=TrainedAutoencoder", "sampling.clip=false"]
    ).sampling.clip


def test_a_file_puts_it_over_a_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "0.png")
    page = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text()
    text = page.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "mine.yaml").write_text(
        text.replace("path: photos", f"path: {tmp_path / 'photos'}")
    )
    run, own = resolve(tmp_path / "mine.yaml"), resolve("ddpm")
    assert (run.data.resolution, run.data.channels, run.budget.minutes) == (32, 3, 60)
    assert (run.objective, run.sampling, run.denoiser, run.network) == (
        own.objective,
        own.sampling,
        own.denoiser,
        own.network,
    )
    assert str(tmp_path / "photos") in str(run.data.source)
