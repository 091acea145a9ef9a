"""Tiny autoencoders that others distilled from large ones (TAESD and similar ones), built from
their tensors' names and shapes.

Source: Ollin Boer Bohan 2023, github.com/madebyollin/taesd (MIT); diffusers calls the layout
    `AutoencoderTiny`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from sfumato.autoencoders.codec import Codec
from sfumato.errors import CheckpointError

DETERMINISTIC_LOGVAR = -30.0  # log-variance of latents that are one value
GROUPS = 4  # of the norm in blocks that gather context
_NAME = re.compile(r"(?:(?:encoder|decoder)\.layers\.)?(\d+)\.(.+)")

LayerTensors = dict[int, dict[str, Tensor]]


class TinyAutoencoder(Codec):
    """Images (B, C, H, W) in [-1, 1] <-> deterministic latents (B, c, H/f, W/f)."""

    def __init__(self, encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> None:
        """Build both halves from their tensors, named as in TAESD's files or as in diffusers'.

        Raises:
            CheckpointError: if they are those of another network.
        """
        super().__init__()
        try:
            self.encoder, self.decoder = _encoder(_by_layer(encoder)), _decoder(_by_layer(decoder))
            self.encoder.load_state_dict(_rename_for(self.encoder, _by_layer(encoder)))
            self.decoder.load_state_dict(_rename_for(self.decoder, _by_layer(decoder)))
            first, last = (cast(nn.Conv2d, self.encoder[place]) for place in (0, -1))
            self.image_channels, self.latent_channels = first.in_channels, last.out_channels
        except (KeyError, IndexError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"not the tensors of a tiny autoencoder ({str(error)[:200]})",
                where="autoencoder",
                hint="give the encoder and the decoder of TAESD or a similar one",
            ) from None
        self.factor = 2 ** sum(isinstance(layer, nn.Upsample) for layer in self.decoder)

    def moments(self, x: Tensor) -> Tensor:
        """Return the latents and a log-variance of -30, (B, 2 c, H/f, W/f)."""
        z = self.encoder((x + 1) / 2)
        return torch.cat([z, torch.full_like(z, DETERMINISTIC_LOGVAR)], dim=1)

    def decode_low_res(self, z: Tensor) -> Tensor:
        """Decode latents up to the last upsampling."""
        result: Tensor = self.decoder[: self._last_upsample](z)
        return result

    @property
    def high_res_decoder(self) -> nn.Sequential:
        """The rest of the decoder, which shares its layers."""
        return nn.Sequential(*list(self.decoder)[self._last_upsample :], Signed())

    @property
    def _last_upsample(self) -> int:
        return max(
            (place for place, layer in enumerate(self.decoder) if isinstance(layer, nn.Upsample)),
            default=0,
        )

    def depths(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return blocks and channels at each depth of the encoder and of the decoder, in order."""
        encoder, decoder = (
            [layer for layer in half if isinstance(layer, Block | nn.Conv2d)]
            for half in (self.encoder, self.decoder)
        )
        return _depths(encoder[:-1]), _depths(decoder[:0:-1])[::-1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors under the names that diffusers has for them."""
        # diffusers has no layer for the squashing
        halves = (("encoder", self.encoder, 0), ("decoder", self.decoder, 1))
        return {
            f"{half}.layers.{int(place) - offset}.{parameter}": tensor
            for half, layers, offset in halves
            for place, _, parameter, tensor in (
                (*name.partition("."), tensor) for name, tensor in layers.state_dict().items()
            )
        }


def _depths(layers: Iterable[nn.Module]) -> list[tuple[int, int]]:
    """Return, for each convolution, the number of blocks that follow it and their channels."""
    depths: list[tuple[int, int]] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            depths.append((0, max(layer.in_channels, layer.out_channels)))
        else:
            depths[-1] = (depths[-1][0] + 1, depths[-1][1])
    return depths


class Block(nn.Module):
    """relu(x + conv(relu(conv(relu(conv(x)))))); where a block gathers context, a normed 1 x 1
    branch is added to x first.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        outputs, inputs = tensors["conv.0.weight"].shape[:2]
        layers: list[nn.Module] = []
        for number in range(3):
            layers += [
                nn.Conv2d(inputs if number == 0 else outputs, outputs, 3, padding=1),
                nn.ReLU(),
            ]
        self.conv = nn.Sequential(*layers[:-1])
        self.skip = (
            nn.Conv2d(inputs, outputs, 1, bias=False) if "skip.weight" in tensors else nn.Identity()
        )
        self.pool: nn.Sequential | None = None
        if "pool.0.weight" in tensors:
            hidden = len(tensors["pool.0.weight"])
            self.pool = nn.Sequential(
                nn.Conv2d(inputs, hidden, 1, bias=False), nn.GroupNorm(GROUPS, hidden), nn.ReLU(),
                nn.Conv2d(hidden, inputs, 1, bias=False),
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + self.skip(x))


class Signed(nn.Module):
    """[0, 1] -> [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 2 x - 1."""
        return x * 2 - 1


class Squash(nn.Module):
    """3 tanh(x / 3): draws back latents beyond what the encoder makes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 3 tanh(x / 3)."""
        return torch.tanh(x / 3) * 3


def _by_layer(tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Group tensors by the number of their layer, in order."""
    layers: LayerTensors = defaultdict(dict)
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"a tensor called {name}")
        layers[int(match[1])][match[2]] = tensor.float()
    return dict(sorted(layers.items()))


def _layer(tensors: Mapping[str, Tensor], *, stride: int = 1) -> nn.Module:
    if "conv.0.weight" in tensors:
        return Block(tensors)
    outputs, inputs = tensors["weight"].shape[:2]
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias="bias" in tensors)


def _encoder(layers: LayerTensors) -> nn.Sequential:
    """Build the encoder, whose convolutions without a bias halve the resolution."""
    return nn.Sequential(
        *(
            _layer(tensors, stride=2 if set(tensors) == {"weight"} else 1)
            for tensors in layers.values()
        )
    )


def _decoder(layers: LayerTensors) -> nn.Sequential:
    """Build the decoder, whose convolutions without a bias follow a doubling of the resolution.

    The first layer comes after `Squash` and before a ReLU.
    """
    modules: list[nn.Module] = []
    for number, tensors in enumerate(layers.values()):
        if set(tensors) == {"weight"}:
            modules.append(nn.Upsample(scale_factor=2.0, mode="nearest"))
        modules.append(_layer(tensors))
        if number == 0:
            modules = [Squash(), *modules, nn.ReLU()]
    return nn.Sequential(*modules)


def _rename_for(half: nn.Sequential, layers: LayerTensors) -> dict[str, Tensor]:
    """Return the tensors under the names that they have in `half`."""
    places = [place for place, layer in enumerate(half) if any(True for _ in layer.parameters())]
    return {
        f"{place}.{name}": tensor
        for place, tensors in zip(places, layers.values(), strict=True)
        for name, tensor in tensors.items()
    }
