"""The evaluation of a run: its newest checkpoint against the data that it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from sfumato.data.dataset_diff import changes
from sfumato.evaluation.report import EvaluationReport, evaluate_pipeline
from sfumato.generation.request import require_context
from sfumato.recipes.resolver import resolve
from sfumato.runs import loading, preparation
from sfumato.storage.run_directory import RunDirectory


def evaluate_run(
    path: str | Path,
    *,
    num: int = 500,
    guidance: Sequence[float] = (),
    seed: int = 1,
    precision: Literal["float32", "bfloat16"] = "float32",
    compile: bool = False,
    on_progress: Callable[[float, str], None] = lambda fraction, text: None,
    before_work: Callable[[], object] = lambda: None,
) -> tuple[EvaluationReport, list[str]]:
    """Evaluate the newest checkpoint of a run.

    Args:
        num, guidance, seed, on_progress: see `sfumato.evaluation.evaluate_pipeline`.
        precision: precision inside the network.
        compile: whether to compile the network first.
        before_work: called once the run is known to exist.
    Returns:
        The report, and remarks on the data: what has changed in them since the run began.
    Raises:
        RunError, CheckpointError, DataError, ConfigError: naming what is wrong.
    """
    directory = RunDirectory.existing(Path(path))
    before_work()
    pipeline = loading.load(path, precision=precision)
    if compile:
        pipeline.compile()
    if not pipeline.reads:
        for scale in guidance:
            require_context(scale, {})
    dataset = preparation.open_data(resolve(path))
    changed = changes(directory.data_record(), dataset)
    report = evaluate_pipeline(
        pipeline, dataset, num=num, guidance=guidance, seed=seed, on_progress=on_progress
    )
    return report, [
        f"the data are not what this run was trained on: {'; '.join(changed)}"
    ] if changed else []
