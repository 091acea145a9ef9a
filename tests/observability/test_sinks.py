"""Metrics go to every sink that is configured, and a sink that is missing is named before work
begins.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from sfumato.errors import ConfigError
from sfumato.observability import sinks

RECORD = {"step": 7, "train/loss": 0.5, "name": "x", "flag": True, "train/skipped": 0}


def test_numbers_alone_are_curves() -> None:
    assert sinks.scalars(RECORD) == {"train/loss": 0.5, "train/skipped": 0.0}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_sink_that_is_not_installed_names_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"sfumato.observability.{name}_sink", raising=False)
    with pytest.raises(ConfigError, match=rf"pip install 'sfumato\[{name}\]'"):
        sinks.require_sinks([name])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_points_of_each_step_are_sent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, object]] = []
    module = ModuleType(name)
    module.init = lambda **settings: calls.append(("init", settings)) or SimpleNamespace()
    module.log = lambda numbers, step: calls.append(("log", (numbers, step)))
    module.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, f"sfumato.observability.{name}_sink", raising=False)
    (sink,) = sinks.open_sinks([name], folder=tmp_path / "run", name="mine", config={"seed": 3})
    sink.write(RECORD)
    sink.close()
    assert [call for call, _ in calls] == ["init", "log", "finish"]
    settings = calls[0][1]
    assert (settings["name"], settings["project"], settings["resume"]) == (
        "run",
        "sfumato",
        "allow",
    )
    assert settings["config"] == {"recipe": "mine", "seed": 3}
    assert calls[1][1] == ({"train/loss": 0.5, "train/skipped": 0.0}, 7)
    monkeypatch.delitem(sys.modules, f"sfumato.observability.{name}_sink", raising=False)
