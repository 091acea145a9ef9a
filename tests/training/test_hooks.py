"""What happens between steps: in order, a failure is a warning, and own hooks and sinks take
part.
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sfumato.runs import prepare, train
from sfumato.runs.training import build_trainer
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Budget, LogConfig
from sfumato.training.hooks import HOOKS, Hook, Session
from sfumato.training.trainer import Trainer
from tests.helpers.runs import images, tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("set"))


class Note(Hook):
    """Writes down the steps at which it ran, and fails at one of them."""

    name = "note"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        return trainer.state.counters.step % 2 == 1 or finished

    def run(self, trainer: Trainer, session: Session) -> None:
        self.steps.append(trainer.state.counters.step)
        session.write({"step": trainer.state.counters.step, "own": 1.0})
        if trainer.state.counters.step == 3:
            raise OSError("disk full")


def test_an_own_hook_runs_when_due_and_its_failure_is_a_warning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note, prepared = Note(), prepare(tiny_run(folder, budget=Budget(steps=4)))
    trainer = build_trainer(prepared, RunDirectory.create(tmp_path / "run"))
    trainer.hooks = (*HOOKS, note)
    trainer.run()
    assert note.steps == [1, 3, 4]
    assert "warning: note at step 3 failed: disk full" in capsys.readouterr().err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"own"' in line] == [1, 3, 4]


def test_a_run_writes_to_the_sinks_that_it_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    module = ModuleType("wandb")
    module.init = lambda **settings: None
    module.log = lambda numbers, step: sent.append(step)
    module.finish = lambda: sent.append(-1)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delitem(sys.modules, "sfumato.observability.wandb_sink", raising=False)
    run = tiny_run(folder, budget=Budget(steps=2), log=LogConfig(every_steps=1, sinks=("wandb",)))
    train(run, run=tmp_path / "run")
    assert sent == [1, 2, 2, -1]  # two steps and the last validation
    monkeypatch.delitem(sys.modules, "sfumato.observability.wandb_sink", raising=False)
