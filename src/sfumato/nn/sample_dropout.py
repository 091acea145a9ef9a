"""Dropout whose masks belong to samples, not to the batch that they are in."""

from __future__ import annotations

from torch import Tensor, nn

from sfumato import randomness


class SampleDropout(nn.Dropout):
    """Sets a fraction p of the values of x to 0 while training, and scales up the others.

    The mask of a sample is a function of its number, so that micro-batches and processes do not
    change it; see `randomness.layer_uniform`. An ordinary dropout where no samples are known.

    Attributes:
        key: stands for the layer, set by `name_dropouts`.

    Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from
        overfitting".
    """

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.key = randomness.layer_key("")

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, ...) with a mask on it."""
        if not (self.training and self.p):
            return x
        draws = randomness.layer_uniform(self.key, tuple(x.shape), x.device)
        return x * (draws >= self.p).to(x.dtype) / (1 - self.p)


def name_dropouts(network: nn.Module) -> None:
    """Give each dropout of a network a name of its own, from which its masks are drawn."""
    for name, module in network.named_modules():
        if isinstance(module, SampleDropout):
            module.key = randomness.layer_key(name)
