"""What `sfumato sample` does once its options are read: it adjusts the model, builds the request,
generates the images and reports.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sfumato.cli.sample_options import grid_labels

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.cli.sample_writer import Make
    from sfumato.generation.options import SamplingOptions
    from sfumato.generation.pipeline import Pipeline
    from sfumato.generation.request import SampleRequest
    from sfumato.sampling import StepInfo


def adjusted(
    pipeline: Pipeline,
    *,
    control: Path | None,
    clip_skip: int | None,
    embedded_guidance: float | None,
    embedding: Path | None,
    loras: Sequence[tuple[Path, float]],
    partial: bool,
) -> Pipeline:
    """Return a pipeline with what the options add to it or change in it."""
    from sfumato.generation.adjusted import with_clip_skip, with_embedded_guidance
    from sfumato.interop.control_files import with_control
    from sfumato.interop.embedding import with_embedding
    from sfumato.interop.lora import with_lora

    if control is not None:
        pipeline = with_control(pipeline, control)
    if clip_skip is not None:
        pipeline = with_clip_skip(pipeline, clip_skip)
    if embedded_guidance is not None:
        pipeline = with_embedded_guidance(pipeline, embedded_guidance)
    if embedding is not None:
        pipeline = with_embedding(pipeline, embedding)
    for file, factor in loras:
        pipeline = with_lora(pipeline, file, factor, partial=partial)
    return pipeline


def generate(
    pipeline: Pipeline,
    request: SampleRequest,
    settings: SamplingOptions,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Generate and write the images; refuse what cannot be done before any work."""
    from sfumato.cli.sample_output import Generated, recorded_settings
    from sfumato.cli.sample_writer import SampleWriter, not_finite
    from sfumato.distributed import current
    from sfumato.errors import NonFiniteError
    from sfumato.observability.image_formats import FORMATS, usual_format

    num, run, values = options["num"], options["run"], pipeline.values
    kind = options["format"] or usual_format(values)
    FORMATS[kind].require(values)
    if kind != (options["format"] or "png"):
        typer.echo(
            f"note: PNG cannot hold {values.colours} colour channels; images are written as {kind}",
            err=True,
        )
    make = _make(pipeline, request, settings, options)
    recorded = recorded_settings(options, pipeline, request, settings, kind)
    target = Generated(
        options["out"] or options["folder"] / f"seed-{options['seed']}", kind, values, recorded
    )
    if options["out"] is None:
        world = current()
        if world.is_first:
            target = target.in_free_folder()
        folder = Path(world.gather(str(target.folder))[0])
        target = replace(target, folder=folder, fresh=target.fresh and world.is_first)
    job = SampleWriter(
        pipeline=pipeline,
        target=target,
        num=num,
        inputs=_inputs(request, pipeline),
        trajectory=options["trajectory"],
        labels=[]
        if options["to_prompt"]
        else grid_labels(options["prompt"], options["category"], num),
    )
    try:
        return job.run(make)
    except NonFiniteError as error:
        raise not_finite(error, run, options["weights"]) from None


def _make(
    pipeline: Pipeline,
    request: SampleRequest,
    settings: SamplingOptions,
    options: dict[str, Any],
) -> Make:
    """Return the function that makes the images, from noise or by interpolation.

    The interpolation is to another prompt or seed.
    """
    from sfumato.contexts import user_contexts
    from sfumato.generation.request import require_context

    num, seed, to_prompt, to_seed = (
        options[name] for name in ("num", "seed", "to_prompt", "to_seed")
    )
    contexts = user_contexts(pipeline.model.conditioner)
    if to_prompt is None and to_seed is None:
        from sfumato.runs import snapshot

        step = options["autoguidance"]
        weaker = (
            None
            if step is None
            else (snapshot(options["run"], step), options["autoguidance_scale"])
        )
        settings = replace(settings, autoguidance=weaker)
        if settings.guidance is not None:
            require_context(settings.guidance, contexts, request)

        def batches(
            skip: Collection[int], on_step: Callable[[StepInfo], None]
        ) -> Iterable[tuple[int, Tensor]]:
            with _notes():
                return pipeline.batches(
                    num, request, settings, seed=seed, skip=skip, on_step=on_step
                )

        return batches
    _require_interpolable(options)
    last = (
        request
        if to_prompt is None
        else replace(request, contexts={**request.contexts, "prompt": to_prompt})
    )
    if settings.guidance is not None:
        require_context(settings.guidance, contexts, request, last)

    def interpolated(
        skip: Collection[int], on_step: Callable[[StepInfo], None]
    ) -> Iterable[tuple[int, Tensor]]:
        if len(skip) == num:
            return []
        with _notes():
            seeds = (seed, seed if to_seed is None else to_seed)
            images = pipeline.interpolate(
                num,
                request,
                last,
                seeds=seeds,
                steps=settings.steps,
                sampler=settings.sampler,
                guidance=settings.guidance,
                interval=settings.interval,
                clip=settings.clip,
                guidance_rescale=settings.guidance_rescale,
                on_step=on_step,
            )
        return [(0, images)]

    return interpolated


