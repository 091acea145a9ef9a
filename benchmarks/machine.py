"""What the benchmarks share: options, the machine's measured peaks, interleaved timing, the JSON
form.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sfumato.cli.main import keep_memory
from sfumato.training.precision import DTYPES, choose, default_device

keep_memory()  # as the command line does; the peers run in the same process and gain as much


def options(description: str, **defaults: Any) -> argparse.Namespace:
    """--quick, --json FILE and one option for each default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="under a minute, fewer rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def interleaved(
    candidates: dict[str, Callable[[], object]], rounds: int, repeat: int = 1
) -> dict[str, list[float]]:
    """Times of each candidate, taken in turn, so that a machine that slows down slows all of them;
    one round warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, work in candidates.items():
            taken = statistics.median(seconds(work) for _ in range(repeat))
            if number:
                times[name].append(taken)
    return times


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of (their time / our time): how many times faster ours is."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def _attention(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any
) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(
    out: tuple[int, ...],
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    *_: Any,
    **__: Any,
) -> int:
    return sdpa_backward_flop_count(out, q, k, v)


COUNTED_TOO = {  # which torch does not count
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of one call, counted by torch (2 for a multiply-add)."""
    with FlopCounterMode(display=False, custom_mapping=COUNTED_TOO) as counter:
        work()
    return counter.get_total_flops()


def fastest() -> str:
    """The precision that multiplies fastest here, float32 or bfloat16: as `precision=auto` chooses
    for a wide layer.
    """
    device = default_device()
    return choose(torch.nn.Linear(1024, 1024, device=device), device)[0]


def peaks(rounds: int = 15, precision: str | None = None) -> dict[str, Any]:
    """Best measured GFLOP/s of a square matrix product and of 3x3 convolutions on this machine,
    now, in its fastest precision.

    A GPU is given larger ones, many at a time, so that starting them is hidden.
    """
    gpu = torch.cuda.is_available()
    device, size, repeat, batch = (
        (torch.device("cuda"), 8192, 10, 512) if gpu else (torch.device("cpu"), 2048, 1, 64)
    )
    precision = precision or fastest()
    dtype = DTYPES[precision]
    a = torch.ones(size, size, dtype=dtype, device=device)
    found: dict[str, Any] = {
        "matmul_gflops": 0.0,
        "convolution_gflops": 0.0,
        "precision": precision,
    }
    for _ in range(rounds):
        taken = seconds(lambda: [a @ a for _ in range(repeat)])
        found["matmul_gflops"] = max(found["matmul_gflops"], repeat * 2 * size**3 / taken / 1e9)
    for channels, side in ((64, 32), (128, 32), (128, 16), (256, 16), (256, 32)):
        x = torch.ones(batch, channels, side, side, dtype=dtype, device=device).to(
            memory_format=torch.channels_last
        )
        layer = torch.nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype, device=device)
        layer = layer.to(memory_format=torch.channels_last)
        work = repeat * 2 * batch * side**2 * channels**2 * 9
        with torch.no_grad():
            for _ in range(rounds):
                taken = seconds(lambda: [layer(x) for _ in range(repeat)])  # noqa: B023
                found["convolution_gflops"] = max(found["convolution_gflops"], work / taken / 1e9)
    return found


def continued(path: Path | None, settings: dict[str, Any], *, rows: str) -> dict[str, Any]:
    """The sheet at `path` with what an earlier sitting measured under `rows`, or a new one;
    settings other than its own are refused.
    """
    if path is None or not path.is_file():
        return {"machine": machine(), "settings": settings, rows: {}}
    sheet: dict[str, Any] = json.loads(path.read_text())
    if sheet["settings"] != settings:
        raise SystemExit(
            f"{path} was begun with {sheet['settings']}, this asks for {settings}: use another file"
        )
    return sheet


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "gpu": gpu,
    }


def report(result: dict[str, Any], path: Path | None) -> None:
    """Print the figures, and write them where asked."""
    print(json.dumps(result, indent=1))
    if path is not None:
        path.write_text(json.dumps(result, indent=1))
