"""The verdict on a fine-tuning, look by look."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.training.verdict import DRIFT_LIMIT, Look, Verdict


def look(step: int, gain: float, *, half: float = 0.05, drift: float | None = 0.01) -> Look:
    return Look(step=step, gain=gain, gain_low=gain - half, gain_high=gain + half, drift=drift)


def after(*looks: Look) -> Verdict:
    verdict = Verdict()
    for one in looks:
        verdict = verdict.after(one)
    return verdict


def test_while_the_gain_grows_the_last_look_is_chosen() -> None:
    verdict = after(look(1, 0.1), look(2, 0.2), look(3, 0.3))
    assert verdict.chosen == look(3, 0.3)
    assert not verdict.stop
    assert verdict.sentence() == "keep on: the last look is as good as the best; use step 3"


def test_the_latest_within_the_interval_of_the_best_is_chosen() -> None:
    verdict = after(look(1, 0.30), look(2, 0.27), look(3, 0.24))
    assert verdict.best == look(1, 0.30)
    assert verdict.chosen == look(2, 0.27)
    assert verdict.stop
    assert verdict.sentence() == (
        "stop: held-out new images are predicted worse than at step 2 (gain +24.0%, best +30.0%); "
        "use step 2"
    )


def test_a_look_that_forgets_is_never_chosen() -> None:
    verdict = after(look(1, 0.1), look(2, 0.9, drift=1.01 * DRIFT_LIMIT))
    assert verdict.chosen == verdict.best == look(1, 0.1)
    assert verdict.stop
    assert "stop: the model forgets what its base knew (change 10% of the base's error" in (
        verdict.sentence()
    )


def test_if_all_forget_none_is_chosen() -> None:
    verdict = after(look(1, 0.5, drift=0.2), look(2, 0.6, drift=0.3))
    assert verdict.chosen is None
    assert verdict.sentence().startswith("stop: the model has forgotten")


def test_a_base_of_which_nothing_is_known_cannot_be_forgotten() -> None:
    verdict = after(look(1, 0.1, drift=None))
    assert verdict.chosen == look(1, 0.1, drift=None)


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict(),
        after(look(1, 0.3), look(2, 0.1)),
        after(look(1, 0.1, drift=0.9)),
        after(look(1, 0.1, half=float("inf"), drift=None)),
    ],
)
def test_a_verdict_is_read_as_it_was_written(tmp_path: Path, verdict: Verdict) -> None:
    assert Verdict.read(tmp_path / "none.json") == Verdict()
    verdict.write(tmp_path / "best" / "verdict.json")
    assert Verdict.read(tmp_path / "best" / "verdict.json") == verdict
