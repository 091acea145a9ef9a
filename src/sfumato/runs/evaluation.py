"""The evaluation of a model: a run against the data that it was trained on, or any model against
images that are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from sfumato.data import Dataset, source_at
from sfumato.data.dataset_diff import changes
from sfumato.distributed import current
from sfumato.errors import ConfigError, DataError, RunError
from sfumato.evaluation.extractors import extractor
from sfumato.evaluation.quality import dimensions
from sfumato.evaluation.report import EvaluationReport, evaluate_pipeline
from sfumato.evaluation.statistics import ReferenceStatistics
from sfumato.foreign_models import is_pipeline_folder
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import require_context
from sfumato.interop.base_folder import file_digest
from sfumato.interop.diffusers_folder import read_folder
from sfumato.interop.hub import is_model_name
from sfumato.interop.lora import with_lora
from sfumato.recipes.resolver import resolve
from sfumato.recipes.run import Run
from sfumato.runs import loading, preparation
from sfumato.runs.model_folder import model_folder
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.best_weights import Recommendation

REFERENCE_HOLDOUT = 0.5  # of reference images: as many to compare with as give the prompts
FEWEST_COMPARED, FEWEST_PROMPTS = 4, 2


def evaluate_run(
    path: str | Path,
    *,
    reference: str | None = None,
    caption: str | None = None,
    like: str | Path | None = None,
    variant: str = "",
    loras: Sequence[tuple[Path, float]] = (),
    partial: bool = False,
    num: int = 500,
    guidance: Sequence[float] = (),
    seed: int = 1,
    features: str = "auto",
    statistics: Path | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    compile: bool = False,
    on_progress: Callable[[float, str], None] = lambda fraction, text: None,
    before_work: Callable[[], object] = lambda: None,
) -> tuple[EvaluationReport, list[str]]:
    """Evaluate the newest checkpoint of a run, a model folder of diffusers, or a single file.

    Args:
        path: a run's directory, a folder, the name of a model on the Hugging Face hub, or a file.
        reference: images to compare with, as `train` takes them; by default those that the run was
            trained on. They are read in the model's size and channels; half of them are compared
            with, and the other half gives the prompts and the row of real images.
        caption: of reference images that have none.
        like: for a single file, a pipeline's folder of the same family.
        variant: which weights of a model folder, where it has several, e.g. "fp16".
        loras: LoRA files with their strengths, which are added to the model.
        partial: whether tensors of these files that fit no layer are left out.
        num, guidance, seed, features, on_progress: see `sfumato.evaluation.evaluate_pipeline`.
        statistics: a .npz file of reference statistics, which the Fréchet distance compares with
            instead of the training images.
        precision: precision inside the network.
        compile: whether to compile the network first.
        before_work: called once the model is known to exist.
    Returns:
        The report, and remarks: which LoRAs the model has, and on the data what has changed in them
        since the run began, or how the reference was used.
    Raises:
        RunError, CheckpointError, DataError, ConfigError: naming what is wrong.
    """
    folder = model_folder(path, variant=variant, like=like)
    settings = _settings(folder, reference, caption=caption, variant=variant)
    known = _statistics(statistics, features)  # refuses before images are generated
    before_work()
    pipeline = loading.load(folder, precision=precision, variant=variant)
    for file, strength in loras:
        pipeline = with_lora(pipeline, file, strength, partial=partial)
    if compile:
        pipeline.compile()
    if not pipeline.reads:
        for scale in guidance:
            require_context(scale, {})
    dataset = current().in_turn(
        lambda: preparation.open_data(settings, directory=path if reference is None else None)
    )
    remarks = (
        [*_changed(folder, dataset), *_verdict(folder)]
        if reference is None
        else _require_fitting(pipeline, dataset, reference)
    )
    added = [_lora_remark(file, strength) for file, strength in loras]
    report = evaluate_pipeline(
        pipeline,
        dataset,
        num=num,
        guidance=guidance,
        seed=seed,
        features=features,
        statistics=known,
        compared_with="training" if reference is None else "reference",
        on_progress=on_progress,
    )
    if added:
        fidelity = replace(report.fidelity, remarks=(*added, *report.fidelity.remarks))
        report = replace(report, fidelity=fidelity)
    return report, remarks


def _statistics(path: Path | None, features: str) -> ReferenceStatistics | None:
    """Read the reference statistics, if any are given, and the network that they must be of."""
    network = extractor(features)
    if path is None:
        return None
    return ReferenceStatistics.read(path, dimensions=dimensions(network))


def evaluation_folder(
    path: Path, reference: str | None = None, loras: Sequence[tuple[Path, float]] = ()
) -> Path:
    """Return the folder of a model's evaluation: inside a run, else in the working directory.

    A model folder of another program is never written to. Evaluations with LoRAs have folders of
    their own.
    """
    foreign = is_pipeline_folder(path) or is_model_name(path) or path.is_file()
    name = path.stem if path.is_file() else path.resolve().name
    folder = (Path("generated") / name if foreign else path) / "evaluation"
    if reference is not None:
        folder /= Path(reference).resolve().stem or "images"
    if not loras:
        return folder
    added = "+".join(f"{file.stem}-{strength:g}" for file, strength in loras)
    return folder / f"with-{added}"


def _settings(
    path: Path, reference: str | None, *, caption: str | None = None, variant: str = ""
) -> Run:
    """Return the model's configuration, whose data are the reference if there is one.

    Raises:
        RunError: if it is neither a run nor a model folder, or the latter without a reference.
        ConfigError: for a caption without a reference.
    """
    if caption is not None and reference is None:
        raise ConfigError(
            "is given, and no reference images that it could be of",
            where="--caption",
            hint="add --reference FOLDER; the images of a run have the captions it was trained with",
        )
    if not is_pipeline_folder(path):
        RunDirectory.existing(path)
        run = resolve(path)
    elif reference is None:
        raise RunError(
            "is a model folder of diffusers, which does not say what it was trained on",
            where=str(path),
            hint="name images to compare it with: --reference FOLDER",
        )
    else:
        run = read_folder(path, variant=variant).run
    if reference is None:
        return run
    source = source_at(reference)
    data = replace(run.data.of_other(source), holdout=REFERENCE_HOLDOUT, exclude=None)
    return replace(run, data=data if caption is None else replace(data, caption=caption))


def _lora_remark(file: Path, strength: float) -> str:
    """Return a sentence on a LoRA; the report keeps it."""
    digest = f" (SHA-256 {file_digest(file)[:12]})" if file.is_file() else ""
    return f"with the LoRA {file.name}{digest} at strength {strength:g}"


def _verdict(path: Path) -> list[str]:
    """Return what the run said on when to stop, if it said anything."""
    sentence = Recommendation.read(RunDirectory.existing(path).verdict).sentence
    return [f"verdict of the training: {sentence}"] if sentence else []


def _changed(path: Path, dataset: Dataset) -> list[str]:
    changed = changes(RunDirectory.existing(path).data_record(), dataset)
    return (
        [f"the data are not what this run was trained on: {'; '.join(changed)}"] if changed else []
    )


def _require_fitting(pipeline: Pipeline, dataset: Dataset, reference: str) -> list[str]:
    """Return remarks on how the reference is used.

    Raises:
        DataError: if the model reads what the reference lacks or numbers otherwise.
    """
    if len(dataset.training) < FEWEST_COMPARED or len(dataset.holdout) < FEWEST_PROMPTS:
        raise DataError(
            f"{len(dataset.entries)} images, too few to compare with",
            where=reference,
            hint="give at least 8 different ones; reliable figures need hundreds",
        )
    known = {
        "category": (dataset.categories, pipeline.info.categories),
        "attributes": (dataset.annotations.attributes.names, pipeline.info.attributes),
    }
    for name, (there, learned) in known.items():
        if name in pipeline.reads and tuple(there) != tuple(learned):
            raise DataError(
                f"has {name} {', '.join(there) or '(none)'}, and the model knows "
                f"{', '.join(learned)}",
                where=reference,
                hint="give a reference with the same ones",
            )
    lines = [
        f"compared with {len(dataset.training)} images of {reference}; the conditions and the row "
        f"of real images come from {len(dataset.holdout)} others"
    ]
    if "text" in pipeline.reads:
        captioned = sum(map(bool, dataset.captions(dataset.holdout)))
        if not captioned:
            raise DataError(
                "has no captions, and the model reads text",
                where=reference,
                hint='say what all of them show: --caption "a photo of NAME"; or put a .txt with a '
                "caption beside each image: captions are the prompts",
            )
        if len(set(dataset.captions(dataset.holdout))) == 1:
            lines.append(
                "all prompts are the same, which cannot tell whether text steers the model"
            )
        if captioned < len(dataset.holdout):
            lines.append(
                f"{len(dataset.holdout) - captioned} of {len(dataset.holdout)} prompts are empty: "
                "their images have no caption"
            )
    return lines
