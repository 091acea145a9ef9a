"""Would more images help? A run on all images beside a run on half of them (`data.half`).

Both have the same held-out images, and measure their errors on them with the same noises, so that
the errors are compared image by image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato import config as configuration
from sfumato.errors import RunError
from sfumato.observability.metrics_file import read_lines
from sfumato.recipes.autoencoder_stage import PixelsConfig
from sfumato.recipes.resolver import resolve
from sfumato.recipes.run import Run
from sfumato.storage.atomic import write_text
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.denoising_error import Estimate
from sfumato.training.evidence import Look, looks_of
from sfumato.training.stopping import FEWEST_HELD_OUT, change, verdict

FILE = "half.json"
WORTHWHILE = 0.02  # of the error, that twice the images must save to be called a help
# keys in which the two runs may differ: none changes what a step does, or what is measured
FREE = ("name", "budget", "stop", "log", "checkpoint", "preview", "data.half")
# where the data lie and how they are kept; that the images are the same is known by fingerprint
PLACE = ("data.source", "data.cache", "data.memory_gib", "data.workers", "data.exclude")


@dataclass(frozen=True, kw_only=True)
class HalfComparison:
    """The least error of a run on held-out images, beside that of a run on half of its images.

    Attributes:
        gain: share of the error of the half run that twice the images save, with 98 % interval over
            held-out images.
        held_out: number of these images.
        images: training images of the two runs, the half first.
        steps: at which the errors of the two runs were least.
        unfinished: which of the two runs, "half" or "whole", were still learning at their last look.
    """

    gain: Estimate
    held_out: int
    images: tuple[int, int]
    steps: tuple[int, int]
    unfinished: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, half: Sequence[Look], whole: Sequence[Look], *, images: tuple[int, int]
    ) -> HalfComparison:
        """Compare the looks of two runs at the same held-out images."""
        least = [min(looks, key=lambda look: look.error) for looks in (half, whole)]
        mean, low, high = change(*least)
        return cls(
            gain=Estimate(-mean, -high, -low),
            held_out=len(least[0].held_out),
            images=images,
            steps=(least[0].step, least[1].step),
            unfinished=tuple(
                name
                for name, looks in (("half", half), ("whole", whole))
                if verdict(looks).state in ("too early", "learning")
            ),
        )

    def sentence(self) -> str:
        """Return whether more images would help."""
        half, whole = self.images
        low, high = (100 * value for value in self.gain[1:])
        found = (
            f"{whole:,} images in place of {half:,} lowered the least error on unseen images by "
            f"{100 * self.gain.mean:.1f} % [{low:.1f}, {high:.1f}]"
        )
        return f"{found}: {self._conclusion()}{self._reservation()}"

    def _conclusion(self) -> str:
        if self.held_out < FEWEST_HELD_OUT:
            return f"{self.held_out} held-out images are too few to say whether more would help"
        if self.gain.high < 0:
            return "the run on all images is worse, so that it says nothing; train it for longer"
        if self.gain.high < WORTHWHILE:
            return "more images of the same kind would hardly help"
        if self.gain.low > 0 and self.gain.mean > WORTHWHILE:
            return "more images would still help"
        return "whether more would help cannot be told; more held-out images would tell"

    def _reservation(self) -> str:
        if not self.unfinished:
            return ""
        runs = " and ".join(f"the run on {name}" for name in self._names())
        verb = "was" if len(self.unfinished) == 1 else "were"
        return f" ({runs} {verb} still learning: longer trainings may differ)"

    def _names(self) -> list[str]:
        words = {"half": "half", "whole": "all"}
        return [words[name] for name in self.unfinished]

    def basis(self) -> str:
        """Return how that is known."""
        return (
            f"the same {self.held_out} held-out images, paired, at step {self.steps[1]} of this run "
            f"and step {self.steps[0]} of the run on half; interval of 98 % over images"
        )

    def plain(self) -> dict[str, Any]:
        """Return the comparison as plain data, for JSON."""
        return {
            "sentence": self.sentence(),
            "basis": self.basis(),
            "gain": self.gain._asdict(),
            "held_out": self.held_out,
            "images": list(self.images),
            "steps": list(self.steps),
            "unfinished": list(self.unfinished),
        }


def compare_with_half(path: Path, half: Path) -> HalfComparison:
    """Compare a run with one on half of its images, and write RUN/half.json.

    Raises:
        RunError: if the two do not differ in that alone, so that their errors say something else.
    """
    directories = [RunDirectory.existing(each) for each in (half, path)]
    runs = [resolve(each) for each in (half, path)]
    _require_alike(*runs, where=str(half), whole_path=str(path))
    records = [directory.data_record() for directory in directories]
    fingerprints = [_whole_fingerprint(record) for record in records]
    if not fingerprints[0] or fingerprints[0] != fingerprints[1]:
        raise RunError(
            f"its images or held-out images are not those of {path}",
            where=str(half),
            hint="train both on the same images, with the same data.holdout",
        )
    looks = [looks_of(read_lines(each.looks), each.data_record()) for each in directories]
    for directory, taken in zip(directories, looks, strict=True):
        if not taken or not taken[0].held_out:
            raise RunError(
                "has not looked at held-out images yet",
                where=str(directory.path),
                hint="train it for longer, with data.holdout above 0",
            )
    if len(looks[0][0].held_out) != len(looks[1][0].held_out):
        raise RunError(
            f"looked at {len(looks[0][0].held_out)} held-out images, and {path} at "
            f"{len(looks[1][0].held_out)}",
            where=str(half),
            hint="train both with the same version of sfumato",
        )
    result = HalfComparison.of(
        *looks, images=(int(records[0]["training"]), int(records[1]["training"]))
    )
    write_text(path / FILE, json.dumps(result.plain(), indent=1))
    return result


def _whole_fingerprint(record: Mapping[str, Any]) -> str:
    """Return the fingerprint of a run's set without `data.half`, which older runs did not have."""
    return str(record.get("whole_fingerprint", record.get("fingerprint", "")))


def _require_alike(half: Run, whole: Run, *, where: str, whole_path: str) -> None:
    """Raise RunError unless two runs differ in `data.half` alone, as far as it matters here."""
    if half.data.half == "off" or whole.data.half != "off":
        raise RunError(
            f"data.half={half.data.half}, and data.half={whole.data.half} in {whole_path}",
            where=where,
            hint="sfumato report RUN --half HALF compares a run on all images with one that was "
            "trained with data.half=first or second",
        )
    if not isinstance(whole.autoencoder, PixelsConfig):
        raise RunError(
            "the two runs work in latents, each with its own mean and scale, so that their errors "
            "cannot be compared",
            where=where,
            hint="compare samples of both with `sfumato evaluate`, or train in pixels",
        )
    lines = configuration.differences(configuration.plain(half), configuration.plain(whole))
    differing = [line for line in lines if not _is_below(line.partition(":")[0], FREE + PLACE)]
    if differing:
        raise RunError(
            f"differs from {whole_path} in more than data.half: {'; '.join(differing)}",
            where=where,
            hint="train a run with the settings of the other one and data.half=first",
        )


def _is_below(key: str, roots: Sequence[str]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)
