"""NetworkDenoiser, guidance (invariant 5), the exact denoiser, objective, coupling, times."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.condition import NO_CONDITION, Condition
from sfumato.diffusion import (
    Angle,
    AutoGuidance,
    ClampX0,
    ClassifierFree,
    Cosine,
    Denoised,
    DynamicThresholding,
    EmpiricalDenoiser,
    Epsilon,
    Flow,
    FlowTime,
    GuidanceInterval,
    GuidanceTerm,
    Independent,
    IndependentTimes,
    Linear,
    LogSNR,
    MinibatchOptimalTransport,
    MinSNR,
    NetworkDenoiser,
    NoiseLevel,
    Objective,
    Sample,
    Stratified,
    UnitSum,
    UnitVariance,
    Velocity,
    target_weight,
)

PARAMETERIZATIONS = [Epsilon(), Sample(), Flow(), Velocity(0.6)]
LEVEL = Cosine()(torch.tensor(0.37, dtype=torch.float64))


def network(x, noise_input, condition):
    """Smooth, nonlinear, and sensitive to everything it is given."""
    shift = 0.0 if condition.vector is None else condition.vector.sum(1).view(-1, 1, 1, 1)
    return torch.tanh(x * 1.3 + noise_input.view(-1, 1, 1, 1) * 1.4 + shift)


def noisy(count: int = 4) -> torch.Tensor:
    return torch.randn(
        count, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def vector(value: float, count: int = 4) -> Condition:
    return Condition(vector=torch.full((count, 2), value, dtype=torch.float64))


@pytest.mark.parametrize("p", PARAMETERIZATIONS, ids=str)
@pytest.mark.parametrize("scale", [UnitVariance(0.7), UnitSum()], ids=str)
@pytest.mark.parametrize("told", [Angle(), LogSNR(), FlowTime()], ids=str)
def test_posterior_depends_on_logsnr_alone(p, scale, told) -> None:
    denoiser = NetworkDenoiser(
        network=network, parameterization=p, input_scale=scale, noise_input=told
    )
    here = denoiser(noisy(), LEVEL)
    there = denoiser(noisy() * 3.7, NoiseLevel(LEVEL.alpha * 3.7, LEVEL.sigma * 3.7))
    torch.testing.assert_close(here.x0, there.x0)
    torch.testing.assert_close(here.eps, there.eps)


def test_per_sample_levels_equal_scalar_ones() -> None:
    denoiser = NetworkDenoiser(network=network, parameterization=Velocity(0.6))
    levels = Cosine()(torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64))
    together = denoiser(noisy(), levels)
    for i in range(4):
        alone = denoiser(noisy()[i : i + 1], levels.at(i))
        torch.testing.assert_close(together.x0[i : i + 1], alone.x0)


def test_result_keeps_the_dtype_of_x_while_the_network_computes_in_its_own() -> None:
    seen = []

    def watched(x, noise_input, condition):
        result = torch.nn.functional.linear(x.flatten(1), torch.eye(18)).view_as(x)
        seen.append(result.dtype)
        return result

    x = noisy().float()
    denoised = NetworkDenoiser(
        network=watched, parameterization=Flow(), compute_dtype=torch.bfloat16
    )(x, LEVEL)
    assert seen == [torch.bfloat16]
    assert denoised.x0.dtype == torch.float32


@pytest.mark.parametrize("w", [0.0, 1.0, 3.5])
@pytest.mark.parametrize("p", PARAMETERIZATIONS, ids=str)
def test_guidance_commutes_with_the_parameterization(p, w: float) -> None:
    denoiser = NetworkDenoiser(network=network, parameterization=p)
    x, good, bad = noisy(), vector(0.4), vector(-0.2)
    guided = ClassifierFree(denoiser=denoiser, terms=(GuidanceTerm(bad, w),))(x, LEVEL, good)
    in_target_space = denoiser.predict(x, LEVEL, bad) + w * (
        denoiser.predict(x, LEVEL, good) - denoiser.predict(x, LEVEL, bad)
    )
    expected = p.solve(in_target_space, x, LEVEL)
    torch.testing.assert_close(guided.x0, expected.x0)
    torch.testing.assert_close(guided.eps, expected.eps)
    if w == 1:
        torch.testing.assert_close(guided.x0, denoiser(x, LEVEL, good).x0)


def test_guidance_scale_may_follow_the_level_and_levels_may_differ() -> None:
    denoiser = NetworkDenoiser(network=network, parameterization=Flow())
    levels = Cosine()(torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64))
    x, good, bad = noisy(), vector(0.4), vector(-0.2, count=1)
    guided = ClassifierFree(
        denoiser=denoiser, terms=(GuidanceTerm(bad, lambda level: 1 + level.sigma),)
    )(x, levels, good)
    for i in range(4):
        fixed = ClassifierFree(
            denoiser=denoiser, terms=(GuidanceTerm(bad, 1 + float(levels.sigma[i])),)
        )
        one = fixed(x[i : i + 1], levels.at(i), Condition(vector=good.vector[i : i + 1]))
        torch.testing.assert_close(guided.x0[i : i + 1], one.x0)


def test_autoguidance_extrapolates_between_two_denoisers() -> None:
    good = NetworkDenoiser(network=network, parameterization=Flow())
    bad = NetworkDenoiser(network=lambda x, n, c: 0.5 * network(x, n, c), parameterization=Flow())
    guided = AutoGuidance(good=good, bad=bad, scale=2.0)(noisy(), LEVEL, NO_CONDITION)
    torch.testing.assert_close(guided.x0, 2 * good(noisy(), LEVEL).x0 - bad(noisy(), LEVEL).x0)


def test_interval_chooses_by_logsnr() -> None:
    inside = lambda x, level, condition: Denoised(x * 0 + 1, x)  # noqa: E731
    outside = lambda x, level, condition: Denoised(x * 0, x)  # noqa: E731
    both = GuidanceInterval(inside=inside, outside=outside, low=-2.0, high=2.0)
    for logsnr, value in ((-3.0, 0.0), (-1.9, 1.0), (1.9, 1.0), (2.1, 0.0)):
        ratio = torch.tensor(logsnr / 2).exp()
        assert (
            both(noisy(), NoiseLevel(ratio, torch.ones(())), NO_CONDITION).x0.unique().item()
            == value
        )


@pytest.mark.parametrize("wrap", [ClampX0, DynamicThresholding])
def test_clipping_bounds_x0_and_still_explains_x(wrap) -> None:
    wild = lambda x, level, condition: Sample().solve(3 * x, x, level)  # noqa: E731
    denoised = wrap(denoiser=wild)(noisy(), LEVEL, NO_CONDITION)
    assert denoised.x0.abs().max() <= 1 + 1e-9
    torch.testing.assert_close(LEVEL.mix(*denoised), noisy())


def test_dynamic_threshold_rescales_by_the_quantile() -> None:
    wild = lambda x, level, condition: Sample().solve(3 * x, x, level)  # noqa: E731
    x0 = 3 * noisy()
    limit = torch.quantile(x0.flatten(1).abs(), 0.9, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    found = DynamicThresholding(denoiser=wild, quantile=0.9)(noisy(), LEVEL, NO_CONDITION).x0
    torch.testing.assert_close(found, x0.clamp(-limit, limit) / limit, atol=1e-6, rtol=1e-6)


def test_empirical_denoiser_is_the_softmax_over_its_data() -> None:
    data, x = noisy(5), noisy(3) * 0.8
    log_weights = -((x[:, None] - LEVEL.alpha * data[None]) ** 2).flatten(2).sum(2) / (
        2 * LEVEL.sigma**2
    )
    expected = torch.einsum("bn,nchw->bchw", torch.softmax(log_weights, 1), data)
    torch.testing.assert_close(EmpiricalDenoiser(data)(x, LEVEL).x0, expected)


def test_loss_of_each_sample_is_the_weighted_mean_square() -> None:
    denoiser = NetworkDenoiser(network=network, parameterization=Velocity(0.6))
    objective = Objective(schedule=Linear(), weighting=MinSNR())
    x0, noise = noisy(4), noisy(4).flip(0)
    level = objective.levels(torch.tensor([0.1, 0.5, 0.2, 0.9], dtype=torch.float64))
    losses = objective(denoiser, x0, level=level, noise=noise)
    for i in range(4):
        one = level.at(i)
        x = one.alpha * x0[i : i + 1] + one.sigma * noise[i : i + 1]
        error = denoiser.predict(x, one) - Velocity(0.6).target(
            Denoised(x0[i : i + 1], noise[i : i + 1]), one
        )
        expected = target_weight(MinSNR(), one, Velocity(0.6)) * error.square().mean()
        torch.testing.assert_close(losses.per_sample[i], expected)


def test_optimal_transport_is_the_cheapest_permutation() -> None:
    x0, noise = noisy(4), noisy(4).flip(0) + 0.01
    coupled = MinibatchOptimalTransport()(x0, noise)
    assert sorted(coupled.flatten(1).sum(1).tolist()) == pytest.approx(
        sorted(noise.flatten(1).sum(1).tolist())
    )
    from itertools import permutations

    cheapest = min(
        float((x0 - noise[list(order)]).square().sum()) for order in permutations(range(4))
    )
    assert float((x0 - coupled).square().sum()) == pytest.approx(cheapest)
    assert torch.equal(Independent()(x0, noise), noise)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 100])
def test_stratified_times_fill_each_stratum_once(count: int) -> None:
    times = Stratified()(
        torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    assert sorted((times * count).long().tolist()) == list(range(count))


def test_stratified_times_are_spread_in_every_slice_and_calm_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(400, 64, dtype=torch.float64, generator=generator)
    for part in Stratified()(draws[0]).split(16):
        assert torch.histc(part, bins=4, min=0, max=1).min() >= 2
    variance = {
        kind: torch.stack([torch.log1p(kind()(row)).mean() for row in draws]).var()
        for kind in (Stratified, IndependentTimes)
    }
    assert variance[Stratified] < variance[IndependentTimes] / 100


def test_several_rungs_weigh_each_context_by_itself() -> None:
    """On a denoiser that is linear in its condition, guidance is a sum that can be written down."""
    direction = torch.randn(3, 6, dtype=torch.float64)

    def denoiser(x: torch.Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        x0 = (condition.vector @ direction).view(-1, 1, 1, 6).expand_as(x)
        return Denoised(x0, (x - level.alpha * x0) / level.sigma)

    nothing, first, both = (
        Condition(vector=torch.tensor([row], dtype=torch.float64))
        for row in ([0, 0, 1], [2, 0, 1], [2, 3, 1])
    )
    x = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    guided = ClassifierFree(
        denoiser=denoiser, terms=(GuidanceTerm(nothing, 1.5), GuidanceTerm(first, 4.0))
    )(x, LEVEL, both.expand(2))
    expected = direction[2] + 1.5 * 2 * direction[0] + 4.0 * 3 * direction[1]
    torch.testing.assert_close(guided.x0, expected.expand_as(x))
    torch.testing.assert_close(LEVEL.alpha * guided.x0 + LEVEL.sigma * guided.eps, x)


@pytest.mark.parametrize("count", [2, 3, 64])
def test_a_place_in_the_batch_is_not_tied_to_a_stratum(count: int) -> None:
    """An image of a rare shape always begins its batch: its times once lay all in [0, 1/64)."""
    draws = torch.rand(4000, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = torch.stack([Stratified()(row)[0] for row in draws])
    share = torch.histc(first, bins=10, min=0, max=1) / len(first)
    assert (share - 0.1).abs().max() < 5 * math.sqrt(0.1 * 0.9 / len(first))
