"""A U-Net: residual blocks modulated by level and context, attention at chosen depths, skips
across.

Source: Ronneberger et al. 2015 (arXiv:1505.04597); Ho et al. 2020 (arXiv:2006.11239); Dhariwal &
    Nichol 2021 (arXiv:2105.05233).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.condition import NO_CONTEXT, Condition, ContextSizes
from sfumato.config.bounds import FractionBelowOne, Size, SizeOrZero
from sfumato.errors import ConfigError
from sfumato.networks.backbone import Backbone, NetworkConfig
from sfumato.networks.checks import check_inputs, join_maps, pad_inputs, resize_maps, unpadded
from sfumato.nn.attention import CrossAttention, SelfAttention
from sfumato.nn.embeddings import TIMESTEPS, SinusoidalEmbedding
from sfumato.nn.init import zero_init
from sfumato.nn.norms import ModulatedGroupNorm, num_groups
from sfumato.nn.sample_dropout import SampleDropout, name_dropouts
from sfumato.nn.widenable import InputLayer, Widenable

Place = Literal["all", "decoder"]
GROUP_CHANNELS = 16  # channels that share a group norm's statistics


@dataclass(frozen=True, kw_only=True)
class UNetConfig(NetworkConfig):
    """Size and shape of a U-Net.

    Attributes:
        channels: feature channels at full resolution.
        multipliers: channels at each depth as multiples of that; every depth but the last halves
            the resolution.
        blocks: residual blocks at each depth (one more on the way up).
        attention_depths: depths with self-attention (0 is full resolution); the middle has it
            whenever any depth does.
        head_channels: channels of one attention head; 32 to 64 run best.
        vector_at, tokens_at, maps_at: where the context's summary, tokens (beside each
            self-attention) and maps enter: everywhere,
            or only the feature maps on the way up.
        dropout: of the residual branches.
    """

    kind: ClassVar[str] = "unet"

    channels: Size = 64
    multipliers: tuple[Size, ...] = (1, 2, 2)
    blocks: Size = 2
    attention_depths: tuple[SizeOrZero, ...] = (2,)
    head_channels: Size = 64
    vector_at: Place = "all"
    tokens_at: Place = "all"
    maps_at: Place = "all"
    dropout: FractionBelowOne = 0.0

    def __post_init__(self) -> None:
        depths = range(len(self.multipliers))
        if (
            not self.multipliers
            or min(self.channels, self.blocks, self.head_channels, *self.multipliers) < 1
            or any(depth not in depths for depth in self.attention_depths)
        ):
            raise ConfigError(
                f"{self} is not a valid network",
                where="network",
                hint=f"attention_depths are among {list(depths)}; channels, blocks, multipliers "
                "and head_channels are at least 1",
            )
        if self.channels % 2:
            raise ConfigError(
                f"channels = {self.channels} is odd, and the noise-level embedding has as many sines "
                "as cosines",
                where="network.channels",
                hint="choose an even number; multiples of 32 run best",
            )
        middle = {len(self.multipliers) - 1} if self.attention_depths else set()
        for depth in sorted({*self.attention_depths, *middle}):
            if self.channels * self.multipliers[depth] % self.head_channels:
                raise ConfigError(
                    f"{self.channels * self.multipliers[depth]} channels at depth {depth} are "
                    "not a multiple of "
                    f"head_channels = {self.head_channels}"
                    + (", and the middle attends" if depth in middle else ""),
                    where="network.head_channels",
                    hint="choose 32 or 64, and channels that are multiples of it",
                )

    def build(self, *, image_channels: int, context: ContextSizes = NO_CONTEXT) -> UNet:
        """Build the untrained network."""
        return UNet(self, image_channels=image_channels, context=context)


class UNet(Backbone, Widenable):
    """network(x, noise_input, condition) -> prediction of x's shape.

    All residual branches and the output start at zero.

    Its innermost feature map (B, hidden_channels, h, w) passes through `probe`, where auxiliary
    losses can read it.

    Args:
        image_channels: channels of x and of the prediction.
        context: sizes of the condition's slots; an absent slot has size 0.
    """

    def __init__(
        self, config: UNetConfig, *, image_channels: int, context: ContextSizes = NO_CONTEXT
    ) -> None:
        super().__init__(image_channels=image_channels, context=context)
        self.config = config
        self.reads_maps = config.maps_at == "all"
        size = 4 * config.channels
        self.level_embedding = nn.Sequential(
            SinusoidalEmbedding(config.channels, scale=TIMESTEPS),
            nn.Linear(config.channels, size),
            nn.SiLU(),
        )
        self.vector_embedding = nn.Linear(context.vector, size) if context.vector else None
        self.embedding = nn.Sequential(nn.Linear(size, size), nn.SiLU())

        encoder_tokens = context.tokens if config.tokens_at == "all" else 0
        input_maps, decoder_maps = (context.spatial, 0) if self.reads_maps else (0, context.spatial)
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        last = len(widths) - 1
        self.input = nn.Conv2d(image_channels + input_maps, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for depth, out in enumerate(widths):
            inputs = [width] + [out] * (config.blocks - 1)
            stages = [
                Stage(n, out, size, config, depth in config.attention_depths, encoder_tokens)
                for n in inputs
            ]
            self.down.append(DownLevel(stages, Downsample(out) if depth < last else None))
            width = out
            skips += [out] * (config.blocks + (depth < last))
        self.middle = Stage(
            width, width, size, config, bool(config.attention_depths), encoder_tokens
        )
        self.hidden_channels = width
        self.middle_out = ResidualBlock(width, width, size, config.dropout)
        for depth, out in reversed(list(enumerate(widths))):
            inputs = [skips.pop() + (out if i else width) for i in range(config.blocks + 1)]
            stages = [
                Stage(n, out, size, config, depth in config.attention_depths, context.tokens)
                for n in inputs
            ]
            maps = zero_init(nn.Conv2d(decoder_maps, width, 1)) if decoder_maps else None
            # Narrowed before the next depth, where every channel costs four times as much.
            width = widths[max(0, depth - 1)]
            self.up.append(UpLevel(stages, Upsample(out, width) if depth else None, maps))
        self.output_norm = nn.GroupNorm(num_groups(width, GROUP_CHANNELS), width)
        self.output = zero_init(nn.Conv2d(width, image_channels, 3, padding=1))
        name_dropouts(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Predict (B, C, H, W) from x (B, C, H, W) of unit variance and noise_input (B,) in [0, 1].

        Sides of any length are padded to multiples of the down-sampling factor.

        Raises:
            ShapeError: if the channels of x or the slots of the condition are not those of the
                network.
        """
        check_inputs(
            x, condition, image_channels=self.image_channels, context=self.context, where="UNet"
        )
        height, width = x.shape[-2:]
        x, condition = pad_inputs(x, condition, self.multiple)
        level = self.level_embedding(noise_input)
        conditioned_level = (
            level
            if self.vector_embedding is None
            else level + self.vector_embedding(condition.vector)
        )
        decoder_embedding = self.embedding(conditioned_level)
        embedding = decoder_embedding if self.config.vector_at == "all" else self.embedding(level)
        if self.reads_maps:
            x = join_maps(x, condition)
        x = self.input(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for down in self.down:
            x = down(x, embedding, condition, skips)
        x = self.middle_out(self.probe(self.middle(x, embedding, condition)), embedding)
        for up in self.up:
            x = up(x, decoder_embedding, condition, skips)
        return unpadded(self.output(F.silu(self.output_norm(x))), height, width)

    def input_layers(self) -> list[nn.Module]:
        """Return the first convolution."""
        return [self.input]

    def input_layer(self) -> InputLayer:
        """Return the first convolution, as the layer that reads x."""
        return InputLayer(self.input)

    def units(self) -> list[nn.Module]:
        """Return the stages: levels also pass skips on, in a list that a wrapper would copy."""
        return [module for module in self.modules() if isinstance(module, Stage)]

    def output_layers(self) -> list[nn.Module]:
        """Return the last convolution."""
        return [self.output]

    @property
    def multiple(self) -> int:
        """The down-sampling factor of all depths together."""
        return int(2 ** (len(self.config.multipliers) - 1))


class ResidualBlock(nn.Module):
    """skip(x) + conv(dropout(silu(modulate(norm(conv(silu(norm(x)))))))).

    The skip is a 1 x 1 convolution if the number of channels changes.
    """

    def __init__(self, inputs: int, outputs: int, embedding_size: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(num_groups(inputs, GROUP_CHANNELS), inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm_out = ModulatedGroupNorm(outputs, embedding_size, GROUP_CHANNELS)
        self.dropout = SampleDropout(dropout)
        self.conv_out = zero_init(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, outputs, H, W) of x (B, inputs, H, W), modulated by embedding (B, E)."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = self.conv_out(self.dropout(F.silu(self.norm_out(h, embedding))))
        result: Tensor = self.skip(x) + h
        return result


class Stage(nn.Module):
    """A residual block, followed by self-attention and cross-attention at depths that have them."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding_size: int,
        config: UNetConfig,
        attend: bool,
        token_size: int,
    ) -> None:
        super().__init__()
        heads = max(1, outputs // config.head_channels)
        self.block = ResidualBlock(inputs, outputs, embedding_size, config.dropout)
        self.attention = SelfAttention(outputs, heads, GROUP_CHANNELS) if attend else None
        self.cross = (
            CrossAttention(outputs, heads, token_size, GROUP_CHANNELS)
            if attend and token_size
            else None
        )

    def forward(self, x: Tensor, embedding: Tensor, condition: Condition) -> Tensor:
        """Return (B, outputs, H, W) of x (B, inputs, H, W), modulated by embedding (B, E)."""
        x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross is not None:
            x = self.cross(x, condition.tokens, condition.token_mask)
        return x


class DownLevel(nn.Module):
    """The stages of one depth on the way down, then a down-sampling except at the last depth.

    Every output is stored as a skip.
    """

    def __init__(self, stages: list[Stage], downsample: Downsample | None) -> None:
        super().__init__()
        self.stages, self.downsample = nn.ModuleList(stages), downsample

    def forward(
        self, x: Tensor, embedding: Tensor, condition: Condition, skips: list[Tensor]
    ) -> Tensor:
        """Append all outputs to `skips`, and return the last."""
        for stage in self.stages:
            x = stage(x, embedding, condition)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x


class UpLevel(nn.Module):
    """The stages of one depth on the way up; each takes the most recent skip.

    Maps that enter here are added first.
    """

    def __init__(
        self, stages: list[Stage], upsample: Upsample | None, maps: nn.Conv2d | None
    ) -> None:
        super().__init__()
        self.stages, self.upsample, self.maps = nn.ModuleList(stages), upsample, maps

    def forward(
        self, x: Tensor, embedding: Tensor, condition: Condition, skips: list[Tensor]
    ) -> Tensor:
        """Apply the stages, each to x joined with the last of `skips`, and return the output.

        It is up-sampled except at depth 0.
        """
        if self.maps is not None and condition.spatial is not None:
            x = x + self.maps(resize_maps(condition.spatial, x))
        for stage in self.stages:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding, condition)
        return x if self.upsample is None else self.upsample(x)


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ceil(H / 2), ceil(W / 2)) of x (B, C, H, W)."""
        result: Tensor = self.conv(x)
        return result


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, 2 H, 2 W) of x (B, inputs, H, W)."""
        result: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return result
