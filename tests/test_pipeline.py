"""A pipeline's images depend on what is asked for and on nothing else."""

import pytest
import torch

from sfumato.autoencoders import Pixels
from sfumato.conditioners import ConditioningInfo
from sfumato.errors import ConfigError, ScheduleError, ShapeError
from sfumato.generation.pipeline import Pipeline, to_unit
from sfumato.recipes import resolve
from sfumato.runs.preparation import build_model
from sfumato.sampling import DDIM, SAMPLERS, KeyedNoise


def made(*overrides: str, categories: tuple[str, ...] = ("0", "1", "two words", "10")) -> Pipeline:
    """A model of digits' shape whose weights are random, so that everything it is told shows."""
    run = resolve(
        "digits",
        [
            "network.channels=32",
            "network.multipliers=[1]",
            "network.attention_depths=[]",
            *overrides,
        ],
    )
    info = ConditioningInfo(channels=1, categories=categories)
    model = build_model(run, info).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Pipeline(
        model=model,
        autoencoder=Pixels(1),
        sampling=run.sampling,
        info=info,
        image_shape=(1, 8, 8),
    )


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return made()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("dpm-solver++2m", "Linear"),
        ("ddpm", "Linear"),
        ("dpm-solver++2m-sde", "Cosine"),
        ("churn", "Karras"),
    ],
)
def test_image_i_is_the_same_in_any_number_and_batch(sampler: str, schedule: str) -> None:
    pipeline = made(f"sampling.schedule={schedule}")
    asked = {
        "category": ["0", "10", "1"],
        "seed": 4,
        "steps": 4,
        "sampler": sampler,
        "guidance": 1.5,
    }
    whole = pipeline.sample(7, **asked)
    assert apart(pipeline.sample(3, **asked), whole[:3]) < 1e-4
    for batch_size in (1, 3, 7):
        assert apart(pipeline.sample(7, batch_size=batch_size, **asked), whole) < 1e-4
    assert min(apart(whole[i], whole[j]) for i in range(7) for j in range(i)) > 0.05


