"""How close a reconstruction is to its image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, WIDTH = 11, 1.5  # of the Gaussian that structural similarity looks through
K1, K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (B,): 10 log10(2^2 / MSE), at most 100.

    The images are (B, C, H, W) in [-1, 1].
    """
    error = (a - b).double().square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error.clamp(min=4e-10))).float()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity of images (B, C, H, W) in [-1, 1], (B,): 1 if equal.

    It is averaged over channels and over the places where the whole window fits.

    Source: Wang et al. 2004 (doi:10.1109/TIP.2003.819861), eqs. 13 to 16.
    """
    down, across = (windows(side, min(WINDOW, *a.shape[2:])).to(a.device) for side in a.shape[2:])

    def local(x: Tensor) -> Tensor:
        return down @ x @ across.T

    a, b = (a.double() + 1) / 2, (b.double() + 1) / 2
    mean_a, mean_b = local(a), local(b)
    variance_a, variance_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).flatten(1).mean(1).float()


def windows(side: int, size: int) -> Tensor:
    """Return a Gaussian window at each place of a line of `side` values where it fits.

    The shape is (side - size + 1, side), float64; the weights of a window add up to 1.
    """
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(offsets**2) / (2 * WIDTH**2))
    return torch.stack(
        [F.pad(line / line.sum(), (first, side - size - first)) for first in range(side - size + 1)]
    )
