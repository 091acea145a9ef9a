"""One of each schedule, found through the union, so that a new one is tested by being listed."""

from sfumato.config import members
from sfumato.diffusion import (
    Cosine,
    Linear,
    LinearBetas,
    LogitNormal,
    Mode,
    Schedule,
    Shift,
    Span,
    Tabulated,
    Warped,
    ZeroTerminalSNR,
)

NEED_ARGUMENTS = {
    "Tabulated": Tabulated(alphas=(1.0, 0.9, 0.5, 0.1), sigmas=(0.01, 0.3, 0.8, 1.0)),
    "ZeroTerminalSNR": ZeroTerminalSNR(LinearBetas()),
    "Warped": Warped(schedule=Linear(), warp=Shift(3.0)),
}
SCHEDULES = {
    **{kind.__name__: NEED_ARGUMENTS.get(kind.__name__) or kind() for kind in members(Schedule)},
    "LogitNormal": Warped(schedule=Linear(), warp=LogitNormal(mean=0.2, std=0.8)),
    "Mode": Warped(schedule=Cosine(), warp=Mode(0.8)),
    "Span": Warped(schedule=Linear(), warp=Span(low=0.1, high=0.8)),
}
