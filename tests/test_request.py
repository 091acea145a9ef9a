"""What is asked becomes tensors for each image, or an error that says what the model reads, knows
or expects.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.conditioners import CompositeConditioner, Downsample, Grayscale
from sfumato.contexts import Truncated, Unfamiliar
from sfumato.contexts.points import MOST_POINTS
from sfumato.errors import ConfigError, SfumatoError, ShapeError
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest, SampleRequest, resolve_request
from tests.helpers.pipelines import CONFIGS, INFO, REQUESTS, SIDE, cloud, image, tiny_pipeline


@pytest.fixture(scope="module")
def everything() -> Pipeline:
    return tiny_pipeline()


def request_of(pipeline: Pipeline, num: int = 5, **asked: Any) -> ResolvedRequest:
    return resolve_request(
        SampleRequest.of(**asked),
        pipeline.model.conditioner,
        pipeline.info,
        pipeline.image_shape,
        num,
    )


def said(pipeline: Pipeline, error: type[SfumatoError] = ConfigError, **asked: Any) -> str:
    with pytest.raises(error) as caught:
        request_of(pipeline, **asked)
    assert caught.value.where == "sample"
    assert caught.value.hint
    return str(caught.value)


# --- one for all, several in turn -----------------------------------------------------------------


def test_nothing_is_asked_by_default(everything: Pipeline) -> None:
    request = request_of(everything)
    assert request.context == {}
    assert request.names == ()
    assert (request.negative, request.strength, request.known) == ({}, 1.0, None)
    assert request.start.eq(0).all()


def test_categories_by_name_or_number_are_taken_in_turn(everything: Pipeline) -> None:
    assert request_of(everything, category="dog").context["category"].tolist() == [1] * 5
    assert request_of(everything, category=["7", "cat"]).context["category"].tolist() == [
        2,
        0,
        2,
        0,
        2,
    ]
    assert request_of(everything, category=7).context["category"].tolist() == [2] * 5
    assert request_of(everything, category=("dog", 7)).context["category"].tolist() == [
        1,
        2,
        1,
        2,
        1,
    ]


def test_prompts_are_taken_in_turn(everything: Pipeline) -> None:
    assert request_of(everything, prompt="a heart").context["text"] == ["a heart"] * 5
    assert request_of(everything, prompt=["a", ""], num=3).context["text"] == ["a", "", "a"]
    assert request_of(everything, prompt=["a", "b", "c"], num=2).context["text"] == ["a", "b"]


def test_attributes_that_are_not_named_are_unknown(everything: Pipeline) -> None:
    one = request_of(everything, attributes={"asleep": 1}).context["attributes"]
    assert one.shape == (5, 2)
    assert one[:, 0].isnan().all()
    assert one[:, 1].eq(1).all()
    two = request_of(everything, attributes=[{"age": 4, "asleep": 0.5}, {"age": -1}]).context[
        "attributes"
    ]
    assert two[::2].tolist() == [[4, 0.5]] * 3
    assert two[1::2, 0].tolist() == [-1, -1]
    assert two[1::2, 1].isnan().all()


@pytest.mark.parametrize("name", ["doodle", "reference", "image"])
def test_images_are_taken_in_turn_and_stretched_from_minus_one_to_one(
    everything: Pipeline, name: str
) -> None:
    one, several = image(0), image(1, count=2)
    context = request_of(everything, **{name: one}).context[name]
    assert context.shape == (5, 1, SIDE, SIDE)
    assert all(torch.equal(shown, 2 * one - 1) for shown in context)
    context = request_of(everything, **{name: several}).context[name]
    assert all(torch.equal(context[i], 2 * several[i % 2] - 1) for i in range(5))


def test_images_of_another_size_are_resized(everything: Pipeline) -> None:
    large = image(0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    doodle = request_of(everything, doodle=large).context["doodle"][0]
    assert doodle.shape == (1, SIDE, SIDE)
    assert doodle.min() >= -1
    assert doodle.max() <= 1
    assert (doodle - (2 * image(0) - 1)).abs().mean() < 0.2
    stripes = (torch.arange(8 * SIDE) % 2).float().expand(1, 8 * SIDE, 8 * SIDE)
    # thin lines turn gray, and do not vanish
    assert request_of(everything, doodle=stripes).context["doodle"].abs().max() < 0.1
    white = request_of(everything, doodle=torch.ones(1, 3, 100)).context["doodle"]
    assert white.shape == (5, 1, SIDE, SIDE)
    torch.testing.assert_close(white, torch.ones_like(white))


def test_whole_numbers_0_and_1_are_black_and_white(everything: Pipeline) -> None:
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    mask[:, :3] = 1
    known = request_of(everything, image=image(0), mask=mask).known
    assert torch.equal(known[0], 1 - mask.float())
    known = request_of(everything, image=image(0), mask=mask.bool()).known
    assert torch.equal(known[0], 1 - mask.float())


def test_clouds_are_padded_and_taken_in_turn(everything: Pipeline) -> None:
    short, long = cloud(0, 4), cloud(1, 9)
    assert torch.equal(
        request_of(everything, points=short).context["points"], short.expand(5, 4, 2)
    )
    points = request_of(everything, points=[short, long]).context["points"]
    assert points.shape == (5, 9, 2)
    assert torch.equal(points[0, :4], short)
    assert points[0, 4:].isnan().all()
    assert torch.equal(points[3], long)
    assert torch.equal(points[4].nan_to_num(9), points[0].nan_to_num(9))
    stacked = request_of(everything, points=torch.stack([long, -long])).context["points"]
    assert torch.equal(stacked[1], -long)


def test_points_of_whole_numbers_are_points(everything: Pipeline) -> None:
    points = request_of(everything, points=[torch.tensor([[0, 1], [-1, 0]]), cloud(0, 3)]).context[
        "points"
    ]
    assert points.dtype == torch.float32
    assert points[0, :2].tolist() == [[0, 1], [-1, 0]]
    assert points[0, 2].isnan().all()


def test_everything_at_once(everything: Pipeline) -> None:
    both = {name: value for asked, _ in REQUESTS.values() for name, value in asked.items()}
    request = request_of(everything, **both, negative="two", strength=0.5, mask=image(9).round())
    assert set(request.names) == set(REQUESTS)
    assert all(len(value) == 5 for value in request.context.values())
    some = request.rows(slice(1, 3), torch.device("cpu"))
    assert len(some.start) == len(some.known) == 2
    assert all(len(value) == 2 for value in some.context.values())
    assert (some.negative, some.strength) == ({"text": ["two", "two"]}, 0.5)


def test_a_negative_prompt_alone_asks_of_the_text(everything: Pipeline) -> None:
    request = request_of(everything, negative="a heart")
    assert request.context == {}
    assert request.names == ("text",)


# --- the image to start from ----------------------------------------------------------------------


def test_a_strength_starts_from_the_image(everything: Pipeline) -> None:
    request = request_of(everything, image=image(0), strength=0.25)
    assert request.strength == 0.25
    assert torch.equal(request.start[4], 2 * image(0) - 1)


def test_a_mask_says_where_the_image_stays(everything: Pipeline) -> None:
    mask = torch.zeros(2, 1, SIDE, SIDE)
    mask[1, :, :, 4:] = 1
    request = request_of(everything, image=image(0), mask=mask)
    assert request.strength == 1
    assert torch.equal(request.known[:3], 1 - mask[[0, 1, 0]])


def test_a_model_that_fills_holes_is_shown_the_image_without_them(everything: Pipeline) -> None:
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, 2:5] = 1
    request = request_of(everything, image=image(0), mask=mask)
    shown = request.context["image"][0]
    assert torch.equal(shown.isnan(), mask.bool())
    assert torch.equal(shown[~mask.bool()], request.start[0][~mask.bool()])
    assert request.start.isfinite().all()


@pytest.mark.parametrize("lost", [Downsample(factor=4), Grayscale()])
def test_a_model_that_restores_is_shown_what_has_lost_it(lost: Any) -> None:
    request = request_of(tiny_pipeline("image", lost=lost), image=image(0))
    assert torch.equal(request.context["image"], lost.degrade_input(request.start))


def test_a_model_that_reads_no_images_is_shown_none() -> None:
    request = request_of(
        tiny_pipeline("category"), image=image(0), strength=0.5, mask=image(1).round()
    )
    assert request.context == {}


@pytest.mark.parametrize("strength", [0, 0.0, 1e-9, 1, 1.0])
def test_the_bounds_of_strength_are_strengths(everything: Pipeline, strength: float) -> None:
    assert request_of(everything, image=image(0), strength=strength).strength == strength


@pytest.mark.parametrize("strength", [-1e-9, 1.0001, math.nan, math.inf, -math.inf, 30])
def test_what_is_beyond_them_is_none(everything: Pipeline, strength: float) -> None:
    assert "strength" in said(everything, image=image(0), strength=strength)
    assert "strength" in said(tiny_pipeline("category"), image=image(0), strength=strength)


def test_a_mask_or_a_strength_needs_a_image(everything: Pipeline) -> None:
    assert "a mask or a strength without an image" in said(everything, strength=0.5)
    assert "a mask or a strength without an image" in said(everything, mask=image(0))


def test_a_image_alone_says_too_little_to_a_model_that_reads_none() -> None:
    assert "give a strength from 0 to 1 to start from it, or a mask" in said(
        tiny_pipeline("category"), image=image(0)
    )
    request_of(tiny_pipeline("image"), image=image(0))


# --- errors ---------------------------------------------------------------------------------------

UNREAD = {
    "category": "cat",
    "attributes": {"age": 1},
    "prompt": "a cat",
    "negative": "a cat",
    "doodle": image(0),
    "points": cloud(0),
    "reference": image(0),
}


@pytest.mark.parametrize("field", UNREAD)
@pytest.mark.parametrize(
    "reads", [["category", "doodle"], ["text"], ["points", "reference", "attributes"]]
)
def test_a_context_that_is_not_read_names_those_that_are(reads: list[str], field: str) -> None:
    context = {"prompt": "text", "negative": "text"}.get(field, field)
    pipeline = tiny_pipeline(*reads)
    if context in reads:
        request_of(pipeline, **{field: UNREAD[field]})
        return
    message = said(pipeline, **{field: UNREAD[field]})
    assert f"this model was not trained with {field} conditioning" in message
    assert f"it is steered by {', '.join(name for name in REQUESTS if name in reads)}" in message
    assert f"train with conditioner.{context}" in message


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"category": "dgo"}, ["no category 'dgo'", "did you mean 'dog'?", "cat, dog, 7"]),
        ({"category": ["cat", ""]}, ["no category ''"]),
        ({"category": [1]}, ["no category '1'"]),
        ({"category": []}, ["an empty list of categories"]),
        ({"attributes": {"aeg": 1}}, ["no attribute 'aeg'", "did you mean 'age'?"]),
        ({"attributes": [{"age": 1}, {"": 1}]}, ["no attribute ''"]),
        ({"attributes": {"age": math.nan}}, ["attribute age = nan"]),
        ({"attributes": {"age": -math.inf}}, ["attribute age = -inf"]),
        ({"attributes": []}, ["an empty list of attributes"]),
        ({"prompt": []}, ["an empty list of prompt"]),
        ({"points": []}, ["an empty list of point clouds"]),
    ],
)
def test_names_and_values_that_the_model_does_not_know(
    everything: Pipeline, asked: dict[str, Any], words: list[str]
) -> None:
    message = said(everything, **asked)
    assert all(word in message for word in words)


def test_no_attributes_named_asks_for_none_in_particular(everything: Pipeline) -> None:
    assert request_of(everything, attributes={}).context["attributes"].isnan().all()


WRONG_IMAGES = {
    "of two dimensions": torch.zeros(SIDE, SIDE),
    "of five dimensions": torch.zeros(1, 1, 1, SIDE, SIDE),
    "in colour": torch.zeros(3, SIDE, SIDE),
    "several in colour": torch.zeros(2, 3, SIDE, SIDE),
    "none of several": torch.zeros(0, 1, SIDE, SIDE),
    "without height": torch.zeros(1, 0, SIDE),
    "without channels": torch.zeros(0, SIDE, SIDE),
    "from 0 to 255": torch.full((1, SIDE, SIDE), 255, dtype=torch.uint8),
    "from -1": torch.full((1, SIDE, SIDE), -0.1),
    "of NaN": torch.full((1, SIDE, SIDE), math.nan),
    "of infinity": torch.full((1, SIDE, SIDE), math.inf),
}


@pytest.mark.parametrize("name", ["doodle", "reference", "image", "mask"])
@pytest.mark.parametrize("what", WRONG_IMAGES)
def test_images_of_other_shapes_and_values_are_refused(
    everything: Pipeline, name: str, what: str
) -> None:
    beside = {"image": image(0)} if name == "mask" else {}
    message = said(everything, ShapeError, **{**beside, name: WRONG_IMAGES[what]})
    assert f"a {name} " in message


WRONG_CLOUDS: dict[str, Any] = {
    "of three dimensions": torch.zeros(5, 3),
    "of one dimension": torch.zeros(5),
    "empty": torch.zeros(0, 2),
    "of NaN": torch.tensor([[0.0, math.nan]]),
    "of infinity": torch.tensor([[math.inf, 0.0]]),
    "too large": torch.zeros(MOST_POINTS + 1, 2),
    "the second of three dimensions": [torch.zeros(5, 2), torch.zeros(5, 3)],
    "the second empty": [torch.zeros(5, 2), torch.zeros(0, 2)],
    "several in several": torch.zeros(2, 2, 2, 2),
}


@pytest.mark.parametrize("what", WRONG_CLOUDS)
def test_clouds_of_other_shapes_and_values_are_refused(everything: Pipeline, what: str) -> None:
    assert "a point cloud " in said(everything, ShapeError, points=WRONG_CLOUDS[what])


def test_the_largest_cloud_is_one(everything: Pipeline) -> None:
    assert request_of(everything, points=torch.zeros(MOST_POINTS, 2), num=1).context[
        "points"
    ].shape == (1, MOST_POINTS, 2)


# --- text of all kinds ----------------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "a red heart",
    "ein rotes Herz, größer",
    "猫が寝ている",
    "قلب أحمر",
    "हृदय",
    "❤️‍🔥👩🏽‍🚀",
    "x\0y\x1b[31m\n\t\r",
    "\ud800",
    "‮evil",
    "<img src=x onerror=alert(1)>",
    "$(touch owned); '; DROP TABLE--",
    "../../etc/passwd",
    "𝕒𝕓𝕔ﬁ",
    "e" + "\u0301" * 500,
]


def condition_of(pipeline: Pipeline, text: str) -> Tensor:
    return pipeline.model.conditioner({"text": [text]}, 1).vector


@pytest.mark.filterwarnings("ignore::sfumato.contexts.PromptNote")
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_text_in_any_script_can_be_read(text: str) -> None:
    pipeline = tiny_pipeline("text")
    request = request_of(pipeline, prompt=text, negative=text)
    assert request.context["text"] == [text] * 5
    assert condition_of(pipeline, text).isfinite().all()


def test_texts_are_told_apart() -> None:
    pipeline = tiny_pipeline("text")
    conditions = [
        condition_of(pipeline, text) for text in ("", "猫", "犬", "a heart", "heart a", "ar", "ra")
    ]
    apart = [(a - b).abs().max() for i, a in enumerate(conditions) for b in conditions[:i]]
    assert min(apart) > 1e-4


@pytest.mark.parametrize(
    "asked",
    [{"prompt": "@"}, {"negative": "@"}, {"prompt": ["a heart", "@"], "negative": "a heart"}],
)
@pytest.mark.parametrize(
    "long", ["heart " * 16_667, "猫" * 100_000, "x" * 100_000], ids=["words", "cats", "one word"]
)
def test_a_text_that_is_cut_is_said_to_be_with_what_is_read(
    long: str, asked: dict[str, Any]
) -> None:
    pipeline = tiny_pipeline("text")
    mine = {
        name: long
        if text == "@"
        else [long if one == "@" else one for one in text]
        if isinstance(text, list)
        else text
        for name, text in asked.items()
    }
    with pytest.warns(Truncated) as caught:
        request_of(pipeline, **mine)
    (warning,) = [str(w.message) for w in caught if w.category is Truncated]
    assert f"a prompt has {len(long)} characters, of which the model reads the first " in warning
    assert len(warning) < 200


def test_what_is_read_of_a_cut_text_is_quoted() -> None:
    with pytest.warns(Truncated, match="'a red heart a red heart a red'"):
        request_of(tiny_pipeline("text"), prompt="a red heart " * 9)


def test_nothing_is_said_of_a_text_that_fits() -> None:
    pipeline = tiny_pipeline("text")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for text in ("", "a red heart", "a red heart, two cats", "  a   heart  "):
            request_of(pipeline, prompt=text, negative=text)
    assert said == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"prompt": "a red guitar"},
            'the training captions never contained: "guitar"; it is encoded as bytes',
        ),
        (
            {"prompt": ["a red guitar", "two owls"], "negative": "owls"},
            '"guitar", "owls"; they are encoded as bytes',
        ),
        ({"prompt": "红猫"}, '"红", "猫"; they are'),
        ({"prompt": "a \u202e \x1b"}, r'"\u202e", "\x1b"; they are'),
        ({"prompt": "y" * 7}, '"yyyyyyy"; it is'),
    ],
)
def test_words_that_no_caption_contained_are_named(asked: dict[str, Any], said: str) -> None:
    with pytest.warns(Unfamiliar) as caught:
        request_of(tiny_pipeline("text"), **asked)
    assert said in str(caught[0].message)


def test_of_many_unknown_words_ten_are_named() -> None:
    run = replace(CONFIGS["text"], length=60)
    part = run.build(INFO.words, None)
    with pytest.warns(Unfamiliar, match='"j" and 2 more; they are encoded'):
        resolve_request(
            SampleRequest.of(prompt="b c d e f g h i k j l m"),
            CompositeConditioner({"text": part}),
            INFO,
            (1, 8, 8),
            1,
        )


def test_a_model_that_never_learned_letters_says_so() -> None:
    part = replace(CONFIGS["text"], spelled=0.0).build(INFO.words, None)
    with pytest.warns(
        Unfamiliar,
        match=r"encoded as bytes, which this model was not trained on "
        r"\(conditioner\.text\.spelled=0\)$",
    ):
        resolve_request(
            SampleRequest.of(prompt="a guitar"),
            CompositeConditioner({"text": part}),
            INFO,
            (1, 8, 8),
            1,
        )


def test_the_facts_above_are_what_the_model_knows(everything: Pipeline) -> None:
    assert everything.info == INFO
    assert set(everything.reads) == set(REQUESTS)
