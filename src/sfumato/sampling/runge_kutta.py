"""Runge-Kutta methods on dy/dc = T, y = x/k, in the coordinate of any parameterization."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from sfumato.diffusion.noise_level import NoiseLevel, broadcast
from sfumato.diffusion.parameterizations import Flow, ParameterizationConfig
from sfumato.sampling.protocol import Denoise, History, Noise


class Tableau(NamedTuple):
    """An explicit Butcher tableau: row i of `stages` weighs the slopes before stage i + 1; `nodes`
    are their abscissae.
    """

    order: int
    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


TABLEAUS = {
    "euler": Tableau(1, (), (), (1.0,)),
    "midpoint": Tableau(2, (0.5,), ((0.5,),), (0.0, 1.0)),
    "heun": Tableau(2, (1.0,), ((1.0,),), (0.5, 0.5)),
    "rk4": Tableau(
        4, (0.5, 0.5, 1.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    ),
}


@dataclass(frozen=True)
class RungeKutta:
    """y' = y + h sum_i w_i T_i with h = c' - c: one call of the denoiser for each stage.

    Heun in `Epsilon` is EDM's sampler, and Euler in `Flow` is flow matching's; in `Velocity` it is
    v-DDIM's rotation to first order.

    Attributes:
        method: name of the tableau.
        parameterization: coordinate that is integrated in.
    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1 (Heun); Butcher 2016 for the
        tableaus.
    """

    method: Literal["euler", "midpoint", "heun", "rk4"] = "heun"
    _: KW_ONLY
    parameterization: ParameterizationConfig = Flow()

    @property
    def order(self) -> int:
        """The order of the tableau: 1, 2 or 4."""
        return TABLEAUS[self.method].order

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        start: NoiseLevel,
        stop: NoiseLevel,
        history: History,
        noise: Noise,
    ) -> Tensor:
        """Integrate dy/dc = T, y = x/k, from `start` to `stop` by the stages of the tableau."""
        p, tableau = self.parameterization, TABLEAUS[self.method]
        begin = p.finite_coordinate(start)
        interval = p.finite_coordinate(stop) - begin
        y = x / broadcast(p.scale(start), x)
        slopes = [p.target(denoise(x, start), start)]
        for node, row in zip(tableau.nodes, tableau.stages, strict=True):
            level = p.level(begin + node * interval)  # of unit scale, so that x = y there
            stage = y + broadcast(interval, x) * _weighted(row, slopes)
            slopes.append(p.target(denoise(stage, level), level))
        return broadcast(p.scale(stop), x) * (
            y + broadcast(interval, x) * _weighted(tableau.weights, slopes)
        )


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        total = total + weight * slope
    return total
