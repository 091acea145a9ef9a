"""SIGKILL at random moments of all stages, half of them in the middle of a write: a run always resumes
and ends bit for bit as the one that was left alone.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from glob import glob
from pathlib import Path

import pytest

from tests.faults.conftest import Case
from tests.faults.injector import leftovers
from tests.helpers.runs import fingerprint

MID_WRITE_S = 0.003  # within which a kill strikes after a temporary file has appeared


def being_written(run: Path, cache: Path) -> set[str]:
    """Return what is being written just now."""
    places = [run, run / "checkpoints", run / "autoencoder", run / "autoencoder" / "checkpoints"]
    places += [Path(path) for path in glob(f"{cache}/*/*")]
    return {path for place in places for path in glob(f"{place}/.tmp-*")}


def kill_at_random(case: Case, rng: random.Random, run: Path, cache: Path) -> tuple[str, bool]:
    """Begin or go on with a run, and kill it at a random moment, perhaps in the middle of a write.

    Returns:
        the state that it was killed in, "" if it was finished before; and whether it was writing.
    """
    child = case.lab.start("train", case.recipe, "--run", run, "--resume")
    seen, passes = being_written(run, cache), rng.randrange(0, 8)
    in_write, limit = rng.random() < 0.5, time.monotonic() + rng.uniform(0.02, 1.2)
    while child.poll() is None:
        now = being_written(run, cache)
        if in_write and now - seen:
            seen |= now
            passes -= 1
            if passes < 0:
                time.sleep(rng.uniform(0, MID_WRITE_S))
                break
        if time.monotonic() > limit + 2 * in_write:
            break
        time.sleep(0.0 if in_write else 0.002)
    child.kill()
    if child.code == 0:
        return "", False
    assert child.code == -9, child.said()
    writing = bool(being_written(run, cache))
    if not (run / "config.yaml").exists():
        return "before config.yaml", writing
    stage = "autoencoder" if not glob(f"{run}/checkpoints/step-*") else "model"
    return stage, writing


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["pixel", pytest.param("latent", marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_as_if_left_alone(
    kind: str,
    kills: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case: Case = request.getfixturevalue(kind)
    rng, done = random.Random(kills), Counter[str]()
    number = mid_write = 0
    while done.total() < kills:
        number += 1
        run, cache = tmp_path / f"run-{number}", tmp_path / f"cache-{number}"
        monkeypatch.setenv("SFUMATO_CACHE", str(cache))
        for _ in range(8):
            state, writing = kill_at_random(case, rng, run, cache)
            if not state:
                break
            done[state] += 1
            mid_write += writing
        code, said = case.lab.call("train", case.recipe, "--run", run, "--resume")
        assert code == 0, said
        assert fingerprint(run) == case.end
        assert not list(run.rglob("*.corrupt"))
        assert leftovers(run, cache) == []
    assert mid_write >= kills // 8, f"{done} over {number} runs, {mid_write} in a write"
