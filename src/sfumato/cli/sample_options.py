"""Parsing of the values of `sfumato sample`'s options."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from sfumato.diffusion import GuidanceRescale

MIN_IMAGES = 16  # unless more prompts or categories are given


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse HEIGHTxWIDTH."""
    if text is None:
        return None
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise typer.BadParameter(
            f"{text!r}: write HEIGHTxWIDTH in pixels, e.g. 64x96", param_hint="--size"
        )
    return int(height), int(width)


def parse_contexts(pairs: Sequence[str] | None) -> dict[str, str]:
    """Parse NAME=VALUE pairs into a mapping."""
    split = [pair.partition("=") for pair in pairs or ()]
    if any(not (name and equals) for name, equals, _ in split):
        raise typer.BadParameter("write NAME=VALUE", param_hint="--context")
    return {name: value for name, _, value in split}


NAMED_WEIGHTS: dict[str, Literal["auto", "best", "ema", "raw"]] = {
    "auto": "auto",
    "best": "best",
    "ema": "ema",
    "raw": "raw",
}


def parse_weights(text: str) -> Literal["auto", "best", "ema", "raw"] | float:
    """Parse a name of weights, or the width of a post-hoc average."""
    if text in NAMED_WEIGHTS:
        return NAMED_WEIGHTS[text]
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither {', '.join(NAMED_WEIGHTS)} nor a number", param_hint="--weights"
        ) from None


def parse_guidance(texts: list[str] | None) -> float | dict[str, float] | None:
    """Parse one scale, or one for each context by name; return None for the model's own."""
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return _number(texts[0], "--guidance")
    return parse_numbers(texts, "--guidance")


def parse_rescale(text: str | None) -> float | GuidanceRescale | None:
    """Parse a share from 0 to 1, or what is renormalized; return None for the model's own."""
    from sfumato.diffusion import MatchNorm

    if text is None:
        return None
    if text in ("rows", "cells"):
        return MatchNorm(parts="rows" if text == "rows" else "cells")
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a number from 0 to 1, nor rows or cells",
            param_hint="--guidance-rescale",
        ) from None


def parse_loras(texts: list[str] | None) -> list[tuple[Path, float]]:
    """Parse repeated FILE[:STRENGTH] into paths and strengths, 1 by default."""
    found = []
    for text in texts or ():
        name, _, strength = text.rpartition(":")
        try:
            found.append((Path(name), float(strength)) if name else (Path(text), 1.0))
        except ValueError:  # a colon in the path
            found.append((Path(text), 1.0))
    return found


def parse_numbers(texts: list[str] | None, option: str) -> dict[str, float]:
    """Parse repeated NAME=NUMBER pairs into a mapping."""
    pairs = [text.rpartition("=") for text in texts or ()]
    return {name.strip(): _number(value, option) for name, _, value in pairs}


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number", param_hint=option) from None


def number_of_images(
    num: int | None, prompts: Sequence[str] | None, categories: Sequence[str] | None
) -> int:
    """Return `num`, or enough for every prompt and category; print what it leaves out."""
    count = num or max(MIN_IMAGES, len(prompts or ()), len(categories or ()))
    for name, values in (("prompt", prompts or ()), ("category", categories or ())):
        unused = values[count:]
        if unused:
            listed = ", ".join(
                repr(text if len(text) <= 40 else f"{text[:37]}...") for text in unused[:5]
            )
            more = ", ..." if len(unused) > 5 else ""
            typer.echo(
                f"note: --num {count} leaves out {len(unused)} of {len(values)} --{name}: "
                f"{listed}{more}",
                err=True,
            )
    return count


def grid_labels(prompts: list[str] | None, categories: list[str] | None, num: int) -> list[str]:
    """Return the prompt and category of each image; [] if all are the same."""
    pairs = zip(cycle(prompts or [""]), cycle(categories or [""]), strict=False)
    labels = [", ".join(filter(None, words)) for words in islice(pairs, num)]
    return (
        [label if len(label) <= 80 else f"{label[:77]}..." for label in labels]
        if len(set(labels)) > 1
        else []
    )
