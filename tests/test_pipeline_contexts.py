"""Images follow what is asked: each context alone and with others, guidance by hand, images to
start from, and the way between two.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.diffusion import (
    Cosine,
    EmpiricalDenoiser,
    Inpaint,
    Linear,
    NoiseLevel,
    VarianceExploding,
)
from sfumato.errors import ConfigError, ShapeError
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import SampleRequest
from sfumato.observability.image_formats import FORMATS
from sfumato.sampling import SAMPLERS, KeyedNoise, grid, sample
from tests.helpers.pipelines import REQUESTS, SIDE, image, tiny_pipeline
from tests.oracles import exact

TEXT = {"prompt": "a red heart"}
BOTH = {"prompt": "a red heart", "category": "dog"}


@pytest.fixture(scope="module")
def everything() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def two() -> Pipeline:
    """WithCondition by category and text."""
    return tiny_pipeline("category", "text")


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def together(number: int = 0) -> dict[str, Any]:
    """All contexts at once."""
    return {name: value for asked in REQUESTS.values() for name, value in asked[number].items()}


def said(pipeline: Pipeline, **asked: Any) -> str:
    with pytest.raises((ConfigError, ShapeError)) as caught:
        pipeline.sample(1, **asked)
    return str(caught.value)


# --- each context ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REQUESTS)
def test_images_depend_on_the_context(name: str) -> None:
    pipeline = tiny_pipeline(name)
    nothing = pipeline.sample(2)
    one, other = (pipeline.sample(2, **asked) for asked in REQUESTS[name])
    assert apart(one, nothing) > 0.01
    assert apart(one, other) > 0.01
    assert apart(one, pipeline.sample(2, **REQUESTS[name][0])) == 0


@pytest.mark.parametrize("name", REQUESTS)
def test_together_with_others_each_context_still_matters(everything: Pipeline, name: str) -> None:
    (field,) = REQUESTS[name][1]
    changed = dict(together(), **{field: REQUESTS[name][1][field]})
    left_out = dict(together(), **{field: None})
    whole = everything.sample(2, **together())
    assert apart(everything.sample(2, **changed), whole) > 1e-3
    assert apart(everything.sample(2, **left_out), whole) > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 2.0, {"text": 3.0, "category": 1.0, "points": 0.0}])
def test_image_i_is_the_same_in_any_number_and_batch(everything: Pipeline, guidance: Any) -> None:
    asked = dict(
        together(),
        prompt=["a heart", "two cats", ""],
        doodle=image(0, count=2),
        negative="red" if guidance != 1.0 else None,
    )
    whole = everything.sample(5, **asked, guidance=guidance, seed=3)
    assert (
        apart(everything.sample(5, **asked, guidance=guidance, seed=3, batch_size=2), whole) < 1e-4
    )
    assert apart(everything.sample(2, **asked, guidance=guidance, seed=3), whole[:2]) < 1e-4
    assert min(apart(whole[i], whole[j]) for i in range(5) for j in range(i)) > 0.01


def test_short_names_for_category_and_prompt_are_laid_over_what_is_asked(two: Pipeline) -> None:
    assert torch.equal(two.sample(2, category="dog", prompt="a red heart"), two.sample(2, **BOTH))
    assert torch.equal(two.sample(2, **TEXT, category="dog"), two.sample(2, **BOTH))
    instead = {"prompt": "x", "category": "cat"}
    assert torch.equal(two.sample(2, **{**instead, **BOTH}), two.sample(2, **BOTH))


# --- guidance -------------------------------------------------------------------------------------


def by_hand(
    pipeline: Pipeline,
    weights: list[tuple[float, dict[str, Any]]],
    *,
    steps: int = 3,
    seed: int = 0,
) -> Tensor:
    """DDIM from Linear noise on a weighted sum of the guesses under several contexts, one image."""
    noise = KeyedNoise(seed)(torch.zeros(1, 1, SIDE, SIDE))
    denoiser, conditioner = pipeline.model.denoiser(), pipeline.model.conditioner
    x, times = noise, torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    with torch.no_grad():
        for now, then in pairwise(times):
            guesses = [
                (w, denoiser(x, NoiseLevel(1 - now, now), conditioner(context, 1)))
                for w, context in weights
            ]
            x0, eps = (sum(w * guess[i] for w, guess in guesses) for i in (0, 1))
            x = (1 - then) * x0 + then * eps
    return ((x + 1) / 2).clamp(0, 1)


def told(**context: Any) -> dict[str, Any]:
    named = {
        "category": lambda name: torch.tensor([("cat", "dog", "7").index(name)]),
        "text": lambda text: [text],
    }
    return {name: named[name](value) for name, value in context.items()}


NULL, C, T, N = told(), told(category="dog"), told(text="a red heart"), told(text="two")
CT = {**C, **T}


@pytest.mark.parametrize(
    ("asked", "guidance", "weights"),
    [
        (BOTH, 1.0, [(1, CT)]),
        (BOTH, 3.0, [(-2, NULL), (3, CT)]),
        (BOTH, 0.0, [(1, NULL)]),
        (TEXT, {"text": 2.5}, [(-1.5, NULL), (2.5, T)]),
        (BOTH, {"category": 2.0, "text": 4.0}, [(-1, NULL), (-2, C), (4, CT)]),
        (BOTH, {"category": 1.0, "text": 4.0}, [(-3, C), (4, CT)]),
        (BOTH, {"category": 3.0, "text": 1.0}, [(-2, NULL), (2, C), (1, CT)]),
        (BOTH, {"category": 0.0, "text": 1.0}, [(1, NULL), (-1, C), (1, CT)]),
        # the other one's is the model's own, 1
        (BOTH, {"category": 2.0}, [(-1, NULL), (1, C), (1, CT)]),
        (dict(TEXT, negative="two"), 3.0, [(-2, N), (3, T)]),
        ({"negative": "two"}, 3.0, [(-2, N), (3, NULL)]),
        ({"category": "dog", "negative": "two"}, 3.0, [(-2, N), (3, C)]),
        (dict(BOTH, negative="two"), 3.0, [(-2, N), (3, CT)]),
        (
            dict(BOTH, negative="two"),
            {"category": 2.0, "text": 4.0},
            [(-1, N), (-2, {**C, **N}), (4, CT)],
        ),
        (dict(BOTH, negative="two"), {"category": 1.0, "text": 4.0}, [(-3, {**C, **N}), (4, CT)]),
    ],
)
def test_guidance_is_the_sum_that_it_says(
    two: Pipeline, asked: dict[str, Any], guidance: Any, weights: list
) -> None:
    expected = by_hand(two, weights)
    assert expected.std() > 0.02
    assert apart(two.sample(1, **asked, guidance=guidance), expected) < 2e-4


def test_three_scales_step_from_context_to_context() -> None:
    pipeline = tiny_pipeline("category", "text", "doodle")
    asked = dict(BOTH, doodle=image(5))
    doodle = {"doodle": (2 * image(5) - 1)[None]}
    scales = {"category": 2.0, "text": 0.5, "doodle": 1.5}
    expected = by_hand(
        pipeline, [(-1, NULL), (2 - 0.5, C), (0.5 - 1.5, CT), (1.5, {**CT, **doodle})]
    )
    assert apart(pipeline.sample(1, **asked, guidance=scales), expected) < 2e-4
    expected = by_hand(pipeline, [(-2, N), (3 - 1.5, NULL), (1.5, doodle)])
    asked_less = {"negative": "two", "doodle": image(5)}
    assert (
        apart(pipeline.sample(1, **asked_less, guidance={"text": 3.0, "doodle": 1.5}), expected)
        < 2e-4
    )
    mixed = {"category": 2.0, "text": 2.0, "doodle": 1.5}
    expected = by_hand(pipeline, [(-1, NULL), (2 - 1.5, CT), (1.5, {**CT, **doodle})])
    assert apart(pipeline.sample(1, **asked, guidance=mixed), expected) < 2e-4


def test_guidance_away_from_what_training_never_saw_is_refused() -> None:
    pipeline = tiny_pipeline("category", "text")
    pipeline.model.conditioner.parts["category"].dropout = 0.0
    for scales in (2.0, {"category": 2.0, "text": 1.0}):
        with pytest.raises(
            ConfigError,
            match=r"(?s)unconditional prediction for category, but its dropout is 0, so it was never "
            r"trained.*conditioner\.category\.dropout=0\.1",
        ):
            pipeline.sample(1, **BOTH, guidance=scales)
    for scales in (1.0, {"category": 1.0, "text": 3.0}):  # which never leaves out the category
        assert pipeline.sample(1, **BOTH, guidance=scales).isfinite().all()


def test_guidance_1_is_no_guidance_and_calls_the_network_once_a_step(
    two: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    two.model.network.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    plain = two.sample(2, **BOTH)
    for guidance in (1, 1.0, {"category": 1.0, "text": 1.0}, {}):
        assert torch.equal(two.sample(2, **BOTH, guidance=guidance), plain)
    assert set(seen) == {2}
    two.sample(2, **BOTH, guidance=2.0)
    assert max(seen) == 4
    two.sample(2, **BOTH, guidance={"category": 2.0, "text": 3.0})
    assert max(seen) == 6


def test_equal_scales_are_one_number(everything: Pipeline) -> None:
    one = everything.sample(2, **together(), guidance=2.0)
    assert torch.equal(
        everything.sample(2, **together(), guidance=dict.fromkeys(REQUESTS, 2.0)), one
    )
    assert apart(everything.sample(2, **together()), one) > 0.01


def test_scales_of_contexts_that_are_not_asked_for_do_not_matter(everything: Pipeline) -> None:
    assert torch.equal(
        everything.sample(2, **TEXT, guidance={**dict.fromkeys(REQUESTS, 9.0), "text": 2.0}),
        everything.sample(2, **TEXT, guidance=2.0),
    )


def test_a_negative_prompt_changes_images_and_needs_guidance(two: Pipeline) -> None:
    plain, away = (
        two.sample(2, **TEXT, guidance=3),
        two.sample(2, **dict(TEXT, negative="two cats"), guidance=3),
    )
    assert apart(plain, away) > 0.01
    assert apart(two.sample(2, **dict(TEXT, negative=""), guidance=3), plain) < 1e-5
    for guidance in (1.0, {"text": 1.0}, {"category": 3.0, "text": 1.0}):
        assert "a negative prompt has no effect at guidance 1" in said(
            two, **dict(TEXT, negative="two"), guidance=guidance
        )


@pytest.mark.parametrize(
    "guidance", [math.nan, math.inf, {"text": math.nan}, {"txt": 2.0}, {"": 2.0}, {"doodle": 2.0}]
)
def test_guidance_of_other_names_and_numbers_is_refused(two: Pipeline, guidance: Any) -> None:
    assert "finite numbers for category, text; 1 is off" in said(two, **TEXT, guidance=guidance)


def test_an_interval_of_all_levels_is_always_and_one_of_none_is_never(two: Pipeline) -> None:
    always, never = two.sample(2, **BOTH, guidance=3.0), two.sample(2, **BOTH)
    assert torch.equal(two.sample(2, **BOTH, guidance=3.0, interval=(-math.inf, math.inf)), always)
    assert torch.equal(two.sample(2, **BOTH, guidance=3.0, interval=(50.0, 51.0)), never)
    part = two.sample(2, **BOTH, guidance=3.0, interval=(-math.inf, -3.0))
    assert min(apart(part, always), apart(part, never)) > 0.01


def test_guiding_away_from_a_worse_model(two: Pipeline) -> None:
    worse = tiny_pipeline("category", "text", seed=5).model
    plain = two.sample(2, **BOTH, guidance=2.0)
    assert apart(two.sample(2, **BOTH, guidance=2.0, autoguidance=(worse, 1.0)), plain) < 1e-5
    assert (
        apart(
            two.sample(2, **BOTH, guidance=2.0, autoguidance=(two.model, 1.7)),
            two.sample(2, **BOTH, guidance=2.0),
        )
        > 1e-3
    )
    assert apart(two.sample(2, **BOTH, autoguidance=(two.model, 1.7)), two.sample(2, **BOTH)) < 1e-4
    none = two.sample(2, **BOTH, guidance=2.0, autoguidance=(worse, 0.0))
    assert apart(none, replace(two, model=worse).sample(2, **BOTH)) < 1e-4
    away = two.sample(1, **BOTH, autoguidance=(worse, 1.5), steps=1)
    good, bad = two.sample(1, **BOTH, steps=1), replace(two, model=worse).sample(1, **BOTH, steps=1)
    inside = (away > 0) & (away < 1) & (good > 0) & (good < 1) & (bad > 0) & (bad < 1)
    assert inside.float().mean() > 0.2
    assert apart(away[inside], (bad + 1.5 * (good - bad))[inside]) < 1e-4


# --- images to start from -------------------------------------------------------------------------


def restarted(pipeline: Pipeline, strength: float, **more: Any) -> Tensor:
    return pipeline.sample(3, image=image(1, count=3), strength=strength, **more, steps=20)


def test_strength_0_returns_the_image_and_1_ignores_it(two: Pipeline) -> None:
    torch.testing.assert_close(restarted(two, 0), image(1, count=3), atol=1e-6, rtol=0)
    assert torch.equal(restarted(two, 1), two.sample(3, steps=20))


def test_the_smaller_the_strength_the_nearer_the_image(two: Pipeline) -> None:
    distances = [
        float((restarted(two, strength) - image(1, count=3)).abs().mean())
        for strength in (1e-6, 0.01, 0.1, 0.4, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 1e-4
    assert distances[1] < 0.02
    assert distances[-1] > 0.1


def test_strength_is_the_share_of_steps_and_of_the_way(two: Pipeline) -> None:
    told: list = []
    two.sample(1, image=image(1), strength=0.3, steps=20, on_step=told.append)
    assert len(told) == 6
    assert float(told[0].start.sigma) == pytest.approx(0.3)
    torch.testing.assert_close(
        told[0].before, 0.7 * (2 * image(1)[None] - 1) + 0.3 * KeyedNoise(0)(image(1)[None])
    )


def test_a_image_is_changed_towards_the_prompt(two: Pipeline) -> None:
    assert apart(restarted(two, 0.5, prompt="a red heart"), restarted(two, 0.5)) > 1e-3


# --- images to complete ---------------------------------------------------------------------------

HOLE = torch.zeros(1, SIDE, SIDE)
HOLE[:, 2:6, 1:5] = 1


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm-solver++2m", "ddpm", "churn", "unipc"])
@pytest.mark.parametrize("strength", [None, 0.6])
def test_kept_pixels_are_the_given_ones_and_others_are_made(
    two: Pipeline, sampler: str, strength: float | None
) -> None:
    given, hole = image(1, count=2), HOLE.bool().expand(2, 1, SIDE, SIDE)
    asked = {"image": given, "mask": HOLE, "strength": strength, "prompt": "a red heart"}
    made = two.sample(2, **asked, steps=5, sampler=sampler, guidance=2.0)
    torch.testing.assert_close(made[~hole], given[~hole], atol=1e-5, rtol=0)
    assert apart(made[hole], given[hole]) > 0.05
    assert (
        apart(
            made[:, :, 2:6, 1:5],
            two.sample(2, **asked, steps=5, sampler=sampler, guidance=2.0, seed=1)[:, :, 2:6, 1:5],
        )
        > 0.01
    )


def test_what_is_made_depends_on_what_is_kept(two: Pipeline) -> None:
    one, other = (two.sample(2, image=image(seed), mask=HOLE) for seed in (1, 2))
    assert apart(one[:, :, 2:6, 1:5], other[:, :, 2:6, 1:5]) > 0.01


def test_a_mask_of_everything_is_a_new_image_and_one_of_nothing_the_old(two: Pipeline) -> None:
    whole, none = (
        two.sample(2, image=image(1), mask=torch.full_like(HOLE, value)) for value in (1.0, 0.0)
    )
    assert apart(whole, two.sample(2)) < 1e-5
    torch.testing.assert_close(none, image(1).expand(2, 1, SIDE, SIDE), atol=1e-5, rtol=0)


def test_each_image_has_its_own_mask_in_any_batch(two: Pipeline) -> None:
    masks = torch.stack([HOLE, 1 - HOLE])
    asked = {"image": image(1, count=3), "mask": masks}
    whole = two.sample(5, **asked)
    assert apart(two.sample(5, **asked, batch_size=2), whole) < 1e-4
    kept = (1 - masks[torch.arange(5) % 2]).bool()
    torch.testing.assert_close(
        whole[kept], image(1, count=3)[torch.arange(5) % 3][kept], atol=1e-5, rtol=0
    )


def test_half_a_mask_blends(two: Pipeline) -> None:
    half = two.sample(1, image=image(1), mask=0.5 * torch.ones_like(HOLE), steps=1)
    new = two.sample(1, steps=1)
    inside = (new > 0) & (new < 1)
    assert apart(half[inside], ((new + image(1)[None]) / 2)[inside]) < 1e-5


def test_images_of_a_set_are_completed_from_the_set() -> None:
    """The exact denoiser of six images: the left half is kept, and the right half is mostly the one
    that belongs to it.
    """
    data = image(1, count=6, side=4) * 2 - 1
    left = torch.zeros(1, 1, 4, 4)
    left[..., :2] = 1
    noise = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    right = []
    for wanted in data:
        denoiser = Inpaint(denoiser=EmpiricalDenoiser(data), image=wanted[None], known=left)
        x = sample(SAMPLERS["ddim"], denoiser, noise, grid(Cosine(), 25))
        torch.testing.assert_close(
            x[..., :2], wanted[None, ..., :2].expand(32, 1, 4, 2), atol=1e-5, rtol=0
        )
        right += ((x - wanted).flatten(1).abs().amax(1) < 0.01).tolist()
    # by chance 1/6; never all, as what is made at first does not know of the rest yet
    assert sum(right) / len(right) > 0.6


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VarianceExploding()])
@pytest.mark.parametrize("oracle", exact.ORACLES)
def test_known_numbers_are_exact_and_others_as_if_alone(oracle: str, schedule: Any) -> None:
    denoiser, levels = exact.ORACLES[oracle], grid(schedule, 50)
    noise = (
        torch.randn(300, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        * levels.sigma[0]
    )
    wanted = torch.linspace(-1, 1, 300, dtype=torch.float64).view(300, 1, 1, 1).expand_as(noise)
    left = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    for sampler in ("ddim", "heun"):
        alone = sample(SAMPLERS[sampler], denoiser, noise, levels)
        x = sample(
            SAMPLERS[sampler], Inpaint(denoiser=denoiser, image=wanted, known=left), noise, levels
        )
        torch.testing.assert_close(x[..., 0], wanted[..., 0], atol=1e-12, rtol=0)
        torch.testing.assert_close(x[..., 1], alone[..., 1])  # independent of the known one


# --- the way from one to another ------------------------------------------------------------------

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "nothing": ({}, {}, 1.0),
    "prompts": (TEXT, {"prompt": "two cats"}, 1.0),
    "prompts, guided": (TEXT, {"prompt": "two cats"}, 3.0),
    "categories, each context guided by its own": (
        BOTH,
        {"prompt": "two cats", "category": "7"},
        {"category": 2.0, "text": 3.0},
    ),
    "from a prompt to a category": (TEXT, {"category": "cat"}, 3.0),
    "from nothing to something": ({}, BOTH, 2.0),
    "from nothing to something, each guided by its own": ({}, BOTH, {"category": 2.0, "text": 3.0}),
    "away from one thing and from another": (
        dict(TEXT, negative="two"),
        dict(TEXT, negative="cats"),
        3.0,
    ),
    "away from one thing and from nothing": (dict(TEXT, negative="two"), TEXT, 3.0),
}


@pytest.mark.parametrize("sampler", ["dpm-solver++2m", "ddpm"])
@pytest.mark.parametrize("way", WAYS)
def test_the_ends_of_a_way_are_the_images_of_the_two_requests(
    two: Pipeline, way: str, sampler: str
) -> None:
    first, last, guidance = WAYS[way]
    images = two.interpolate(
        5,
        SampleRequest.of(**first),
        SampleRequest.of(**last),
        seeds=(3, 8),
        guidance=guidance,
        sampler=sampler,
    )
    assert images.shape == (5, 1, SIDE, SIDE)
    ends = [
        two.sample(1, **asked, seed=seed, guidance=guidance, sampler=sampler)
        for asked, seed in ((first, 3), (last, 8))
    ]
    assert apart(images[:1], ends[0]) < 1e-3
    assert apart(images[-1:], ends[1]) < 1e-3


@pytest.mark.parametrize("name", REQUESTS)
def test_there_is_a_way_through_every_context(everything: Pipeline, name: str) -> None:
    first, last = REQUESTS[name]
    images = everything.interpolate(
        3, SampleRequest.of(**first), SampleRequest.of(**last), guidance=2.0
    )
    assert apart(images[:1], everything.sample(1, **first, guidance=2.0)) < 1e-3
    assert apart(images[-1:], everything.sample(1, **last, guidance=2.0)) < 1e-3
    assert images.isfinite().all()
    assert min(apart(images[0], images[1]), apart(images[1], images[2])) > 1e-4


def test_the_way_is_walked_in_small_steps(two: Pipeline) -> None:
    images = two.interpolate(
        33, SampleRequest.of(**TEXT), SampleRequest.of(prompt="two cats"), seeds=(0, 1)
    )
    steps = (images[1:] - images[:-1]).flatten(1).norm(dim=1)
    whole = (images[-1] - images[0]).norm()
    assert whole > 0.5
    assert steps.max() < whole / 5


def test_noise_on_the_way_is_as_strong_as_at_its_ends(two: Pipeline) -> None:
    told: list = []
    real = two.model.network.forward
    two.model.network.forward = lambda x, *rest: (told.append(x), real(x, *rest))[1]
    try:
        two.interpolate(
            9, SampleRequest.of(), SampleRequest.of(), seeds=(0, 6), steps=1
        )  # noises that happen to be nearly perpendicular
    finally:
        del two.model.network.forward
    spread = told[0].flatten(1).std(1)
    assert spread.min() > 0.95 * spread.max()
    assert min(apart(told[0][i], told[0][i + 1]) for i in range(8)) > 0.01


def test_guidance_on_the_way_keeps_to_its_interval(two: Pipeline) -> None:
    plain, guided = (
        two.interpolate(3, SampleRequest.of(**TEXT), SampleRequest.of(**BOTH), guidance=guidance)
        for guidance in (1.0, 3.0)
    )
    assert torch.equal(
        two.interpolate(
            3,
            SampleRequest.of(**TEXT),
            SampleRequest.of(**BOTH),
            guidance=3.0,
            interval=(50.0, 51.0),
        ),
        plain,
    )
    assert apart(plain, guided) > 0.01


def test_one_image_on_the_way_is_the_first(two: Pipeline) -> None:
    assert (
        apart(
            two.interpolate(1, SampleRequest.of(**TEXT), SampleRequest.of(**BOTH)),
            two.sample(1, **TEXT),
        )
        < 1e-5
    )


@pytest.mark.parametrize(
    ("num", "last", "words"),
    [
        (0, {}, "0 images"),
        (3, {"prompt": "a", "negative": "b"}, "a negative prompt has no effect at guidance 1"),
        (3, {"doodle": image(0)}, "this model was not trained with doodle conditioning"),
        (3, {"image": image(0), "strength": 0.5}, "interpolation starts from noise"),
        (3, {"image": image(0), "mask": HOLE}, "interpolation starts from noise"),
    ],
)
def test_a_way_that_cannot_be_walked_says_why(
    two: Pipeline, num: int, last: dict[str, Any], words: str
) -> None:
    for ends in ((TEXT, last), (last, TEXT)):
        with pytest.raises((ConfigError, ShapeError), match=words) as caught:
            two.interpolate(num, *(SampleRequest.of(**end) for end in ends))
        assert caught.value.hint


def test_generated_images_carry_their_settings(two: Pipeline, tmp_path: Path) -> None:
    made = two.generate(2, prompt="a red heart", category="dog", steps=3, seed=5)
    assert torch.equal(
        made.images, two.sample(2, prompt="a red heart", category="dog", steps=3, seed=5)
    )
    assert (
        made.settings | {"num": 2, "seed": 5, "steps": 3, "prompt": "a red heart"} == made.settings
    )
    paths = made.save(tmp_path / "out")
    assert [path.name for path in paths] == ["00000.png", "00001.png"]
    settings = FORMATS["png"].settings(paths[1])
    assert (settings["index"], settings["category"]) == (1, "dog")


@pytest.mark.parametrize("size", [(8, 8), (12, 8), (5, 7)])
def test_a_size_is_a_matter_of_the_call(two: Pipeline, size: tuple[int, int]) -> None:
    assert two.sample(2, category="dog", size=size, steps=2).shape == (2, 1, *size)
    assert torch.equal(
        two.sample(1, category="dog", size=(SIDE, SIDE)), two.sample(1, category="dog")
    )


def test_an_unknown_keyword_names_the_nearest(two: Pipeline) -> None:
    assert "did you mean 'prompt'" in said(two, promt="a red heart")
