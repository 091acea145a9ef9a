"""Attention written out equals PyTorch's fused kernel."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sfumato.nn import attention


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_on_a_cpu_equals_the_fused_kernel_in_float64(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the branch under test does not call it
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", None)
    q, k, v = (torch.randn(2, 3, length, 16).bfloat16().requires_grad_() for length in (9, 5, 5))
    mask = (
        torch.tensor([[True, True, False, True, False], [True] * 5])[:, None, None]
        if masked
        else None
    )
    out = attention.attend(q, k, v, mask)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    monkeypatch.undo()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask)
    expected_grads = torch.autograd.grad(expected.square().sum(), exact)
    assert out.dtype is torch.bfloat16
    for got, want in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert (got.double() - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_use_the_fused_kernel(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 4, 8, dtype=dtype) for _ in range(3))
    assert torch.equal(attention.attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_scores_too_large_to_hold_go_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask: called.append(q.shape) or v,
    )
    long = torch.zeros(1, 1, 2**14, 1, dtype=torch.bfloat16)
    attention.attend(long, long, long)
    assert called == [long.shape]
