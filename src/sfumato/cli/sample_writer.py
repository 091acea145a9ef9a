"""A job of `sfumato sample`.

Images are written as they are made, with progress, so that a stop loses at most one batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from torch import Tensor

from sfumato.cli.sample_output import GRID, TRAJECTORY, Generated, unwritten, writable
from sfumato.cli.trajectory_images import trajectory_image
from sfumato.distributed import current
from sfumato.errors import NonFiniteError
from sfumato.generation.pipeline import Pipeline
from sfumato.observability.image_formats import SETTINGS
from sfumato.observability.images import grid_image, save_png, to_display_rgb
from sfumato.observability.progress import ProgressBar, printable
from sfumato.process.signals import Interrupted, handled, poll
from sfumato.sampling import StepInfo
from sfumato.storage.atomic import atomic_file

STRIP_IMAGES, STRIP_STEPS = 4, 10
# images in the grid, and about how many pixels they have together
GRID_MOST, GRID_PIXELS = 400, 2**26

# Makes the images whose numbers are not in the collection, and tells of each step: first number and
# images, batch by batch.
Make = Callable[[Collection[int], Callable[[StepInfo], None]], Iterable[tuple[int, Tensor]]]


@dataclass(kw_only=True)
class SampleWriter:
    """A job that generates and writes those images of one request that its folder lacks, and draws sheets of them.

    Attributes:
        num: images in all.
        labels: above each image in the grid; none where they are all alike.
        inputs: by name, images (C, H, W) in [0, 1] that the request began with, for the first row
            of the grid.
        trajectory: whether to draw the way of the first images out of noise.
    """

    pipeline: Pipeline
    target: Generated
    num: int
    labels: Sequence[str] = ()
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    trajectory: bool = False
    _tiles: dict[int, Tensor] = field(default_factory=dict)
    _recorded: list[StepInfo] = field(default_factory=list)
    _done: int = 0

    def run(self, make: Make) -> dict[str, Any]:
        """Make and write the missing images; return the files, and how many images were made now.

        Raises:
            OutputError: before any work, if the folder cannot be written to or holds files of
                another request.
            Interrupted: after a signal; finished images are kept.
            NonFiniteError: if the model makes images that are not finite.
        """
        target, world = self.target, current()
        there = frozenset(world.on_first(self._there))
        skip = there - frozenset(range(STRIP_IMAGES)) if self.trajectory else there
        missing = [number for number in range(self.num) if number not in skip]
        # the first process has those whose way is drawn
        each = max(-(-len(missing) // world.size), STRIP_IMAGES if self.trajectory else 0)
        mine = missing[world.rank * each : (world.rank + 1) * each]
        if there:
            _say(
                f"note: {len(there)} of {self.num} images are in {target.folder} already, made "
                "by the same request"
            )
        with writable(target.folder, fresh=target.fresh):
            try:
                world.together(lambda: self._make(make, frozenset(range(self.num)) - set(mine)))
                sheets = world.on_first(self._draw)
            except OSError as error:
                raise unwritten(
                    target.folder, error, f" ({self._written()} of {self.num} images are there)"
                ) from None
        return {
            "folder": str(target.folder),
            "files": [str(target.path(number)) for number in range(self.num)],
            **sheets,
            "made": sum(world.gather(self._done)),
            "settings": dict(target.settings),
        }

    def _there(self) -> list[int]:
        """Return which images are there already, once it is sure that nothing else would be harmed."""
        target = self.target
        target.require_unharmed(
            [target.path(number).name for number in range(self.num)] + self._sheets()
        )
        target.notes(self.num, _say)
        return [number for number in range(self.num) if number in target.there]

    def _sheets(self) -> list[str]:
        """Return the names of the files besides the images."""
        return [GRID, *[TRAJECTORY] * self.trajectory, *[SETTINGS] * (self.target.kind == "npy")]

    def _make(self, make: Make, skip: Collection[int]) -> None:
        target, total = self.target, self.num - len(skip)
        if target.kind == "npy":
            with atomic_file(target.folder / SETTINGS) as file:
                file.write(json.dumps(dict(target.settings), indent=1).encode())
        with handled(), ProgressBar("sampling") as bar:

            def on_step(progress: StepInfo) -> None:
                poll()
                self._record(progress)
                fraction = (self._done + len(progress.x) * progress.step / progress.steps) / total
                # without a terminal, a short job prints nothing
                if bar.live or fraction < 1:
                    bar.update(fraction, f"{self._done} of {total} images")

            try:
                for first, images in make(skip, on_step):
                    for number, image in enumerate(images, first):
                        target.write(number, image)
                    self._keep_tiles(first, images)
                    self._done += len(images)
            except Interrupted:
                bar.say(
                    f"interrupted: {self._written()} of {self.num} images are in "
                    f"{target.folder}; the same command goes on"
                )
                raise

    def _written(self) -> int:
        """Count the images of this request that the folder holds."""
        return sum(self.target.path(number).is_file() for number in range(self.num))

    def _record(self, progress: StepInfo) -> None:
        """Keep a step of the first batch, for the few images whose trajectory is drawn."""
        if self.trajectory and self._done == 0 and len(self._recorded) < progress.steps:
            few = {name: getattr(progress, name)[:STRIP_IMAGES] for name in ("before", "x", "x0")}
            self._recorded.append(progress._replace(**few))

    @property
    def _in_grid(self) -> int:
        height, width = self.pipeline.image_shape[1:]
        return min(self.num, max(16, min(GRID_MOST, GRID_PIXELS // (height * width))))

    def _keep_tiles(self, first: int, images: Tensor) -> None:
        few = images[: max(0, self._in_grid - first)]
        if len(few):
            self._tiles |= dict(enumerate(to_display_rgb(few, self.pipeline.values.alpha), first))

    def _tile(self, number: int) -> Tensor:
        """Return an image as the grid shows it: just made, or read back."""
        if number in self._tiles:
            return self._tiles[number]
        values = self.pipeline.values
        return to_display_rgb(
            self.target.form.read(self.target.path(number), values)[None],
            "straight" if values.has_alpha else "none",
        )[0]

    def _draw(self) -> dict[str, str]:
        """Write the grid, and the trajectory if it was recorded; return their paths."""
        import torch

        alpha, settings, sheets = self.pipeline.values.alpha, dict(self.target.settings), {}
        if self._recorded:
            strip = trajectory_image(
                self._recorded,
                images=STRIP_IMAGES,
                columns=STRIP_STEPS,
                decode=self.pipeline.decode,
                alpha=alpha,
            )
            sheets["trajectory"] = str(save_png(strip, self.target.folder / TRAJECTORY, settings))
        count = self._in_grid
        if count < self.num:
            _say(f"note: {GRID} shows the first {count} of {self.num} images")
        inputs = {
            name: to_display_rgb(image[None], alpha)[0] for name, image in self.inputs.items()
        }
        tiles = torch.stack([self._tile(number) for number in range(count)])
        sheet = grid_image(tiles, labels=self.labels[:count], inputs=inputs)
        return sheets | {"grid": str(save_png(sheet, self.target.folder / GRID, settings))}


def not_finite(error: NonFiniteError, run: Path, weights: str) -> NonFiniteError:
    """Return the error with a hint that names the other weights of the run."""
    files = {
        "checkpoints": sorted(
            path.name for path in (run / "checkpoints").glob("step-*") if path.is_dir()
        ),
        "snapshots": sorted(path.stem for path in (run / "snapshots").glob("step-*.safetensors")),
    }
    listed = "; ".join(f"{name}: {', '.join(names)}" for name, names in files.items() if names)
    other = "raw" if weights != "raw" else "ema"
    return NonFiniteError(
        error.what,
        where=str(run),
        hint=f"try --weights {other}, or --precision float32; the run keeps "
        f"{listed or 'nothing else'}; if all of them diverged, "
        "train again with a lower optimizer.learning_rate",
    )


def _say(line: str) -> None:
    typer.echo(printable(line), err=True)
