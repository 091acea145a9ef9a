"""Fail if a word that the project has given up comes back in text that users read.

User-visible text is: string literals of the package that are not docstrings, README.md and docs/*.md.
Run by `make check`.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

FORMER = {
    r"\bpictures?\b": "image",
    r"\bmend(s|ed|ing)?\b": "fix, hint",
    r"\b(is|are) no (key|run|recipe|network|autoencoder|number|whole|mapping|image|model|multiple)\b": "is not a ...",
    r"\banew\b": "again, regenerate",
    r"\basked[- ]for\b": "requested",
    r"\bby heart\b": "memorized",
    r"\bforetells?\b": "predict",
    r"\bstands? (twice|k times)\b": "appear",
    r"\bkin\b": "similar",
    r"\bgo on with\b": "resume",
    r"\bread as asked\b": "category accuracy",
    r"\b(WordsConfig|OwnAutoencoder|PixelSpace|LossSpace|non_leaking|base_width=|--worse\b)": "see config/aliases.py",
}
ALIASES = Path("src/sfumato/config/aliases.py")  # lists former words on purpose
NAMES_OF_DATA = {  # what people call folders, columns and files
    Path("src/sfumato/data/split_names.py"),
    Path("src/sfumato/data/sources/parquet.py"),
    Path("src/sfumato/data/check/captions.py"),
}


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each string literal that is not a docstring."""
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.STRING and previous not in (
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
        ):
            yield token.start[0], token.string
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            previous = token.type


def texts() -> Iterator[tuple[Path, int, str]]:
    """All text that users read, by file and line."""
    for path in sorted(Path("src/sfumato").rglob("*.py")):
        if path != ALIASES and path not in NAMES_OF_DATA:
            yield from ((path, line, text) for line, text in strings(path))
    for path in [Path("README.md"), *sorted(Path("docs").glob("*.md"))]:
        yield from (
            (path, number, line)
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        )


def main() -> int:
    """Print each former word with its place; 1 if there is one."""
    found = [
        f"{path}:{line}: {match[0]!r}: say {instead}"
        for path, line, text in texts()
        for pattern, instead in FORMER.items()
        for match in [re.search(pattern, text, re.IGNORECASE)]
        if match
    ]
    print("\n".join(found), end="\n" if found else "")  # noqa: T201
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
