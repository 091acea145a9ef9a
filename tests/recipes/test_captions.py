"""Captions of a set: when they steer a model, how much of them it reads, and that what is cut off
is said.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato import config as configuration
from sfumato.conditioners import LearnedTextConfig, WordTokenizer
from sfumato.conditioners.tokenizer import ByRuns, ByScript
from sfumato.contexts import ContextConfig
from sfumato.data import DataConfig, Entry, Folder
from sfumato.data.listing import Inline
from sfumato.recipes import Run, recipe, resolve
from sfumato.recipes.caption_statistics import (
    CaptionSurvey,
    Truncation,
    build_tokenizer,
    fitting_length,
)
from sfumato.runs import train
from sfumato.runs.preparation import text_encoder

LONG = "an object on a wooden table in front of a plain wall with soft light from the left showing a"  # 20 words


def survey(images: int, captions: list[str]) -> CaptionSurvey:
    blob = Inline(b"")
    texts = [(text,) for text in captions] + [()] * (images - len(captions))
    return CaptionSurvey.of(
        [
            Entry(name=f"{number}.png", image=blob, captions=text)
            for number, text in enumerate(texts)
        ]
    )


def things(count: int) -> list[str]:
    return [f"thing number {number}" for number in range(count)]


@pytest.mark.parametrize(
    ("images", "captions", "used", "said"),
    [
        (20, things(9), True, "45% of the images (9 of 20) have captions: steered by text"),
        (100_000, things(8), True, "(8 of 100000) have captions: steered by text"),
        (4, things(3), True, "75% of the images (3 of 4)"),
        (20, things(20), True, "100% of the images (20 of 20)"),
        (
            20,
            things(7),
            False,
            "35% of the images (7 of 20) have captions: the text is not used, since fewer than 8",
        ),
        (20, ["the same"] * 20, False, "the text is not used, since all of them are the same"),
        (20, [f"IMG_{number}" for number in range(20)], False, ""),
        (20, [], False, ""),
    ],
)
def test_captions_are_used_where_enough_images_have_different_ones_and_the_fraction_is_said(
    images: int, captions: list[str], used: bool, said: str
) -> None:
    found = survey(images, captions)
    assert found.usable == used == (found.text is not None)
    assert said in "".join(found.reasons)
    assert bool(found.reasons) == bool(said)
    assert ("without a caption" in "".join(found.reasons)) == (used and len(captions) < images)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=60))
def test_the_length_holds_95_percent_of_captions_and_one_spelled_word(counts: list[int]) -> None:
    captions = [" ".join(["red"] * count) for count in counts]
    length = fitting_length(captions)
    words = WordTokenizer.fit(captions, most=20_000)
    assert length % 8 == 0
    assert 16 <= length <= 128
    if length < 128:
        assert sum(words.count(text) + 7 <= length for text in captions) >= 0.95 * len(captions)
    if length > 16:
        assert sum(words.count(text) + 7 <= length - 8 for text in captions) < 0.95 * len(captions)


def test_the_length_counts_letters_where_a_script_has_no_spaces() -> None:
    assert fitting_length(["红" * 20]) == 32  # START, 20, and room for 7
    assert fitting_length([]) == 16


@pytest.mark.parametrize(
    ("length", "cut", "collisions"),
    # START, 20 words, the animal; 21: "... a" itself is whole, and reads like both
    [(21, 2, 3), (22, 0, 0), (2, 4, 4)],
)
def test_captions_that_are_cut_and_that_differ_only_there_are_counted(
    length: int, cut: int, collisions: int
) -> None:
    captions = [f"{LONG} cat", f"{LONG} dog", LONG, "an apple", f"{LONG.upper()}  Cat"]
    part: Any = LearnedTextConfig(length=length).build(LearnedTextConfig().words(captions), None)
    found = Truncation.of(captions, part)
    assert (found.different, found.truncated, found.collisions) == (4, cut, collisions)
    said = "\n".join(found.lines)
    assert (
        f"{cut} of 4 distinct captions are truncated, since the model reads {length} tokens" in said
    ) == (cut > 0)
    assert (f"warning: {collisions} captions are equal after truncation" in said) == (
        collisions > 0
    )
    assert ("none of 4 distinct captions is truncated" in said) == (cut == 0)


# --- by the commands ------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Twelve images whose captions differ in their last word."""
    root = tmp_path / "set"
    root.mkdir()
    for number in range(12):
        values = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        (root / f"{number}.png").write_bytes(buffer.getvalue())
        (root / f"{number}.txt").write_text(f"{LONG} {('cat', 'dog')[number % 2]}")
    return root


@pytest.mark.parametrize(
    ("length", "said"),
    [
        ("16", "captions: 2 of 2 distinct captions are truncated, since the model reads 16 tokens"),
        ("32", "none of 2"),
    ],
)
def test_train_says_how_many_captions_are_cut(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    length: str,
    said: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sfumato.training.Trainer.run", lambda self, **_: True)
    run = Run(
        name="x",
        data=DataConfig(source=Folder(str(place)), resolution=8, cache="off"),
        conditioner=ContextConfig(text=LearnedTextConfig(length=int(length))),
    )
    train(run, run=tmp_path / "run")
    output = "".join(capsys.readouterr())
    assert said in output
    assert ("warning: 2 captions are equal after truncation" in output) == (length == "16")


def test_what_would_read_a_set_is_what_the_run_reads_with(place: Path) -> None:
    captions = [path.read_text() for path in sorted(place.glob("*.txt"))]
    run = resolve(str(place))
    assert run.conditioner.text is not None
    assert build_tokenizer(run, captions, text_encoder).length == run.conditioner.text.length == 32
    silent = resolve(run, ["conditioner.text=null"])
    assert build_tokenizer(silent, captions, text_encoder).length == 32
    assert (
        build_tokenizer(resolve(run, ["conditioner.text.length=9"]), captions, text_encoder).length
        == 9
    )


# --- runs made before -----------------------------------------------------------------------------


def test_a_run_made_before_reads_as_it_did_and_a_new_one_as_new_ones_do(tmp_path: Path) -> None:
    """Absent keys of a run's own configuration mean what the run did; those of a person's file mean
    the defaults.
    """
    plain = configuration.plain(recipe("emoji-text"))
    assert plain["conditioner"]["text"].pop("splitting") == {"kind": "by-script"}
    assert plain["conditioner"]["text"].pop("spelled") == 0.02
    written = configuration.dump_yaml(plain)
    (tmp_path / "run").mkdir()
    for file in (tmp_path / "run" / "config.yaml", tmp_path / "mine.yaml"):
        file.write_text(written)
    before, new = (
        resolve(tmp_path / "run").conditioner.text,
        resolve(tmp_path / "mine.yaml").conditioner.text,
    )
    assert isinstance(before, LearnedTextConfig)
    assert isinstance(new, LearnedTextConfig)
    assert (before.spelled, before.splitting) == (0.0, ByRuns())
    assert (new.spelled, new.splitting) == (0.02, ByScript())
    assert (
        resolve(tmp_path / "run", ["conditioner.text.spelled=0.1"]).conditioner.text.spelled == 0.1
    )  # what is set wins


@pytest.mark.parametrize("text", [None, {"kind": "pretrained"}])
def test_other_parts_of_a_run_made_before_are_left_as_they_are(text: Any) -> None:
    plain = configuration.plain(recipe("digits"))
    plain["conditioner"]["text"] = text
    assert configuration.fill_former_defaults(Run, plain) == plain
    assert configuration.fill_former_defaults(Run, "damaged") == "damaged"
