"""The check of wording finds former words in text that users read, and nowhere else."""

import runpy
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "wording.py"), run_name="tool")


def test_literals_are_read_and_docstrings_and_comments_are_not(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""A picture."""\n\n# a picture\nMESSAGE = "a picture"\n\n\ndef f():\n    """Anew."""\n'
    )
    assert list(TOOL["strings"](path)) == [(4, '"a picture"')]


@pytest.mark.parametrize("text", ["no such picture", "mend: fix it", "made anew", "x is no run"])
def test_a_former_word_is_found(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src" / "sfumato").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("Train a model.\n")
    monkeypatch.chdir(tmp_path)
    assert TOOL["main"]() == 0
    (tmp_path / "src" / "sfumato" / "some.py").write_text(f'MESSAGE = "{text}"\n')
    assert TOOL["main"]() == 1
    assert "some.py:1: " in capsys.readouterr().out
