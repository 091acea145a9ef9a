"""The difficulty of each noise level, learned along with the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.nn.embeddings import SinusoidalEmbedding
from sfumato.nn.init import zero_init

FREQUENCIES = 128
LIMIT = 20.0  # of the log-SNR, which is infinite at both ends
# scale of the log-SNR before its sinusoids, so that levels half a unit apart are distinguishable
STRETCH = 10.0


class NoUncertainty(nn.Module):
    """No level is harder than another: 0 everywhere, so the loss is unchanged."""

    def forward(self, logsnr: Tensor) -> Tensor:
        """Return zeros: (B,) -> (B,)."""
        return torch.zeros_like(logsnr, dtype=torch.float32)


class LearnedUncertainty(nn.Module):
    """u(log-SNR), the log of the expected loss at a level when loss / e^u + u is minimized; it
    starts at 0.

    Levels then count alike in the gradient, whatever the size of their loss.

    Source: Karras et al. 2024 (arXiv:2312.02696), appendix B.2 (after Kendall et al. 2018,
        arXiv:1705.07115).
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = SinusoidalEmbedding(FREQUENCIES)
        self.out = zero_init(nn.Linear(FREQUENCIES, 1))

    def forward(self, logsnr: Tensor) -> Tensor:
        """Return u of log-SNRs: (B,) -> (B,)."""
        result: Tensor = self.out(self.embedding(STRETCH * logsnr.float().clamp(-LIMIT, LIMIT)))[
            :, 0
        ]
        return result


def weight_by_uncertainty(loss: Tensor, uncertainty: Tensor) -> Tensor:
    """Return loss / e^u + u of each sample, whose minimum over u is at u = log loss."""
    return loss * torch.exp(-uncertainty) + uncertainty
