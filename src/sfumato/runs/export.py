"""Exports: what a run has learned, written for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch

from sfumato.adapters import adapted_layers
from sfumato.errors import ConfigError, OutputError, closest
from sfumato.interop.trained_model import Exporter, TrainedModel
from sfumato.observability.progress import console
from sfumato.recipes.resolver import resolve
from sfumato.runs.loading import load
from sfumato.storage import checkpoint
from sfumato.storage.atomic import atomic_output
from sfumato.storage.output_paths import require_writable
from sfumato.storage.run_directory import RunDirectory

FOLDER = "exports"  # of a run
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Format:
    """A format that runs are exported to.

    Attributes:
        module: in sfumato.interop, imported when it is needed.
        function: in the module, an `Exporter`.
        suffix: of the file; "" for a folder.
        of_lora: whether it holds a LoRA alone, without its base.
    """

    module: str
    function: str
    suffix: str = ""
    of_lora: bool = False

    def exporter(self) -> Exporter:
        """Import the function that writes it."""
        found: Exporter = getattr(import_module(f"sfumato.interop.{self.module}"), self.function)
        return found


FORMATS: Mapping[str, Format] = {
    "lora-diffusers": Format("lora_export", "lora_diffusers", of_lora=True),
    "lora-kohya": Format("lora_export", "lora_kohya", suffix=".safetensors", of_lora=True),
    "lora-peft": Format("lora_export", "lora_peft", of_lora=True),
}


def export(
    run: str | Path,
    format: str,
    out: str | Path | None = None,
    dtype: str = "float32",
    *,
    weights: Literal["ema", "raw"] = "ema",
) -> Path:
    """Write a run's model for other programs; return the path of what was written.

    It is written whole or not at all, and compared with the run first. What was compared, and what
    was lost by rounding, is printed.

    Args:
        format: a key of `FORMATS`.
        out: a path that does not exist yet; by default RUN/exports/FORMAT-STEP.
        dtype: float32, float16 or bfloat16.
        weights: `ema`, the averaged ones, or `raw`, those of the last step.
    Raises:
        ConfigError: for an unknown format or precision, or a model that cannot be written so.
        RunError, CheckpointError: if this is not a run, or it has no usable checkpoint.
        OutputError: if `out` exists.
    """
    chosen = _format(format)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}", where="export", hint=f"one of {', '.join(DTYPES)}")
    directory = RunDirectory.existing(Path(run))
    step = int(checkpoint.read_newest(directory.checkpoints)[0].state["counters"]["step"])
    target = Path(out) if out is not None else default_path(directory.path, format, step)
    if target.exists():
        raise OutputError(
            "exists already, and is not replaced",
            where=str(target),
            hint="name another place with --out, or move it away",
        )
    require_writable(target.parent)
    trained = trained_model(directory.path, weights=weights, step=step)
    if chosen.of_lora and not adapted_layers(trained.pipeline.model.network):
        others = [name for name, other in FORMATS.items() if not other.of_lora]
        raise ConfigError(
            f"has no LoRA to write as {format}: all weights of its network were trained",
            where=str(run),
            hint=f"use {' or '.join(others) or 'the whole model'}, or train with adapter.kind=lora",
        )
    try:
        with atomic_output(target) as path:
            lines = chosen.exporter()(trained, path, DTYPES[dtype])
    except OSError as error:
        raise OutputError(
            f"could not be written: {error.strerror or error}",
            where=str(target),
            hint="free some disk space, or name another place with --out",
        ) from None
    for line in lines:
        console().print(line, markup=False)
    return target


def default_path(run: Path, format: str, step: int) -> Path:
    """Return where a run is exported to unless another place is named."""
    return run / FOLDER / f"{format}-{step}{_format(format).suffix}"


def trained_model(run: Path, *, weights: Literal["ema", "raw"], step: int) -> TrainedModel:
    """Load a run's model for an export: on the CPU, in float32."""
    pipeline = load(run, weights=weights)
    return TrainedModel(
        pipeline=replace(
            pipeline, model=pipeline.model.cpu(), autoencoder=pipeline.autoencoder.cpu()
        ),
        run=resolve(run),
        directory=run,
        step=step,
    )


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError(
            f"unknown format {name!r}",
            where="export",
            hint=f"{closest(name, FORMATS)}there are {', '.join(FORMATS)}",
        )
    return FORMATS[name]
