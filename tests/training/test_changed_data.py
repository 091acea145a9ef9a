"""A run that goes on with changed data means by its weights what it meant before."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.conditioners import (
    AttributesConfig,
    CategoryConfig,
    ConditioningInfo,
    LearnedTextConfig,
    PointsConfig,
    PretrainedTextConfig,
)
from sfumato.contexts import ContextConfig
from sfumato.errors import DataError
from sfumato.recipes import Run
from sfumato.recipes.resolver import resolve
from sfumato.runs import resume, train
from sfumato.runs.changed_data import Continued, carried_info
from sfumato.runs.finetuning import choose_finetuning
from sfumato.runs.preparation import open_data, prepare
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory
from tests.helpers.runs import fingerprint, tiny_run
from tests.training.test_resume import Crash, crash_after

SHORT = "budget.steps=16"


def add(folder: Path, category: str, numbers: range, **annotations: object) -> None:
    """Write images with a caption, or other annotations in a JSON file beside each."""
    (folder / category).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        place = folder / category / f"{number:03d}.png"
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8), np.uint8)
        Image.fromarray(pixels).save(place)
        if annotations:
            place.with_suffix(".json").write_text(json.dumps(annotations))


def arrays(folder: Path, reach: float) -> Path:
    """Write 24 arrays of floats from -reach to reach."""
    folder.mkdir(parents=True)
    for number in range(24):
        values = np.random.default_rng(number).uniform(-reach, reach, (8, 8))
        np.save(folder / f"{number:03d}.npy", values.astype(np.float32))
    return folder


def infos(run: Path) -> list[ConditioningInfo]:
    """What the conditioner was built from, at each checkpoint."""
    from sfumato import config

    found = [checkpoint.load(path).state["facts"] for path in checkpoint.paths(run / "checkpoints")]
    return [config.parse(ConditioningInfo, facts) for facts in reversed(found)]


def begun(folder: Path, place: Path, **changes: object) -> Path:
    return train(tiny_run(folder, **changes), run=place)


def test_words_keep_their_vectors_when_others_become_more_frequent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path / "images", "a", range(24), caption="red cat")
    add(tmp_path / "images", "a", range(24, 36), caption="blue dog")
    text = ContextConfig(text=LearnedTextConfig(size=8, layers=1, heads=2, length=6))
    run = begun(tmp_path / "images", tmp_path / "run", conditioner=text)
    before = infos(run)[-1].words
    assert before[:2] in {("red", "cat"), ("cat", "red")}
    add(tmp_path / "images", "a", range(36, 90), caption="blue dog")
    add(tmp_path / "images", "a", range(90, 94), caption="green owl")
    changed = open_data(resolve(run))
    assert text.info_fields(changed)["words"] != before  # what the run would mean by them now
    capsys.readouterr()
    resume(run, overrides=[SHORT], accepts_data=True)
    assert infos(run)[-1].words == before
    assert "2 words of the captions, such as green, are new to the model" in capsys.readouterr().err
    assert sfumato.load(run).info.words == before
    resume(run, overrides=["budget.steps=17"])  # and further, with nothing to accept
    assert infos(run)[-1].words == before


def test_categories_keep_their_numbers_and_new_ones_are_refused(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name in ("b", "c", "d"):
        add(images, name, range(100 * ord(name), 100 * ord(name) + 24))
    run = begun(images, tmp_path / "run")
    assert infos(run)[-1].categories == ("b", "c", "d")
    (images / "b").rename(tmp_path / "gone")
    resume(run, overrides=[SHORT], accepts_data=True)
    info = infos(run)[-1]
    assert info.categories == ("b", "c", "d")
    assert info.untrained == ("b",)
    data = open_data(resolve(run))
    assert set(data.labels.tolist()) == {1, 2}
    # in place of the one that is gone: as many categories, which would mean others
    add(images, "a", range(24))
    with pytest.raises(DataError, match=r"1 of the categories are new .* cannot take up more: a"):
        resume(run, overrides=["budget.steps=18"], accepts_data=True)
    (images / "a").rename(tmp_path / "left out")
    resume(run, overrides=["budget.steps=17"])


def test_a_range_of_values_that_was_measured_stays(tmp_path: Path) -> None:
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(24):
        np.save(images / f"{number:03d}.npy", rng.uniform(-3, 3, (8, 8)).astype(np.float32))
    run = begun(tmp_path / "images", tmp_path / "run", conditioner=ContextConfig())
    before = infos(run)[-1].value_range
    assert before is not None
    for number in range(24, 60):
        np.save(images / f"{number:03d}.npy", rng.uniform(-9, 9, (8, 8)).astype(np.float32))
    assert open_data(resolve(run)).scale.range != before
    resume(run, overrides=[SHORT], accepts_data=True)
    assert infos(run)[-1].value_range == before
    assert resolve(run).data.range == before
    resume(run, overrides=["budget.steps=17"])
    assert infos(run)[-1].value_range == before


def test_values_of_another_kind_are_refused(tmp_path: Path) -> None:
    add(tmp_path / "images", "a", range(24))
    run = begun(tmp_path / "images", tmp_path / "run", conditioner=ContextConfig())
    for path in sorted((tmp_path / "images" / "a").glob("*.png")):
        values = np.random.default_rng(int(path.stem)).uniform(-3, 3, (8, 8)).astype(np.float32)
        np.save(path.with_suffix(".npy"), values)
        path.unlink()
    with pytest.raises(DataError, match="black and white were the ends of their type"):
        resume(run, overrides=[SHORT], accepts_data=True)


def test_values_of_another_kind_are_refused_the_other_way_round(tmp_path: Path) -> None:
    images = arrays(tmp_path / "images" / "a", 3.0)
    run = begun(tmp_path / "images", tmp_path / "run", conditioner=ContextConfig())
    for path in images.glob("*.npy"):
        path.unlink()
    add(tmp_path / "images", "a", range(24))
    with pytest.raises(DataError, match="and are the ends of their type"):
        resume(run, overrides=[SHORT], accepts_data=True)


def test_a_fine_tuning_keeps_the_range_of_its_own_images(tmp_path: Path) -> None:
    """What its conditioner was built from is the base's, and says another range."""
    for name, reach in (("first", 3.0), ("second", 9.0)):
        arrays(tmp_path / name / "a", reach)
    base = begun(tmp_path / "first", tmp_path / "base", conditioner=ContextConfig())
    settings = choose_finetuning(base, str(tmp_path / "second"), ["budget.steps=2"])
    run = train(settings.resolved(["budget.steps=2"]).run, run=tmp_path / "tuned")
    before = RunDirectory(run).data_record()["value_range"]
    assert before[1] > 8 > infos(run)[-1].value_range[1]
    np.save(tmp_path / "second" / "a" / "more.npy", np.full((8, 8), 7.0, np.float32))
    resume(run, overrides=["budget.steps=4"], accepts_data=True)
    assert RunDirectory(run).data_record()["value_range"] == before


