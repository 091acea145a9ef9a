"""What the keys of a configuration mean, read from the docstrings of its dataclasses."""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(r" {4}(?P<names>\w+(?:, \w+)*): (?P<text>.*)")
_CONTINUED = " " * 8


def attribute_docs(cls: type) -> dict[str, str]:
    """Return the texts of the `Attributes:` sections of a class and its bases, by attribute.

    "a, b: text" describes several attributes at once, and a line that is indented further continues
    the one above. A class's own text replaces its base's.
    """
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= _section(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    return texts


def _section(docstring: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    names: list[str] = []
    _, _, below = docstring.partition("Attributes:\n")
    for line in below.splitlines():
        if entry := _ENTRY.fullmatch(line):
            names = entry["names"].split(", ")
            texts |= dict.fromkeys(names, entry["text"])
        elif line.startswith(_CONTINUED) and names:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        else:  # a blank line, or the next section
            break
    return texts
