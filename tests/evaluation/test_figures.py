"""Figures have the intervals of the textbooks, and none without an interval, n, and a reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from sfumato.evaluation.figures import Estimate, Figure, wilson


@pytest.mark.parametrize("n", [1, 5, 30, 500])
def test_wilsons_interval_is_that_of_scipy(n: int) -> None:
    for successes in range(0, n + 1, max(1, n // 7)):
        interval = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        assert wilson(successes / n, n) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_proportions_have_wilsons_interval_and_other_means_students() -> None:
    none = Estimate.of(torch.zeros(30))
    assert (none.mean, none.low, none.high, none.n) == (0.0, *wilson(0.0, 30), 30)
    half = Estimate.of(torch.tensor([0.0, 1.0, torch.nan, 1.0, 0.0]))
    assert (half.low, half.high, half.n) == (*wilson(0.5, 4), 4)
    values = [0.0, 0.4, 0.5, 1.2]
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    other = Estimate.of(torch.tensor(values))
    assert (other.low, other.high) == pytest.approx(expected, abs=1e-6)
    figure = Figure.mean(np.array([*values, np.inf]), metric="m", reference="r")
    assert (figure.low, figure.high) == pytest.approx(expected, abs=1e-6)
    assert figure.n == 4


def test_nothing_measured_is_no_figure_and_one_image_has_no_interval() -> None:
    words = {"metric": "m", "reference": "r"}
    assert Figure.mean(np.zeros(0), **words) is None
    assert Figure.proportion(np.zeros(0), **words) is None
    alone = Figure.mean(np.array([2.0]), **words)
    assert (alone.value, alone.low, alone.high) == (2.0, None, None)
    assert alone.text("{:.1f}".format) == "2.0"
    assert Estimate.of(torch.tensor([torch.nan])).figure("m", "r") is None
    assert Estimate.of(torch.tensor([0.3])).figure("m", "r").low is None
