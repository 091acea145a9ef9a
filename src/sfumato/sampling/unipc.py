"""UniPC: a multistep predictor of which every evaluation also corrects the step before it, without
an extra call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sfumato.config.bounds import Count
from sfumato.diffusion.noise_level import NoiseLevel
from sfumato.diffusion.parameterizations import Sample
from sfumato.sampling.multistep import check_order, integrate
from sfumato.sampling.protocol import Denoise, History, Noise, Point


@dataclass(frozen=True)
class UniPC:
    """Predict with order - 1 points, evaluate, correct with those and the new one.

    The paper's UniPC-p has order p + 1 and is `UniPC(p + 1)` here (libraries that say
    `solver_order=p` mean its p). With all its conditions solved exactly, as here, the paper's free
    function B(h) cancels. It predicts x0 in log(alpha/sigma).

    Attributes:
        order: global order of accuracy.
    Source: Zhao et al. 2023 (arXiv:2302.04867), algorithms 1 and 2.
    """

    kind: ClassVar[str] = "unipc"

    order: Count = 3

    def __post_init__(self) -> None:
        check_order("UniPC", self.order, (2, 3, 4))

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        start: NoiseLevel,
        stop: NoiseLevel,
        history: History,
        noise: Noise,
    ) -> Tensor:
        """Correct `x` with the evaluation at `start`, then predict the sample at `stop`."""
        p = Sample()
        sigma, next_sigma = start.like(x).sigma, stop.like(x).sigma
        target = denoise(x, start).x0
        y = x / sigma
        if history:
            previous = history[0]
            known = [Point(start, target, y), *list(history)[: self.order - 1]]
            y = previous.y + integrate(known, previous.level, start, p, True)
        history.appendleft(Point(start, target, y))
        return next_sigma * (y + integrate(list(history)[: self.order - 1], start, stop, p, True))
