"""The run that fine-tunes a model folder of diffusers on images: settings, and why they are so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sfumato.adapters import LoRA
from sfumato.conditioners import PipelineTextConfig
from sfumato.contexts import ContextConfig
from sfumato.data import source_at
from sfumato.errors import ConfigError
from sfumato.foreign_models import is_pipeline_folder
from sfumato.interop.diffusers_folder import read_folder
from sfumato.recipes.run import Run
from sfumato.training import (
    Budget,
    OptimizerConfig,
    PowerEMA,
    PreviewConfig,
    ValidationConfig,
)

SMALL_SET, RANK, LARGE_RANK = 30, 16, 32
VIEWS = 100  # of each image, at which small sets are learned
MAX_STEPS = 5000
DROPOUT = 0.05


def finetuning_run(model: Path, source: str) -> tuple[Run, list[str]]:
    """Return the run, and a line for each choice.

    Args:
        model: a pipeline's folder in diffusers' layout.
        source: images, as `train` takes them.
    Raises:
        ConfigError: if the model is no such folder, or needs captions that the images lack.
        DataError: if there are no images.
    """
    if not is_pipeline_folder(model):
        raise ConfigError(
            "is not a pipeline's folder: it has no model_index.json",
            where=str(model),
            hint="name a folder that diffusers wrote with save_pretrained; a run of sfumato is "
            "continued with `sfumato resume RUN`",
        )
    content = read_folder(model)
    images = source_at(source)
    listing = images.listing()
    count = len(listing.entries)
    captioned = sum(bool(entry.captions) for entry in listing.entries)
    text = content.run.conditioner.text
    if text is not None and not captioned:
        raise ConfigError(
            f"{model.name} is conditioned on text, and none of {count} images has a caption",
            where=source,
            hint="put a .txt with a caption beside each image",
        )
    assert text is None or isinstance(text, PipelineTextConfig)
    rank = RANK if count <= SMALL_SET else LARGE_RANK
    batch_size = min(4, count)
    steps = min(MAX_STEPS, max(100, VIEWS * count // batch_size))
    run = replace(
        content.run,
        name=f"{Path(source).resolve().stem or 'images'}-{content.run.name}",
        data=replace(content.run.data, source=images),
        adapter=LoRA(rank=rank),
        conditioner=content.run.conditioner
        if text is None
        else ContextConfig(text=replace(text, dropout=DROPOUT)),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, weight_decay=0.0, schedule="constant", warmup_steps=steps // 20
        ),
        ema=PowerEMA(0.1),
        batch_size=batch_size,
        budget=Budget(steps=steps),
        preview=PreviewConfig(num=4),
        validation=ValidationConfig(samples=min(128, 8 * count)),
    )
    reasons = [
        f"{count} images, {captioned} with a caption",
        f"LoRA of rank {rank} on all linear layers, learning rate 1e-4, constant: the base stays "
        "as it is (adapter.kind=none trains all weights)",
        f"{steps} steps of {batch_size}: each image is seen {steps * batch_size // count} times",
        *(
            []
            if text is None
            else [f"{DROPOUT:.0%} of captions are replaced by the null condition, for guidance"]
        ),
    ]
    return run, [*content.remarks, *(f"chosen: {reason}" for reason in reasons)]
