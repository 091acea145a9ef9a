"""On linear-Gaussian data the optimal R^2 of a denoiser has a closed form."""

import torch

from sfumato.condition import NO_CONDITION
from sfumato.diffusion import Denoised, Linear, LogitNormal, Sample, Warped
from sfumato.training.denoising_error import difference, make_triples, measure, summarize

# standard deviations of four independent pixels
SCALES = torch.tensor([1.5, 0.9, 0.3, 0.05], dtype=torch.float64)
SCHEDULE = Warped(schedule=Linear(), warp=LogitNormal())


def gaussian(x, level, condition=NO_CONDITION) -> Denoised:
    """The exact posterior mean for x0 ~ N(0, diag(SCALES^2))."""
    shaped = level.like(x)
    variance = SCALES.view(1, 1, 2, 2) ** 2
    return Sample().solve(
        shaped.alpha * variance / (shaped.alpha**2 * variance + shaped.sigma**2) * x, x, level
    )


def triples(count: int = 40_000, bins: int = 10):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(count, 1, 2, 2, dtype=torch.float64, generator=generator) * SCALES.view(
        1, 1, 2, 2
    )
    return make_triples(x0, SCHEDULE, seed=3, bins=bins)


def test_r2_of_the_ideal_denoiser_is_the_closed_form_in_every_bin() -> None:
    t = triples()
    report = summarize(
        measure(gaussian, t, NO_CONDITION, batch_size=1000), t, float((SCALES**2).mean())
    )
    alpha2, sigma2 = t.level.alpha**2, t.level.sigma**2
    moment = (SCALES**2).mean()
    trivial = alpha2 * moment / (alpha2 * moment + sigma2)
    best = (alpha2[:, None] * SCALES**2 / (alpha2[:, None] * SCALES**2 + sigma2[:, None])).mean(1)
    assert len(report["bins"]) == 10
    for number, row in enumerate(report["bins"]):
        chosen = t.bin == number
        expected = 1 - float(best[chosen].mean() / trivial[chosen].mean())
        assert abs(row["r2"] - expected) < 0.02, number
        assert abs(row["eps_mse"] / float(best[chosen].mean()) - 1) < 0.03, number
        assert abs(row["eps_rmse"] ** 2 - row["eps_mse"]) < 1e-12
    assert report["r2"] > 0.1


def test_the_trivial_predictor_scores_zero_and_copying_the_input_does_not_pass() -> None:
    t = triples()
    moment = float((SCALES**2).mean())

    def linear_guess(x, level, condition) -> Denoised:
        shaped = level.like(x)
        eps = shaped.sigma / (shaped.alpha**2 * moment + shaped.sigma**2) * x
        return Denoised((x - shaped.sigma * eps) / shaped.alpha, eps)

    def copy(x, level, condition) -> Denoised:
        shaped = level.like(x)
        return Denoised((x - shaped.sigma * x) / shaped.alpha, x)

    assert (
        abs(summarize(measure(linear_guess, t, NO_CONDITION, batch_size=5000), t, moment)["r2"])
        < 0.02
    )
    copied = summarize(measure(copy, t, NO_CONDITION, batch_size=5000), t, moment)
    assert all(row["r2"] < 0.02 for row in copied["bins"])


def test_r2_is_the_same_for_noise_and_image() -> None:
    t = triples(2000)
    errors = measure(gaussian, t, NO_CONDITION, batch_size=100)
    ratio = errors.x0_square / errors.eps_square * (t.level.alpha / t.level.sigma) ** 2
    torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_triples_are_fixed_and_fill_every_bin_evenly() -> None:
    a, b = triples(200), triples(200)
    assert torch.equal(a.noise, b.noise)
    assert torch.equal(a.level.alpha, b.level.alpha)
    assert torch.bincount(a.bin).tolist() == [20] * 10
    logsnr = a.level.logsnr()
    for number in range(10):
        inside = logsnr[a.bin == number]
        assert (inside >= a.edges[number]).all()
        assert (inside <= a.edges[number + 1]).all()


def test_gap_sees_a_denoiser_that_knows_its_training_images() -> None:
    t = triples(500)
    honest = measure(gaussian, t, NO_CONDITION, batch_size=500)

    def knows(x, level, condition) -> Denoised:
        return Denoised(t.x0, t.noise)

    gap = difference(honest, measure(knows, t, NO_CONDITION, batch_size=500), t)
    assert gap["low"] > 0
    none = difference(honest, honest, t)
    assert none["mean"] == 0
