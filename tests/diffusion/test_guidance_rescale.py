"""Rescaled guidance beside its formulas, written down with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.condition import Condition
from sfumato.diffusion import (
    ClassifierFree,
    Denoised,
    Epsilon,
    Flow,
    GuidanceTerm,
    MatchDeviation,
    MatchNorm,
    NoiseLevel,
    RescaledGuidance,
)

GENERATOR = torch.Generator().manual_seed(0)
GUIDED, PLAIN = (torch.randn(2, 4, 6, 8, generator=GENERATOR) * scale for scale in (3.0, 1.0))


def test_deviations_are_matched_in_part() -> None:
    """Lin et al. 2023, eq. 15-16."""
    result = MatchDeviation(share=0.7)(GUIDED, PLAIN).numpy()
    for image, guided, plain in zip(result, GUIDED.numpy(), PLAIN.numpy(), strict=True):
        ratio = plain.std(ddof=1) / guided.std(ddof=1)
        np.testing.assert_allclose(image, 0.7 * guided * ratio + 0.3 * guided, rtol=1e-5)


def test_each_row_has_the_length_of_the_conditional_one() -> None:
    result = MatchNorm(parts="rows")(GUIDED, PLAIN)
    torch.testing.assert_close(result.norm(dim=-1), PLAIN.norm(dim=-1))
    directions = (part / part.norm(dim=-1, keepdim=True) for part in (result, GUIDED))
    torch.testing.assert_close(*directions)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_each_cell_has_the_length_of_the_conditional_one(size: tuple[int, int]) -> None:
    guided, plain = (x[..., : size[0], : size[1]] for x in (GUIDED, PLAIN))
    result = MatchNorm(parts="cells")(guided, plain).numpy()
    for row in range(0, size[0], 2):
        for column in range(0, size[1], 2):
            cell = np.s_[:, :, row : row + 2, column : column + 2]
            lengths = [
                np.sqrt((part[cell] ** 2).sum((1, 2, 3), keepdims=True))
                for part in (plain.numpy(), guided.numpy())
            ]
            expected = guided.numpy()[cell] * lengths[0] / lengths[1]
            np.testing.assert_allclose(result[cell], expected, rtol=1e-5)


@pytest.mark.parametrize("parameterization", [Epsilon(), Flow()])
def test_it_is_the_networks_target_that_is_rescaled(parameterization: Epsilon | Flow) -> None:
    """And the pair still explains x."""
    level = NoiseLevel(torch.tensor(0.6), torch.tensor(0.8))
    outputs = {1.0: PLAIN[:1], 0.0: GUIDED[:1]}

    def denoiser(x: torch.Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        assert condition.vector is not None
        rows = [outputs[float(row)] for row in condition.vector]
        return parameterization.solve(torch.cat(rows), x, level)

    null, asked = (Condition(vector=torch.tensor([[value]])) for value in (0.0, 1.0))
    guidance = ClassifierFree(denoiser=denoiser, terms=(GuidanceTerm(null, 3.0),))
    x = torch.randn(1, 4, 6, 8, generator=GENERATOR)
    result = RescaledGuidance(
        guidance=guidance, parameterization=parameterization, rescale=MatchDeviation(share=1.0)
    )(x, level, asked)
    guided = outputs[0.0] + 3 * (outputs[1.0] - outputs[0.0])
    expected = guided * outputs[1.0].std() / guided.std()
    torch.testing.assert_close(parameterization.target(result, level), expected)
    torch.testing.assert_close(level.mix(*result), x)
