"""SIGKILL at random moments: the run always resumes, and ends bit for bit as the one that was left
alone.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfumato import config
from tests.helpers.runs import fingerprint, images, tiny_run


def start(*arguments: str, start_new_session: bool = False) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "sfumato.cli.main", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=start_new_session,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


@pytest.mark.parametrize("wanted", [pytest.param(20, marks=pytest.mark.slow)])
def test_killed_many_times_ends_as_if_left_alone(wanted: int, tmp_path: Path) -> None:
    folder = images(tmp_path / "images")
    recipe = tmp_path / "tiny.yaml"
    settings = config.with_overrides(
        config.plain(tiny_run(folder)),
        {
            "budget.steps": 50 + 5 * wanted,
            "checkpoint.every_steps": 4,
            "validation.every_steps": 60,
            "preview.every_steps": 60,
        },
    )
    recipe.write_text(config.dump_yaml(settings))
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    finish(start("train", str(recipe), "--run", str(alone)))

    moments = random.Random(0)
    arguments = ["train", str(recipe), "--run", str(killed)]
    kills, steps = 0, set()
    for _ in range(3 * wanted):
        process = start(*arguments)
        appeared = time.monotonic() + 60
        before = newest(killed)
        while process.poll() is None and newest(killed) == before and time.monotonic() < appeared:
            time.sleep(0.01)  # it has come at least as far as one more checkpoint
        time.sleep(moments.uniform(0.0, 0.15))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
            steps.add(newest(killed))
        process.communicate()
        arguments = ["resume", str(killed)]
        if kills == wanted:
            break
    finish(start("resume", str(killed)))
    assert kills == wanted
    assert len(steps) > wanted // 2
    assert fingerprint(killed) == fingerprint(alone)
    assert not list((killed / "checkpoints").glob("*.corrupt"))
    assert not list((killed / "checkpoints").glob(".tmp-*"))


def newest(run: Path) -> str:
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    return names[-1] if names else ""


def test_sigterm_saves_and_exits_143(tmp_path: Path) -> None:
    folder = images(tmp_path / "images")
    recipe = tmp_path / "tiny.yaml"
    settings = config.with_overrides(
        config.plain(tiny_run(folder)), {"budget.steps": 100_000, "checkpoint.every_steps": 99_999}
    )
    recipe.write_text(config.dump_yaml(settings))
    run = tmp_path / "run"
    process = start("train", str(recipe), "--run", str(run))
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 3' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"sfumato resume" in errors
    assert b"Traceback" not in errors
    assert newest(run) > "step-000000000"
    assert '"interrupted"' in (run / "status.json").read_text()


@pytest.mark.slow
def test_sigterm_to_all_processes_of_a_run_saves_too(tmp_path: Path) -> None:
    """As `timeout`, Ctrl-C on a terminal and job schedulers send it: those that read ahead are
    ended at the same time.
    """
    folder = images(tmp_path / "images")
    recipe = tmp_path / "tiny.yaml"
    changes = {
        "budget.steps": 100_000,
        "checkpoint.every_steps": 99_999,
        "validation.every_steps": 99_999,
    }
    decoded_as_used = {
        "data.cache": "off",
        "data.memory_gib": 0.0,
        "data.workers": 2,
        "preview.every_steps": 99_999,
    }
    recipe.write_text(
        config.dump_yaml(
            config.with_overrides(config.plain(tiny_run(folder)), {**changes, **decoded_as_used})
        )
    )
    arguments = ["train", str(recipe), "--run", str(tmp_path / "run")]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(*arguments, start_new_session=True)
        metrics, before = tmp_path / "run" / "metrics.jsonl", newest(tmp_path / "run")
        step = int(before[5:] or 0) + 5
        while process.poll() is None and not (
            metrics.exists() and f'"step": {step},' in metrics.read_text()
        ):
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1].decode()
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors.decode()
        assert b"sfumato resume" in errors
        assert b"Traceback" not in errors
        assert newest(tmp_path / "run") > before
        arguments = ["resume", str(tmp_path / "run")]
