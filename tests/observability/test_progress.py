"""A bar on a terminal, plain lines elsewhere, and never a control character from a file's name."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.observability import progress
from sfumato.observability.progress import Clock, ProgressBar, TimeLeft, duration, printable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 9.6, 309, 3909, -5)] == [
        "0:00",
        "0:10",
        "5:09",
        "1:05:09",
        "0:00",
    ]


def test_where_no_terminal_is_a_plain_line_now_and_then_and_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 101.0, 107.0, 108.0, 110.0])  # begun, then one for each update
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with ProgressBar("training") as bar:
        for fraction in (0.1, 0.35, 0.4, 1.0):
            bar.update(fraction, f"loss {fraction}")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split("  left ")[0] for line in lines] == [
        "training  35%  loss 0.35",
        "training 100%  loss 1.0",
    ]
    assert lines[1].endswith("left 0:00")
    assert "\x1b" not in captured.err


def test_the_time_left_of_a_resumed_run_counts_from_where_it_began(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    bar = ProgressBar("training")
    bar.start_at(0.5)
    bar.update(0.6, "x")  # a tenth took 10 s, four are left
    assert "left 0:40" in capsys.readouterr().err


def test_the_time_left_is_not_told_from_one_sample() -> None:
    """A first step that warmed up made `left 4:51:36` of a run of an hour."""
    assert TimeLeft(0.0).at(4.9, 0.2) is None
    slow = TimeLeft(0.0)
    assert slow.at(10.0, 0.001) is None
    assert slow.at(90.0, 0.011) is not None


def test_twenty_reports_are_enough_where_the_work_is_long() -> None:
    left = TimeLeft(0.0)
    told = [left.at(10.0 * n, 0.0001 * n) for n in range(1, 21)]
    assert told[:19] == [None] * 19
    assert told[19] == pytest.approx(10.0 * (10_000 - 20))


@given(speed=st.floats(1e-5, 0.1), every=st.floats(0.1, 30.0), begun=st.floats(0, 0.9))
def test_work_at_a_constant_speed_ends_when_it_is_told_to(
    speed: float, every: float, begun: float
) -> None:
    left = TimeLeft(100.0)
    left.start_at(begun)
    for n in range(1, 200):
        fraction = begun + n * every * speed
        if fraction >= 1:
            break
        seconds = left.at(100.0 + n * every, fraction)
        assert seconds is None or seconds == pytest.approx((1 - fraction) / speed, rel=1e-6)


def test_the_time_left_follows_a_machine_that_became_faster() -> None:
    left = TimeLeft(0.0)
    for second in range(1, 60):
        left.at(float(second), 0.0001 * second)
    for second in range(60, 400):
        left.at(float(second), 0.006 + 0.001 * (second - 60))
    # by the mean of all it would be 756
    assert left.at(400.0, 0.346) == pytest.approx(654.0, rel=0.05)


def test_a_terminal_gets_a_live_bar_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert ProgressBar("x").live
    for name in ("CI", "NO_COLOR"):
        with monkeypatch.context() as inside:
            inside.setenv(name, "1")
            assert not ProgressBar("x").live


def test_what_is_said_is_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("x") as bar:
        bar.say("[bold]cat[/bold] [/] " + "long " * 60)
    assert capsys.readouterr().err == "[bold]cat[/bold] [/] " + "long " * 60 + "\n"


@pytest.mark.parametrize(
    "payload", ["\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "a\rb", "\u202egnp.exe", "\x00"]
)
def test_control_characters_do_not_reach_the_terminal(
    payload: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("x") as bar:
        bar.say(f"cat{payload}.png")
    said = capsys.readouterr().err
    assert said.startswith("cat")
    assert said.endswith(".png\n")
    assert all(character.isprintable() for character in said.removesuffix("\n"))


def test_ordinary_text_is_left_as_it_is() -> None:
    text = "été 猫 🐈 naïve\n  hint: 'x'"
    assert printable(text) == text


def test_a_resumed_runs_speed_counts_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([50.0, 50.0, 60.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    clock = Clock(7.0, 100)
    clock.wait(2.0)
    speed, wait_ms = clock.lap(batch_size=8, step=120)
    assert speed == 20 * 8 / 10
    assert wait_ms == 100
