"""Normalization by the root mean square, against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from sfumato.nn.norms import RMSNorm, rms_norm


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_values_are_divided_by_their_root_mean_square(dtype: torch.dtype, error: float) -> None:
    x = (torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = rms_norm(x)
    assert normed.dtype is dtype
    assert (normed.double() - exact).abs().max() < error * exact.abs().max()


def test_the_learned_weight_scales_channels_and_keeps_the_precision() -> None:
    module = RMSNorm(4)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([1.0, 2.0, 0.0, -1.0]))
    x = torch.tensor([[2.0, 2.0, 2.0, 2.0]], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x)
    assert found.dtype is torch.bfloat16
    assert found.tolist() == [[1.0, 2.0, 0.0, -1.0]]


def test_the_gradient_is_that_of_the_formula() -> None:
    x = torch.randn(
        2, 3, 8, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1)
    )
    weight = torch.rand(
        8, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(2)
    )
    given = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    own = torch.autograd.grad((rms_norm(x, weight) * given).sum(), (x, weight))
    exact = torch.autograd.grad(
        (torch.nn.functional.rms_norm(x, (8,), weight, 1e-6) * given).sum(), (x, weight)
    )
    for a, b in zip(own, exact, strict=True):
        assert (a - b).abs().max() < 1e-12
