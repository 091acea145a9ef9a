"""A diffusion transformer: patches as a sequence, modulated by level and context.

Source: Peebles & Xie 2023 (arXiv:2212.09748); RMS norms, gated feed-forward and rotary positions as
    in Yao et al. 2025 (arXiv:2501.01423); one modulation shared by all blocks: Chen et al. 2024
    (arXiv:2310.00426), sec. 2.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sfumato import randomness
from sfumato.condition import NO_CONTEXT, Condition, ContextSizes
from sfumato.config.bounds import FractionBelowOne, Positive, Size, SizeOrZero
from sfumato.errors import ConfigError
from sfumato.networks.backbone import Backbone, NetworkConfig
from sfumato.networks.checks import check_inputs, join_maps, pad_inputs
from sfumato.nn.attention import attend, split_heads
from sfumato.nn.embeddings import TIMESTEPS, SinusoidalEmbedding
from sfumato.nn.init import zero_init
from sfumato.nn.norms import RMSNorm, rms_norm
from sfumato.nn.rotary import apply_rotary, rotary_angles
from sfumato.nn.sample_dropout import SampleDropout, name_dropouts
from sfumato.nn.widenable import InputLayer, Widenable

MODULATIONS = 6  # of a block: shift, scale and gate, of attention and of the feed-forward
LEVEL_SIZE = 256
SUMMARY_TOKENS = 4  # that a vector becomes where it enters as tokens
TOKENS = randomness.layer_key("tokens")  # which tokens are dropped
UNROUTED = 2  # blocks at either end that process every token, where tokens are dropped


@dataclass(frozen=True, kw_only=True)
class DiTConfig(NetworkConfig):
    """Size and shape of a diffusion transformer. (384, 12), (768, 12), (1024, 24) and (1152, 28)
    are the sizes S, B, L and XL.

    Attributes:
        patch_size: side of the square of pixels, or of latents' places, that is one token.
        hidden_size, depth: width, and number of blocks.
        head_dim: channels of one attention head; must be a multiple of 4 (rotary positions). 64
            runs best.
        mlp_ratio: width of the feed-forward part as a multiple of `hidden_size`; 8/3 has as many
            weights as an ungated one of 4.
        bottleneck: width that patches are squeezed through first; for large patches, of which most
            dimensions are noise. 0 for none.
        vector_conditioning: how the context's summary enters: it modulates every block, or becomes
            a few tokens of the sequence.
        token_conditioning: how its tokens enter: each block attends to them (`cross`); they go
            along with the patches, through weights of their own
            (`joint`, as in Stable Diffusion 3), or through the same ones (`sequence`).
        registers: number of register tokens: learned, discarded at the output.
        dropout: of the residual branches.
        token_drop: share of the patches that skip all but the outer blocks while training; meant
            for 1,024 tokens and more.
        activation_checkpointing: whether activations inside blocks are recomputed in the backward
            pass, instead of stored: one more forward pass, less memory.

    Source: joint attention: Esser et al. 2024 (arXiv:2403.03206), sec. 4; registers: Darcet et al.
        2024 (arXiv:2309.16588); dropped tokens:
        Krause et al. 2025 (arXiv:2501.04765); the bottleneck: Li & He 2025 (arXiv:2511.13720), sec.
        4.
    """

    kind: ClassVar[str] = "dit"

    patch_size: Size = 2
    hidden_size: Size = 384
    depth: Size = 12
    head_dim: Size = 64
    mlp_ratio: Positive = 8 / 3
    bottleneck: SizeOrZero = 0
    vector_conditioning: Literal["modulation", "tokens"] = "modulation"
    token_conditioning: Literal["cross", "joint", "sequence"] = "cross"
    registers: SizeOrZero = 0
    dropout: FractionBelowOne = 0.0
    token_drop: FractionBelowOne = 0.0
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if (
            min(self.patch_size, self.hidden_size, self.depth, self.head_dim, self.mlp_ratio) <= 0
            or min(self.bottleneck, self.registers) < 0
        ):
            raise ConfigError(
                f"{self} is not a valid network",
                where="network",
                hint="sizes are above 0; bottleneck and registers may be 0",
            )
        if self.hidden_size % self.head_dim or self.head_dim % 4:
            raise ConfigError(
                f"hidden_size = {self.hidden_size} with head_dim = {self.head_dim}",
                where="network.head_dim",
                hint="choose a head_dim of 32 or 64, and a hidden_size that is a multiple of it",
            )
        if not 0 <= self.token_drop < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"token_drop = {self.token_drop}, dropout = {self.dropout}",
                where="network",
                hint="shares are from 0 to less than 1",
            )
        if self.token_drop and self.depth <= 2 * UNROUTED:
            raise ConfigError(
                f"token_drop > 0 needs more than {2 * UNROUTED} blocks, and depth = {self.depth}",
                where="network.token_drop",
                hint=f"set it to 0, or use a depth of more than {2 * UNROUTED}",
            )

    def build(self, *, image_channels: int, context: ContextSizes = NO_CONTEXT) -> DiT:
        """Build the untrained network."""
        return DiT(self, image_channels=image_channels, context=context)


class DiT(Backbone, Widenable):
    """network(x, noise_input, condition) -> prediction of x's shape.

    All residual branches and the output start at zero.

    The patches after a third of the blocks, or after the first two if tokens are dropped, pass
    through `probe` as a map (B, hidden_channels, rows, columns), where auxiliary losses can read
    them.

    Args:
        image_channels: channels of x and of the prediction.
        context: sizes of the condition's slots; an absent slot has size 0.
    """

    # on a CPU, where its many small operations are fused (docs/benchmarks.md)
    compile_after_s: ClassVar[float] = 1200

    def __init__(
        self, config: DiTConfig, *, image_channels: int, context: ContextSizes = NO_CONTEXT
    ) -> None:
        super().__init__(image_channels=image_channels, context=context)
        self.config = config
        size, patch = config.hidden_size, config.patch_size
        inputs = (image_channels + context.spatial) * patch**2
        squeezed = [nn.Linear(inputs, config.bottleneck, bias=False)] if config.bottleneck else []
        self.patches = nn.Sequential(*squeezed, nn.Linear(config.bottleneck or inputs, size))
        self.level_embedding = nn.Sequential(
            SinusoidalEmbedding(LEVEL_SIZE, scale=TIMESTEPS), nn.Linear(LEVEL_SIZE, size), nn.SiLU()
        )
        vector, tokens = context.vector, context.tokens
        self.vector_embedding = (
            nn.Linear(vector, size)
            if vector and config.vector_conditioning == "modulation"
            else None
        )
        self.vector_tokens = (
            nn.Linear(vector, SUMMARY_TOKENS * size)
            if vector and config.vector_conditioning == "tokens"
            else None
        )
        tokens_in_sequence = tokens and config.token_conditioning != "cross"
        self.token_embedding = (
            nn.Sequential(nn.LayerNorm(tokens), nn.Linear(tokens, size))
            if tokens_in_sequence
            else None
        )
        self.registers = (
            nn.Parameter(0.02 * torch.randn(config.registers, size)) if config.registers else None
        )
        self.embedding = nn.Sequential(nn.Linear(size, size), nn.SiLU())
        self.modulation = zero_init(nn.Linear(size, MODULATIONS * size))
        streams = 2 if tokens and config.token_conditioning == "joint" else 1
        cross_token_size = tokens if config.token_conditioning == "cross" else 0
        self.blocks = nn.ModuleList(
            Block(
                config,
                num_read=streams,
                num_updated=streams if number < config.depth - 1 else 1,
                token_size=cross_token_size,
            )
            for number in range(config.depth)
        )
        self.hidden_channels = size
        self.output_modulation = zero_init(nn.Linear(size, 2 * size))
        self.output = zero_init(nn.Linear(size, image_channels * patch**2))
        name_dropouts(self)

    def forward(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Predict (B, C, H, W) from x (B, C, H, W) of unit variance and noise_input (B,) in [0, 1].

        Sides of any length are padded to multiples of the patch.

        Raises:
            ShapeError: if the channels of x or the slots of the condition are not those of the
                network.
        """
        check_inputs(
            x, condition, image_channels=self.image_channels, context=self.context, where="DiT"
        )
        height, width = x.shape[-2:]
        x, condition = pad_inputs(x, condition, self.multiple)
        patch = self.config.patch_size
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        level = self.level_embedding(noise_input)
        embedding = self.embedding(
            level
            if self.vector_embedding is None
            else level + self.vector_embedding(condition.vector)
        )
        patches = self.patches(
            F.pixel_unshuffle(join_maps(x, condition), patch).flatten(2).transpose(1, 2)
        )
        parts = self._sequence(patches, condition)
        places = rotary_angles(rows, columns, self.config.head_dim, like=patches)
        # tokens other than patches have no position
        places = F.pad(places, (0, 0, 0, parts[0].shape[1] - len(places)))
        shared = (self.modulation(embedding).unflatten(1, (MODULATIONS, 1, -1)), condition)
        hidden = self._run_blocks(parts, places, (rows, columns), shared)[:, : rows * columns]
        shift, scale = self.output_modulation(embedding)[:, None].chunk(2, dim=2)
        output = self.output(rms_norm(hidden) * (1 + scale) + shift)
        return F.pixel_shuffle(output.transpose(1, 2).unflatten(2, (rows, columns)), patch)[
            ..., :height, :width
        ]

    def _sequence(self, patches: Tensor, condition: Condition) -> list[Tensor]:
        """Return the sequences that go through the blocks, one part for each stream.

        Context tokens come last, where their mask is applied.
        """
        sequence = [patches]
        if self.registers is not None:
            sequence.append(self.registers.to(patches.dtype).expand(len(patches), -1, -1))
        if self.vector_tokens is not None:
            sequence.append(
                self.vector_tokens(condition.vector)
                .unflatten(1, (SUMMARY_TOKENS, -1))
                .to(patches.dtype)
            )
        tokens = (
            []
            if self.token_embedding is None
            else [self.token_embedding(condition.tokens).to(patches.dtype)]
        )
        if self.config.token_conditioning == "joint":
            return [concat(sequence, dim=1), *tokens]
        return [concat([*sequence, *tokens], dim=1)]

    def _run_blocks(
        self,
        parts: list[Tensor],
        places: Tensor,
        shape: tuple[int, int],
        shared: tuple[Tensor, Condition],
    ) -> Tensor:
        """Return the first part after all blocks.

        In training, some of its first tokens, which are the patches, may skip the inner blocks.
        """
        first, count = (
            UNROUTED if self.config.token_drop else self.config.depth // 3,
            shape[0] * shape[1],
        )
        parts = self._blocks(self.blocks[:first], parts, places, shared)
        self.probe(parts[0][:, :count].transpose(1, 2).unflatten(2, shape))
        if not (self.training and self.config.token_drop):
            return self._blocks(self.blocks[first:], parts, places, shared)[0]
        selected = self._select_tokens(parts[0], count)
        index = selected[..., None].expand(-1, -1, parts[0].shape[2])
        fewer = [parts[0].gather(1, index), *parts[1:]]
        fewer = self._blocks(self.blocks[first:-UNROUTED], fewer, places[selected][:, None], shared)
        parts = [parts[0].scatter(1, index, fewer[0]), *fewer[1:]]
        return self._blocks(self.blocks[-UNROUTED:], parts, places, shared)[0]

    def _select_tokens(self, x: Tensor, count: int) -> Tensor:
        """Return the indices (B, K) of the tokens that go through the inner blocks.

        They are some of the first `count`, drawn for each sample, and all others.
        """
        chosen = randomness.layer_uniform(TOKENS, (len(x), count), x.device).argsort(dim=1)[
            :, : count - int(count * self.config.token_drop)
        ]
        others = torch.arange(count, x.shape[1], device=x.device).expand(len(x), -1)
        return torch.cat([chosen.sort(dim=1).values, others], dim=1)

    def _blocks(
        self,
        blocks: Iterable[nn.Module],
        parts: list[Tensor],
        places: Tensor,
        shared: tuple[Tensor, Condition],
    ) -> list[Tensor]:
        for block in blocks:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                parts = checkpoint(block, parts, places, *shared, use_reentrant=False)
            else:
                parts = block(parts, places, *shared)
        return parts

    def input_layers(self) -> list[nn.Module]:
        """Return the embeddings of patches and of the noise level."""
        return [self.patches, self.level_embedding]

    def input_layer(self) -> InputLayer:
        """Return the first layer of the embedding of patches, as the one that reads x."""
        return InputLayer(cast(nn.Linear, self.patches[0]))

    def output_layers(self) -> list[nn.Module]:
        """Return the projection back to pixels."""
        return [self.output]

    def units(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.blocks)

    def float8_layers(self) -> list[nn.Linear]:
        """Return all linear layers of the blocks."""
        return [layer for layer in self.blocks.modules() if isinstance(layer, nn.Linear)]

    @property
    def multiple(self) -> int:
        """The side of a patch."""
        return self.config.patch_size


