"""The comparison of sampling settings in the report of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FIGURES = ("kid", "difference", "copies", "category_accuracy")  # of a row of sweep.json


@dataclass(frozen=True)
class Cell:
    """A figure, and its interval as text; "" without one."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        name: the setting.
        note: what is special about it; "" for nothing.
        chosen: whether it is the setting to use.
    """

    name: str
    note: str
    chosen: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Lines of one comparison, and what it was for."""

    caption: str
    lines: tuple[Line, ...]


def sweep_tables(plain: Mapping[str, Any]) -> list[Table]:
    """Return the tables of sweep.json: the decision, if there was one, and the selection."""
    captions = {
        "final": "Decision: noise and conditions that the selection did not use",
        "rows": "Selection: all settings that were compared",
    }
    return [
        Table(caption, tuple(_line(row, plain) for row in plain[key]))
        for key, caption in captions.items()
        if plain.get(key)
    ]


def sweep_rows(plain: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield rows of figures by name, as evaluation.json has them."""
    for key, part in (("final", "decision"), ("rows", "selection")):
        for row in plain.get(key, ()):
            name = f"{part}, {_name(row['setting'], plain)}"
            yield {"name": name, **{figure: row[figure] for figure in FIGURES}}


def _line(row: Mapping[str, Any], plain: Mapping[str, Any]) -> Line:
    own = row["setting"] == plain["own"]
    chosen = row["setting"] == (plain["recommended"] or plain["own"])
    notes = [
        *(["the run's own"] if own else []),
        *(["recommended"] if chosen and plain["recommended"] else []),
        *([row["out"]] if row["out"] else []),
        f"{row['kid']['n']} samples",
    ]
    copies = f"{row['copies']['value']:.1%}"
    return Line(
        name=_name(row["setting"], plain),
        note=", ".join(notes),
        chosen=chosen,
        cells=(
            _cell(row["kid"], ".3g"),
            Cell("-") if own else _cell(row["difference"], "+.3g"),
            Cell(copies),
        ),
    )


def _name(setting: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """Return a setting in words; the weights are left out where all have the same."""
    name = f"guidance {setting['guidance']:g}, {setting['steps']} steps"
    several = _weights(plain["rows"]) - {plain["own"]["weights"]}
    return f"weights {setting['weights']}, {name}" if several else name


def _weights(rows: Iterable[Mapping[str, Any]]) -> set[Any]:
    return {row["setting"]["weights"] for row in rows}


def _cell(figure: Mapping[str, Any], form: str) -> Cell:
    return Cell(f"{figure['value']:{form}}", f"[{figure['low']:{form}}, {figure['high']:{form}}]")
