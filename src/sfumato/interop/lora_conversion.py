"""Changes of weights of any kind as products of low rank, which every program reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.adapters import Factors, adapted_layers, changed_layers

KEPT = 0.99  # of a change's energy, its squared Frobenius norm


@dataclass(frozen=True)
class Converted:
    """Changes of layers as products.

    Attributes:
        layers: the products, by layer.
        lines: what was converted, and what that lost.
    """

    layers: dict[str, Factors]
    lines: tuple[str, ...] = ()


def as_products(network: nn.Module, described: str) -> Converted:
    """Return the changes of a network's layers as products of low rank.

    Those of a LoRA are exact. Others keep the largest singular values, so many that each layer
    keeps `KEPT` of its change's energy.

    Args:
        described: the adapter, in words.
    """
    own = {name: layer.factors() for name, layer in adapted_layers(network).items()}
    others = {
        name: layer.delta() for name, layer in changed_layers(network).items() if name not in own
    }
    if not others:
        return Converted(own)
    products = {name: low_rank(change) for name, change in others.items()}
    energy = {name: _energy(change) for name, change in others.items()}
    lost = {name: _energy(change - products[name].delta()) for name, change in others.items()}
    shares = {name: lost[name] / energy[name] if energy[name] else 0.0 for name in others}
    worst = max(shares, key=shares.__getitem__)
    total = sum(energy.values())
    kept = 1 - sum(lost.values()) / total if total else 1.0
    full = max(min(change.flatten(1).shape) for change in others.values())
    ranks = ranks_in_words([product.rank for product in products.values()])
    line = (
        f"{described} as a LoRA of rank {ranks} (of up to {full}): {kept:.2%} of the change is kept "
        f"(of its energy; {shares[worst]:.2%} lost in {worst}); lora-peft and the formats of whole "
        "models lose nothing"
    )
    return Converted({**own, **products}, (line,))


def _energy(change: Tensor) -> float:
    return float(change.double().square().sum())


def low_rank(change: Tensor, kept: float = KEPT) -> Factors:
    """Return the product of the smallest rank that keeps a share of a change's energy.

    Args:
        change: (outputs, inputs) of a linear layer, (outputs, inputs, k, k) of a convolution.
    """
    matrix = change.flatten(1).double()
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    squares, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    rank = 1 + int((squares.cumsum(0) < kept * squares.sum()).sum())
    rank = min(rank, len(squares))
    basis = vectors[:, :rank]
    # both factors get the root of the singular values, so that none underflows in fewer bits
    root = squares[:rank].clamp(min=torch.finfo(torch.float32).tiny).pow(0.25)
    left, right = basis * root, (basis.T @ wide) / root[:, None]
    down, up = (right, left) if wide is matrix else (left.T, right.T)
    shape = (rank, *change.shape[1:])
    ones = [1] * (change.ndim - 2)
    return Factors(
        down.reshape(shape).float().contiguous(),
        up.reshape(len(change), rank, *ones).float().contiguous(),
    )


def ranks_in_words(ranks: list[int]) -> str:
    """Format a rank, or the range of several."""
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"
