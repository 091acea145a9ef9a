"""On linear-Gaussian data the optimal R^2 of a denoiser has a closed form, and the linear denoiser
is the optimum.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.covariance import ledoit_wolf

from sfumato.autoencoders import Pixels
from sfumato.condition import NO_CONDITION
from sfumato.data import to_float
from sfumato.diffusion import (
    Denoised,
    EmpiricalDenoiser,
    Linear,
    LinearDenoiser,
    LogitNormal,
    Sample,
    Warped,
)
from sfumato.training import TrainingConfig, ValidationConfig
from sfumato.training.denoising_error import (
    Errors,
    Triples,
    difference,
    make_triples,
    measure,
    score_interval,
    summarize,
)
from sfumato.training.monitors import Validator
from tests.helpers.image_sets import dataset_of, photographs

# standard deviations of four independent pixels
SCALES = torch.tensor([1.5, 0.9, 0.3, 0.05], dtype=torch.float64)
MEAN = torch.tensor([0.5, -0.2, 0.1, 0.7], dtype=torch.float64).view(1, 2, 2)
SCHEDULE = Warped(schedule=Linear(), warp=LogitNormal())


def images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, 2, 2, dtype=torch.float64, generator=generator)
    return noise * SCALES.view(1, 1, 2, 2) + MEAN


def ideal(x, level, condition=NO_CONDITION) -> Denoised:
    """The exact posterior mean for x0 ~ N(MEAN, diag(SCALES^2))."""
    shaped = level.like(x)
    variance = SCALES.view(1, 1, 2, 2) ** 2
    gain = shaped.alpha * variance / (shaped.alpha**2 * variance + shaped.sigma**2)
    return Sample().solve(MEAN + gain * (x - shaped.alpha * MEAN), x, level)


def triples(count: int = 4_000, bins: int = 10, draws: int = 1) -> Triples:
    return make_triples(images(count), SCHEDULE, seed=3, bins=bins, draws=draws)


def errors(denoiser, t: Triples) -> Errors:
    return measure(denoiser, t, NO_CONDITION, batch_size=5000)


def report(denoiser, t: Triples) -> dict:
    learned = images(20_000, seed=1)
    mean_guess, linear = LinearDenoiser.of_mean(learned), LinearDenoiser.of(learned)
    memory = EmpiricalDenoiser(images(50, seed=2))
    others = [errors(other, t) for other in (mean_guess, linear, memory)]
    return summarize(errors(denoiser, t), t, *others)


def test_r2_of_the_ideal_denoiser_is_the_closed_form_at_every_level() -> None:
    t = triples()
    found = report(ideal, t)
    alpha2, sigma2 = (part**2 for part in t.levels.at(slice(0, 10)))
    moment = (SCALES**2).mean()
    trivial = alpha2 * moment / (alpha2 * moment + sigma2)
    best = (alpha2[:, None] * SCALES**2 / (alpha2[:, None] * SCALES**2 + sigma2[:, None])).mean(1)
    assert len(found["bins"]) == 10
    for number, row in enumerate(found["bins"]):
        # both guesses meet the same noises, so that most of the chance cancels
        assert abs(row["r2"] - (1 - float(best[number] / trivial[number]))) < 0.011, number
        assert abs(row["eps_mse"] / float(best[number]) - 1) < 0.08, number
        assert abs(row["eps_rmse"] ** 2 - row["eps_mse"]) < 1e-12
        assert abs(row["skill"]) < 0.01, number
    assert found["r2"] > 0.1


def test_a_denoiser_that_only_remembers_is_measured_beside_the_others() -> None:
    t = triples(400)
    memory = EmpiricalDenoiser(images(50, seed=2))
    found = report(ideal, t)
    squares = errors(memory, t).eps_square
    assert found["memory_mse"] == pytest.approx(float(squares.mean()))
    for number, row in enumerate(found["bins"]):
        assert row["memory_mse"] == pytest.approx(float(squares[:, number].mean()))
    assert found["memory_mse"] > 1.5 * found["eps_mse"]  # of images that it does not know
    assert report(memory, t)["eps_mse"] == pytest.approx(found["memory_mse"])


def test_intervals_of_figures_cover_them_and_scores_are_paired() -> None:
    learned = images(20_000, seed=1)
    guess = LinearDenoiser.of_mean(learned)
    truth = report(ideal, triples(20_000))
    covered, at_a_level = {"eps_mse": 0, "r2": 0}, {"eps_mse": 0, "r2": 0}
    for number in range(60):
        t = replace(triples(40), seed=number)
        found = report(ideal, replace(t, x0=images(40, seed=100 + number)))
        for counts, row, true in (
            (covered, found, truth),
            (at_a_level, found["bins"][4], truth["bins"][4]),
        ):
            for name in counts:
                ends = row["intervals"][name]
                counts[name] += ends["low"] <= true[name] <= ends["high"]
    assert all(51 <= count <= 60 for count in covered.values()), covered
    assert all(51 <= count <= 60 for count in at_a_level.values()), at_a_level
    t = triples(40)
    first, second = (errors(each, t).by_image() for each in (ideal, guess))
    found = score_interval(first, second)
    both = torch.stack([first, second])
    generator = torch.Generator().manual_seed(0)
    draws = both[:, torch.randint(40, (4000, 40), generator=generator)].mean(2)
    low, high = (1 - draws[0] / draws[1]).quantile(torch.tensor([0.025, 0.975]).double())
    assert found.mean == pytest.approx(1 - float(first.mean() / second.mean()))
    assert found.high - found.low == pytest.approx(float(high - low), rel=0.15)


def test_guesses_that_know_less_score_below_the_ideal_one() -> None:
    t = triples()

    def copy(x, level, condition) -> Denoised:
        shaped = level.like(x)
        return Denoised((x - shaped.sigma * x) / shaped.alpha, x)

    mean_guess = LinearDenoiser.of_mean(images(20_000, seed=1))
    assert report(mean_guess, t)["r2"] == 0
    assert report(mean_guess, t)["skill"] < -0.1
    assert all(row["r2"] < 0.02 for row in report(copy, t)["bins"])


@pytest.mark.parametrize("count", [40, 300])
def test_the_covariance_is_shrunk_as_scikit_learn_does(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    size = 100
    mixing = torch.randn(size, size, dtype=torch.float64, generator=generator)
    learned = torch.randn(count, size, dtype=torch.float64, generator=generator) @ mixing
    found = LinearDenoiser.of(learned.view(count, 1, 10, 10))
    basis = found.vectors
    covariance = basis * found.values @ basis.T + found.rest * (torch.eye(size) - basis @ basis.T)
    np.testing.assert_allclose(covariance, ledoit_wolf(learned)[0], atol=1e-9)


def test_the_linear_denoiser_is_the_ideal_one_and_few_images_do_not_break_it() -> None:
    t = triples(500)
    x0, noise, level = t.part(slice(0, 5000))
    x = level.mix(x0, noise)
    found = LinearDenoiser.of(images(200_000, seed=1))(x, level)
    torch.testing.assert_close(found.x0, ideal(x, level).x0, atol=0.03, rtol=0)
    for few in (1, 2, 3):
        assert bool(torch.isfinite(LinearDenoiser.of(images(few))(x, level).x0).all())


def test_r2_is_the_same_for_noise_and_image() -> None:
    t = triples(2000)
    found = errors(ideal, t)
    alpha, sigma = t.levels.at(slice(0, 10))
    ratio = found.x0_square / found.eps_square * (alpha / sigma) ** 2
    torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_every_image_meets_every_level_with_noises_that_stay_the_same() -> None:
    a, b = triples(20, draws=3), triples(20, draws=3)
    assert len(a) == 20 * 10 * 3
    assert torch.equal(a.part(slice(7, 99))[1], b.part(slice(0, 600))[1][7:99])
    assert len(a.part(slice(0, 600))[1].flatten(1).unique(dim=0)) == 600
    assert torch.equal(a.image, torch.arange(20).repeat_interleave(30))
    logsnr = a.levels.logsnr().view(20, 10, 3)
    assert (logsnr == logsnr[:1]).all()
    assert (logsnr[0] > a.edges[:-1, None]).all()
    assert (logsnr[0] < a.edges[1:, None]).all()


def test_an_image_is_worth_one_value_however_often_it_is_met() -> None:
    """As intervals over (image, noise, level) the same figures would look four times surer."""
    t = triples(30, draws=16)
    found = difference(errors(LinearDenoiser.of_mean(images(5000, seed=1)), t), errors(ideal, t), t)
    values = (
        errors(LinearDenoiser.of_mean(images(5000, seed=1)), t).eps_square
        - errors(ideal, t).eps_square
    )
    expected = stats.ttest_1samp(values.mean(1), 0).confidence_interval(0.95)
    np.testing.assert_allclose((found["low"], found["high"]), expected, rtol=1e-9)
    assert found["low"] > 0
    assert len(found["bins"]) == 10
    none = difference(errors(ideal, t), errors(ideal, t), t)
    assert (none["mean"], none["low"], none["high"]) == (0, 0, 0)


class Unconditioned:
    """A conditioner that reads nothing."""

    user_inputs = ()

    def training_context(self, *args, **options) -> dict:
        return {}

    def __call__(self, context, count):
        return NO_CONDITION


def model(denoiser) -> SimpleNamespace:
    return SimpleNamespace(
        eval=lambda: None, conditioner=Unconditioned(), denoiser=lambda: denoiser
    )


def test_validation_compares_different_images_and_guesses_on_the_same_noises() -> None:
    pixels = photographs(80, side=8)[:, :1]
    groups = np.concatenate([np.arange(75), np.arange(60, 65)])  # five are near-duplicates
    dataset = dataset_of(pixels[:60], pixels[60:], groups=groups)
    validator = Validator(
        config=TrainingConfig(validation=ValidationConfig(samples=400, bins=10)),
        dataset=dataset,
        schedule=SCHEDULE,
        conditioner=Unconditioned(),
        autoencoder=Pixels(1),
        device=torch.device("cpu"),
    )
    learned = to_float(dataset.images(dataset.training).pixels)
    mean_guess, linear = (
        model(each) for each in (LinearDenoiser.of_mean(learned), LinearDenoiser.of(learned))
    )
    figures = validator.figures(mean_guess, linear)
    for name in ("raw/r2", "ema/skill"):
        which, score = name.split("/")
        assert figures[f"validation/{name}"] == pytest.approx(0, abs=1e-5)
        for row in figures[f"validation/{which}/bins"]:
            assert row[score] == pytest.approx(0, abs=1e-5)
    held_out, seen = (each.eps_square for each in validator.errors(linear))
    assert held_out.shape == (15, 10)
    assert seen.shape == (40, 10)
    logs = [each.mean(1).log() for each in (held_out, seen)]
    interval = stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.95)
    expected = np.exp([float(logs[0].mean() - logs[1].mean()), *interval])
    found = [figures[f"validation/ratio/{part}"] for part in ("mean", "low", "high")]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
