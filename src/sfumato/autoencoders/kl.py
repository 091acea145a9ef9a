"""A variational autoencoder of convolutions: images to latents of a fraction of their side, and
back.

Its parameters are named, and compute, as those of diffusers' `AutoencoderKL`, so that weights are
exchanged between the two unchanged.

Source: Kingma & Welling 2014 (arXiv:1312.6114); Rombach et al. 2022 (arXiv:2112.10752), sec. 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.autoencoders.codec import Codec
from sfumato.config.bounds import Size
from sfumato.errors import ConfigError
from sfumato.nn.accelerable import Accelerable

EPS = 1e-6  # of group norms
RESIDUAL_INIT_SCALE = 0.1  # factor on random weights where a layer starts near the identity
LOG_VARIANCE = (-30.0, 20.0)  # what log-variances are clamped to, as everywhere else


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Size and shape of an autoencoder.

    Attributes:
        channels: feature channels at each depth; every depth but the last halves the resolution, so
            three depths make latents of a
            quarter of the image's side, four an eighth.
        latent_channels: of the latents; more keep more detail, and are harder to generate.
        blocks: residual blocks at each depth (one more on the way up).
        groups: of group norms; they divide all channels. Each should hold four channels or more: a
            group of one or two is normalized
            to nearly the same brightness and contrast in every image, and colours come out wrong.
        attention: whether positions attend to one another at the smallest resolution. It costs
            memory of the fourth power of the side.
        projections: `quant` has a 1 x 1 convolution on both sides of the latents, as Stable
            Diffusion's has; FLUX's has none.
    """

    channels: tuple[Size, ...] = (64, 128, 256, 256)
    latent_channels: Size = 8
    blocks: Size = 2
    groups: Size = 8
    attention: Literal["middle", "none"] = "none"
    projections: Literal["quant", "none"] = "quant"

    def __post_init__(self) -> None:
        if (
            not self.channels
            or min(*self.channels, self.latent_channels, self.blocks, self.groups) < 1
        ):
            raise ConfigError(
                f"{self} is not a valid autoencoder",
                where="autoencoder.network",
                hint="all sizes are at least 1",
            )
        if any(width % self.groups for width in self.channels):
            raise ConfigError(
                f"groups = {self.groups} does not divide all of channels = {self.channels}",
                where="autoencoder.network.groups",
                hint="choose groups that divide all channels",
            )

    @property
    def factor(self) -> int:
        """Side of an image over the side of its latents."""
        result: int = 2 ** (len(self.channels) - 1)
        return result


class KLAutoencoder(Codec):
    """Images (B, C, H, W) in [-1, 1] <-> latents (B, c, H/f, W/f), Gaussian given the image."""

    def __init__(self, config: KLConfig, *, image_channels: int) -> None:
        super().__init__()
        self.config, self.image_channels, self.factor = config, image_channels, config.factor
        self.latent_channels = latent = config.latent_channels
        self.encoder = Encoder(config, image_channels)
        self.decoder = Decoder(config, image_channels)
        has = config.projections == "quant"
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if has else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if has else nn.Identity()
        self.apply(init_as_identity)

    def moments(self, x: Tensor) -> Tensor:
        """Return the mean and log-variance of the latents, (B, 2 c, H/f, W/f)."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(*LOG_VARIANCE)], dim=1)

    def decode_low_res(self, z: Tensor) -> Tensor:
        """Decode latents up to half the image's resolution."""
        return self.decoder.decode_low_res(self.post_quant_conv(z))

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        """The encoder's first convolution and the decoder's last."""
        return self.encoder.conv_in, self.decoder.conv_out

    @property
    def high_res_decoder(self) -> nn.Module:
        """The decoder from half the image's resolution to the image."""
        return self.decoder.high_res_decoder


class Encoder(Accelerable):
    """The encoder: images to means and log-variances."""

    def __init__(self, config: KLConfig, image_channels: int) -> None:
        super().__init__()
        widths, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        inputs = [widths[0], *widths[:-1]]
        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            DownBlock(i, o, config.blocks, groups, halve=depth < last)
            for depth, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        self.mid_block = MidBlock(widths[-1], groups, config.attention == "middle")
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) to (B, 2 c, H/f, W/f), before `quant_conv`."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        result: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return result


