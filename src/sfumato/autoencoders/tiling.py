"""Decoding large images a tile at a time, with the result of decoding them whole.

Convolutions see a few pixels around a tile; group norms see the whole image. So each norm's
statistics are gathered over all tiles before the next one is reached: this takes a few more passes,
and leaves no seams, where blending overlapping tiles leaves each with its own tint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.autoencoders.codec import Codec

RIM = 16  # positions around a tile, at the decoder's input, within its receptive field


@dataclass(frozen=True)
class Tile:
    """A part of the high-resolution decoder's input with its rim, and the position of its core.

    Slices are rows, then columns.
    """

    outer: tuple[slice, slice]
    core: tuple[slice, slice]
    inner: tuple[slice, slice]

    def crop(self, x: Tensor) -> Tensor:
        """Crop the tile, with its rim, out of `x`."""
        return x[..., self.outer[0], self.outer[1]]

    def crop_core(self, x: Tensor, like: Tensor) -> Tensor:
        """Crop the core out of feature maps computed from the tile `like`, at their resolution."""
        scale = x.shape[-1] // like.shape[-1]
        rows, columns = (slice(s.start * scale, s.stop * scale) for s in self.core)
        return x[..., rows, columns]


def tiles(height: int, width: int, size: int) -> Iterator[Tile]:
    """Yield tiles of at most `size` that cover height x width, each with its rim.

    The rim ends at the border of the whole.
    """
    for top in range(0, height, size):
        for left in range(0, width, size):
            inner = (slice(top, min(top + size, height)), slice(left, min(left + size, width)))
            outer = tuple(
                slice(max(0, s.start - RIM), min(side, s.stop + RIM))
                for s, side in zip(inner, (height, width), strict=True)
            )
            core = tuple(
                slice(i.start - o.start, i.stop - o.start)
                for i, o in zip(inner, outer, strict=True)
            )
            yield Tile(outer, core, inner)  # type: ignore[arg-type]


class _Reached(Exception):
    """The norm whose statistics are being gathered has been reached, with this input."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


@torch.no_grad()
def decode_in_tiles(decoder: Codec, z: Tensor, *, size: int = 256) -> Tensor:
    """Decode latents to images in tiles of `size` positions of the high-resolution decoder's input.

    The result equals that of decoding the whole, except for rounding.
    """
    x = decoder.decode_low_res(z)
    all_tiles = list(tiles(x.shape[2], x.shape[3], size))
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for norm in [
            module
            for module in decoder.high_res_decoder.modules()
            if isinstance(module, nn.GroupNorm)
        ]:
            statistics = _gather_statistics(decoder.high_res_decoder, norm, x, all_tiles)
            hooks.append(norm.register_forward_hook(_fixed_statistics_hook(*statistics)))
        out: Tensor | None = None
        for tile in all_tiles:
            part = tile.crop(x)
            core = tile.crop_core(decoder.high_res_decoder(part), part)
            if out is None:
                scale = core.shape[-1] // (tile.inner[1].stop - tile.inner[1].start)
                out = core.new_empty(len(x), core.shape[1], scale * x.shape[2], scale * x.shape[3])
            rows, columns = (slice(s.start * scale, s.stop * scale) for s in tile.inner)
            out[..., rows, columns] = core
        assert out is not None
        return out
    finally:
        for hook in hooks:
            hook.remove()


def _gather_statistics(
    decoder: nn.Module, norm: nn.GroupNorm, x: Tensor, all_tiles: list[Tile]
) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of each group of a norm's input, (B, groups, 1).

    They are those of the whole image.
    """
    count = 0
    total = squares = torch.zeros(())

    def reached(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    hook = norm.register_forward_pre_hook(reached)
    try:
        for tile in all_tiles:
            part = tile.crop(x)
            try:
                decoder(part)
            except _Reached as reached_norm:
                values = (
                    tile.crop_core(reached_norm.x, part)
                    .double()
                    .reshape(len(x), norm.num_groups, -1)
                )
                count += values.shape[2]
                total, squares = (
                    total + values.sum(2, keepdim=True),
                    squares + values.square().sum(2, keepdim=True),
                )
    finally:
        hook.remove()
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)


def _fixed_statistics_hook(
    mean: Tensor, variance: Tensor
) -> Callable[[nn.GroupNorm, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a hook that makes a group norm use given statistics."""

    def forward(norm: nn.GroupNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        grouped = x.reshape(len(x), norm.num_groups, -1)
        normed = ((grouped - mean.to(x)) * (variance + norm.eps).rsqrt().to(x)).view_as(x)
        return normed * norm.weight[:, None, None] + norm.bias[:, None, None]

    return forward
