"""Linear multistep methods: integrate the polynomial through the last few evaluations, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor

from sfumato.config.bounds import Count
from sfumato.diffusion.noise_level import NoiseLevel, broadcast
from sfumato.diffusion.parameterizations import ParameterizationConfig, Sample
from sfumato.errors import ConfigError
from sfumato.sampling.protocol import Denoise, History, Noise, Point

HISTORY = 4  # evaluations the driver remembers: what the highest order uses
_NODES, _WEIGHTS = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(16))


def check_order(name: str, order: int, legal: Sequence[int]) -> None:
    """Raise ConfigError unless `order` is one that the method has."""
    if order not in legal:
        raise ConfigError(
            f"order {order} is not one of {list(legal)}",
            where=name,
            hint=f"{name}(order={legal[0]})",
        )


def integrate(
    points: Sequence[Point],
    start: NoiseLevel,
    stop: NoiseLevel,
    parameterization: ParameterizationConfig,
    exponential: bool,
) -> Tensor:
    """Return sum_j T_j * integral of L_j(z(c)) dc from `start` to `stop`.

    L_j is the Lagrange basis on the points' z: z = c gives Adams' methods, z = log c the
    exponential ones. An evaluation at infinite z (log c at alpha = 0) carries no information on the
    slope: it is used alone or not at all.
    """
    warp = torch.log if exponential else torch.clone
    nodes = [warp(parameterization.coordinate(point.level)) for point in points]
    finite = [
        (node, point)
        for node, point in zip(nodes, points, strict=True)
        if bool(torch.isfinite(node).all())
    ]
    if len(finite) < 2:
        only = finite[0][1] if finite else points[0]
        interval = parameterization.finite_coordinate(stop) - parameterization.finite_coordinate(
            start
        )
        return broadcast(interval, only.target) * only.target

    begin, end = (warp(parameterization.coordinate(level)) for level in (start, stop))
    half = (end - begin) / 2
    shape = (-1, *[1] * begin.ndim)
    z = half * _NODES.to(begin).view(shape) + (begin + end) / 2
    measure = half * _WEIGHTS.to(begin).view(shape) * (torch.exp(z) if exponential else 1.0)
    total = torch.zeros_like(points[0].target)
    for j, (node, point) in enumerate(finite):
        basis = torch.ones_like(z)
        for m, (other, _) in enumerate(finite):
            if m != j:
                basis = basis * (z - other) / (node - other)
        total = total + broadcast((measure * basis).sum(0), point.target) * point.target
    return total


@dataclass(frozen=True)
class Multistep:
    """y' = y + sum_j T_j * integral L_j(z) dc: one call of the denoiser a step, at any order from 2
    to 4.

    `Multistep(2, parameterization=Epsilon(), exponential=False)` is Adams-Bashforth on EDM's sigma
    (LMS, PLMS); `exponential=True` with `Sample` belongs to the DPM-Solver++ family, with `Epsilon`
    to DPM-Solver's.

    The order is reached from exact starting values. The first steps have nothing to look back on
    and run at lower order, which caps a whole trajectory at order 2.

    Attributes:
        order: number of evaluations that a step interpolates.
        parameterization: coordinate that is integrated in.
        exponential: whether the linear part is integrated exactly.
    Source: Liu et al. 2022 (arXiv:2202.09778); Zhang & Chen 2023 (arXiv:2204.13902) for the
        exponential form.
    """

    order: Count = 2
    _: KW_ONLY
    parameterization: ParameterizationConfig = Sample()
    exponential: bool = True

    def __post_init__(self) -> None:
        check_order("Multistep", self.order, (2, 3, 4))

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        start: NoiseLevel,
        stop: NoiseLevel,
        history: History,
        noise: Noise,
    ) -> Tensor:
        """Integrate the polynomial through the last `order` targets, as far as there are any."""
        p = self.parameterization
        y = x / broadcast(p.scale(start), x)
        history.appendleft(Point(start, p.target(denoise(x, start), start), y))
        y = y + integrate(list(history)[: self.order], start, stop, p, self.exponential)
        return broadcast(p.scale(stop), y) * y
