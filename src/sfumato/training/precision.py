"""The device and the precision that the network computes in.

`auto` depends on the machine's instructions, and on one small measured product where these do not
decide.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.nn.accelerable import Accelerable
from sfumato.nn.float8 import convert_to_float8, require_float8

# float8 is of matrix products only
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.bfloat16}
CHOICES = ("float32", "bfloat16")
# compute capability of the first NVIDIA GPUs that multiply bfloat16 (CUDA C++ programming guide,
# table 5)
GPU_FROM = (8, 0)
# names of bfloat16 instructions in torch and Linux, for x86 and ARM
FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "svebf16")
FLOPS, REPEATS = 2**26, 3  # of the measured product: 10 ms at the 6 GFLOP/s of emulated bfloat16
HOPELESS = 2.0  # time of bfloat16 over that of float32, from which on it is not measured again


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool | None:
    """Return whether a device has bfloat16 multiplication; None if only a measurement can tell."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= GPU_FROM
    capabilities = _capabilities()
    return any(capabilities.get(name, False) for name in FLAGS) if capabilities else None


def _capabilities() -> Mapping[str, Any]:
    """Return the processor's instruction sets by name.

    The result is {} if neither torch (from 2.13) nor Linux lists them.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        listed = next(
            (
                line.partition(":")[2].split()
                for line in lines
                if line.startswith(("flags", "Features"))
            ),
            [],
        )
        return dict.fromkeys(listed, True)
    return {}


def choose(network: nn.Module, device: torch.device) -> tuple[str, str]:
    """Choose the faster precision for a network's products, and give a line that says why.

    This takes well under a second.
    """
    supported = has_bfloat16(device)
    if supported is False:
        return "float32", f"precision float32: {_device_name(device)} has no bfloat16 instructions"
    if supported is True and device.type == "cuda":
        return "bfloat16", f"precision bfloat16: {_device_name(device)} multiplies it directly"
    return faster(_widest(network), device)


def faster(weight: Tensor, device: torch.device) -> tuple[str, str]:
    """Time a matrix (N, M) times columns in both precisions; return the faster one and why.

    Rounding to bfloat16 is part of the measured time, and bfloat16 must win by a tenth: since it
    rounds, it has to pay.
    """
    columns = torch.ones(weight.shape[1], max(16, FLOPS // (2 * weight.numel())), device=device)
    exact = _timed(weight, columns, torch.float32)
    seconds = {
        "float32": exact,
        "bfloat16": _timed(weight, columns, torch.bfloat16, enough=HOPELESS * exact),
    }
    chosen = "bfloat16" if seconds["bfloat16"] < 0.9 * seconds["float32"] else "float32"
    measured = ", ".join(f"{1000 * value:.1f} ms in {name}" for name, value in seconds.items())
    return chosen, f"precision {chosen}: a product of the network's largest matrix takes {measured}"


@torch.no_grad()
def _timed(weight: Tensor, columns: Tensor, dtype: torch.dtype, *, enough: float = 1.0) -> float:
    """Return the median seconds of one product; the first warms up.

    If the first takes longer than `enough`, it is the only one.
    """
    seconds = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        weight.to(dtype) @ columns.to(dtype)
        finish(weight.device)
        seconds.append(time.perf_counter() - begun)
        if seconds[0] > enough:
            return seconds[0]
    return statistics.median(seconds[1:])


def _widest(network: nn.Module) -> Tensor:
    """Return the largest kernel or matrix of a network as a matrix (N, M).

    A network that has none gets a small matrix of ones.
    """
    matrices = [
        parameter.detach().flatten(1) for parameter in network.parameters() if parameter.ndim > 1
    ]
    return max(matrices, key=torch.numel, default=torch.ones(256, 256))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"


def finish(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def require(network: Accelerable, name: str) -> None:
    """Raise ConfigError if the network or the machine does not support a precision."""
    if name == "float8":
        require_float8(network.float8_layers())


def prepare(network: Accelerable, name: str) -> None:
    """Change a network's layers in place if a precision is more than the dtype of autocast."""
    if name == "float8":
        convert_to_float8(network, network.float8_layers())
