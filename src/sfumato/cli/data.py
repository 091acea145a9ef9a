"""The commands `sfumato data check | coverage | convert | cache`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image

    from sfumato.data import Entry, Listing
    from sfumato.data.check.captions import Coverage
    from sfumato.data.check.findings import Kind
    from sfumato.data.check.inspect import Inspection

data_app = typer.Typer(help="Inspect data before training on them.", no_args_is_help=True)
Source = Annotated[
    str,
    typer.Argument(
        help="A folder, .tar, .parquet, .zip or .npz, a URL, hub:owner/name, or a built-in set "
        "such as digits."
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def _slug(source: str) -> str:
    return (
        re.sub(r"[^\w.-]+", "-", source.rstrip("/").rpartition("/")[2])[:60].strip(".-") or "data"
    )


def _say(text: object) -> None:
    """Print a text without the characters that would control the terminal.

    The text may hold captions and names of files.
    """
    from sfumato.observability.progress import printable

    typer.echo(printable(str(text)))


def _listing(source: str) -> Listing:
    from sfumato.data import listed, source_at

    return listed(source_at(source))


@data_app.command()
def check(
    source: Source,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings such as data.range=[0,4095] or data.frames=all.",
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; by default data-check/NAME.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side to train at; by default the preset's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure every image and report what the set can and cannot teach; changes nothing."""
    from sfumato.data.check import KINDS, IntendedModel, inspect_data, write
    from sfumato.data.check.report import plain
    from sfumato.data.frames import expand_frames
    from sfumato.data.value_range import choose_scale
    from sfumato.observability.progress import ProgressBar
    from sfumato.recipes.caption_statistics import Truncation, build_tokenizer
    from sfumato.recipes.resolver import preset
    from sfumato.runs.plan_check import views_before_planning
    from sfumato.runs.preparation import empty_network, text_encoder
    from sfumato.storage.output_paths import require_writable
    from sfumato.training.parameters import count

    listing = _listing(source)
    folder = require_writable(out or Path("data-check") / _slug(source))
    run = preset(source, overrides or (), listing)
    captions = [text for entry in listing.entries for text in entry.captions]
    tokenizer = build_tokenizer(run, captions, text_encoder)
    listing = expand_frames(listing, run.data.frames)
    chosen = choose_scale(run.data.range, listing.entries)
    network = empty_network(run)
    plan = IntendedModel(
        resolution=resolution or run.data.resolution,
        parameters=count(network.parameters()),
        form=run.data.pixel_format(chosen.scale),
        remarks=chosen.lines,
        length=tokenizer.length,
        cuts=tokenizer.is_truncated,
    )
    with ProgressBar("checking") as bar:
        inspection = inspect_data(
            listing,
            source=source,
            plan=plan,
            on_progress=lambda done, total: bar.update(done / total, f"{done} of {total}"),
        )
    inspection.remarks += Truncation.of(captions, tokenizer).lines
    if views := views_before_planning(run, inspection.learned, network=network):
        inspection.remarks.append(views)
    paths = write(inspection, folder)
    if as_json:
        typer.echo(
            json.dumps(
                {**plain(inspection), "files": [str(path) for path in paths]},
                indent=1,
                ensure_ascii=False,
            )
        )
        return
    for line in _findings(inspection, KINDS):
        _say(line)
    for path in paths:
        _say(path)


def _findings(inspection: Inspection, kinds: Mapping[str, Kind]) -> list[str]:
    """Return what was found, as lines of text."""
    figures = inspection.figures
    measured = "" if inspection.share == 1 else f"{figures['measured']} measured, "
    lines = [
        *(inspection.ledger.lines() if inspection.ledger else ()),
        f"{figures['images']} images, {measured}{figures['readable']} readable, "
        f"{figures.get('distinct', 0)} without copies",
    ]
    for kind, names in inspection.files().items():
        about = kinds[kind]
        lines.append(f"{len(names):6d} {kind:20} {about.effect} {about.advice}")
    remarks = [*inspection.remarks, inspection.memorized_first()]
    return [*lines, *(f"       {remark}" for remark in remarks if remark)]


