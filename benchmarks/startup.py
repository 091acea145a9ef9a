"""Seconds before anything happens: import, help, the first training step, the first sample;
diffusers' import beside ours.

    python benchmarks/startup.py [--quick] [--rounds 5] [--json FILE]

Each is a fresh process, taken in turn. The first step is that of `sfumato train digits
budget.steps=1`, whole.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import interleaved, machine, options, report


def run(*arguments: str) -> None:
    """A fresh process of this Python."""
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def sfumato(*arguments: str) -> None:
    """The program in a fresh process."""
    run("-c", "from sfumato.cli.main import main; main()", *arguments)


def main() -> None:
    """Time all in turn."""
    asked = options(__doc__.splitlines()[0], rounds=5)
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "trained"
        tiny = ("budget.minutes=null", "budget.steps=1", "validation.samples=10", "preview.num=2")
        sfumato("train", "digits", "--run", str(trained), *tiny)
        numbers = iter(range(10**6))
        candidates = {
            "python": lambda: run("-c", "pass"),
            "import sfumato": lambda: run("-c", "import sfumato"),
            "sfumato --help": lambda: sfumato("--help"),
            "import torch": lambda: run("-c", "import torch"),
            "sfumato train digits, one step": lambda: sfumato(
                "train", "digits", "--run", f"{folder}/{next(numbers)}", *tiny
            ),
            "sfumato sample, two images": lambda: sfumato(
                "sample",
                str(trained),
                "--num",
                "2",
                "--steps",
                "2",
                "--out",
                f"{folder}/{next(numbers)}",
            ),
        }
        if importlib.util.find_spec("diffusers"):
            candidates["import diffusers and its UNet2DModel"] = lambda: run(
                "-c", "from diffusers import UNet2DModel"
            )
        times = interleaved(candidates, 1 if asked.quick else asked.rounds)
    result = {
        "machine": machine(),
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "times": times,
    }
    report(result, asked.json)


if __name__ == "__main__":
    main()
