"""Exports: what a run has learned, written for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch

from sfumato.config import kind_of
from sfumato.errors import ConfigError, OutputError, closest
from sfumato.interop.model_card import write_card
from sfumato.interop.trained_model import Exporter, TrainedModel
from sfumato.observability.progress import console
from sfumato.recipes.resolver import resolve
from sfumato.runs.loading import load
from sfumato.storage import checkpoint
from sfumato.storage.atomic import atomic_output
from sfumato.storage.output_paths import require_writable
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.best_weights import Recommendation

FOLDER = "exports"  # of a run
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Format:
    """A format that runs are exported to.

    Attributes:
        module: in sfumato.interop, imported when it is needed.
        function: in the module, an `Exporter`.
        suffix: of the file; "" for a folder.
        kinds: of adapters whose runs it can hold; () for all.
        how_to_run: lines of Python for its model card; "" if the function writes the card itself.
    """

    module: str
    function: str
    suffix: str = ""
    kinds: tuple[str, ...] = ()
    how_to_run: str = ""

    def exporter(self) -> Exporter:
        """Import the function that writes it."""
        found: Exporter = getattr(import_module(f"sfumato.interop.{self.module}"), self.function)
        return found


PRODUCTS = ("oft", "lokr", "dora", "lora")  # changes of layers, which a LoRA can be made of
MERGED = ("none", *PRODUCTS)  # whose changes are in the network's own weights
LORA_IN_DIFFUSERS = """from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("FOLDER OF THE BASE")
pipeline.load_lora_weights("PATH OF THIS LORA")"""
LORA_IN_PEFT = """from diffusers import DiffusionPipeline
from peft import PeftModel
pipeline = DiffusionPipeline.from_pretrained("FOLDER OF THE BASE")
pipeline.unet = PeftModel.from_pretrained(pipeline.unet, "FOLDER OF THIS LORA")
# with trained text encoders, each part has a folder in it: unet, text_encoder, text_encoder_2"""
EMBEDDING_IN_DIFFUSERS = """from diffusers import DiffusionPipeline
from safetensors.torch import load_file
pipeline = DiffusionPipeline.from_pretrained("FOLDER OF THE BASE")
for part, vectors in load_file("PATH OF THIS FILE").items():
    second = "_2" if part == "clip_g" else ""
    pipeline.load_textual_inversion(
        vectors,
        token="THE TOKEN",
        text_encoder=getattr(pipeline, f"text_encoder{second}"),
        tokenizer=getattr(pipeline, f"tokenizer{second}"),
    )"""
CONTROLNET_IN_DIFFUSERS = """from diffusers import ControlNetModel
from diffusers import StableDiffusionControlNetPipeline as Pipeline  # ...XLControlNetPipeline
from PIL import Image, ImageOps
control = ControlNetModel.from_pretrained("THIS FOLDER")
pipeline = Pipeline.from_pretrained("FOLDER OF THE BASE", controlnet=control)
doodle = Image.open("doodle.png").convert("L").resize((512, 512))  # dark lines on light
ink, given, none = ImageOps.invert(doodle), doodle.point(lambda _: 255), doodle.point(lambda _: 0)
image = Image.merge("RGB", (ink, given, none))
pipeline("a photo", image=image).images[0].save("image.png")"""
CONTROL_IN_SFUMATO = """import numpy, sfumato, torch
from PIL import Image
pipeline = sfumato.with_control(sfumato.load("FOLDER OF THE BASE"), "PATH OF THIS FILE")
doodle = numpy.array(Image.open("doodle.png").convert("L"))  # dark lines on light
images = pipeline.sample(4, doodle=torch.from_numpy(doodle)[None] / 255)  # and prompt="..." """

