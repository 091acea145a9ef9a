"""`sfumato compare` draws the same noise in each row, and says what each row costs."""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.autoencoders import Pixels
from sfumato.conditioners import ConditioningInfo
from sfumato.generation.pipeline import Pipeline
from sfumato.observability.images import GAP, to_uint8
from sfumato.recipes import resolve
from sfumato.runs.preparation import build_model
from sfumato.sampling import SAMPLERS
from tests.helpers.cli import Result, sfumato

TILE = 56


def made(source: str, info: ConditioningInfo) -> Pipeline:
    """A model whose weights are random, so that everything it is told shows."""
    settings = resolve(
        source, ["network.channels=32", "network.multipliers=[1]", "network.attention_depths=[]"]
    )
    model = build_model(settings, info).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Pipeline(
        model=model,
        autoencoder=Pixels(1),
        sampling=settings.sampling,
        info=info,
        image_shape=(1, 8, 8),
    )


MODELS = {
    "digits": made("digits", ConditioningInfo(channels=1, categories=tuple("0123456789"))),
    "ddpm": made("ddpm", ConditioningInfo(channels=1)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`digits` is steered by category, `ddpm` by nothing; both are loaded from memory."""
    with mock.patch("sfumato.runs.loading.load", lambda path: MODELS[path.name]):
        yield tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(runs: Path) -> Path:
    return runs / "digits"


@pytest.fixture(scope="module")
def unsteered(runs: Path) -> Path:
    return runs / "ddpm"


@pytest.fixture(scope="module")
def compared(run: Path) -> dict:
    """Two samplers and two scales, as JSON."""
    result = sfumato(
        "compare",
        run,
        "--sampler",
        "ddim:4",
        "--sampler",
        "heun:3",
        "--guidance",
        1,
        "--guidance",
        2,
        "--num",
        3,
        "--seed",
        5,
        "--category",
        "7",
        "--category",
        "2",
        "--json",
    )
    assert result.code == 0, result.err
    return json.loads(result.out)


HOW = [("ddim", 4, 1.0), ("ddim", 4, 2.0), ("heun", 3, 1.0), ("heun", 3, 2.0)]


def test_there_is_a_row_for_each_sampler_and_scale(compared: dict) -> None:
    assert [(row["sampler"], row["steps"], row["guidance"]) for row in compared["rows"]] == HOW


def test_calls_count_each_stage_of_a_solver_and_guidance_twice(compared: dict) -> None:
    """Heun calls the network twice a step, but for the step onto clean data."""
    assert [row["calls"] for row in compared["rows"]] == [4, 8, 5, 10]
    assert all(row["seconds"] > 0 for row in compared["rows"])


def test_rows_are_what_the_pipeline_samples_and_differences_are_to_the_first(
    compared: dict,
) -> None:
    pipeline = MODELS["digits"]
    rows = [
        pipeline.sample(
            3, category=["7", "2"], seed=5, sampler=sampler, steps=steps, guidance=guidance
        )
        for sampler, steps, guidance in HOW
    ]
    differences = [float((row - rows[0]).abs().mean()) for row in rows]
    assert differences[1] > 0
    assert [row["difference"] for row in compared["rows"]] == pytest.approx(differences, abs=1e-6)
    sheet = np.asarray(Image.open(compared["figure"])).astype(int)
    left, top = sheet.shape[1] - 3 * (TILE + GAP), sheet.shape[0] - 4 * (TILE + GAP)
    for number, image in enumerate(torch.cat(rows)):
        y, x = top + number // 3 * (TILE + GAP), left + number % 3 * (TILE + GAP)
        expected = to_uint8(image[None])[0].repeat(7, 0).repeat(7, 1).astype(int)
        assert np.abs(sheet[y : y + TILE, x : x + TILE] - expected).max() <= 1


def test_a_figure_is_replaced_by_the_same_comparison_only(run: Path, tmp_path: Path) -> None:
    def figure(*options: object) -> Path:
        return Path(
            sfumato(
                "compare", run, "--sampler", "ddim:1", "--num", 1, "--seed", 8, *options
            ).out.splitlines()[-1]
        )

    first = figure()
    assert first == run / "compared" / "seed-8.png"
    assert figure() == first
    assert figure("--guidance", 3) == run / "compared" / "seed-8-2.png"
    out = tmp_path / "mine.png"
    Image.new("RGB", (2, 2)).save(out)
    before = out.read_bytes()
    result = sfumato("compare", run, "--sampler", "ddim:1", "--out", out)
    assert result.code == 2
    assert f"{out}: another file exists there" in result.err
    assert out.read_bytes() == before


def test_a_table_names_the_reference_and_ends_in_the_path(run: Path) -> None:
    lines = sfumato(
        "compare", run, "--sampler", "ddim", "--sampler", "ddpm", "--steps", 2, "--num", 1
    ).out.splitlines()
    assert lines[0].split()[:3] == ["sampler", "steps", "guidance"]
    assert lines[1].split()[:4] == ["ddim", "2", "1.3", "4"]
    assert lines[1].endswith("reference")
    assert lines[2].split()[:2] == ["ddpm", "2"]
    assert lines[3] == f"{run}/compared/seed-0.png"


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ("dim:20", "did you mean 'ddim'?"),
        ("ddim:0", "must be 1 or more"),
        ("ddim:", "must be 1 or more"),
        ("ddim:ten", "must be 1 or more"),
        ("ddim:-3", "must be 1 or more"),
        ("", "unknown sampler ''"),
    ],
)
def test_a_sampler_that_does_not_exist_is_refused_before_anything_is_loaded(
    sampler: str, said: str
) -> None:
    result = sfumato("compare", "no-such-run", "--sampler", sampler)
    assert result.code == 2
    assert said in " ".join(result.err.split())


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_compared_where_the_schedule_is_discrete(
    unsteered: Path, name: str
) -> None:
    result = sfumato("compare", unsteered, "--sampler", f"{name}:2", "--num", 1, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["rows"][0]["sampler"] == name


def refusal(result: Result) -> str:
    """The message of a command that exits with 2."""
    return " ".join(result.err.split()) if result.code == 2 else f"exit {result.code}"


def test_guidance_that_has_no_effect_is_refused(unsteered: Path) -> None:
    assert "guidance has no effect without a condition" in refusal(
        sfumato("compare", unsteered, "--guidance", 2)
    )


def test_categories_that_do_not_fit_or_do_not_exist_are_refused(run: Path) -> None:
    two = sfumato("compare", run, "--num", 1, "--category", 1, "--category", 2)
    assert "do not fit into rows of 1" in refusal(two)
    assert "no category 'x'" in refusal(sfumato("compare", run, "--num", 1, "--category", "x"))
    assert "this model was not trained with prompt conditioning" in refusal(
        sfumato("compare", run, "--prompt", "a cat")
    )
