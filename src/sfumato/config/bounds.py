"""Bounds of numbers, declared with the field: `eta: Fraction = 0.0`. The parser, the JSON schema
and `require_bounds` read them.
"""

from __future__ import annotations

import math
from dataclasses import is_dataclass
from functools import lru_cache
from typing import Annotated, Any, get_args, get_origin

from pydantic import AllowInfNan, ConfigDict, Field, TypeAdapter, ValidationError

from sfumato.config.kinds import members
from sfumato.config.schema import config_fields
from sfumato.errors import ConfigError

LARGE = 1e9  # beyond which a number is a slip, in any unit used here
MANY = 10**12

Finite = Annotated[float, Field(ge=-LARGE, le=LARGE)]
Positive = Annotated[float, Field(gt=0, le=LARGE)]
NonNegative = Annotated[float, Field(ge=0, le=LARGE)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
InnerFraction = Annotated[float, Field(gt=0, lt=1)]
Limit = Annotated[
    float, AllowInfNan(True), Field(ge=-math.inf)
]  # an end of an interval: infinite where that end is open, never NaN
AnyFloat = Annotated[float, AllowInfNan(True)]  # measured, not set
Count = Annotated[int, Field(ge=1, le=MANY)]
CountOrZero = Annotated[int, Field(ge=0, le=MANY)]
Size = Annotated[int, Field(ge=1, le=1 << 16)]  # channels, layers, sides: what memory grows with
SizeOrZero = Annotated[int, Field(ge=0, le=1 << 16)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Bounded:
    """A dataclass that checks its numbers when it is made, even if no configuration is parsed."""

    def __post_init__(self) -> None:
        require_bounds(self)


def require_bounds(thing: Any, path: str = "") -> None:
    """Raise ConfigError if a number in a dataclass, or in one that it holds, is out of bounds.

    Args:
        path: of `thing` in the configuration; "" for its root.
    """
    cls: Any = type(thing)
    for name, check in _checks(cls):
        value = getattr(thing, name)
        if is_dataclass(value):
            require_bounds(value, f"{path}.{name}" if path else name)
        elif check is not None:
            try:
                check.validate_python(value)
            except ValidationError as error:
                raise ConfigError(
                    f"`{name}` = {value!r}: {error.errors()[0]['msg'].lower()}",
                    where=path or cls.__name__,
                    hint="`sfumato config schema` prints the bounds of every number",
                ) from None


@lru_cache
def _checks(cls: Any) -> tuple[tuple[str, TypeAdapter[Any] | None], ...]:
    """Return the fields that a configuration may set, each with a check if it holds numbers."""
    finite = ConfigDict(allow_inf_nan=False)
    return tuple(
        (field.name, TypeAdapter(hint, config=finite) if holds_numbers(hint) else None)
        for field, hint in config_fields(cls)
    )


def holds_numbers(hint: Any) -> bool:
    """Return whether values of this annotation are numbers, several of them, or None instead."""
    if get_origin(hint) is Annotated:
        return holds_numbers(get_args(hint)[0])
    return (
        hint is int
        or hint is float
        or (not members(hint) and any(map(holds_numbers, get_args(hint))))
    )
