"""Tiny autoencoders: diffusers' own numbers from its folders, the same from TAESD's files, and the
block that gathers context.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from sfumato.autoencoders import LatentAutoencoder, TinyAutoencoder, io
from sfumato.errors import CheckpointError


def images(side: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny(
        latent_channels=5,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
    ).eval()
    folder = tmp_path_factory.mktemp("tiny") / "folder"
    model.save_pretrained(folder)
    model.folder = folder
    return model


def taesd_files(folder: Path, place: Path) -> tuple[Path, Path]:
    """The same weights as TAESD's two files: layers counted from 0, the decoder's from 1 since it
    begins with the squashing.
    """
    tensors = load_file(folder / io.WEIGHTS)
    for half, shift in (("encoder", 0), ("decoder", 1)):
        found = {}
        for name, tensor in tensors.items():
            if name.startswith(half):
                _, _, number, rest = name.split(".", 3)
                found[f"{int(number) + shift}.{rest}"] = tensor
        save_file(found, place / f"{half}.safetensors")
    return place / "encoder.safetensors", place / "decoder.safetensors"


def test_a_folder_of_diffusers_gives_its_numbers(theirs, tmp_path: Path) -> None:
    ours, x = io.load(theirs.folder), images()
    with torch.no_grad():
        z = theirs.encode(x).latents
        assert (ours.encode(x) - z).abs().max() < 1e-5
        assert (ours.decode(z) - theirs.decode(z).sample).abs().max() < 1e-5
    assert (ours.factor, ours.latent_channels, ours.image_channels) == (8, 5, 3)
    noise = torch.randn(2, 5, 4, 4)
    # there is nothing to draw
    assert (ours.sample_posterior(ours.moments(x), lambda shape: noise) - z).abs().max() < 1e-5


def test_the_two_files_of_taesd_give_the_same(theirs, tmp_path: Path) -> None:
    ours, x = io.load(*taesd_files(theirs.folder, tmp_path)), images()
    folder = io.load(theirs.folder)
    assert torch.equal(ours.encode(x), folder.encode(x))
    assert torch.equal(ours.decode(ours.encode(x)), folder.decode(folder.encode(x)))


def test_what_is_saved_is_read_back_with_its_statistics(theirs, tmp_path: Path) -> None:
    codec = io.load(theirs.folder).codec
    latents = LatentAutoencoder(codec, torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5))
    again, x = io.load(io.save(latents, tmp_path / "saved", {})), images()
    assert torch.equal(again.encode(x), latents.encode(x))
    assert torch.equal(again.decode(again.encode(x)), latents.decode(latents.encode(x)))
    assert io.identity(again) == io.identity(latents)
    diffusers = pytest.importorskip("diffusers")
    reopened = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        z = theirs.encode(x).latents
        assert torch.allclose(reopened.decode(z).sample, theirs.decode(z).sample, atol=1e-5)


def test_a_block_gathers_context_by_its_normed_branch() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    block = {
        f"conv.{i}.{kind}": draw(*shape)
        for i in (0, 2, 4)
        for kind, shape in (("weight", (8, 8, 3, 3)), ("bias", (8,)))
    }
    block |= {
        "pool.0.weight": draw(32, 8, 1, 1),
        "pool.1.weight": draw(32),
        "pool.1.bias": draw(32),
        "pool.3.weight": draw(8, 32, 1, 1),
    }
    encoder = {
        "0.weight": draw(8, 3, 3, 3),
        "0.bias": draw(8),
        "2.weight": draw(4, 8, 3, 3),
        "2.bias": draw(4),
    }
    encoder |= {f"1.{name}": tensor for name, tensor in block.items()}
    decoder = {
        "1.weight": draw(8, 4, 3, 3),
        "1.bias": draw(8),
        "3.weight": draw(3, 8, 3, 3),
        "3.bias": draw(3),
    }
    codec, x = TinyAutoencoder(encoder, decoder), images(8)
    h = F.conv2d((x + 1) / 2, encoder["0.weight"], encoder["0.bias"], padding=1)
    gathered = F.group_norm(
        F.conv2d(h, block["pool.0.weight"]), 4, block["pool.1.weight"], block["pool.1.bias"]
    )
    h = h + F.conv2d(F.relu(gathered), block["pool.3.weight"])
    out = h
    for i in (0, 2, 4):
        out = F.conv2d(
            out if i == 0 else F.relu(out),
            block[f"conv.{i}.weight"],
            block[f"conv.{i}.bias"],
            padding=1,
        )
    expected = F.conv2d(F.relu(out + h), encoder["2.weight"], encoder["2.bias"], padding=1)
    assert torch.allclose(codec.moments(x).chunk(2, dim=1)[0], expected, atol=1e-5)
    assert codec.factor == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"layers": torch.zeros(1)},
        {"0.weight": torch.zeros(8, 3, 3, 3), "0.bias": torch.zeros(4)},
        {"0.weight": torch.zeros(8, 3, 5, 5), "0.bias": torch.zeros(8)},
        {"0.conv.0.weight": torch.zeros(8, 3, 3, 3)},
        {"0.what": torch.zeros(3)},
    ],
)
def test_other_tensors_are_refused(wrong: dict[str, torch.Tensor]) -> None:
    right = {"0.weight": torch.zeros(8, 3, 3, 3), "0.bias": torch.zeros(8)}
    with pytest.raises(CheckpointError, match="not the tensors of a tiny autoencoder"):
        TinyAutoencoder(wrong, right)