def build_request(
    pipeline: Pipeline,
    size: tuple[int, int] | None,
    values: dict[str, Any],
    written: Mapping[str, str | Path | None],
    *,
    image: Path | None,
    mask: Path | None,
    strength: float | None,
) -> SampleRequest:
    """Build the request, and read its files.

    Args:
        values: values of contexts, by keyword.
        written: further values, as text or as paths of files, which each context reads in its own
            way.
    """
    from sfumato.contexts import CONTEXTS, by_keyword
    from sfumato.contexts.image import read_image
    from sfumato.contexts.protocol import RequestInfo
    from sfumato.data.user_inputs import load_user_mask
    from sfumato.generation.request import SampleRequest, require_size

    if size is not None:
        require_size(size, pipeline.autoencoder.factor)
    height, width = size or pipeline.image_shape[1:]
    by_name, parts = by_keyword(CONTEXTS.values()), dict(pipeline.model.conditioner.parts.items())
    for keyword, text in written.items():
        if text is not None and keyword in by_name:
            part = parts.get(by_name[keyword].name)
            request_info = RequestInfo(
                info=pipeline.info, conditioner=part, size=(height, width), num=1
            )
            values[keyword] = by_name[keyword].read(str(text), request_info)
        elif text is not None:
            values[keyword] = text
    request_info = RequestInfo(info=pipeline.info, conditioner=None, size=(height, width), num=1)
    return SampleRequest.of(
        image=None if image is None else read_image(str(image), request_info),
        mask=None if mask is None else load_user_mask(mask, height=height, width=width),
        strength=strength, size=size, **values,
    )  # fmt: skip


def _inputs(request: SampleRequest, pipeline: Pipeline) -> dict[str, Tensor]:
    """Return the images that the request starts from, as the grid shows them."""
    from sfumato.contexts import CONTEXTS, by_keyword

    height, width = request.size or pipeline.image_shape[1:]
    contexts = by_keyword(CONTEXTS.values())
    images = {
        name: contexts[name].preview(value, (height, width))
        for name, value in request.contexts.items()
    }
    images |= {"image": request.image, "mask": request.mask}
    return {name: image for name, image in images.items() if image is not None}


def print_report(report: dict[str, Any], *, as_json: bool) -> None:
    """Print the report as JSON, or the paths of its sheets."""
    if as_json:
        typer.echo(json.dumps(report))
        return
    for sheet in ("trajectory", "grid"):
        if sheet in report:
            typer.echo(report[sheet])


def _require_interpolable(options: dict[str, Any]) -> None:
    """Refuse options that have no meaning in an interpolation to another prompt or seed."""
    if options["autoguidance"] is not None or options["trajectory"] or options["resample"] != 1:
        hint = "--autoguidance, --trajectory, --resample"
        raise typer.BadParameter(
            "not with interpolation to another prompt or seed", param_hint=hint
        )
    for name in ("prompt", "category"):
        if len(options[name] or ()) > 1:
            raise typer.BadParameter(
                "interpolation starts from one, and several are given", param_hint=f"--{name}"
            )


@contextmanager
def _notes() -> Iterator[None]:
    """Print what was read of a long prompt, and which words are unknown, when the block ends."""
    from sfumato.contexts import PromptNote

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromptNote)
        yield
    for warning in caught:
        typer.echo(f"note: {warning.message}", err=True)
