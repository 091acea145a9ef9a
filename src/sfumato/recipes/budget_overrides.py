"""Budgets in which a limit that is set replaces the others.

`budget.steps=1200` on a recipe of one minute means 1,200 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sfumato.training import Budget

LIMITS = tuple(field.name for field in fields(Budget))


def replaced(base: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return `base` without the limits that `asked` replaces, and a line for each changed budget.

    Several limits that are set together all hold: the first one reached ends the training.
    """
    result, lines = dict(base), []
    for stage in ("autoencoder",):
        if isinstance(base.get(stage), Mapping) and isinstance(asked.get(stage), Mapping):
            result[stage], said = _without(base[stage], asked[stage], f"{stage}.budget")
            lines += said
    result, said = _without(result, asked, "budget")
    return result, [*said, *lines]


def _without(
    base: Mapping[str, Any], asked: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], list[str]]:
    before, wanted = base.get("budget"), asked.get("budget")
    if not (isinstance(before, Mapping) and isinstance(wanted, Mapping)):
        return dict(base), []
    new = {limit: wanted[limit] for limit in LIMITS if wanted.get(limit) is not None}
    old = {
        limit: before[limit]
        for limit in LIMITS
        if before.get(limit) is not None and limit not in wanted
    }
    if not (new and old):
        return dict(base), []
    line = f"{name}: {_in_words(new)} replaces {_in_words(old)}; set both to stop at whichever comes first"
    return {**base, "budget": {**before, **dict.fromkeys(old)}}, [line]


def _in_words(limits: Mapping[str, Any]) -> str:
    return " and ".join(f"{limit}={value}" for limit, value in limits.items())
