"""Averages reconstructed afterwards, against those tracked along the way and against quadrature."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sfumato import load
from sfumato.cli.ema import ema
from sfumato.errors import CheckpointError, ConfigError
from sfumato.runs import resume, train
from sfumato.training import Budget, CheckpointConfig, PostHocEMAConfig, PowerEMA
from sfumato.training.post_hoc_ema import Profile, overlap, solve_weights
from tests.helpers.runs import images, tiny_run


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((7, 3.0), (5, 9.0)),
        ((5, 9.0), (7, 3.0)),
        ((4, 6.94), (4, 6.94)),
        ((1000, 16.97), (300, 6.94)),
    ],
)
def test_overlap_is_the_integral_of_the_product(a: tuple, b: tuple) -> None:
    a, b = Profile(*a), Profile(*b)
    t = (np.arange(2_000_000) + 0.5) / 2_000_000 * min(a.step, b.step)
    dense = [(p.gamma + 1) * t**p.gamma / float(p.step) ** (p.gamma + 1) for p in (a, b)]
    assert overlap(a, b) == pytest.approx(
        float((dense[0] * dense[1]).mean() * min(a.step, b.step)), rel=1e-6
    )


def test_an_average_that_was_kept_is_itself() -> None:
    kept = [
        Profile(step, PowerEMA(sigma).gamma) for step in (250, 500, 1000) for sigma in (0.05, 0.1)
    ]
    assert np.allclose(solve_weights(kept, kept[3]), np.eye(6)[3], atol=1e-6)


@pytest.mark.parametrize("widths", [(0.1,), (0.1, 0.25)])
@pytest.mark.parametrize("steps", [(1000,), (500, 1000), tuple(range(100, 1001, 100))])
@pytest.mark.parametrize("wanted", [0.05, 0.1, 0.25])
def test_shares_sum_to_one_however_little_was_kept(
    widths: tuple, steps: tuple, wanted: float
) -> None:
    """Or all weights would be made larger or smaller: what never changed stays as it is."""
    kept = [Profile(step, PowerEMA(width).gamma) for step in steps for width in widths]
    assert solve_weights(kept, Profile(1000, PowerEMA(wanted).gamma)).sum() == pytest.approx(
        1, abs=1e-9
    )


@pytest.mark.parametrize("sigma", [0.06, 0.08, 0.15, 0.2])
def test_a_reconstructed_average_is_the_tracked_one(sigma: float) -> None:
    """Weights on a random walk with drift, as training's are; all averages tracked step by step."""
    steps, every = 4_000, 250
    rng = np.random.default_rng(0)
    weights = (
        np.cumsum(rng.normal(0, 0.02, (steps, 50)), axis=0)
        + np.linspace(0, 1, steps)[:, None]
        + rng.normal(0, 1, 50)
    )
    profiles = {width: PowerEMA(width) for width in (0.05, 0.1, sigma)}
    averages = {width: np.zeros(50) for width in profiles}
    kept: list[Profile] = []
    values: list[np.ndarray] = []
    for step in range(1, steps + 1):
        for width, profile in profiles.items():
            averages[width] += (1 - profile.decay(step)) * (weights[step - 1] - averages[width])
        if step % every == 0:
            for width in (0.05, 0.1):
                kept.append(Profile(step, profiles[width].gamma))
                values.append(averages[width].copy())
    made = solve_weights(kept, Profile(steps, profiles[sigma].gamma)) @ np.array(values)
    scale = np.sqrt((averages[sigma] ** 2).mean())
    assert np.sqrt(((made - averages[sigma]) ** 2).mean()) / scale < 1e-2


@pytest.mark.parametrize("width", [0.06, pytest.param(0.2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_run_keeps_what_any_width_is_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], width: float
) -> None:
    """The run's own average, whose width was not kept, is reconstructed."""
    settings = replace(
        tiny_run(images(tmp_path / "images")),
        budget=Budget(steps=60),
        ema=PowerEMA(width),
        post_hoc_ema=PostHocEMAConfig(widths=(0.1, 0.25), num=30),
        checkpoint=CheckpointConfig(every_steps=20),
    )
    run = train(settings, run=tmp_path / "run")
    assert len(list((run / "averages").glob("ema-*/step-*.safetensors"))) == 2 * 30
    wanted, made = load(run).model.state_dict(), load(run, weights=width).model.state_dict()
    errors = {
        name: float((made[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-3))
        for name in wanted
    }
    assert max(errors.values()) < 1e-4
    ema(run, width=[0.05, 0.2])
    assert "least error" in capsys.readouterr().out


def test_a_larger_budget_goes_on_keeping_and_forgets_what_it_will_take_again(
    tmp_path: Path,
) -> None:
    settings = replace(
        tiny_run(images(tmp_path / "images")),
        budget=Budget(steps=8),
        post_hoc_ema=PostHocEMAConfig(widths=(0.1,), num=4),
    )
    run = train(settings, run=tmp_path / "run")
    kept = run / "averages" / "ema-0.1"
    assert [path.stem for path in sorted(kept.iterdir())] == [
        f"step-{step:09d}" for step in (2, 4, 6, 8)
    ]
    (kept / "step-000000011.safetensors").write_bytes(
        b"of a training that was killed and will take this step anew"
    )
    resume(run, overrides=["budget.steps=16"])
    assert [path.stem for path in sorted(kept.iterdir())] == [
        f"step-{step:09d}" for step in (2, 4, 6, 8, 12, 16)
    ]
    (kept / "step-000000012.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(run, weights=0.15)


def test_a_run_that_kept_nothing_says_what_to_do(tmp_path: Path) -> None:
    run = train(
        replace(tiny_run(images(tmp_path / "images")), budget=Budget(steps=1)), run=tmp_path / "run"
    )
    with pytest.raises(CheckpointError, match=r"post_hoc_ema\.widths"):
        load(run, weights=0.15)


@pytest.mark.parametrize("wrong", [{"widths": (0.1, 0.1)}, {"widths": (0.5,)}, {"num": 0}])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        PostHocEMAConfig(**wrong)
