"""metrics.jsonl survives crashes and resumes: whole lines only, no step twice, nothing that is not
JSON.
"""

import json
import math
from pathlib import Path

import pytest

from sfumato.observability.metrics_file import MetricsFile, read_lines


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def written(path: Path, *numbers: int) -> Path:
    with MetricsFile(path, after_step=0) as file:
        for number in numbers:
            file.write({"step": number, "train/loss": number / 10})
    return path


def test_a_record_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", after_step=0)
    file.write({"step": 1, "train/loss": 0.5})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 0.5}]
    file.close()


def test_resuming_drops_the_steps_that_will_be_trained_again(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 10, 20, 30, 40)
    with MetricsFile(path, after_step=20) as file:
        assert steps(path) == [10, 20]
        file.write({"step": 30, "train/loss": 9.0})
    assert steps(path) == [10, 20, 30]
    assert read_lines(path)[2]["train/loss"] == 9.0
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [2, 5, 20])
def test_a_line_cut_short_is_left_out_and_the_next_stands_on_its_own(
    tmp_path: Path, cut: int
) -> None:
    path = written(tmp_path / "metrics.jsonl", 10, 20, 30)
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(path) == [10, 20]
    with MetricsFile(path, after_step=30) as file:
        file.write({"step": 30})
    assert steps(path) == [10, 20, 30]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_tail_of_zeros_after_a_power_cut_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 10)
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    assert steps(path) == [10]


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, after_step=0) as file:
        file.write(
            {"step": 1, "a": math.nan, "b": math.inf, "c": {"d": [-math.inf, 1.5]}, "e": "nan"}
        )
    assert read_lines(path) == [
        {"step": 1, "a": None, "b": None, "c": {"d": [None, 1.5]}, "e": "nan"}
    ]
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()


def test_a_file_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "none.jsonl") == []


def test_the_file_is_closed_even_after_an_error(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", after_step=0)
    with pytest.raises(KeyError), file:
        raise KeyError
    with pytest.raises(ValueError, match="closed"):
        file.write({"step": 2})