NOW = ConditioningInfo(
    channels=1,
    words=("new", "old"),
    categories=("a", "b"),
    attributes=("age", "size"),
    means=(1.0, 2.0),
    deviations=(1.0, 1.0),
    dimensions=3,
)
ATTRIBUTES = ContextConfig(attributes=AttributesConfig(size=8))


def carried(before: ConditioningInfo, conditioner: ContextConfig) -> ConditioningInfo:
    return carried_info(Run(name="changed", conditioner=conditioner), before, NOW)


@pytest.mark.parametrize(
    "conditioner",
    [
        ContextConfig(),
        ATTRIBUTES,
        ContextConfig(category=CategoryConfig(size=8), points=PointsConfig(size=8)),
        ContextConfig(text=LearnedTextConfig()),
    ],
)
def test_what_has_not_changed_is_carried_as_it_is(conditioner: ContextConfig) -> None:
    assert carried(NOW, conditioner) == NOW


def test_moments_of_attributes_stay_and_other_attributes_are_refused() -> None:
    before = replace(NOW, means=(5.0, 6.0), deviations=(2.0, 3.0))
    assert carried(before, ATTRIBUTES) == before
    assert carried(before, ContextConfig()) == NOW
    with pytest.raises(DataError, match=r"other attributes .*: size, weight"):
        carried(replace(NOW, attributes=("age", "weight")), ATTRIBUTES)


def test_points_of_other_dimensions_are_refused_where_they_are_read() -> None:
    before = replace(NOW, dimensions=6)
    assert carried(before, ContextConfig()) == NOW
    with pytest.raises(DataError, match="points have 3 dimensions, and the run began with 6"):
        carried(before, ContextConfig(points=PointsConfig(size=8)))


def test_words_that_are_no_weights_may_grow() -> None:
    before = replace(NOW, words=("old",))
    assert carried(before, ContextConfig(text=PretrainedTextConfig())).words == NOW.words
    assert carried(before, ContextConfig(text=LearnedTextConfig())).words == ("old",)


def test_another_preparation_of_unchanged_data_is_the_same(tmp_path: Path) -> None:
    for name in ("b", "c"):
        add(tmp_path / "images", name, range(100 * ord(name), 100 * ord(name) + 24))
    run = tiny_run(tmp_path / "images")
    first = prepare(run)
    fingerprint = first.dataset.fingerprint
    for accepts in (False, True):
        before = Continued(
            info=first.info, fingerprint=fingerprint, value_range=None, accepts_data=accepts
        )
        again = prepare(run, continued=before)
    assert (again.run, again.info) == (first.run, first.info)
    assert again.dataset.fingerprint == first.dataset.fingerprint


def test_a_run_that_dies_right_after_its_data_changed_is_resumed_with_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path / "images", "a", range(24))
    run = begun(tmp_path / "images", tmp_path / "run", conditioner=ContextConfig())
    add(tmp_path / "images", "a", range(24, 30))
    expected = resume(
        shutil.copytree(run, tmp_path / "whole"), overrides=[SHORT], accepts_data=True
    )
    with monkeypatch.context() as patch:
        crash_after(patch, 0)
        with pytest.raises(Crash):
            resume(run, overrides=[SHORT], accepts_data=True)
    newest = checkpoint.load(checkpoint.paths(run / "checkpoints")[0])
    assert newest.step == 14
    assert newest.state["data"] == RunDirectory(run).data_record()["fingerprint"]
    assert newest.state["plan_begins"] == 14
    assert not list((run / "checkpoints").glob("*.replaced"))
    assert not list((run / "checkpoints").glob("*.new"))
    assert fingerprint(resume(run)) == fingerprint(expected)


def test_a_range_of_other_data_than_the_checkpoints_is_not_taken(tmp_path: Path) -> None:
    arrays(tmp_path / "images" / "a", 3.0)
    run = begun(tmp_path / "images", tmp_path / "run", conditioner=ContextConfig())
    directory = RunDirectory(run)
    found = Continued.of(directory, accepts_data=True)
    assert found is not None
    record = directory.data_record()
    assert found.value_range == tuple(record["value_range"])
    for fingerprint_of, expected in ((record["fingerprint"], (0.0, 1.0)), ("x", found.value_range)):
        directory.write_json(
            "data.json", {**record, "value_range": [0, 1], "fingerprint": fingerprint_of}
        )
        again = Continued.of(directory, accepts_data=True)
        assert again is not None
        assert again.value_range == expected
