"""Budget overrides: a limit that is set replaces the other limits of the budget.

`budget.steps=1200` on a recipe of one minute means 1,200 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sfumato.training import Budget

LIMITS = tuple(field.name for field in fields(Budget))


def replace_limits(
    base: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return `base` without the limits that `overrides` replaces, and a line for each changed
    budget.

    Several limits that are set together all hold: the first one reached ends the training.
    """
    result, lines = dict(base), []
    for stage in ("autoencoder",):
        if isinstance(base.get(stage), Mapping) and isinstance(overrides.get(stage), Mapping):
            result[stage], stage_lines = _drop_limits(
                base[stage], overrides[stage], f"{stage}.budget"
            )
            lines += stage_lines
    result, run_lines = _drop_limits(result, overrides, "budget")
    return result, [*run_lines, *lines]


def _drop_limits(
    base: Mapping[str, Any], overrides: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], list[str]]:
    before, override = base.get("budget"), overrides.get("budget")
    if not (isinstance(before, Mapping) and isinstance(override, Mapping)):
        return dict(base), []
    new = {limit: override[limit] for limit in LIMITS if override.get(limit) is not None}
    old = {
        limit: before[limit]
        for limit in LIMITS
        if before.get(limit) is not None and limit not in override
    }
    if not (new and old):
        return dict(base), []
    line = f"{name}: {_in_words(new)} replaces {_in_words(old)}; set both to stop at whichever comes first"
    return {**base, "budget": {**before, **dict.fromkeys(old)}}, [line]


def _in_words(limits: Mapping[str, Any]) -> str:
    return " and ".join(f"{limit}={value}" for limit, value in limits.items())