@data_app.command()
def coverage(
    source: Source,
    prompt: Annotated[
        list[str], typer.Option(help="What you mean to ask for; may be given several times.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for images of the nearest captions.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether the captions hold a prompt's words, and all of them together, with the nearest
    captions and images.
    """
    from sfumato.data.check.captions import Vocabulary
    from sfumato.errors import DataError
    from sfumato.storage.output_paths import require_writable

    listed = _listing(source).entries
    # what is held out teaches nothing
    entries = [entry for entry in listed if entry.holdout is None]
    texts = [" ".join(entry.captions) or entry.category or "" for entry in entries]
    if not any(texts):
        raise DataError(
            "has neither captions nor categories",
            where=source,
            hint="put a .txt file beside each image",
        )
    folder = require_writable(out or Path("data-check") / _slug(source))
    vocabulary = Vocabulary(texts)
    if as_json:
        typer.echo(
            json.dumps(
                [_plain(vocabulary.coverage(text), entries) for text in prompt],
                indent=1,
                ensure_ascii=False,
            )
        )
        return
    for number, text in enumerate(prompt):
        result = vocabulary.coverage(text)
        _say("\n".join(_lines(result, len(entries))))
        for place, likeness in result.nearest:
            _say(
                f"  {likeness:.2f}  "
                f"{'; '.join(entries[place].captions) or entries[place].category}  "
                f"({entries[place].name})"
            )
        sheet = _sheet([entries[place] for place, _ in result.nearest])
        if sheet is not None:
            path = folder / f"coverage-{number:02d}-{_slug(text.replace('/', ' '))}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
            _say(path)


def _plain(result: Coverage, entries: list[Entry]) -> dict[str, Any]:
    """Return the coverage of a prompt as plain data, for JSON."""
    near = [
        {
            "likeness": likeness,
            "file": entries[place].name,
            "captions": list(entries[place].captions),
        }
        for place, likeness in result.nearest
    ]
    pairs = [{"words": list(pair), "captions": count} for pair, count in result.together.items()]
    return {
        "prompt": result.prompt,
        "verdict": result.verdict,
        "captions": len(entries),
        "whole": result.with_all_words,
        "counts": result.counts,
        "together": pairs,
        "similar": result.similar,
        "nearest": near,
    }


def _lines(result: Coverage, total: int) -> list[str]:
    verdicts = {
        "seen": f"seen: {result.with_all_words} of {total} captions hold all of its words; the model can "
        "learn it.",
        "never together": "every part seen, but never together: the model has to compose it from "
        "what it learned apart.",
        "unseen words": "unseen words: nothing in the captions teaches them.",
    }
    words = (
        ", ".join(f"{word} {count}" for word, count in result.counts.items())
        or "none that carry meaning"
    )
    pairs = [f"{a} + {b} {count}" for (a, b), count in result.together.items()]
    lines = [f"“{result.prompt}”: {verdicts[result.verdict]}", f"  words: {words}"]
    if pairs:
        lines.append(f"  together: {', '.join(pairs[:12])}")
    return [
        *lines,
        *(
            f"  instead of {word}: {', '.join(known)}"
            for word, known in result.similar.items()
            if known
        ),
    ]


def _sheet(entries: Sequence[Entry]) -> Image.Image | None:
    """Draw the images side by side; return None if none can be read."""
    import torch

    from sfumato.data.decoding import PixelFormat, RejectedImage, decode
    from sfumato.observability.images import grid_image

    tiles = []
    for entry in entries:
        try:
            tiles.append(
                torch.from_numpy(
                    decode(entry.image.read(), PixelFormat(shapes=((96, 96),), channels=3)).pixels
                )
            )
        except (RejectedImage, OSError):
            continue
    return grid_image(torch.stack(tiles).float() / 255, columns=len(tiles)) if tiles else None


@data_app.command()
def convert(
    source: Source,
    dest: Annotated[
        Path, typer.Argument(help="A .parquet or .tar file, or a folder of shards with --to.")
    ],
    to: Annotated[
        str | None,
        typer.Option(help="parquet or webdataset; by default by the destination's ending."),
    ] = None,
    shard_mib: Annotated[
        int, typer.Option(min=1, help="Begin a new file of a folder after so many MiB.")
    ] = 1000,
    keep_metadata: Annotated[
        bool,
        typer.Option(
            "--keep-metadata",
            help="Keep Exif data and comments of images, which may say where a photo was taken.",
        ),
    ] = False,
) -> None:
    """Write the same images, texts and annotations as parquet or WebDataset shards, byte for byte
    the same each time. Exif data and comments of JPEG, PNG and WebP are left out, but for the
    orientation; of other formats they are not, which is said.
    """
    from sfumato.data.convert import convert as write
    from sfumato.observability.progress import ProgressBar

    copied: list[str] = []
    with ProgressBar("converting") as bar:
        paths, rejects = write(
            _listing(source), dest, to=to, shard_mib=shard_mib, keep_metadata=keep_metadata,
            on_copied=copied.append,
            on_progress=lambda done, total: bar.update(done / max(1, total), f"{done} of {total}"),
        )  # fmt: skip
        for reject in rejects[:10]:
            bar.say(f"left out {reject.name}: {reject.reason}")
        if len(rejects) > 10:
            bar.say(f"left out {len(rejects)} in all")
        if copied:
            bar.say(
                f"warning: {len(copied)} files, e.g. {copied[0]}, are neither JPEG, PNG nor WebP: they are "
                "copied as they are, with what they say of places, cameras and authors"
            )
    for path in paths:
        _say(path)


@data_app.command()
def cache(
    source: Annotated[
        str, typer.Argument(help="A recipe's name, a YAML file, a run, or a source of images.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings such as data.resolution=64.", metavar="[KEY=VALUE]..."),
    ] = None,
    part: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Decode the I-th of N parts only, counted from 1: for several machines that share "
            "SFUMATO_CACHE. Parts may be done in any order, and again.",
        ),
    ] = "1/1",
    engine: Annotated[
        Literal["local", "dask", "ray"],
        typer.Option(
            help="Who decodes: this machine, or the workers of a cluster, which share SFUMATO_CACHE and "
            "have the images at the same path.",
        ),
    ] = "local",
    encode: Annotated[
        bool,
        typer.Option(
            "--encode",
            help="Encode images and captions by the pretrained autoencoder and text encoder, once all parts "
            "are decoded: with --part, this part of them.",
        ),
    ] = False,
    address: Annotated[
        str,
        typer.Option(
            help="Of the cluster, such as tcp://HOST:8786 (Dask) or ray://HOST:10001; without it, one is "
            "started on this machine.",
        ),
    ] = "",
) -> None:
    """Decode a run's images into the cache ahead of training."""
    from sfumato.recipes import resolve
    from sfumato.recipes.paths import with_absolute_paths
    from sfumato.runs.encoding_ahead import encode_part
    from sfumato.runs.preparation import decode_on_cluster, decode_part, open_data
    from sfumato.storage.cache_folder import cache_folder
    from sfumato.storage.output_paths import require_writable

    require_writable(
        cache_folder(), option="SFUMATO_CACHE"
    )  # training goes on without a cache; this command is for nothing else
    number, count = _parse_part(part)
    run = with_absolute_paths(resolve(source, overrides or ()))
    if encode:
        if engine != "local":
            raise typer.BadParameter("is for --engine local", param_hint="--encode")
        batches, texts = encode_part(run, number, count, directory=source)
        _say(f"part {part}: {batches} batches of images, {texts} texts; cache: {cache_folder()}")
        return
    if engine != "local":
        if count > 1:
            raise typer.BadParameter("a cluster divides the images itself", param_hint="--part")
        decode_on_cluster(run, engine, address, directory=source)
    elif address:
        raise typer.BadParameter("belongs to --engine dask or ray", param_hint="--address")
    if count > 1:
        images, bad = decode_part(run, number, count, directory=source)
        _say(f"part {part}: {images} images, {bad} left out; cache: {cache_folder()}")
        return
    dataset = open_data(run, directory=source)
    _say(f"{len(dataset.entries)} images, {len(dataset.rejects)} left out; cache: {cache_folder()}")


def _parse_part(text: str) -> tuple[int, int]:
    """Read "3/64"."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise typer.BadParameter(
            f"{text!r} is not I/N with I from 1 to N, such as 3/64", param_hint="--part"
        )
    return int(number), int(count)
