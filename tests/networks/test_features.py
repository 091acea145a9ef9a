"""Frozen networks that compare images: against their layers written out, batch norms and all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from sfumato.errors import CheckpointError, ConfigError
from sfumato.evaluation import extractors
from sfumato.networks.perceptual import (
    EfficientNetLite0,
    Lpips,
    RandomFeatures,
    distance,
    efficientnet_lite0,
)

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR) * scale


def images(channels: int = 3, side: int = 32) -> torch.Tensor:
    return torch.rand(2, channels, side, side, generator=GENERATOR) * 2 - 1


def lite0_tensors() -> dict[str, torch.Tensor]:
    """Tensors as the package names them, drawn at random."""
    found: dict[str, torch.Tensor] = {}

    def conv(name: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        found[f"{name}.weight"] = draw(
            outputs, inputs, kernel, kernel, scale=(2 / (inputs * kernel**2)) ** 0.5
        )
        found[f"{norm}.weight"], found[f"{norm}.bias"] = (
            1 + draw(outputs, scale=0.1),
            draw(outputs, scale=0.1),
        )
        found[f"{norm}.running_mean"], found[f"{norm}.running_var"] = (
            draw(outputs, scale=0.1),
            1 + draw(outputs).abs(),
        )

    conv("_conv_stem", "_bn0", 32, 3, 3)
    inputs, number = 32, 0
    for expansion, kernel, _, width, repeats in EfficientNetLite0._STAGES:
        for _ in range(repeats):
            hidden = inputs * expansion
            if expansion > 1:
                conv(f"_blocks.{number}._expand_conv", f"_blocks.{number}._bn0", hidden, inputs, 1)
            conv(f"_blocks.{number}._depthwise_conv", f"_blocks.{number}._bn1", hidden, 1, kernel)
            conv(f"_blocks.{number}._project_conv", f"_blocks.{number}._bn2", width, hidden, 1)
            inputs, number = width, number + 1
    conv("_conv_head", "_bn1", 1280, 320, 1)
    found["_fc.weight"], found["_fc.bias"] = draw(1000, 1280, scale=0.03), draw(1000)
    return found


def lite0_written_out(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Logits, batch norms apart."""

    def conv(
        name: str, norm: str, x: torch.Tensor, stride: int = 1, groups: int = 1
    ) -> torch.Tensor:
        weight = tensors[f"{name}.weight"]
        side, kernel = x.shape[-1], weight.shape[-1]
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        x = F.conv2d(
            F.pad(x, [total // 2, total - total // 2] * 2), weight, stride=stride, groups=groups
        )
        statistics = (
            tensors[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, *statistics, eps=1e-3)

    x = F.relu6(conv("_conv_stem", "_bn0", ((x + 1) * 127.5 - 127) / 128, stride=2))
    number = 0
    for expansion, _, stride, _, repeats in EfficientNetLite0._STAGES:
        for repeat in range(repeats):
            name, h = f"_blocks.{number}", x
            if expansion > 1:
                h = F.relu6(conv(f"{name}._expand_conv", f"{name}._bn0", h))
            step = stride if repeat == 0 else 1
            h = F.relu6(
                conv(f"{name}._depthwise_conv", f"{name}._bn1", h, stride=step, groups=h.shape[1])
            )
            h = conv(f"{name}._project_conv", f"{name}._bn2", h)
            x = x + h if repeat > 0 else h
            number += 1
    x = F.relu6(conv("_conv_head", "_bn1", x)).mean((2, 3))
    return F.linear(x, tensors["_fc.weight"], tensors["_fc.bias"])


@pytest.mark.parametrize("side", [32, 45])
def test_efficientnet_is_its_layers(side: int) -> None:
    tensors, x = lite0_tensors(), images(side=side)
    network = efficientnet_lite0(tensors)
    expected = lite0_written_out(tensors, x)
    assert torch.allclose(network(x), expected, atol=1e-3 * float(expected.abs().max()))
    assert [tuple(found.shape[1:]) for found in network.maps(images(side=64))] == [
        (16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2),
    ]  # fmt: skip


def test_efficientnet_of_other_tensors_is_refused() -> None:
    tensors = lite0_tensors()
    for wrong in ({}, {**tensors, "_fc.weight": torch.zeros(2, 2)}):
        with pytest.raises(CheckpointError, match="EfficientNet"):
            efficientnet_lite0(wrong)


def lpips_tensors() -> dict[str, torch.Tensor]:
    found, inputs = {}, 3
    widths = dict(zip(Lpips._LAYERS, (64, 64, 128, 128, *[256] * 3, *[512] * 6), strict=True))
    for number, width in widths.items():
        found[f"features.{number}.weight"] = draw(
            width, inputs, 3, 3, scale=(2 / (9 * inputs)) ** 0.5
        )
        found[f"features.{number}.bias"], inputs = draw(width, scale=0.1), width
    for k, width in enumerate((64, 128, 256, 512, 512)):
        found[f"lin{k}.model.1.weight"] = draw(1, width, 1, 1).abs()
    return found


def test_lpips_is_its_formula() -> None:
    tensors, a, b = lpips_tensors(), images(), images()

    def layers(x: torch.Tensor) -> list[torch.Tensor]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, found, number = (x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1), [], 0
        for group in (2, 2, 3, 3, 3):
            for _ in range(group):
                x = F.relu(
                    F.conv2d(
                        x,
                        tensors[f"features.{number}.weight"],
                        tensors[f"features.{number}.bias"],
                        padding=1,
                    )
                )
                number += 2
            found.append(x)
            x, number = F.max_pool2d(x, 2), number + 1
        return found

    expected = torch.zeros(2)
    for k, (p, q) in enumerate(zip(layers(a), layers(b), strict=True)):
        difference = (p / p.norm(dim=1, keepdim=True) - q / q.norm(dim=1, keepdim=True)).square()
        expected += (difference * tensors[f"lin{k}.model.1.weight"]).sum(1).mean((1, 2))
    assert torch.allclose(distance(Lpips(tensors), a, b), expected, rtol=1e-4)
    with pytest.raises(CheckpointError, match="LPIPS"):
        Lpips({key: value for key, value in tensors.items() if key != "lin3.model.1.weight"})


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_distance_is_zero_for_equal_images_and_grows(channels: int) -> None:
    network, a = RandomFeatures(), images(channels)
    near, far = (a + size * draw(*a.shape) for size in (0.05, 0.5))
    assert distance(network, a, a).tolist() == [0, 0]
    assert (distance(network, a, near) < distance(network, a, far)).all()
    # the same in every process
    assert torch.equal(RandomFeatures().layers[0].weight, network.layers[0].weight)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_extractors_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    assert extractors.extractor("random").name == "random features"
    save_file(lpips_tensors(), tmp_path / "lpips.safetensors")
    assert extractors.extractor(str(tmp_path / "lpips.safetensors")).name == "LPIPS (VGG-16)"
    with pytest.raises(ConfigError, match="random"):
        extractors.extractor("vgg")
    (tmp_path / "broken.safetensors").write_bytes(b"what")
    with pytest.raises(CheckpointError):
        extractors.extractor(str(tmp_path / "broken.safetensors"))
    monkeypatch.setattr(extractors, "_package", lambda: None)
    assert extractors.extractor("auto").name == "random features"
    with pytest.raises(ConfigError, match=r"sfumato\[features\]"):
        extractors.extractor("efficientnet-lite0")


def test_the_packages_file_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "package"
    (package / "models").mkdir(parents=True)
    tensors = lite0_tensors()
    torch.save(tensors, package / extractors.FILE)
    monkeypatch.setattr(extractors, "_package", lambda: package)
    with pytest.raises(CheckpointError, match="SHA-256"):  # not the file that the package came with
        extractors.extractor("auto")
    monkeypatch.setattr(
        extractors, "SHA256", hashlib.sha256((package / extractors.FILE).read_bytes()).hexdigest()
    )
    first, x = extractors.extractor("auto"), images()
    (package / extractors.FILE).unlink()
    assert torch.equal(extractors.extractor("efficientnet-lite0").pooled(x), first.pooled(x))


@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_a_vision_transformers_patches_are_its_map(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    model = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**sizes)
    ).eval()
    model.save_pretrained(tmp_path / "encoder")
    found = extractors.extractor(str(tmp_path / "encoder"))
    assert found.name == "encoder"
    x = images(side=28)
    mean, deviation = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        patches = model(pixel_values=((x + 1) / 2 - mean) / deviation).last_hidden_state[:, 1:]
    torch.testing.assert_close(found.pooled(x), patches.mean(1))
    (made,) = found.maps(x)
    assert made.shape == (2, 16, 2, 2)
    torch.testing.assert_close(made[0, :, 1, 0], F.normalize(patches[0, 2], dim=0))
    assert found.maps(images(channels=1, side=8))[0].shape == (2, 16, 2, 2)


def test_a_model_that_sees_no_images_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 8,
    }
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vision transformer"):
        extractors.extractor(str(tmp_path))
