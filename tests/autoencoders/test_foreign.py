"""Autoencoders that only diffusers knows: its own numbers, kept with our statistics, and what is
refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfumato.autoencoders import LatentAutoencoder, io
from sfumato.autoencoders.diffusers_codec import ForeignCodec
from sfumato.errors import CheckpointError


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    widths = {"encoder_block_out_channels": (8, 16, 16), "decoder_block_out_channels": (8, 16, 16)}
    depth = {"encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1)}
    scales = {
        "encoder_qkv_multiscales": ((), (), ()),
        "decoder_qkv_multiscales": ((), (), ()),
        "scaling_factor": 0.5,
    }
    model = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, **blocks, **widths, **depth, **scales
    ).eval()
    model.folder = tmp_path_factory.mktemp("dc") / "folder"
    model.save_pretrained(model.folder)
    return model


def images(side: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_deep_compression_autoencoder_gives_its_own_numbers(theirs) -> None:
    ours, x = io.load(theirs.folder), images()
    with torch.no_grad():
        z = theirs.encode(x).latent
        assert (ours.encode(x) - 0.5 * z).abs().max() < 1e-5  # its scaling factor is honoured
        assert (ours.decode(0.5 * z) - theirs.decode(z).sample).abs().max() < 1e-5
    assert (ours.factor, ours.latent_channels, ours.image_channels) == (4, 4, 3)
    drawn = [
        ours.sample_posterior(
            ours.moments(x), lambda shape, s=seed: torch.randn(shape, generator=s)
        )
        for seed in map(generator, (0, 1))
    ]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-5  # there is nothing to draw


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_is_copied_with_the_statistics_that_were_measured(theirs, tmp_path: Path) -> None:
    codec = io.load(theirs.folder).codec
    measured = LatentAutoencoder(codec, torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4))
    io.save(measured, tmp_path / "final", {})
    assert str(theirs.folder) not in (tmp_path / "final" / "config.json").read_text()
    again, x = io.load(tmp_path / "final"), images()
    assert torch.equal(again.encode(x), measured.encode(x))
    assert torch.equal(again.decode(again.encode(x)), measured.decode(measured.encode(x)))


def test_other_kinds_and_damage_are_refused(theirs, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="VQModel"):
        ForeignCodec.load("VQModel", tmp_path)
    (tmp_path / "config.json").write_text((theirs.folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        io.load(tmp_path)