FORMATS: Mapping[str, Format] = {
    "lora-diffusers": Format(
        "lora_export", "lora_diffusers", kinds=PRODUCTS, how_to_run=LORA_IN_DIFFUSERS
    ),
    "lora-kohya": Format(
        "lora_export",
        "lora_kohya",
        suffix=".safetensors",
        kinds=PRODUCTS,
        how_to_run=LORA_IN_DIFFUSERS,
    ),
    "lora-peft": Format("lora_export", "lora_peft", kinds=PRODUCTS, how_to_run=LORA_IN_PEFT),
    "diffusers": Format("diffusers_export", "write_diffusers", kinds=MERGED),
    "single-file": Format("single_file", "write_single_file", suffix=".safetensors", kinds=MERGED),
    "bundle": Format("bundle", "write_bundle"),
    "onnx": Format("onnx_export", "write_onnx", kinds=("none", "lora")),
    "controlnet": Format(
        "controlnet_export",
        "write_controlnet",
        kinds=("controlnet",),
        how_to_run=CONTROLNET_IN_DIFFUSERS,
    ),
    "control-lora": Format(
        "control_files",
        "write_control",
        suffix=".safetensors",
        kinds=("control-lora",),
        how_to_run=CONTROL_IN_SFUMATO,
    ),
    "embedding": Format(
        "embedding_export",
        "write_embedding",
        suffix=".safetensors",
        kinds=("textual-inversion",),
        how_to_run=EMBEDDING_IN_DIFFUSERS,
    ),
}


def export(
    run: str | Path,
    format: str,
    out: str | Path | None = None,
    dtype: str = "float32",
    *,
    weights: Literal["auto", "best", "ema", "raw"] = "auto",
) -> Path:
    """Write a run's model for other programs; return the path of what was written.

    It is written whole or not at all, and compared with the run first. What was compared, and what
    was lost by rounding, is printed.

    Args:
        format: a key of `FORMATS`.
        out: a path that does not exist yet; by default RUN/exports/FORMAT-STEP.
        dtype: float32, float16 or bfloat16.
        weights: `ema`, the averaged ones; `raw`, those of the last step; `best`, those that the
            verdict names; `auto`, `best` where the last step is worse, else `ema`.
    Raises:
        ConfigError: for an unknown format or precision, or a model that cannot be written so.
        RunError, CheckpointError: if this is not a run, or it has no usable checkpoint.
        OutputError: if `out` exists.
    """
    chosen = _format(format)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}", where="export", hint=f"one of {', '.join(DTYPES)}")
    directory = RunDirectory.existing(Path(run))
    _require_kind(directory.path, format)
    step = _step(directory, weights)
    target = Path(out) if out is not None else default_path(directory.path, format, step)
    if target.exists():
        raise OutputError(
            "exists already, and is not replaced",
            where=str(target),
            hint="name another place with --out, or move it away",
        )
    require_writable(target.parent)
    trained = trained_model(directory.path, weights=weights, step=step)
    try:
        with atomic_output(target) as path:
            lines = chosen.exporter()(trained, path, DTYPES[dtype])
            if chosen.how_to_run:
                _write_card(trained, path, chosen)
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


def _require_kind(run: Path, format: str) -> None:
    """Raise ConfigError if a format cannot hold what a run has trained."""
    adapter, kinds = resolve(run).adapter, FORMATS[format].kinds
    kind = kind_of(type(adapter))
    if kinds and kind not in kinds:
        fitting = [
            name for name, other in FORMATS.items() if not other.kinds or kind in other.kinds
        ]
        raise ConfigError(
            f"cannot be written as {format}, which is for adapter.kind={' or '.join(kinds)}: "
            f"trained was {adapter.described}",
            where=str(run),
            hint=f"use {' or '.join(fitting)}; or train with adapter.kind={kinds[-1]}",
        )


def _write_card(trained: TrainedModel, path: Path, chosen: Format) -> None:
    """Write the model card into a folder, or beside a file."""
    if path.is_dir():
        write_card(trained, path, chosen.how_to_run)
    else:
        names = {"name": f"{path.stem}.md", "samples": f"{path.stem}.png"}
        write_card(trained, path.parent, chosen.how_to_run, **names)


def _step(directory: RunDirectory, weights: str) -> int:
    """Return the step that weights of this name are from."""
    advice = Recommendation.read(directory.verdict)
    wanted = weights == "best" or (weights == "auto" and advice.use_best)
    if wanted and advice.best_step is not None:
        return advice.best_step
    return checkpoint.read_newest(directory.checkpoints)[0].step


def trained_model(
    run: Path, *, weights: Literal["auto", "best", "ema", "raw"], step: int
) -> TrainedModel:
    """Load a run's model for an export: on the CPU, in float32.

    Its settings of sampling are those that a sweep recommends, if one does.
    """
    pipeline = load(run, weights=weights)
    return TrainedModel(
        pipeline=replace(
            pipeline, model=pipeline.model.cpu(), autoencoder=pipeline.autoencoder.cpu()
        ),
        run=replace(resolve(run), sampling=pipeline.sampling),
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
