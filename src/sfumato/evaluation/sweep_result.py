"""The result of a sweep: what was compared, and which setting of sampling it recommends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError
from sfumato.evaluation.figures import Figure, percent
from sfumato.observability.tables import format_table

HEAD = ("weights", "guidance", "steps", "n", "KID to held-out", "less that of own", "copies")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting of sampling.

    Attributes:
        weights: `ema` or `best`; or the width of a reconstructed average.
        guidance: scale; 1 is off.
        steps: of denoising.
    """

    weights: str | float
    guidance: float
    steps: int

    @property
    def calls(self) -> int:
        """Calls of the network for one image."""
        return self.steps * (1 if self.guidance == 1 else 2)

    def __str__(self) -> str:
        return f"weights {self.weights}, guidance {self.guidance:g}, {self.steps} steps"

    def instead_of(self, other: Setting) -> str:
        """Return in words what differs from another setting."""
        parts = []
        if self.weights != other.weights:
            parts.append(f"weights {self.weights} instead of {other.weights}")
        if self.guidance != other.guidance:
            parts.append(f"guidance {self.guidance:g} instead of {other.guidance:g}")
        if self.steps != other.steps:
            parts.append(f"{self.steps} steps instead of {other.steps}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """Figures of the samples of one setting.

    Attributes:
        kid: kernel distance to held-out images.
        difference: of it, less that of the run's own setting on the same noise and conditions; None
            for that itself.
        copies: share of near-duplicates of training images.
        category_accuracy: share classified as the requested category; None without requests,
            or without a classifier.
        out: why the setting cannot be recommended, "" where nothing speaks against it.
    """

    setting: Setting
    kid: Figure
    difference: Figure | None
    copies: Figure
    category_accuracy: Figure | None
    out: str = ""

    @property
    def better(self) -> bool:
        """Whether the kernel distance is surely below that of the run's own setting."""
        return self.difference is not None and (self.difference.high or 0.0) < 0

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, for a table."""
        accuracy = self.category_accuracy
        return (
            f"{self.setting.weights}",
            f"{self.setting.guidance:g}",
            f"{self.setting.steps}",
            f"{self.kid.n}",
            self.kid.text(_short),
            "own" if self.difference is None else self.difference.text(_signed),
            percent(self.copies.value),
            "-" if accuracy is None else percent(accuracy.value),
            self.out,
        )


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        step: of the weights that were compared.
        own: the run's own setting.
        recommended: the setting that is surely better; None where the run's own stays.
        sentence: the result in words.
        reason: the figures of the recommendation in words; "" without one.
        remarks: sentences on what was cut or left out.
        rows: every setting compared, by kernel distance; samples of the selection.
        final: the last comparison, on noise and conditions that were not used before.
        seconds: that it took.
    """

    step: int
    own: Setting
    recommended: Setting | None
    sentence: str
    reason: str
    remarks: Sequence[str]
    rows: Sequence[SettingRow]
    final: Sequence[SettingRow]
    seconds: float

    def plain(self) -> dict[str, Any]:
        """Return the result as plain data, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Format the result as text."""
        head = (*HEAD, "category accuracy", "")
        kid = self.rows[0].kid
        parts = [
            f"selection: kernel distance (KID) to {kid.reference}, features of {kid.extractor}; "
            "95 % intervals in brackets, of differences by paired bootstrap",
            format_table([head, *(row.cells() for row in self.rows)]),
        ]
        if self.final:
            parts += [
                "decision: the same on noise and conditions that the selection did not use",
                format_table([head, *(row.cells() for row in self.final)]),
            ]
        return "\n".join([*parts, *(f"note: {remark}" for remark in self.remarks), self.sentence])


@dataclass(frozen=True, kw_only=True)
class SweepAdvice:
    """What sweep.json says about the setting to use.

    Attributes:
        step: of the weights that were compared.
        own: the run's own setting then.
        recommended: the setting to use instead.
        reason: its figures in words.
    """

    step: int
    own: Setting
    recommended: Setting
    reason: str

    @classmethod
    def read(cls, path: Path) -> SweepAdvice | None:
        """Read the advice of a sweep; None without a recommendation.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        plain = read_plain(path)
        if plain is None or plain["recommended"] is None:
            return None
        try:
            return cls(
                step=int(plain["step"]),
                own=Setting(**plain["own"]),
                recommended=Setting(**plain["recommended"]),
                reason=str(plain["reason"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from None


def read_plain(path: Path) -> dict[str, Any] | None:
    """Read what `SweepResult.plain` returned from a JSON file; None if it is missing.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        plain = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, error) from None
    if not plain.keys() >= {"step", "recommended"}:
        raise _damaged(path, "it has no step or no recommendation")
    return plain


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(
        f"cannot be read: {reason}",
        where=str(path),
        hint="remove it; `sfumato sweep RUN` writes it again",
    )


def reason_for(own: SettingRow, row: SettingRow) -> str:
    """Return the figures of a setting beside those of the run's own."""
    assert row.difference is not None
    reason = (
        f"kernel distance (KID) to {row.kid.reference} {row.kid.value:.4g} instead of "
        f"{own.kid.value:.4g}, difference {row.difference.text(_signed)}, on "
        f"{row.kid.n} samples each"
    )
    if row.category_accuracy is not None and own.category_accuracy is not None:
        reason += (
            f"; category accuracy {percent(row.category_accuracy.value)} instead of "
            f"{percent(own.category_accuracy.value)}"
        )
    return reason


def _short(value: float) -> str:
    return f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{value:+.4g}"
