"""Every number of a configuration, set to what it should not be: it is refused, or the run ends with
finite weights, or says that it diverged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sfumato import config
from sfumato.errors import SfumatoError
from sfumato.recipes import Run
from tests.faults.conftest import Case
from tests.faults.injector import newest

WRONG = {"nan": math.nan, "inf": math.inf, "-1": -1, "0": 0, "1e308": 1e308, "1e30": 10**30}
WIDER = {
    "optimizer.muon": {},
    "post_hoc_ema": {"widths": [0.1], "num": 2},
    "auxiliary.dispersive": {},
    "autoencoder.losses.adversarial": {},
    "data.buckets": {},
    "budget.minutes": 1.0,
    "budget.epochs": 5.0,
    "budget.samples": 1000,
}
# how long a run takes or how large it is: a person may want any
SIZES = ("budget.", "every_minutes", "stall_minutes", "sweep.minutes")


def numbers(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif (isinstance(value, int | float) and not isinstance(value, bool)) or (
            isinstance(value, list) and value and all(isinstance(v, int | float) for v in value)
        ):
            yield prefix + key, value


def accepted(base: dict[str, Any]) -> tuple[int, list[tuple[str, Any]]]:
    """Return how many numbers there are, and the wrong values that pass."""
    count, passed = 0, []
    for key, value in numbers(base):
        count += 1
        for wrong in WRONG.values():
            given = [wrong] * len(value) if isinstance(value, list) else wrong
            try:
                config.parse(Run, config.with_overrides(base, {key: given}))
                passed.append((key, given))
            except SfumatoError:
                pass  # any other error fails the test
    return count, passed


def whole(case: Case) -> dict[str, Any]:
    base = config.with_overrides(config.load_yaml_file(case.recipe), WIDER)
    plain: dict[str, Any] = config.plain(config.parse(Run, base))
    return plain


def test_no_number_may_be_infinite_or_absurd(latent: Case) -> None:
    count, passed = accepted(whole(latent))
    assert count > 100
    absurd = [
        (key, given)
        for key, given in passed
        for value in (given if isinstance(given, list) else [given])
        if not math.isfinite(value) or abs(value) > 1e12
    ]
    assert absurd == []


@pytest.mark.slow
def test_what_is_accepted_ends_with_finite_weights(latent: Case, tmp_path: Path) -> None:
    _, passed = accepted(whole(latent))
    tried = [(key, given) for key, given in passed if not any(part in key for part in SIZES)]
    assert len(tried) > 30
    wrong = []
    for key, given in tried:
        run = latent.lab.new("number")
        code, said = latent.lab.call(
            "train", latent.recipe, "--run", run, "budget.steps=3", "autoencoder.budget.steps=3",
            f"{key}={given}",
        )  # fmt: skip
        if code in (2, 3) and "hint: " in said:
            continue
        tensors = load_file(newest(run) / "ema.safetensors") if code == 0 else {}
        if code or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            wrong.append((key, given, code, said[-300:]))
    assert wrong == []
