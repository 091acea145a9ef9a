"""Figures of adherence on makers that follow, ignore or copy, of whom one knows what must come
out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import stats
from torch import Tensor

from sfumato.conditioners import ConditioningInfo, DoodleConfig, LearnedTextConfig, PointsConfig
from sfumato.contexts import ContextConfig
from sfumato.contexts.adherence_metrics import chamfer, line_f1, line_mask, silhouette_iou
from sfumato.data import DataConfig, Dataset, Folder, index, to_float
from sfumato.evaluation import composition, measure_adherence
from sfumato.evaluation.adherence import _adherence, retrieval_rank
from sfumato.evaluation.composition import overlap
from sfumato.evaluation.figures import Estimate
from sfumato.generation.request import ResolvedRequest

SIDE = 32
COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 60, 200),
    "yellow": (230, 210, 40),
}
SHAPES = ("square", "disc", "bar")


def paint(colour: str, shape: str, rng: np.random.Generator) -> Image.Image:
    """Somewhere on white, larger or smaller."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    half = rng.uniform(4, 9)
    wide, tall = {"square": (half, half), "disc": (half, half), "bar": (half / 2, half * 1.2)}[
        shape
    ]
    x, y = rng.uniform(wide + 1, SIDE - 2 - wide), rng.uniform(tall + 1, SIDE - 2 - tall)
    box = (x - wide, y - tall, x + wide, y + tall)
    (pen.ellipse if shape == "disc" else pen.rectangle)(box, fill=COLOURS[colour], outline="black")
    return image


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Coloured shapes with captions, outlines as points and doodles; blue squares and red discs are
    held out.
    """
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for colour in COLOURS:
        for shape in SHAPES:
            for number in range(9):
                name = f"{colour}-{shape}-{number}"
                image = paint(colour, shape, rng)
                image.save(root / f"{name}.png")
                held = (colour, shape) in (("blue", "square"), ("red", "disc"))
                (root / f"{name}.json").write_text(
                    json.dumps(
                        {"caption": f"a {colour} {shape}", **({"holdout": "pairs"} if held else {})}
                    )
                )
                gray = np.asarray(image.convert("L"))
                Image.fromarray(np.where(gray < 20, 0, 255).astype(np.uint8)).save(
                    root / f"{name}.doodle.png"
                )
                y, x = np.nonzero(gray < 20)
                points = np.stack([(x + 0.5) / SIDE * 2 - 1, 1 - (y + 0.5) / SIDE * 2], axis=1)
                np.save(root / f"{name}.points.npy", points.astype(np.float32))
    config = DataConfig(source=Folder(str(root)), resolution=SIDE, holdout=0.3, cache="off")
    return index(config, annotations=("text", "doodle", "points"))


class Maker:
    """A pipeline whose images come from `make`, of the context asked for."""

    def __init__(self, make: Any) -> None:
        context = ContextConfig(
            text=LearnedTextConfig(size=8, heads=2),
            doodle=DoodleConfig(),
            points=PointsConfig(size=8, heads=2),
        )
        info = ConditioningInfo(channels=3, words=("a",), dimensions=2)
        conditioner = context.build(info, encoder=lambda config: pytest.fail("no encoder"))
        self.model, self.make = SimpleNamespace(conditioner=conditioner), make
        self.reads, self.image_shape = tuple(conditioner.parts), (3, SIDE, SIDE)

    def sample(self, num: int, *, prompt: list[str], **settings: Any) -> Tensor:
        return (self.make({"text": prompt}, num) + 1) / 2

    def sample_request(self, request: ResolvedRequest, **settings: Any) -> Tensor:
        return (self.make(request.context, len(request.start)) + 1) / 2


def real_of(dataset: Dataset, positions: Any) -> Tensor:
    return to_float(dataset.images(np.asarray(positions))[0])


def test_a_figure_has_the_interval_of_a_mean() -> None:
    values = torch.tensor([0.25, 0.75] * 50 + [math.nan])
    figure = Estimate.of(values)
    assert figure.mean == pytest.approx(0.5)
    assert figure.high - figure.mean == pytest.approx(1.98422 * 0.25126 / 10, abs=1e-5)


def test_the_own_image_ranks_first_and_chance_is_a_half() -> None:
    torch.manual_seed(0)
    real = torch.rand(200, 3, 16, 16)
    own = torch.arange(200)
    assert retrieval_rank(real, real, own).tolist() == [1.0] * 200
    assert retrieval_rank(torch.rand(200, 3, 16, 16), real, own).mean() == pytest.approx(
        0.5, abs=0.07
    )
    assert retrieval_rank(
        real[:1].expand(200, -1, -1, -1), real[:1].expand(200, -1, -1, -1), own
    ).mean() == pytest.approx(0.5)


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_samples_follow_by_the_paired_difference(better: str) -> None:
    """Images differ far more than conditions do, so that the two intervals overlap."""
    generator, sign = np.random.default_rng(0), 1 if better == "higher" else -1
    images = torch.tensor(generator.normal(0, 1, 12))
    gain = torch.tensor(generator.normal(0.3, 0.1, 12)) * sign

    def metric(images: Tensor, condition: Tensor) -> Tensor:
        return images + gain * (condition == torch.arange(12))

    row = _adherence("text", "a metric", better, metric, images, images)
    assert row.own.low < row.shuffled.high
    assert row.shuffled.low < row.own.high
    expected = stats.ttest_1samp(gain, 0).confidence_interval(0.95)
    assert (row.difference.low, row.difference.high) == pytest.approx(expected, rel=1e-6)
    assert row.works
    assert not _adherence("text", "a metric", better, lambda x, i: x, images, images).works


def test_a_drawings_lines_are_found_in_the_image_that_it_was_drawn_from(dataset: Dataset) -> None:
    chosen = dataset.training[:40]
    real, ink = real_of(dataset, chosen), (1 - dataset.context(chosen)["doodle"]) / 2
    assert line_f1(real, ink).min() > 0.75  # a line has two edges
    assert line_f1(torch.ones_like(real), ink).max() < 0.05
    assert line_f1(real, ink.flip(0)).mean() < 0.75


def test_chamfer_is_a_distance_in_pixels(dataset: Dataset) -> None:
    chosen = dataset.training[:30]
    real, points = real_of(dataset, chosen), dataset.context(chosen)["points"]
    own = chamfer(real, points)
    assert own.max() < 1.2
    moved = chamfer(real, points + torch.tensor([6 * 2 / SIDE, 0.0]))
    assert (moved > own + 1).all()
    assert chamfer(torch.ones_like(real), points).tolist() == [SIDE] * 30
    assert chamfer(real, torch.full_like(points, math.nan)).isnan().all()


def test_silhouettes_overlap_as_areas_do() -> None:
    def square(left: int) -> Tensor:
        image = torch.ones(1, 3, 32, 32)
        image[..., 8:24, left : left + 16] = -1
        return image

    assert silhouette_iou(square(4), square(4)).item() == 1
    assert silhouette_iou(square(4), square(12)).item() == pytest.approx(8 / 24)
    assert silhouette_iou(square(4), torch.ones(1, 3, 32, 32)).item() == 0
    assert line_mask(torch.ones(2, 3, 16, 16)).sum() == 0


def follows(dataset: Dataset) -> Any:
    """Shows the real image of the context, whichever part of it is given."""
    every = np.arange(len(dataset.entries))
    known = dataset.context(every)
    images = real_of(dataset, every)

    def one(context: Any, i: int) -> Tensor:
        if "doodle" in context:
            return images[(known["doodle"] - context["doodle"][i]).abs().flatten(1).sum(1).argmin()]
        if "points" in context:
            alike = [_far(context["points"][i], cloud) for cloud in known["points"]]
            return images[int(np.argmin(alike))]
        return images[known["text"].index(context["text"][i])]

    return lambda context, num: torch.stack([one(context, i) for i in range(num)])


def _far(thin: Tensor, cloud: Tensor) -> float:
    thin, cloud = (x[~x.isnan().any(1)] for x in (thin, cloud))
    return float(torch.cdist(thin, cloud).amin(1).sum()) + abs(float(thin.mean() - cloud.mean()))


def test_who_follows_is_told_from_who_does_not(dataset: Dataset) -> None:
    rows = measure_adherence(Maker(follows(dataset)), dataset, classifier=None, num=40)
    assert {row.context for row in rows} == {"text", "doodle", "points", "all"}
    assert {row.figure for row in rows} >= {
        "rank of its own image",
        "F1 of lines",
        "chamfer distance, pixels",
        "IoU of silhouettes",
    }
    listened = [row for row in rows if row.context == "doodle"]
    assert all(row.works for row in listened), [
        (row.context, row.figure, row.own, row.shuffled) for row in listened
    ]
    assert all(
        row.real.mean >= row.own.mean - 1e-6
        for row in rows
        if row.figure == "rank of its own image"
    )

    torch.manual_seed(0)
    deaf = measure_adherence(
        Maker(lambda context, num: torch.rand(num, 3, SIDE, SIDE) * 2 - 1),
        dataset,
        classifier=None,
        num=40,
    )
    assert not any(row.works for row in deaf)


def test_composition_tells_composing_from_copying(dataset: Dataset) -> None:
    held = dataset.named_holdouts["pairs"]
    assert {dataset.entries[i].captions[0] for i in held} == {"a blue square", "a red disc"}
    model, copyist, shuffled, real = composition(Maker(follows(dataset)), dataset, held)
    assert (model.own.mean, real.own.mean, copyist.own.mean) == (1, 1, 0)
    assert model.words.mean == 1 > copyist.words.mean > 0.4
    assert real.distance.mean == 0
    assert shuffled.own.mean < 0.6

    known = [i for i in dataset.training if dataset.entries[i].captions[0] == "a blue disc"]
    remembers = Maker(lambda context, num: real_of(dataset, known[:1]).expand(num, -1, -1, -1))
    assert composition(remembers, dataset, held)[0].own.mean == 0


def test_words_overlap_without_case_and_signs() -> None:
    assert overlap("A red heart", "red heart, a") == 1
    assert overlap("a red heart", "a blue heart") == pytest.approx(0.5)
    assert overlap("", "") == 0


def test_the_figures_are_json(dataset: Dataset, tmp_path: Path) -> None:
    from dataclasses import asdict

    rows = measure_adherence(Maker(follows(dataset)), dataset, classifier=None, num=10)
    (tmp_path / "x.json").write_text(json.dumps([asdict(row) for row in rows]))
    assert json.loads((tmp_path / "x.json").read_text())[0]["n"] == 10
