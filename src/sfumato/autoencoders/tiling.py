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

RIM = 16  # places around a tile, at the tail's input, that its convolutions may see


@dataclass(frozen=True)
class Tile:
    """A part of the tail's input with its rim, and the place of its core; rows, then columns."""

    outer: tuple[slice, slice]
    core: tuple[slice, slice]
    inner: tuple[slice, slice]

    def cut(self, x: Tensor) -> Tensor:
        """Cut the tile, with its rim, out of `x`."""
        return x[..., self.outer[0], self.outer[1]]

    def kept(self, x: Tensor, like: Tensor) -> Tensor:
        """Cut the core out of feature maps made from the tile `like`, at their resolution."""
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
    """Decode latents to images in tiles of `size` places of the tail's input.

    The result equals that of decoding the whole, except for rounding.
    """
    x = decoder.head(z)
    cut = list(tiles(x.shape[2], x.shape[3], size))
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for norm in [
            module for module in decoder.tail.modules() if isinstance(module, nn.GroupNorm)
        ]:
            statistics = _gathered(decoder.tail, norm, x, cut)
            hooks.append(norm.register_forward_hook(_fixed(*statistics)))
        out: Tensor | None = None
        for tile in cut:
            part = tile.cut(x)
            made = tile.kept(decoder.tail(part), part)
            if out is None:
                scale = made.shape[-1] // (tile.inner[1].stop - tile.inner[1].start)
                out = made.new_empty(len(x), made.shape[1], scale * x.shape[2], scale * x.shape[3])
            rows, columns = (slice(s.start * scale, s.stop * scale) for s in tile.inner)
            out[..., rows, columns] = made
        assert out is not None
        return out
    finally:
        for hook in hooks:
            hook.remove()


def _gathered(
    tail: nn.Module, norm: nn.GroupNorm, x: Tensor, cut: list[Tile]
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
        for tile in cut:
            part = tile.cut(x)
            try:
                tail(part)
            except _Reached as found:
                values = tile.kept(found.x, part).double().reshape(len(x), norm.num_groups, -1)
                count += values.shape[2]
                total, squares = (
                    total + values.sum(2, keepdim=True),
                    squares + values.square().sum(2, keepdim=True),
                )
    finally:
        hook.remove()
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)


def _fixed(
    mean: Tensor, variance: Tensor
) -> Callable[[nn.GroupNorm, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a hook that makes a group norm use given statistics."""

    def forward(norm: nn.GroupNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        grouped = x.reshape(len(x), norm.num_groups, -1)
        normed = ((grouped - mean.to(x)) * (variance + norm.eps).rsqrt().to(x)).view_as(x)
        return normed * norm.weight[:, None, None] + norm.bias[:, None, None]

    return forward
