"""Whether a checkpoint can go on with the data, the plan and the models that are there now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.data import BatchPlan, Dataset
from sfumato.data.batch_plan import NEWEST, ORDERS
from sfumato.data.dataset_diff import changes, held_out_after_training
from sfumato.errors import CheckpointError
from sfumato.storage.base_parts import PARTS, require_same_parts
from sfumato.storage.checkpoint import Checkpoint
from sfumato.storage.run_directory import RunDirectory

# what a checkpoint says of the models around the trained one: what it is, and what to do
SAME = {
    "prior_images": (
        "the prior images of preservation are not those that this run began with",
        "leave preservation and its images as they were, or train a new run",
    ),
    "autoencoder": (
        "the autoencoder is not the one that this run was trained with",
        "put its files back as they were (autoencoder/final), or train a new run",
    ),
    "latents": (
        "latents are stored on disk now and were not, or the other way round, which rounds them "
        "differently",
        "leave data.cache and autoencoder/kept.json as they were, or train a new run",
    ),
}


def require_same_run(
    loaded: Checkpoint,
    dataset: Dataset,
    plan: BatchPlan,
    facts: Mapping[str, Any],
    directory: RunDirectory,
    *,
    accepts_data: bool = False,
) -> list[str]:
    """Return warnings about changes that do not matter to the run, or that are accepted.

    Args:
        facts: what the task would write into a checkpoint now.
        accepts_data: whether the data may have changed.
    Raises:
        CheckpointError: if the data, the seed, the batch size, or a model that is not trained have
            changed.
    """
    state, where = loaded.state, str(loaded.path)
    warnings = []
    if state.get("data") != dataset.fingerprint and accepts_data:
        warnings = _accepted(state, dataset, directory)
    elif state.get("data") != dataset.fingerprint:
        raise CheckpointError(
            f"the data are not what this run was trained on: {_data_changes(state, dataset, directory)}",
            where=where,
            hint="restore them as they were; or resume with them as they are, in a new epoch: "
            "`sfumato resume RUN --accept-data-change`",
        )
    elif state.get("plan") != plan.hash:
        raise CheckpointError(
            "seed, batch_size, data.shuffle or data.window are not what this run began with, so that samples would be "
            "repeated or left out",
            where=where,
            hint="leave them as they are; micro_batch may change",
        )
    for name, (what, hint) in SAME.items():
        before, now = state.get(name, ""), facts.get(name, "")
        if before != now and (before or name == "prior_images"):
            raise CheckpointError(
                f"{what}: it is {str(now)[:12] or 'empty'}, and was {str(before)[:12] or 'empty'} "
                "(hash)",
                where=where,
                hint=hint,
            )
    return warnings + require_same_parts(state.get(PARTS, {}), facts.get(PARTS, {}), where=where)


def plan_version(loaded: Checkpoint) -> int:
    """Return the version of the order of batches that a run began with.

    Raises:
        CheckpointError: if it is not known here.
    """
    version = loaded.state.get("plan_version", 1)  # of runs from before there were several
    if version not in ORDERS:
        raise CheckpointError(
            f"its batches come in an order of version {version!r}, and {NEWEST} is the newest here",
            where=str(loaded.path),
            hint="resume the run with the version of sfumato that it was trained with, or a newer one",
        )
    return int(version)


def _accepted(state: Mapping[str, Any], dataset: Dataset, directory: RunDirectory) -> list[str]:
    """Say what has changed in the data, and what follows from it."""
    lines = [
        f"the data have changed: {_data_changes(state, dataset, directory)}; a new epoch begins"
    ]
    known = held_out_after_training(directory.data_record(), dataset)
    if known:
        lines.append(
            f"{len(known)} held-out images, e.g. {known[0]}, were trained on before: errors on "
            "held-out images are too good from now on"
        )
    return lines


def _data_changes(state: Mapping[str, Any], dataset: Dataset, directory: RunDirectory) -> str:
    """Name what has changed in the data, if that is recorded."""
    before = directory.data_record()
    known = changes(before, dataset) if before.get("fingerprint") == state.get("data") else []
    return "; ".join(known) or (
        "images, their order, captions, categories, the split or the pixel format changed"
    )
