"""Choices that are made once, when a run starts: the precision, and whether to compile the network.

The choice and its measurement are saved in the counters, so that a resumed run continues as it
began, however busy the machine is by then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from sfumato.distributed import current
from sfumato.nn.accelerable import Accelerable
from sfumato.nn.compiling import NEEDED, can_compile, compile_in_place
from sfumato.training import precision
from sfumato.training.config import TrainingConfig
from sfumato.training.state import Counters

# seconds of training from which on compiling pays on a GPU: it takes a minute or two
GPU_AFTER_S = 600.0
LONG_S = 5.0  # seconds of a pass, from which on warm-up hardly counts
Pass = Callable[[torch.dtype], None]  # a forward and backward pass that changes nothing
Say = Callable[[str], None]


def resolve_precision(
    config: TrainingConfig, counters: Counters, network: Accelerable, *, say: Say
) -> None:
    """Choose the precision if it is `auto`, and prepare the network for it."""
    if config.precision == "auto" and counters.precision == "auto":
        counters.precision, line = current().on_first(
            lambda: precision.choose(network, _device(network))
        )
        say(line)
    precision.prepare(network, precision_of(config, counters))


def precision_of(config: TrainingConfig, counters: Counters) -> str:
    """Return the configured precision, or the one that was chosen for `auto`."""
    return counters.precision if config.precision == "auto" else config.precision


def resolve_compile(
    config: TrainingConfig,
    counters: Counters,
    network: Accelerable,
    *,
    images: int,
    trial: Callable[[], Pass],
    say: Say,
) -> bool:
    """Compile the network if `compile` is `on`, or `auto` and it pays; return whether it was.

    Args:
        images: number of images in the training set.
        trial: returns the pass that is timed to decide whether compiling pays.
    Raises:
        ConfigError: if `compile` is `on` and the machine lacks what compiling needs.
    """
    setting = config.compile
    if setting == "off" or (
        setting == "auto" and not _pays(config, counters, network, images, trial)
    ):
        return False
    if setting == "auto" and not can_compile():
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
    """Return whether the whole budget takes longer than compiling needs to pay off.

    That time depends on the device and on the kind of network.
    """
    on_gpu = _device(network).type == "cuda"
    after_s = GPU_AFTER_S if on_gpu else network.compile_after_s
    if math.isinf(after_s):
        return False
    dtype = precision.DTYPES[precision_of(config, counters)]
    counters.pass_s = counters.pass_s or current().on_first(
        lambda: _timed(trial(), dtype, _device(network))
    )
    steps = config.budget.steps_of(counters.pass_s, batch_size=config.batch_size, images=images)
    return counters.pass_s * steps > after_s


def _timed(work: Pass, dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds of the second of two passes.

    The first warms up; if it takes longer than LONG_S, it is the only one.
    """
    for _ in range(2):
        begun = time.perf_counter()
        work(dtype)
        precision.finish(device)
        if (taken := time.perf_counter() - begun) > LONG_S:
            break
    return taken


def _device(network: Accelerable) -> torch.device:
    return next(network.parameters()).device
