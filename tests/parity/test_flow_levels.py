"""Levels of flow-matching schedulers beside those that diffusers sets, without a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sfumato.errors import ConfigError, ScheduleError
from sfumato.interop.schedulers import read_scheduler
from sfumato.sampling import grid

diffusers = pytest.importorskip("diffusers")

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "no shift": {},
    "constant shift": {"shift": 3.0},
    "dynamic": DYNAMIC,
    "dynamic, long": {**DYNAMIC, "max_image_seq_len": 8192},
    "terminal": {**DYNAMIC, "shift_terminal": 0.02},
    "Karras": {"shift": 3.0, "use_karras_sigmas": True},
    "exponential": {**DYNAMIC, "use_exponential_sigmas": True},
    "beta": {**DYNAMIC, "use_beta_sigmas": True},
    "terminal, then Karras": {**DYNAMIC, "shift_terminal": 0.1, "use_karras_sigmas": True},
}


def mu_of(config: Any, tokens: int) -> float:
    """The line through two points that pipelines compute, for a number of tokens."""
    lengths = (config["base_image_seq_len"], config["max_image_seq_len"])
    return float(np.interp(tokens, lengths, (config["base_shift"], config["max_shift"])))


def read(scheduler: Any, **options: Any) -> Any:
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}
    return read_scheduler(config, where="here", **options).sampling


@pytest.mark.parametrize("size", [(128, 128), (64, 96)])
@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("changes", SCHEDULERS.values(), ids=SCHEDULERS)
def test_levels_are_those_that_a_pipeline_with_even_times_sets(
    changes: dict[str, Any], steps: int, size: tuple[int, int]
) -> None:
    if steps == 1 and "shift_terminal" in changes:
        pytest.skip("diffusers divides by zero")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**changes)
    mu = mu_of(scheduler.config, size[0] * size[1] // 4)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    sampling = read(scheduler, even_times=True)
    levels = grid(sampling.schedule.at_size(*size), steps, spacing=sampling.spacing)
    torch.testing.assert_close(levels.sigma.float(), scheduler.sigmas, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(levels.alpha, 1 - levels.sigma)


@pytest.mark.parametrize("changes", [{}, {"shift": 3.0}, DYNAMIC, {"use_karras_sigmas": True}])
def test_levels_are_those_that_the_scheduler_sets_itself(changes: dict[str, Any]) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**changes)
    scheduler.set_timesteps(12, mu=mu_of(scheduler.config, 1024))
    sampling = read(scheduler)
    levels = grid(sampling.schedule.at_size(64, 64), 12, spacing=sampling.spacing)
    torch.testing.assert_close(levels.sigma.float(), scheduler.sigmas, rtol=1e-5, atol=1e-7)


def test_a_size_matters_where_the_shift_is_dynamic_only() -> None:
    for changes, differs in ((DYNAMIC, True), ({"shift": 3.0}, False)):
        schedule = read(diffusers.FlowMatchEulerDiscreteScheduler(**changes)).schedule
        small, large = (schedule.at_size(side, side)(torch.tensor(0.5)) for side in (32, 128))
        assert (small.sigma != large.sigma) == differs
        assert large.sigma >= small.sigma


@pytest.mark.parametrize("changes", [DYNAMIC, {**DYNAMIC, "shift_terminal": 0.02}])
def test_an_image_to_start_from_takes_the_last_levels(changes: dict[str, Any]) -> None:
    sampling = read(diffusers.FlowMatchEulerDiscreteScheduler(**changes))
    whole = grid(sampling.schedule, 10, spacing=sampling.spacing)
    part = grid(sampling.schedule, 10, spacing=sampling.spacing, strength=0.4)
    torch.testing.assert_close(part.sigma, whole.sigma[-5:])


def test_a_rule_needs_a_finite_coordinate() -> None:
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "use_karras_sigmas": True,
        "rescale_betas_zero_snr": True,
    }
    sampling = read_scheduler(config, where="here").sampling
    with pytest.raises(ScheduleError, match="infinite"):
        grid(sampling.schedule, 10, spacing=sampling.spacing)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"_class_name": "DDIMScheduler", "use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"_class_name": "DDIMScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "prediction_type"),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 10.0}, "sigma_max = 10.0"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "unsupported scheduler class"),
    ],
)
def test_what_has_no_equivalent_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_scheduler(changes, where="here")
