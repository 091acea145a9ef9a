"""Every Python block of the README and the docs runs; every command is documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from sfumato.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# defines networks, contexts and sources, which other tests of the same process would see
APART = ("extending.md",)
BLOCKS = [
    pytest.param(
        page.name,
        block,
        id=f"{page.name}-{number}",
        marks=pytest.mark.slow if page.name in APART and number != 1 else (),
    )
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_block_runs(page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) >= 4
    monkeypatch.chdir(tmp_path)
    if page in APART:
        paths = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [sys.executable, "-c", block],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    else:
        exec(compile(block, "<docs>", "exec"), {})


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    missing = [name for name in get_command(app).commands if f"sfumato {name}" not in text]
    assert missing == []
    for verb in ("train", "resume", "sample", "compare", "evaluate", "explain"):
        for option in get_command(app).commands[verb].params:
            if option.opts[0].startswith("--"):
                assert option.opts[0] in text, (verb, option.opts)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]+))?\)", page.read_text()):
            found = page.parent / target if target else page
            assert found.exists(), (page.name, target)
            assert not anchor or anchor in anchors(found), (page.name, target, anchor)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