class Block(nn.Module):
    """Attention over all parts of the sequence, and a feed-forward layer for each part.

    Context tokens that are not in the sequence are read by cross-attention.

    Args:
        num_read, num_updated: number of streams that are read, and that are updated: the last block
            updates only the one with the patches.
        token_size: channels of the context tokens for cross-attention; 0 for none.
    """

    def __init__(
        self, config: DiTConfig, *, num_read: int, num_updated: int, token_size: int
    ) -> None:
        super().__init__()
        self.readers = nn.ModuleList(
            StreamProjection(config, has_queries=number < num_updated) for number in range(num_read)
        )
        self.writers = nn.ModuleList(StreamUpdate(config) for _ in range(num_updated))
        self.cross = CrossAttention(config, token_size) if token_size else None

    def forward(
        self, parts: list[Tensor], places: Tensor, modulation: Tensor, condition: Condition
    ) -> list[Tensor]:
        """Return the updated parts, each (B, L, C).

        Args:
            parts: one (B, L, C) for each stream that is read.
            places: rotary angles of the first part, (L, D / 2), or (B, 1, L, D / 2) if tokens were
                dropped.
            modulation: (B, 6, 1, C).
        """
        projected = [
            project(part, modulation) for project, part in zip(self.readers, parts, strict=True)
        ]
        q, k, v = projected[0]
        projected[0] = (apply_rotary(q, places), apply_rotary(k, places), v)
        q, k, v = (
            concat([x for x in heads if x is not None], dim=2)
            for heads in zip(*projected, strict=True)
        )
        attended = attend(q, k, v, self._mask(condition, k.shape[2])).transpose(1, 2).flatten(2)
        parts = parts[: len(self.writers)]
        pieces = attended.split([part.shape[1] for part in parts], dim=1)
        updated = []
        for number, (module, part, piece) in enumerate(
            zip(self.writers, parts, pieces, strict=True)
        ):
            update = cast(StreamUpdate, module)
            part = update.add_attention(part, piece, modulation)
            if self.cross is not None and number == 0:
                part = self.cross(part, condition.tokens, condition.token_mask)
            updated.append(update.add_mlp(part, modulation))
        return updated

    def _mask(self, condition: Condition, length: int) -> Tensor | None:
        """Return a mask (B, 1, 1, length), True where attention may look; None for no mask.

        Context tokens, if they are in the sequence, are its end.
        """
        if condition.token_mask is None or self.cross is not None:
            return None
        return F.pad(condition.token_mask, (length - condition.token_mask.shape[1], 0), value=True)[
            :, None, None
        ]


