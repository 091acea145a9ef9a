"""Decoding in tiles gives the whole's result: no seam, no tint of a tile's own."""

from __future__ import annotations

import pytest
import torch

from sfumato.autoencoders import KLAutoencoder, KLConfig, LatentAutoencoder, latent_space
from sfumato.autoencoders.tiling import decode_in_tiles, tiles
from tests.helpers.autoencoders import random_autoencoder


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("size", [7, 16, 40])
def test_tiles_and_whole_agree(blocks: int, size: int) -> None:
    codec = random_autoencoder(
        KLConfig(
            channels=(8, 16, 16), latent_channels=4, blocks=blocks, groups=4, attention="middle"
        )
    )
    # brighter to one side, which a tile's own norms would undo
    z = torch.randn(2, 4, 20, 26) + torch.linspace(-3, 3, 26)
    with torch.no_grad():
        whole = codec.decode(z)
    assert (decode_in_tiles(codec, z, size=size) - whole).abs().max() < 2 / 255 * 1e-2


def test_norms_of_each_tile_alone_would_show() -> None:
    """The negative control: what the statistics are gathered for."""
    codec = random_autoencoder(
        KLConfig(channels=(8, 16, 16), latent_channels=4, blocks=1, groups=4)
    )
    z = torch.randn(1, 4, 20, 26) + torch.linspace(-3, 3, 26)
    with torch.no_grad():
        whole, x = codec.decode(z), codec.decode_low_res(z)
        out = torch.empty_like(whole)
        for tile in tiles(*x.shape[2:], 16):
            part = tile.crop(x)
            out[(..., *(slice(2 * s.start, 2 * s.stop) for s in tile.inner))] = tile.crop_core(
                codec.high_res_decoder(part), part
            )
    assert (out - whole).abs().max() > 2 / 255


def test_tiles_cover_everything_once() -> None:
    seen = torch.zeros(37, 53)
    for tile in tiles(37, 53, 10):
        seen[tile.inner] += 1
        assert seen[tile.outer][tile.core].shape == seen[tile.inner].shape
    assert (seen == 1).all()


def test_large_images_are_decoded_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(
        latent_space, "decode_in_tiles", lambda codec, z: called.append(z.shape) or codec.decode(z)
    )
    monkeypatch.setattr(latent_space, "WHOLE", 32 * 32)
    latents = LatentAutoencoder(
        KLAutoencoder(KLConfig(channels=(8, 8), latent_channels=2, groups=4), image_channels=1),
        torch.zeros(2),
        torch.ones(2),
    )
    with torch.no_grad():
        latents.decode(torch.zeros(1, 2, 16, 16))
        assert not called
        latents.decode(torch.zeros(1, 2, 16, 18))
    assert len(called) == 1
    latents.decode(torch.zeros(1, 2, 16, 18))  # where a gradient is wanted, it is made whole
    assert len(called) == 1
