"""The images that can no longer be read while a run trains: listed, and too many end the run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sfumato.errors import DataError
from sfumato.observability.metrics_file import MetricsFile
from sfumato.observability.progress import ProgressBar

LOST_SHARE, LOST_IMAGES = 0.05, 20  # of the dataset, and in any case: more than this stop the run


class UnreadableImages:
    """The list of images that were replaced in batches.

    Args:
        path: the list, a JSON object a line.
        after_step: later lines, of steps that are trained again, are dropped.
        images: in the dataset.
        writes: whether the list is written, or only kept in mind.
    """

    def __init__(self, path: Path, *, after_step: int, images: int, writes: bool = True) -> None:
        self.path, self._after_step, self._writes = path, after_step, writes
        self._most = max(LOST_IMAGES, LOST_SHARE * images)
        self._names: set[str] = set()
        self._file: MetricsFile | None = None

    def record(self, lost: Sequence[tuple[str, str]], step: int, bar: ProgressBar) -> None:
        """List the images of a batch that could not be read, with the reasons.

        Raises:
            DataError: if there are too many by now.
        """
        if not lost:
            return
        name, why = lost[0]
        self._names.update(name for name, _ in lost)
        if len(self._names) > self._most:
            raise DataError(
                f"{len(self._names)} images could not be read any more, e.g. {name}: {why}",
                where=str(self.path),
                hint="check that the disk is still mounted, restore the images, then `sfumato "
                "resume`",
            )
        try:
            if self._file is None and self._writes:
                self._file = MetricsFile(self.path, after_step=self._after_step)
            if self._file is not None:
                for file, reason in lost:
                    self._file.write({"step": step, "file": file, "reason": reason})
        except OSError as error:
            bar.say(f"warning: {error}")
        bar.say(f"replaced {len(lost)} image(s) that can no longer be read, e.g. {name}")

    def go_back(self, step: int) -> None:
        """Drop the lines of steps that are trained again."""
        if self._file is not None:
            self._file.drop_after(step)

    def close(self) -> None:
        """Close the list."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
