"""The command `sfumato sample`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from sfumato.cli.model_options import LikeOption, LoraOption, PartialOption, VariantOption
from sfumato.cli.procs import ProcsOption
from sfumato.cli.sample_options import (
    number_of_images,
    parse_contexts,
    parse_guidance,
    parse_loras,
    parse_numbers,
    parse_rescale,
    parse_size,
    parse_weights,
)
from sfumato.distributed.launch import start_processes


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
    procs: ProcsOption = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print files, settings and seconds as JSON.")
    ] = False,
) -> None:
    """Generate images with a trained model; prints the path of the grid. The same command again
    completes what was interrupted.
    """
    if procs > 1 and (to_prompt is not None or to_seed is not None):
        raise typer.BadParameter("--procs does not go with --to-prompt and --to-seed")
    start_processes(procs)
    from sfumato.cli.sample_job import adjusted, build_request, generate, print_report
    from sfumato.cli.sample_output import recorded_file, recorded_loras, writable
    from sfumato.distributed import joined
    from sfumato.generation.options import SamplingOptions
    from sfumato.runs import load, newest_run
    from sfumato.runs.loading import generated_folder
    from sfumato.runs.recommended import resolved_weights

    begun = time.monotonic()
    loras = parse_loras(lora)
    run = newest_run() if run is None else run
    folder = generated_folder(run)
    weights = resolved_weights(run, weights)
    with joined(), writable(out or folder):
        pipeline = load(
            run, weights=parse_weights(weights), precision=precision, variant=variant, like=like
        )
        pipeline = adjusted(
            pipeline,
            control=control,
            clip_skip=clip_skip,
            embedded_guidance=embedded_guidance,
            embedding=embedding,
            loras=loras,
            partial=partial,
        )
        if compile:
            pipeline.compile()
        request = build_request(
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
        report = generate(pipeline, request, settings, options)
    print_report(
        report | {"seed": seed, "seconds": round(time.monotonic() - begun, 3)}, as_json=as_json
    )
