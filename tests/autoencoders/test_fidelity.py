"""PSNR and structural similarity against their formulas, written out with scipy; of few images,
no Fréchet distance is given.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from sfumato.autoencoders.image_metrics import psnr, ssim
from sfumato.networks.perceptual import RandomFeatures
from sfumato.recipes import autoencoder_stage
from tests.helpers.image_sets import dataset_of, photographs


def pair(channels: int = 3, side: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.from_numpy(
        ndimage.gaussian_filter(
            torch.randn(2, channels, side, side, generator=generator).numpy(), (0, 0, 2, 2)
        )
    )
    a = (a / a.abs().max()).float()
    return a, (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def test_psnr_is_its_formula() -> None:
    a, b = pair()
    expected = [
        10 * np.log10(4 / np.mean((x - y) ** 2))
        for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    assert torch.allclose(psnr(a, b).double(), torch.tensor(expected), atol=1e-4)
    assert psnr(a, a).tolist() == [100.0, 100.0]
    assert psnr(torch.full((1, 1, 4, 4), -1.0), torch.full((1, 1, 4, 4), 1.0)).item() == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_its_formula_where_the_window_fits(channels: int) -> None:
    a, b = pair(channels)

    def local(x: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(x, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    values = []
    for x, y in zip((a.double().numpy() + 1) / 2, (b.double().numpy() + 1) / 2, strict=True):
        of_channels = []
        for p, q in zip(x, y, strict=True):
            mp, mq = local(p), local(q)
            vp, vq, cov = local(p * p) - mp**2, local(q * q) - mq**2, local(p * q) - mp * mq
            c1, c2 = 0.01**2, 0.03**2
            of_channels.append(
                (
                    (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
                ).mean()
            )
        values.append(np.mean(of_channels))
    assert torch.allclose(ssim(a, b).double(), torch.tensor(values), atol=1e-5)


def test_ssim_of_equal_images_is_one_and_of_negatives_is_below_zero() -> None:
    a, _ = pair()
    assert torch.allclose(ssim(a, a), torch.ones(2), atol=1e-6)
    assert (ssim(a, -a) < 0).all()
    small = torch.rand(1, 1, 4, 6)
    assert torch.allclose(ssim(small, small), torch.ones(1), atol=1e-6)


@pytest.mark.parametrize("held_out", [1, 29, 30])
def test_a_frechet_distance_of_reconstructions_is_given_from_thirty_images(
    held_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoder_stage, "reconstruct", lambda codec, images: images)
    monkeypatch.setattr(autoencoder_stage, "default_device", lambda: torch.device("cpu"))
    pixels = photographs(2 + held_out)
    found = autoencoder_stage._reconstruction_frechet(
        None, dataset_of(pixels[:2], pixels[2:]), RandomFeatures()
    )
    assert found.get("rfd_images", 0) == (held_out if held_out >= 30 else 0)
    assert ("rfd" in found) == (held_out >= 30)
    assert held_out < 30 or found["rfd_low"] <= found["rfd"] <= found["rfd_high"]
