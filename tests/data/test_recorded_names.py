"""Long lists of names are in a table beside data.json, which says how many there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from sfumato.data import recorded_names
from sfumato.data.recorded_names import FILE, shortened, write_names


def record(count: int, images: int = 1000) -> dict[str, Any]:
    return {
        "images": images,
        "notes": {"upscaled": [f"{i}.png" for i in range(count)], "duplicate": ["a.png", "b.png"]},
        "rejects": [{"file": f"bad {i}.png", "reason": "damaged: x"} for i in range(count)],
        "holdout_files": [f"held {i}.png" for i in range(count)],
        "fingerprint": "f",
    }


def test_short_lists_stay_as_they_are_and_an_older_table_goes(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"old")
    kept, names = shortened(record(100))
    assert kept == record(100)
    write_names(tmp_path, names)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(("images", "holdout"), [(1000, 150), (10**6, 100)])
def test_long_lists_are_cut_counted_and_whole_in_the_table(
    tmp_path: Path, images: int, holdout: int
) -> None:
    whole = record(150, images)
    kept, names = shortened(whole)
    assert kept["notes"] == {
        "upscaled": whole["notes"]["upscaled"][:100],
        "duplicate": ["a.png", "b.png"],
    }
    assert kept["rejects"] == whole["rejects"][:100]
    # of smaller sets, data.json also has a hash of each image, by which held-out ones are known again
    assert kept["holdout_files"] == whole["holdout_files"][:holdout]
    assert kept["all_names"] == FILE
    assert kept["fingerprint"] == "f"
    write_names(tmp_path, names)
    rows = parquet.read_table(tmp_path / FILE).to_pylist()
    by_kind = {
        kind: [(row["name"], row["reason"]) for row in rows if row["kind"] == kind]
        for kind in {row["kind"] for row in rows}
    }
    expected = {
        "upscaled": [(name, None) for name in whole["notes"]["upscaled"]],
        "left_out": [(row["file"], row["reason"]) for row in whole["rejects"]],
    }
    if holdout == 100:
        expected["holdout"] = [(name, None) for name in whole["holdout_files"]]
    assert by_kind == expected
    assert kept["counts"] == dict.fromkeys(expected, 150)


def test_a_run_on_many_bad_images_names_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato import runs
    from sfumato.storage.run_directory import RunDirectory
    from sfumato.training import Budget
    from tests.helpers.runs import images, tiny_run

    monkeypatch.setattr(recorded_names, "LISTED", 3)
    folder = images(tmp_path / "images")
    for number in range(5):
        (folder / f"bad{number}.png").write_bytes(b"\x89PNG cut")
    run = runs.train(tiny_run(folder, budget=Budget(steps=1)), run=tmp_path / "run")
    data = RunDirectory(run).data_record()
    assert len(data["rejects"]) == 3
    assert data["counts"]["left_out"] == 5
    rows = parquet.read_table(run / FILE).to_pylist()
    assert {row["name"] for row in rows if row["kind"] == "left_out"} == {
        f"bad{number}.png" for number in range(5)
    }