class StreamProjection(nn.Module):
    """Projects a stream to keys and values, and to queries if `has_queries`.

    Queries and keys are RMS-normalized, which keeps bfloat16 attention stable.

    Source: Henry et al. 2020 (arXiv:2010.04245); Dehghani et al. 2023 (arXiv:2302.05442), sec. 2.
    """

    def __init__(self, config: DiTConfig, *, has_queries: bool) -> None:
        super().__init__()
        size, head = config.hidden_size, config.head_dim
        self.heads = size // head
        self.offset = nn.Parameter(torch.zeros(2, 1, size))
        self.q = nn.Linear(size, size) if has_queries else None
        self.q_norm = RMSNorm(head) if has_queries else None
        self.k, self.k_norm, self.v = nn.Linear(size, size), RMSNorm(head), nn.Linear(size, size)

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return queries (or None), keys and values of x (B, L, C), each (B, heads, L, D)."""
        shift, scale = (modulation[:, :2] + self.offset).to(x.dtype).unbind(1)
        h = rms_norm(x) * (1 + scale) + shift
        v = split_heads(self.v(h), self.heads)
        q = (
            None
            if self.q is None or self.q_norm is None
            else self.q_norm(split_heads(self.q(h), self.heads))
        )
        return q, self.k_norm(split_heads(self.k(h), self.heads)), v


class StreamUpdate(nn.Module):
    """Adds the output of attention, and then a gated feed-forward layer, to a stream.

    Both gates start at zero.

    Source: Shazeer 2020 (arXiv:2002.05202), SwiGLU.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        hidden = 32 * max(1, round(config.mlp_ratio * size / 32))
        self.offset = nn.Parameter(torch.zeros(4, 1, size))
        self.out, self.dropout = nn.Linear(size, size), SampleDropout(config.dropout)
        self.up, self.gate, self.down = (
            nn.Linear(size, hidden),
            nn.Linear(size, hidden),
            nn.Linear(hidden, size),
        )

    def add_attention(self, x: Tensor, attention: Tensor, modulation: Tensor) -> Tensor:
        """Return x + gate * out(attention)."""
        gate = (modulation[:, 2] + self.offset[0]).to(x.dtype)
        result: Tensor = x + gate * self.dropout(self.out(attention))
        return result

    def add_mlp(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Return x + gate * feed-forward(x)."""
        shift, scale, gate = (modulation[:, 3:] + self.offset[1:]).to(x.dtype).unbind(1)
        h = rms_norm(x) * (1 + scale) + shift
        result: Tensor = x + gate * self.dropout(self.down(F.silu(self.gate(h)) * self.up(h)))
        return result


class CrossAttention(nn.Module):
    """Residual attention from patches to context tokens; its output projection starts at zero."""

    def __init__(self, config: DiTConfig, token_size: int) -> None:
        super().__init__()
        self.heads = config.hidden_size // config.head_dim
        self.token_norm = nn.LayerNorm(token_size)
        self.q, self.kv = (
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.Linear(token_size, 2 * config.hidden_size),
        )
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim) for _ in range(2))
        self.out = zero_init(nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x: Tensor, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        """Return x (B, L, C) with what it attends to in tokens (B, S, D) added, (B, L, C).

        token_mask (B, S) is True for tokens that may be attended to; None admits all.
        """
        q = split_heads(self.q(rms_norm(x)), self.heads)
        k, v = (
            split_heads(part, self.heads)
            for part in self.kv(self.token_norm(tokens)).chunk(2, dim=2)
        )
        mask = None if token_mask is None else token_mask[:, None, None, :]
        attended = attend(self.q_norm(q), self.k_norm(k), v, mask)
        result: Tensor = x + self.out(attended.transpose(1, 2).flatten(2))
        return result


def concat(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenate the parts; a single one is returned as it is, which `torch.cat` would copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
