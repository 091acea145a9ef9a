"""The command `sfumato sample`."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sfumato.cli.model_options import LikeOption, LoraOption, PartialOption, VariantOption
from sfumato.cli.sample_options import (
    grid_labels,
    number_of_images,
    parse_contexts,
    parse_guidance,
    parse_loras,
    parse_numbers,
    parse_rescale,
    parse_size,
    parse_weights,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.cli.sample_writer import Make
    from sfumato.generation.options import SamplingOptions
    from sfumato.generation.pipeline import Pipeline
    from sfumato.generation.request import SampleRequest
    from sfumato.sampling import StepInfo


def sample(
    context: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(
            help="Directory of the run, by default the newest in runs/; a model of diffusers, as a "
            "folder or OWNER/NAME on the Hugging Face hub; or a single file (see --like)."
        ),
    ] = None,
    like: LikeOption = None,
    num: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many images; by default 16, or one for each prompt or category if more.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text prompt; repeat to cycle through several.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="Negative prompt; needs guidance above 1.")
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="Category; repeat to cycle through several.")
    ] = None,
    attribute: Annotated[
        list[str] | None, typer.Option(help="NAME=NUMBER of an attribute; repeat for several.")
    ] = None,
    doodle: Annotated[
        Path | None, typer.Option(help="Line drawing to follow, dark on light.")
    ] = None,
    points: Annotated[
        Path | None, typer.Option(help="Point cloud to follow: .npy, .ply, .xyz or .csv.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="Image to make variations of.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Image to start from, to complete or to restore.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Fraction of IMAGE to regenerate (0 keeps it, 1 ignores it)."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White areas of IMAGE are regenerated, black areas kept.")
    ] = None,
    context_values: Annotated[
        list[str] | None,
        typer.Option(
            "--context",
            help="NAME=VALUE of any other context that the model reads; may be repeated.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH of the images, e.g. 64x96; by default as trained."),
    ] = None,
    to_prompt: Annotated[
        str | None, typer.Option(help="Interpolate from PROMPT to this prompt.")
    ] = None,
    to_seed: Annotated[int | None, typer.Option(help="Interpolate from SEED to this seed.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddim, ddpm, euler, heun, dpm-solver++2m, unipc, ...")
    ] = None,
    guidance: Annotated[
        list[str] | None,
        typer.Option(
            help="Classifier-free guidance scale, 1 is off; or NAME=SCALE for each context."
        ),
    ] = None,
    guidance_rescale: Annotated[
        str | None,
        typer.Option(
            metavar="PHI|rows|cells",
            help="How far guided predictions get the deviation of unguided ones, from 0 (off) to "
            "1, against too much contrast; or what gets their length (Lumina 2: rows, Qwen-Image: "
            "cells).",
        ),
    ] = None,
    embedded_guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale that a distilled network itself is told (FLUX.1 dev), which costs "
            "nothing."
        ),
    ] = None,
    interval: Annotated[
        tuple[float, float] | None,
        typer.Option("--guidance-interval", help="Range of log-SNR within which guidance acts."),
    ] = None,
    autoguidance: Annotated[
        int | None,
        typer.Option(help="Guide away from the snapshot of the run at this step (autoguidance)."),
    ] = None,
    autoguidance_scale: Annotated[float, typer.Option(help="Strength of autoguidance.")] = 1.5,
    clip: Annotated[
        bool,
        typer.Option(
            "--clip",
            help="Clamp each guess of the clean image to the range of the data (models of pixels).",
        ),
    ] = False,
    resample: Annotated[
        int,
        typer.Option(
            min=1,
            help="With a mask: how many times each step is taken (RePaint); higher blends better "
            "with the kept region.",
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Image i depends on the seed and i only.")] = 0,
    weights: Annotated[
        str,
        typer.Option(
            help="ema: averaged weights; raw: the last step's; best: those that the verdict names; "
            "auto: best where the last step is worse, else ema, or those that a sweep recommends; or "
            "the width of an average to reconstruct."
        ),
    ] = "auto",
    variant: VariantOption = "",
    embedding: Annotated[
        Path | None,
        typer.Option(
            help="Embedding (textual inversion) whose token prompts may use: its name in the file, "
            "or the file's own."
        ),
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(
            help="Control file of sfumato (export --format control-lora), for --doodle to steer "
            "the model that it was trained on."
        ),
    ] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Read prompts without the last N layers of CLIP, as diffusers counts: one less "
            "than in the web interfaces.",
        ),
    ] = None,
    lora: LoraOption = None,
    partial: PartialOption = False,
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="Precision inside the network; bfloat16 is faster."),
    ] = "float32",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the network first: pays for many images.")
    ] = False,
    trajectory: Annotated[
        bool,
        typer.Option("--trajectory", help="Also draw the noisy images and the guess under each."),
    ] = False,
    format: Annotated[
        Literal["png", "tiff", "npy", "webp", "jpg"] | None,
        typer.Option(
            help="File format; by default png, or tiff where PNG cannot hold the channels."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write to; by default RUN/generated/seed-SEED, or seed-SEED-2, ... if "
            "taken."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print files, settings and seconds as JSON.")
    ] = False,
) -> None:
    """Generate images with a trained model; prints the path of the grid. The same command again
    completes what was interrupted.
    """
    from sfumato.cli.sample_output import recorded_file, recorded_loras, writable
    from sfumato.generation.adjusted import with_clip_skip, with_embedded_guidance
    from sfumato.generation.options import SamplingOptions
    from sfumato.interop.control_files import with_control
    from sfumato.interop.embedding import with_embedding
    from sfumato.interop.lora import with_lora
    from sfumato.runs import load, newest_run
    from sfumato.runs.loading import generated_folder
    from sfumato.runs.recommended import resolved_weights

    begun = time.monotonic()
    loras = parse_loras(lora)
    run = newest_run() if run is None else run
    folder = generated_folder(run)
    weights = resolved_weights(run, weights)
    with writable(out or folder):
        pipeline = load(
            run, weights=parse_weights(weights), precision=precision, variant=variant, like=like
        )
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
        if compile:
            pipeline.compile()
        request = _request(
            pipeline,
            parse_size(size),
            {
                "prompt": prompt,
                "negative": negative,
                "category": category,
                "attributes": parse_numbers(attribute, "--attribute") or None,
            },
            {
                "doodle": doodle,
                "points": points,
                "reference": reference,
                **parse_contexts(context_values),
            },
            image=image,
            mask=mask,
            strength=strength,
        )
        settings = SamplingOptions(
            steps=steps,
            sampler=sampler,
            guidance=parse_guidance(guidance),
            interval=interval,
            clip=clip or None,
            resample=resample,
            guidance_rescale=parse_rescale(guidance_rescale),
        )
        options = {**context.params, "num": number_of_images(num, prompt, category)}
        options |= {"run": run, "folder": folder, "lora": recorded_loras(loras)}
        options |= {"weights": weights, "embedding": recorded_file(embedding)}
        options |= {"control": recorded_file(control)}
        report = _generate(pipeline, request, settings, options)
    _report(report | {"seed": seed, "seconds": round(time.monotonic() - begun, 3)}, as_json=as_json)


def _generate(
    pipeline: Pipeline,
    request: SampleRequest,
    settings: SamplingOptions,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Generate and write the images; refuse what cannot be done before any work."""
    from sfumato.cli.sample_output import Generated, recorded_settings
    from sfumato.cli.sample_writer import SampleWriter, not_finite
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
        target = target.in_free_folder()
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


def _request(
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


def _report(report: dict[str, Any], *, as_json: bool) -> None:
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