class Decoder(nn.Module):
    """The decoder: latents to images."""

    def __init__(self, config: KLConfig, image_channels: int) -> None:
        super().__init__()
        widths, groups = config.channels[::-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.attention == "middle")
        inputs = [widths[0], *widths[:-1]]
        last = len(widths) - 1
        self.up_blocks = nn.ModuleList(
            UpBlock(i, o, config.blocks + 1, groups, double=depth < last)
            for depth, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents (B, c, h, w) to images (B, C, f h, f w)."""
        result: Tensor = self.high_res_decoder(self.decode_low_res(z))
        return result

    def decode_low_res(self, z: Tensor) -> Tensor:
        """Run the layers that work below the full resolution."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks[:-2]:
            x = block(x)
        if len(self.up_blocks) > 1:
            x = cast(UpBlock, self.up_blocks[-2]).apply_blocks(x)
        result: Tensor = x
        return result

    @property
    def high_res_decoder(self) -> HighResDecoder:
        """The layers from the last doubling of the resolution on."""
        return HighResDecoder(self.up_blocks[-2:], self.conv_norm_out, self.conv_out)


class HighResDecoder(nn.Module):
    """The end of a decoder, which takes most of its memory.

    It shares the decoder's layers, and is not a part of it.
    """

    def __init__(self, blocks: nn.ModuleList, norm: nn.GroupNorm, out: nn.Conv2d) -> None:
        super().__init__()
        self.upsamplers = nn.ModuleList(
            upsample for block in blocks[:-1] for upsample in cast(UpBlock, block).upsamplers
        )
        self.last, self.norm, self.out = blocks[-1], norm, out

    def forward(self, x: Tensor) -> Tensor:
        """Double the resolution, where the decoder does at all, and return the images."""
        for upsample in self.upsamplers:
            x = upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        result: Tensor = self.out(F.silu(self.norm(self.last(x))))
        return result


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        result: Tensor = self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return result


class Attention(nn.Module):
    """Residual self-attention over all positions, one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Attend from each position to all: (B, C, H, W) -> (B, C, H, W)."""
        positions = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]
        q, k, v = self.to_q(positions), self.to_k(positions), self.to_v(positions)
        attended = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        result: Tensor = x + attended.transpose(1, 2).unflatten(2, x.shape[2:])
        return result


class MidBlock(nn.Module):
    """Two residual blocks at the smallest resolution, with attention between them if requested."""

    def __init__(self, channels: int, groups: int, attend: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attend else [])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        result: Tensor = self.resnets[1](x)
        return result


class DownBlock(nn.Module):
    """Residual blocks, then half the resolution by a strided convolution, padded at the right and
    the bottom only.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int, *, halve: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks)
        )
        self.downsamplers = nn.ModuleList([Resample(outputs, stride=2, padding=0)] if halve else [])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H/2, W/2), or (H, W) if it does not halve."""
        for block in self.resnets:
            x = block(x)
        for downsample in self.downsamplers:
            x = downsample(F.pad(x, (0, 1, 0, 1)))
        return x


class UpBlock(nn.Module):
    """Residual blocks, then twice the resolution: nearest neighbour and a convolution."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, groups: int, *, double: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks)
        )
        self.upsamplers = nn.ModuleList([Resample(outputs, stride=1, padding=1)] if double else [])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, 2 H, 2 W), or (H, W) if it does not double."""
        x = self.apply_blocks(x)
        for upsample in self.upsamplers:
            x = upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x

    def apply_blocks(self, x: Tensor) -> Tensor:
        """Apply the residual blocks, without the change of resolution."""
        for block in self.resnets:
            x = block(x)
        return x


class Resample(nn.Module):
    """The convolution of a change of resolution, a module because diffusers has one here."""

    def __init__(self, channels: int, *, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W); stride 2 halves the resolution."""
        result: Tensor = self.conv(x)
        return result


@torch.no_grad()
def init_as_identity(module: nn.Module) -> None:
    """Initialize a layer near the identity.

    Residual branches start near zero, changes of resolution and width as averages. So shapes and
    colours reach the latents from the first step on (docs/ablations.md shows the effect).
    """
    if isinstance(module, ResidualBlock):
        module.conv2.weight.mul_(RESIDUAL_INIT_SCALE)
        if isinstance(module.conv_shortcut, nn.Conv2d):
            set_identity_kernel(module.conv_shortcut, slice(0, 1))
    if isinstance(module, Resample):
        set_identity_kernel(
            module.conv, slice(0, 2) if module.conv.stride == (2, 2) else slice(1, 2)
        )


def set_identity_kernel(layer: nn.Conv2d, window: slice) -> None:
    """Initialize a convolution to average a window of its kernel and to copy channels.

    Channels are repeated where there are more outputs than inputs, and averaged where there are
    fewer; the random weights that are left make copies differ.
    """
    outputs, inputs = layer.weight.shape[:2]
    middle = layer.weight[:, :, window, window]
    share = min(1.0, outputs / inputs) / middle[0, 0].numel()
    channels = torch.arange(max(inputs, outputs))
    layer.weight.mul_(RESIDUAL_INIT_SCALE)
    middle[channels % outputs, channels % inputs] += share
