"""The generated reference pages are those of the program, and descriptions of keys are read as they
are meant.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from sfumato.config.descriptions import attribute_docs
from sfumato.networks import DiTConfig, UNetConfig

SCRIPT = Path(__file__).parents[2] / "docs" / "reference.py"


def test_the_reference_pages_are_up_to_date() -> None:
    """In a process of its own: other tests register contexts and networks."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@dataclass
class Base:
    """A base.

    Attributes:
        shared: of the base.
        replaced: by the base.
    """

    shared: int = 0
    replaced: int = 0


@dataclass
class Derived(Base):
    """A derived class.

    Attributes:
        a, b: of both: with a colon,
            continued.
        replaced: by the derived class.

    Source: not an attribute.
    """

    a: int = 0
    b: int = 0


@dataclass
class Silent(Derived):
    c: int = 0


def test_attributes_of_bases_several_names_and_continued_lines_are_read() -> None:
    both = "of both: with a colon, continued."
    expected = {"shared": "of the base.", "replaced": "by the derived class.", "a": both, "b": both}
    assert attribute_docs(Derived) == expected
    assert attribute_docs(Silent) == expected
    assert attribute_docs(int) == {}


def test_every_key_of_a_network_is_described() -> None:
    for config in (DiTConfig, UNetConfig):
        assert set(attribute_docs(config)) == {field.name for field in fields(config)}
