"""Families of configurations, and the kind that names each member in YAML and on command lines."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import field, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin

T = TypeVar("T")
TAG = "kind"
SHORTHANDS = "shorthands"


class Extensible:
    """Base of a family that other code may extend.

    Every dataclass derived from a direct subclass of this class is a member of that subclass's
    family. A member's kind is its class variable `kind`, or else its name: `MyNetworkConfig` is
    `my-network`.
    """


def members(annotation: Any) -> list[type]:
    """Return the dataclasses that a value of this annotation may be.

    They are those of a union, of a family, or a single one; [] if there are none.
    """
    options = (
        get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    )
    return [member for option in options if isinstance(option, type) for member in _members(option)]


def is_tagged(annotation: Any) -> bool:
    """Return whether values of this annotation need a `kind`, to choose among dataclasses."""
    options = (
        get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    )
    return len(members(annotation)) > 1 or any(
        isinstance(option, type) and _is_family(option) for option in options
    )


def _members(option: type) -> list[type]:
    if not _is_family(option):
        return [option] if is_dataclass(option) else []
    latest = {
        kind_of(member): member for member in _subclasses(option) if is_dataclass(member)
    }  # a reloaded module defines them again
    return list(latest.values())


def _is_family(option: type) -> bool:
    return Extensible in option.__bases__


def _subclasses(option: type) -> list[type]:
    classes: list[type] = option.__subclasses__()
    return [cls for derived in classes for cls in (derived, *_subclasses(derived))]


def kind_of(cls: type) -> str:
    """Return the kind of a dataclass: its own `kind`, or else one made from its name.

    The name without `Config` in lower case, its words joined by hyphens.
    """
    kind = cls.__dict__.get(TAG)
    if isinstance(kind, str):
        return kind
    name = cls.__name__.removesuffix("Config") or cls.__name__
    return "-".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|[A-Z]", name)).lower()


def with_shorthands(default: T, shorthands: Mapping[str, Any]) -> T:
    """Declare a field whose values also have short names: `sampler=heun`.

    Each short name stands for a member with its settings.
    """
    return field(default=default, metadata={SHORTHANDS: shorthands})
