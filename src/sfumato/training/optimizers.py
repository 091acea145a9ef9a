"""AdamW and Muon, their learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato.config.bounds import (
    CountOrZero,
    Fraction,
    FractionBelowOne,
    NonNegative,
    Positive,
    SizeOrZero,
)
from sfumato.distributed.sharding import by_kind, like, whole
from sfumato.errors import ConfigError
from sfumato.networks import Backbone
from sfumato.training.parameters import require_trainable, trainable

WARMUP_FRACTION = 0.1  # of the budget: the longest warm-up


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for the weights of hidden layers: matrices and kernels with at least 32 inputs and
    outputs, the network's first and last layers aside.

    Its updates are as large as those of AdamW, so that both share a learning rate and weight decay;
    four to eight times the learning rate of AdamW alone trains best.

    Attributes:
        momentum: share of the running mean of gradients that a step keeps.
    """

    momentum: FractionBelowOne = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(
                f"momentum = {self.momentum}",
                where="optimizer.muon",
                hint="use 0 or more, and less than 1",
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); weight decay acts on matrices and kernels
    only.

    Attributes:
        learning_rate: peak of the learning rate.
        warmup_steps: linear rise from 0; in runs of less than ten times as many steps, the rise
            ends with the first tenth of the budget.
        schedule: course of the learning rate over the rest of the budget, down to `final_fraction`
            of the peak.
        max_grad_norm: largest gradient norm; larger gradients are scaled down.
        muon: Muon for the weights of hidden layers, AdamW for the rest; None for AdamW alone.
        mup_base_width: muP: fan-in at which learning_rate was tuned; the rate is scaled by
            base/fan_in in wider hidden and last layers that AdamW optimizes. Muon needs no scaling.
            0 scales none.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: weight decay of matrices and kernels.
        final_fraction: learning rate at the end, as a fraction of the peak.

    Source: mup_base_width: Yang et al. 2022 (arXiv:2203.03466), table 3.
    """

    learning_rate: Positive = 1e-3
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.99)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.01
    warmup_steps: CountOrZero = 50
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    final_fraction: Fraction = 0.0
    max_grad_norm: Positive = 1.0
    muon: MuonConfig | None = None
    mup_base_width: SizeOrZero = 0

    def __post_init__(self) -> None:
        positive = self.learning_rate > 0 and self.max_grad_norm > 0
        if not (
            positive
            and min(self.weight_decay, self.warmup_steps, self.mup_base_width, self.eps) >= 0
        ):
            raise ConfigError(
                f"learning_rate = {self.learning_rate}, max_grad_norm = {self.max_grad_norm}, "
                f"weight_decay = {self.weight_decay}, "
                f"warmup_steps = {self.warmup_steps}, mup_base_width = {self.mup_base_width}, "
                f"eps = {self.eps}",
                where="optimizer",
                hint="learning_rate and max_grad_norm are above 0, the others at least 0",
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"betas = {self.betas}",
                where="optimizer.betas",
                hint="both are in [0, 1), e.g. [0.9, 0.99]",
            )

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Build the optimizers of a model's trainable parameters: AdamW, and Muon if configured.

        Raises:
            ConfigError: if all parameters are frozen.
        """
        require_trainable(model)
        hidden = [] if self.muon is None else hidden_weights(model)
        wide = [*([] if hidden else hidden_weights(model)), *last_weights(model)]
        scaled = wide if self.mup_base_width else []
        chosen = {id(weight) for weight in (*hidden, *scaled)}
        others = [p for p in trainable(model) if id(p) not in chosen]
        kernels = {id(weight) for weight in weights_of_layers(model)}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in others if id(p) in kernels], "weight_decay": self.weight_decay},
            {"params": [p for p in others if id(p) not in kernels], "weight_decay": 0.0},
        ]
        for width in sorted({weight.shape[1] for weight in scaled}):
            weights = [weight for weight in scaled if weight.shape[1] == width]
            groups.append(
                {
                    "params": weights,
                    "weight_decay": self.weight_decay,
                    "lr_scale": min(1.0, self.mup_base_width / width),
                }
            )
        groups = [
            {**group, "params": params} for group in groups for params in by_kind(group["params"])
        ]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True
            )
        ]
        if self.muon is not None and hidden:
            optimizers.append(
                Muon(
                    hidden,
                    lr=self.learning_rate,
                    momentum=self.muon.momentum,
                    weight_decay=self.weight_decay,
                )
            )
        return optimizers

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate of `step`, from 0, when the fraction `progress` of the budget is
        used.

        The fraction is squared in the warm-up, so that time spent before the first steps (a
        preview, compiling) does not end it.
        """
        warmup = min(
            1.0, max((step + 1) / (self.warmup_steps + 1), (progress / WARMUP_FRACTION) ** 2)
        )
        left = max(0.0, 1 - progress)
        decay = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[
            self.schedule
        ]
        return (
            self.learning_rate * warmup * (self.final_fraction + (1 - self.final_fraction) * decay)
        )


MUON_SLOTS = ("mean",)
ITERATIONS = 5
A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic


class Muon(torch.optim.Optimizer):
    """Updates along the orthogonal matrix nearest to the running mean of the gradient.

    A kernel (O, I, h, w) is treated as the matrix (O, I h w). PyTorch's own Muon takes matrices
    only; the two agree on those.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the step's size: Liu et al. 2025
        (arXiv:2502.16982), eq. 4.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(
                        parameter,
                        parameter.grad,
                        group["lr"],
                        group["momentum"],
                        group["weight_decay"],
                    )

    def _update(
        self,
        parameter: nn.Parameter,
        gradient: Tensor,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        mean = state["mean"]
        mean.lerp_(gradient, 1 - momentum)
        matrix = whole(gradient.lerp(mean, momentum)).flatten(1)  # Nesterov's momentum
        size = 0.2 * math.sqrt(max(matrix.shape))
        parameter.mul_(1 - lr * weight_decay)
        step = orthogonalize(matrix).view(parameter.shape)
        parameter.add_(like(step, parameter), alpha=-lr * size)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix (N, M) near 1 (0.7 to 1.2) by Newton-Schulz iteration.

    Source: Jordan et al. 2024 (the coefficients of the quintic).
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T.contiguous()
    x = matrix / (matrix.norm() + 1e-7)
    # A GPU multiplies float32 ten times slower; rounding as coarse as bfloat16's the iteration
    # forgives, but not a Gram matrix rounded so.
    return newton_schulz(x.bfloat16()).to(x.dtype) if x.is_cuda else newton_schulz_gram(x)


def newton_schulz(x: Tensor) -> Tensor:
    """Iterate X <- (a + b G + c G^2) X with G = X X^T, as published."""
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


def newton_schulz_gram(x: Tensor) -> Tensor:
    """Iterate on the Gram matrix alone, and multiply its polynomials by X once at the end.

    The result is that of `newton_schulz`, with a fraction of the products if M is several times N, as in
    kernels.
    """
    gram = x @ x.T
    product = _polynomial(gram)
    polynomial = product
    for _ in range(ITERATIONS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram)
        product = polynomial @ product
    return product @ x


def _polynomial(gram: Tensor) -> Tensor:
    polynomial = torch.addmm(gram, gram, gram, beta=B, alpha=C)
    polynomial.diagonal().add_(A)
    return polynomial


LAYERS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained matrices and kernels with at least 32 inputs and outputs.

    Those of a backbone's input and output layers are left out.
    """
    layers = [
        layer
        for backbone in _backbones(model)
        for layer in (*backbone.input_layers(), *backbone.output_layers())
    ]
    outer = {id(p) for layer in layers for p in layer.parameters()}
    return [p for p in weights_of_layers(model) if min(p.shape[:2]) >= 32 and id(p) not in outer]


def weights_of_layers(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained weights of linear, convolution and attention layers.

    Embedding tables, positions, registers and offsets are not among them, whatever their shape.
    """
    weights = [
        p
        for layer in model.modules()
        if isinstance(layer, LAYERS)
        for p in layer.parameters(recurse=False)
    ]
    return [p for p in weights if p.ndim > 1 and p.requires_grad]


def last_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained matrices and kernels of the output layers of backbones."""
    layers = [layer for backbone in _backbones(model) for layer in backbone.output_layers()]
    return [p for layer in layers for p in layer.parameters() if p.ndim > 1 and p.requires_grad]


def _backbones(model: nn.Module) -> list[Backbone]:
    return [module for module in model.modules() if isinstance(module, Backbone)]


def optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module
) -> dict[str, torch.Tensor]:
    """Return the optimizers' state as tensors `<parameter>/<slot>`; {} before the first step."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{slot}": value
        for optimizer in optimizers
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, torch.Tensor)
    }


def load_optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, tensors: dict[str, torch.Tensor]
) -> None:
    """Restore the state that `optimizer_tensors` returned.

    Raises:
        RuntimeError: if a parameter was optimized by another kind of optimizer.
    """
    parameters = dict(model.named_parameters())
    owners = {
        id(p): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for optimizer in optimizers:
        optimizer.state.clear()
    for name, value in tensors.items():
        parameter, slot = name.rsplit("/", 1)
        target = parameters[parameter]
        if (slot in MUON_SLOTS) != isinstance(owners[id(target)], Muon):
            raise RuntimeError(
                f"optimizer: {parameter} was {'' if slot in MUON_SLOTS else 'not '}optimized by "
                "Muon in the checkpoint, but "
                f"{'not' if slot in MUON_SLOTS else 'is'} with the current configuration"
            )
        # AdamW's step counter is a scalar; the moments have the parameter's device and layout.
        restored = (
            value.to(target.device)
            if value.ndim == 0
            else torch.empty_like(target).copy_(like(value, target))
        )
        owners[id(target)].state[target][slot] = restored