def test_the_seed_decides_and_nothing_global_does(pipeline: Pipeline) -> None:
    torch.manual_seed(1)
    first = pipeline.sample(2, seed=3, steps=3, sampler="ddpm")
    state = torch.get_rng_state()
    assert torch.equal(pipeline.sample(2, seed=3, steps=3, sampler="ddpm"), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert apart(pipeline.sample(2, seed=4, steps=3, sampler="ddpm"), first) > 0.05


def test_images_are_what_the_pipeline_says(pipeline: Pipeline) -> None:
    images = pipeline.sample(3, steps=2)
    assert images.shape == (3, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_categories_are_taken_in_turn_by_name_or_number(pipeline: Pipeline) -> None:
    turned = pipeline.sample(5, category=["10", "two words"], steps=2)
    tens, words = (
        pipeline.sample(5, category=10, steps=2),
        pipeline.sample(5, category="two words", steps=2),
    )
    assert apart(turned[::2], tens[::2]) < 1e-4
    assert apart(turned[1::2], words[1::2]) < 1e-4
    assert apart(tens, words) > 0.005


def test_no_category_asks_for_nothing_and_guidance_has_nothing_to_amplify(
    pipeline: Pipeline,
) -> None:
    nothing = pipeline.sample(2, steps=2)
    assert torch.equal(pipeline.sample(2, steps=2, guidance=5.0), nothing)
    assert all(
        apart(pipeline.sample(2, category=name, steps=2), nothing) > 0.01
        for name in pipeline.categories
    )


def test_guidance_moves_the_image_away_from_asking_for_nothing(pipeline: Pipeline) -> None:
    nothing = pipeline.sample(4, steps=1)
    plain, strong, none = (
        pipeline.sample(4, category="1", steps=1, guidance=scale) for scale in (1.0, 3.0, 0.0)
    )
    assert apart(none, nothing) < 1e-4
    assert apart(strong, plain) > 0.02
    inside = (strong > 0) & (strong < 1) & (plain > 0) & (plain < 1) & (nothing > 0) & (nothing < 1)
    extrapolated = nothing + 3 * (plain - nothing)  # one step is linear in the prediction
    assert inside.double().mean() > 0.2
    assert float((strong - extrapolated)[inside].abs().max()) < 1e-3


def test_the_default_settings_are_the_models_own() -> None:
    pipeline = made("sampling.sampler=DDIM", "sampling.steps=3", "sampling.guidance=2.0")
    asked = pipeline.sample(2, category="0", sampler=DDIM(), steps=3, guidance=2.0)
    assert torch.equal(pipeline.sample(2, category="0"), asked)
    assert apart(pipeline.sample(2, category="0", steps=2), asked) > 1e-3


def test_steps_are_told_from_noise_to_image(pipeline: Pipeline) -> None:
    told = []
    images = pipeline.sample(3, steps=4, batch_size=2, on_step=told.append)
    assert [(progress.step, progress.steps, len(progress.x)) for progress in told] == [
        *((step, 4, 2) for step in range(1, 5)),
        *((step, 4, 1) for step in range(1, 5)),
    ]
    assert torch.equal(told[0].before, KeyedNoise(0)(torch.empty(2, 1, 8, 8)))
    assert torch.equal(to_unit(told[3].x), images[:2])
    assert told[3].level.sigma == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_named(pipeline: Pipeline, name: str) -> None:
    images = pipeline.sample(1, steps=3, sampler=name)
    assert torch.isfinite(images).all()
    assert torch.equal(images, pipeline.sample(1, steps=3, sampler=SAMPLERS[name]))


def said(pipeline: Pipeline, error: type[Exception], **asked: object) -> str:
    with pytest.raises(error) as caught:
        pipeline.sample(**{"num": 1, "steps": 1, **asked})
    return str(caught.value)


def test_an_unknown_category_names_the_nearest(pipeline: Pipeline) -> None:
    assert said(pipeline, ConfigError, category="two wrods") == (
        "sample: no category 'two wrods'\n  hint: did you mean 'two words'? the model knows 0, "
        "1, two words, 10"
    )
    assert "no category '7'" in said(pipeline, ConfigError, category=["0", 7])
    assert "no category ''" in said(pipeline, ConfigError, category="")


def test_a_model_without_categories_says_so() -> None:
    pipeline = made("conditioner.category=null", categories=())
    assert pipeline.sample(2, steps=2).shape == (2, 1, 8, 8)
    assert "it is steered by nothing; train with conditioner.category to change that" in said(
        pipeline, ConfigError, category="1"
    )


def test_an_unknown_sampler_names_the_nearest(pipeline: Pipeline) -> None:
    assert said(pipeline, ConfigError, sampler="huen").startswith(
        "sample: unknown sampler 'huen'\n  hint: did you mean 'heun'? there are ddim, ddpm, euler, "
    )


@pytest.mark.parametrize(
    ("asked", "error"),
    [({"num": 0}, ShapeError), ({"batch_size": 0}, ShapeError), ({"steps": 0}, ScheduleError)],
)
def test_nothing_to_do_is_refused(
    pipeline: Pipeline, asked: dict[str, int], error: type[Exception]
) -> None:
    assert "hint: " in said(pipeline, error, **asked)


def test_an_interval_from_high_to_low_is_refused(pipeline: Pipeline) -> None:
    assert "name the lower one first" in said(
        pipeline, ConfigError, category="1", guidance=2.0, interval=(5.0, 1.0)
    )


@pytest.mark.parametrize(
    "schedule", ["Linear", "scaled-linear", "linear-betas", "karras", "uniform-log-snr"]
)
def test_noise_to_start_from_has_the_deviation_of_noisy_data_at_its_level(schedule: str) -> None:
    model = made(f"sampling.schedule={schedule}", "denoiser.input_scale.sigma_data=0.5")
    first = []
    model.sample(64, steps=2, sampler="ddim", on_step=lambda info: first.append(info))
    level = first[0].start
    expected = torch.hypot(0.5 * level.alpha, level.sigma) * KeyedNoise(0)(first[0].before)
    assert torch.allclose(first[0].before, expected.to(torch.float32), rtol=1e-6)
