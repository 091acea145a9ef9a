"""The KL autoencoder: diffusers' own numbers, statistics inside the weights, and what is
refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sfumato.autoencoders import KLAutoencoder, KLConfig, LatentAutoencoder, io, measure
from sfumato.errors import CheckpointError, ConfigError, DataError, ShapeError
from tests.helpers.autoencoders import random_autoencoder

SHAPES = [
    KLConfig(channels=(16, 32), latent_channels=4, blocks=1, groups=8),
    KLConfig(
        channels=(16, 32, 32),
        latent_channels=3,
        blocks=2,
        groups=16,
        attention="middle",
        projections="none",
    ),
    KLConfig(channels=(8, 16, 16, 24), latent_channels=16, blocks=1, groups=4, attention="middle"),
]


def images(count: int = 3, channels: int = 3, side: int = 32) -> torch.Tensor:
    return (
        torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    )


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_ours_and_diffusers_give_the_same_numbers(
    config: KLConfig, channels: int, tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    codec = random_autoencoder(config, channels)
    mean, deviation = (
        torch.linspace(-1, 1, config.latent_channels),
        torch.linspace(0.5, 2, config.latent_channels),
    )
    latents = LatentAutoencoder(codec, mean, deviation)
    folder = io.save(latents, tmp_path / "saved", {})
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    x = images(channels=channels)
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        ours_mean, ours_log = latents.moments(x).chunk(2, dim=1)
        assert (posterior.mean - ours_mean).abs().max() < 1e-4
        assert (posterior.logvar - ours_log).abs().max() < 1e-4
        assert (theirs.decode(ours_mean).sample - latents.decode(ours_mean)).abs().max() < 1e-4
    assert theirs.config.scaling_factor == 1
    again = io.load(folder)
    assert torch.equal(again.mean, torch.zeros_like(mean))
    assert (again.decode(ours_mean) - latents.decode(ours_mean)).abs().max() < 1e-4


@pytest.mark.parametrize("attention", [True, False])
def test_a_folder_of_diffusers_is_read_with_its_scaling_factor(
    attention: bool, tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=8,
        mid_block_add_attention=attention,
        scaling_factor=0.18215,
        shift_factor=0.1,
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = io.load(tmp_path / "theirs")
    x = images()
    with torch.no_grad():
        z = (theirs.encode(x).latent_dist.mean - 0.1) * 0.18215
        assert (ours.encode(x) - z).abs().max() < 1e-4
        assert (ours.decode(z) - theirs.decode(z / 0.18215 + 0.1).sample).abs().max() < 1e-4


def test_old_names_of_attention_are_read(tmp_path: Path) -> None:
    codec = random_autoencoder(SHAPES[2])
    folder = io.save(
        LatentAutoencoder(codec, torch.zeros(16), torch.ones(16)), tmp_path / "saved", {}
    )
    from safetensors.torch import load_file, save_file

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(folder / io.WEIGHTS).items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = tensor.clone()
    save_file(renamed, folder / io.WEIGHTS)
    x = images()
    assert torch.equal(
        io.load(folder).encode(x),
        LatentAutoencoder(codec, torch.zeros(16), torch.ones(16)).encode(x),
    )


def test_latents_have_zero_mean_and_unit_variance_over_what_was_measured() -> None:
    codec, x = random_autoencoder(SHAPES[0]), images(64, side=16)
    found = measure(codec, x.split(20))
    latents = LatentAutoencoder(codec, found.mean, found.deviation)
    generator = torch.Generator().manual_seed(0)
    draws = latents.sample_posterior(
        latents.moments(x), lambda shape: torch.randn(shape, generator=generator)
    )
    values = draws.transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 0.05
    assert (values.std(1) - 1).abs().max() < 0.05
    moments = torch.cat([codec.moments(part) for part in x.split(7)])
    mean, log_variance = moments.double().chunk(2, dim=1)
    exact = (mean.var((0, 2, 3), correction=0) + log_variance.exp().mean((0, 2, 3))).sqrt()
    assert torch.allclose(found.deviation.double(), exact, rtol=1e-5)


def test_channels_that_tell_nothing_are_named() -> None:
    codec = random_autoencoder(SHAPES[0])
    codec.quant_conv.weight.data[1] = 0  # the mean of channel 1 is the same everywhere
    found = measure(codec, [images(8)])
    assert found.dead == [1]
    assert found.informative[0] > 0.01


def test_constant_images_have_latents_still() -> None:
    found = measure(random_autoencoder(SHAPES[0]), [torch.zeros(4, 3, 16, 16)])
    assert bool((found.deviation > 0).all())


def test_latents_without_any_variance_are_refused() -> None:
    codec = random_autoencoder(SHAPES[0])
    codec.quant_conv.weight.data.zero_()
    codec.quant_conv.bias.data.fill_(-30.0)
    with pytest.raises(DataError, match="a latent channel has zero variance"):
        measure(codec, [images(8)])


def test_wrong_images_and_shapes_are_refused() -> None:
    latents = LatentAutoencoder(random_autoencoder(SHAPES[1]), torch.zeros(3), torch.ones(3))
    for wrong in (images(side=30), images(channels=1)):
        with pytest.raises(ShapeError, match="multiples of 4"):
            latents.moments(wrong)
    for settings in ({"channels": ()}, {"latent_channels": 0}, {"channels": (20,), "groups": 8}):
        with pytest.raises(ConfigError):
            KLConfig(**settings)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = io.save(
        LatentAutoencoder(random_autoencoder(SHAPES[0]), torch.zeros(4), torch.ones(4)),
        tmp_path / "saved",
        {},
    )
    config = json.loads((folder / io.CONFIG).read_text())
    for wrong in (
        {"latent_channels": 5},
        {"act_fn": "relu"},
        {"_class_name": "AutoencoderOobleck"},
        {"block_out_channels": None},
        {"use_quant_conv": False},
    ):
        (folder / io.CONFIG).write_text(json.dumps(config | wrong))
        with pytest.raises(CheckpointError):
            io.load(folder)
    (folder / io.CONFIG).write_text(json.dumps(config))
    (folder / io.STATISTICS).write_text(json.dumps({"mean": [0.0], "deviation": [1.0]}))
    with pytest.raises(CheckpointError, match="statistics"):
        io.load(folder)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        io.load(tmp_path / "nothing")


def test_saving_replaces_whole_folders_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LatentAutoencoder(random_autoencoder(SHAPES[0]), torch.zeros(4), torch.ones(4))
    folder = io.save(first, tmp_path / "saved", {"from": "here"})
    assert json.loads((folder / io.STATISTICS).read_text())["from"] == "here"

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(io, "save_file", full)
    with pytest.raises(CheckpointError, match="No space"):
        io.save(
            LatentAutoencoder(random_autoencoder(SHAPES[0], seed=1), torch.zeros(4), torch.ones(4)),
            folder,
            {},
        )
    assert io.identity(io.load(folder)) == io.identity(io.fold_statistics(first))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("config", SHAPES)
def test_an_untrained_one_passes_on_what_it_is_given(config: KLConfig) -> None:
    """Images of one colour keep it, as far as untrained ends allow: what lies between them is
    nearly the mean over each square.
    """
    torch.manual_seed(0)
    encoder = KLAutoencoder(config, image_channels=3).encoder
    side = 4 * config.factor
    with torch.no_grad():
        x = encoder.conv_in(torch.randn(2, 3, side, side))
        before = F.avg_pool2d(x, config.factor)
        for block in encoder.down_blocks:
            x = block(x)
    kept = torch.corrcoef(torch.stack([x[:, : before.shape[1]].flatten(), before.flatten()]))[0, 1]
    assert kept > 0.5
