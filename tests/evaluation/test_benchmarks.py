"""The statistics of benchmarks/grid_fit.py, the images that are compared, and the GAN of benchmarks/peer_gan.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch.nn import functional as F

from sfumato.data import DataConfig, Digits, index
from sfumato.networks import UNetConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("grid_fit", "held_out", "data_or_model", "peer_gan")
NUMBERS, WIDTHS = np.array([100.0, 400.0, 1400.0]), np.array([8.0, 16.0, 32.0])


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture
def fitting(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["grid_fit"]


@pytest.fixture
def comparing(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["data_or_model"]


@pytest.fixture
def gan(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["peer_gan"]


def planted(b: float, c: float, d: float) -> np.ndarray:
    """Log errors (3, 3) of known slopes for each doubling, from the middle of the grid."""
    x, z = np.log2(NUMBERS / 400)[:, None], np.log2(WIDTHS / 16)[None]
    return -1 + b * x + c * z + d * x * z


def test_the_fit_returns_planted_slopes_for_each_doubling(fitting: ModuleType) -> None:
    found = fitting.fit(planted(-0.2, 0.05, 0.03), NUMBERS, WIDTHS)

    assert found == pytest.approx([-1, -0.2, 0.05, 0.03])


def test_the_fit_is_that_of_scikit_learn(fitting: ModuleType) -> None:
    logs = np.random.default_rng(0).normal(size=(3, 3))
    x, z = np.meshgrid(np.log2(NUMBERS / 400), np.log2(WIDTHS / 16), indexing="ij")
    columns = np.stack([x, z, x * z], axis=-1).reshape(9, 3)

    theirs = LinearRegression().fit(columns, logs.ravel())

    found = fitting.fit(logs, NUMBERS, WIDTHS)
    assert found == pytest.approx([theirs.intercept_, *theirs.coef_])


def test_the_bootstrap_over_seeds_has_the_variance_of_means_of_so_few(fitting: ModuleType) -> None:
    noise = np.random.default_rng(1).normal(scale=0.1, size=(3, 3, 3))  # numbers, widths, seeds
    errors = np.exp(planted(-0.2, 0.05, 0)[..., None] + noise)[..., None].repeat(5, axis=3)

    drawn = fitting.bootstrap(
        errors, lambda rows: fitting.fit(rows, NUMBERS, WIDTHS), resamples=4000
    )

    # coefficients are linear in the cells; the seeds of one number of images are drawn together
    inverse = np.linalg.pinv(fitting.design(NUMBERS, WIDTHS)).reshape(4, 3, 3)
    logs = np.log(errors[..., 0])
    exact = sum(inverse[:, n] @ np.cov(logs[n]) @ inverse[:, n].T / 3 for n in range(3))
    assert np.diag(np.cov(drawn.T)) == pytest.approx(np.diag(exact), rel=0.1)


def test_the_bootstrap_draws_the_same_test_images_for_all_runs(fitting: ModuleType) -> None:
    generator = np.random.default_rng(2)
    difficulty = generator.gamma(1, size=50)
    errors = np.exp(planted(-0.2, 0.05, 0))[..., None, None] * difficulty
    errors = errors.repeat(3, axis=2)

    drawn = fitting.bootstrap(
        errors, lambda rows: fitting.fit(rows, NUMBERS, WIDTHS), resamples=200
    )

    assert drawn[:, 0].std() == pytest.approx(
        difficulty.std() / difficulty.mean() / 50**0.5, rel=0.3
    )
    assert drawn[:, 1:] == pytest.approx(np.tile([-0.2, 0.05, 0], (200, 1)))  # no spread at all


@pytest.mark.parametrize(("b", "c", "expected"), [(-0.2, 0.05, 1.0), (0.05, -0.2, 0.0)])
def test_the_summary_says_which_of_the_two_changes_more(
    fitting: ModuleType, b: float, c: float, expected: float
) -> None:
    noise = np.random.default_rng(3).normal(scale=0.01, size=(3, 3, 3, 20))
    errors = np.exp(planted(b, c, 0)[..., None, None] + noise)

    found = fitting.summary(errors, NUMBERS, WIDTHS)

    assert found["P(images matter more)"] == expected
    assert found["images less width, absolute"][0] == pytest.approx(abs(b) - abs(c), abs=0.01)


def test_slopes_between_neighbours_show_where_the_fit_is_bent(fitting: ModuleType) -> None:
    bent = planted(0, 0.05, 0) + np.array([0.4, 0.0, 0.0])[:, None]  # images help up to 400 only

    found = fitting.slopes(bent, NUMBERS, WIDTHS)

    assert found == pytest.approx([-0.2, 0, 0.05, 0.05])


def test_other_images_are_compared_with_those_drawn_at_random(comparing: ModuleType) -> None:
    kinds = {"random": 0.2, "most diverse": 0.1, "least diverse": 0.4, "half duplicates": 0.2}
    rows = [{"subset": kind, "errors": [error] * 9} for kind, error in kinds.items()] * 3

    found = comparing.others(rows)

    assert found["most diverse"] == pytest.approx([-np.log(2)] * 3, abs=1e-4)
    assert found["least diverse"] == pytest.approx([np.log(2)] * 3, abs=1e-4)
    assert found["half duplicates"] == pytest.approx([0.0] * 3)


def test_farthest_points_spread_and_nearest_ones_do_not(comparing: ModuleType) -> None:
    line = np.array([[0.0], [1.0], [2.0], [9.0], [10.0], [5.5]])

    assert comparing.farthest(line, 3, first=0).tolist() == [0, 4, 5]
    assert sorted(comparing.nearest(line, 3, first=0).tolist()) == [0, 1, 2]


def test_half_of_a_set_with_duplicates_is_distinct(scripts: dict[str, ModuleType]) -> None:
    dataset = index(DataConfig(source=Digits(), resolution=8, channels=1))
    parts = scripts["held_out"].split(dataset, pool=400, looks=50, test=100)
    subsets = scripts["data_or_model"].Subsets(
        pool=parts.pool, labels=dataset.labels.numpy()[parts.pool], features=np.zeros((400, 1))
    )

    drawn = subsets.draw("half duplicates", 200, seed=0)
    chosen = scripts["held_out"].with_split(dataset, training=drawn, held_out=parts.looks)

    assert len(chosen.epoch) == 200
    assert len(chosen.training) == 100
    assert set(chosen.training) <= set(parts.pool)
    assert not {*parts.pool} & {*parts.looks} | {*parts.pool} & {*parts.test}
    assert len(dataset.epoch) == len(dataset.training)  # the dataset itself stays as it was


def test_the_losses_judge_pairs(gan: ModuleType) -> None:
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])

    of_discriminator, of_generator = gan.pairing_losses(real, fake)

    assert of_discriminator == pytest.approx(float(-F.logsigmoid(real - fake).mean()))
    assert of_generator == pytest.approx(float(-F.logsigmoid(fake - real).mean()))
    assert gan.pairing_losses(real + 7, fake + 7)[0] == pytest.approx(float(of_discriminator))


def test_the_gradient_penalty_is_that_of_a_quadratic_discriminator(gan: ModuleType) -> None:
    images = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    weights, scale = torch.linspace(-1, 1, 9).view(1, 3, 3), torch.tensor(0.7, requires_grad=True)
    judged = images.clone().requires_grad_(True)
    logits = (judged * weights).sum((1, 2, 3)) + scale / 2 * judged.square().sum((1, 2, 3))

    penalty = gan.gradient_penalty(logits, judged)
    penalty.backward()

    gradient = weights + 0.7 * images  # of the logit by the image
    assert penalty.item() == pytest.approx(float(gradient.square().sum((1, 2, 3)).mean() / 2))
    by_scale = (gradient * images).sum((1, 2, 3)).mean()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(float(by_scale))


def test_a_step_of_the_discriminator_follows_loss_and_both_penalties(gan: ModuleType) -> None:
    """One step of a GAN whose generator stands still, beside gradients of the separate terms."""
    shape = gan.Shape(image=(1, 4, 4), categories=2, widths=(4, 4), blocks=1)
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = gan.GanConfig(rate=0.0, gamma=0.3, batch_size=2)
    trained = gan.Gan(config, shape, images, torch.tensor([0, 1, 1]), steps=1000, seed=0)
    again = gan.Gan(config, shape, images, torch.tensor([0, 1, 1]), steps=1000, seed=0)

    trained.step()

    chosen = torch.randint(3, (2,), generator=again.noise)
    real, category = images[chosen].requires_grad_(True), torch.tensor([0, 1, 1])[chosen]
    fake = again._drawn(category).detach().requires_grad_(True)
    network = again.discriminator
    real_logits, fake_logits = network(real, category), network(fake, category)
    loss = F.softplus(fake_logits - real_logits).mean()
    for logits, side in ((real_logits, real), (fake_logits, fake)):
        (gradient,) = torch.autograd.grad(logits.sum(), side, create_graph=True)
        loss = loss + 0.3 / 2 * gradient.square().sum((1, 2, 3)).mean()
    loss.backward()
    for mine, other in zip(trained.discriminator.parameters(), network.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad)


def test_a_generator_has_as_many_parameters_as_the_network_beside_it(gan: ModuleType) -> None:
    network = UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention_depths=())
    total = gan.parameters(network.build(image_channels=1))

    shape = gan.gan_shape(network, (1, 8, 8), 10, total)

    assert gan.parameters(gan.Generator(shape)) == pytest.approx(total, rel=0.1)
