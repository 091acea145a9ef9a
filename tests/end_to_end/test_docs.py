"""Every Python block of the README and the docs runs; every command is documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from sfumato.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) >= 4
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "<docs>", "exec"), {})


def test_every_command_is_documented() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [name for name in get_command(app).commands if f"sfumato {name}" not in text]
    assert missing == []
    for verb in ("train", "resume", "sample", "compare", "evaluate", "explain"):
        for option in get_command(app).commands[verb].params:
            if option.opts[0].startswith("--"):
                assert option.opts[0] in text, (verb, option.opts)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
