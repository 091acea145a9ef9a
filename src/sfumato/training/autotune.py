"""What is settled when a run starts, once in its life: the precision, and whether the network is
compiled.

The counters keep what was settled and measured, so that a run goes on as it began, however busy the
machine is when it is resumed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from sfumato.nn.accelerable import Accelerable
from sfumato.nn.compiling import NEEDED, can_compile, compile_in_place
from sfumato.training import precision
from sfumato.training.config import TrainingConfig
from sfumato.training.state import Counters

# of training: compiling takes a minute or two of it, which a short run had better use
GPU_AFTER_S = 600.0
LONG_S = 5.0  # of a pass, beside which warming up does not count
Pass = Callable[[torch.dtype], None]  # forward and backward, in that precision, leaving no trace
Say = Callable[[str], None]


def settle_precision(
    config: TrainingConfig, counters: Counters, network: Accelerable, *, say: Say
) -> None:
    """Choose the precision if that is left to the machine, and make the network fit for it."""
    if config.precision == "auto" and counters.precision == "auto":
        counters.precision, line = precision.choose(network, _device(network))
        say(line)
    precision.prepare(network, precision_of(config, counters))


def precision_of(config: TrainingConfig, counters: Counters) -> str:
    """As configured, or as measured."""
    return counters.precision if config.precision == "auto" else config.precision


def settle_compiling(
    config: TrainingConfig,
    counters: Counters,
    network: Accelerable,
    *,
    images: int,
    trial: Callable[[], Pass],
    say: Say,
) -> bool:
    """Compile the network if asked to, or if it pays and can be done; whether it is.

    Args:
        images: in the training set.
    Raises:
        ConfigError: if it is asked for on a machine that lacks what it takes.
    """
    asked = config.compile
    if asked == "off" or (asked == "auto" and not _pays(config, counters, network, images, trial)):
        return False
    if asked == "auto" and not can_compile():
        say(f"not compiling the network, which would be faster: it {NEEDED}")
        return False
    say("the network is compiled: the first steps take a minute or more")
    compile_in_place(network)
    return True


def _pays(
    config: TrainingConfig,
    counters: Counters,
    network: Accelerable,
    images: int,
    trial: Callable[[], Pass],
) -> bool:
    """Where the whole budget comes to more than what the network's kind makes up for compiling in
    on such a device.
    """
    on_gpu = _device(network).type == "cuda"
    after_s = GPU_AFTER_S if on_gpu else network.compile_after_s
    if math.isinf(after_s):
        return False
    counters.pass_s = counters.pass_s or _timed(
        trial(), precision.DTYPES[precision_of(config, counters)], _device(network)
    )
    steps = config.budget.steps_of(counters.pass_s, batch_size=config.batch_size, images=images)
    return counters.pass_s * steps > after_s


def _timed(work: Pass, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the second of two passes; the first warms up, and is enough where it is long."""
    for _ in range(2):
        begun = time.perf_counter()
        work(dtype)
        precision.finish(device)
        if (taken := time.perf_counter() - begun) > LONG_S:
            break
    return taken


def _device(network: Accelerable) -> torch.device:
    return next(network.parameters()).device
