"""Generators that cheat or fail: which figures must be worse than those of real images, and what is
said of them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.conditioners import ConditioningInfo
from sfumato.data import DataConfig, Dataset, Digits, index, to_float
from sfumato.evaluation.fidelity import evaluate
from sfumato.evaluation.rows import Evaluation, FidelityRow
from sfumato.evaluation.sentences import describe
from sfumato.generation.request import ResolvedRequest
from tests.helpers.image_sets import blurred, dataset_of, noisy

LEARNED, HELD_OUT, SAMPLES = 300, 100, 150


class Fake:
    """A pipeline that asks a generator, chosen by the scale of guidance, for images of
    categories.
    """

    def __init__(self, dataset: Dataset, generators: list[Callable[[Tensor], Tensor]]) -> None:
        self.generators, self.image_shape = generators, dataset.image_shape
        self.reads = ("category",)
        self.info = ConditioningInfo(channels=1, categories=dataset.categories)
        self.sampling = SimpleNamespace(guidance=0.0)

    def sample_request(
        self, request: ResolvedRequest, *, seed: int, guidance: float, batch_size: int
    ) -> Tensor:
        return (self.generators[int(guidance)](request.context["category"]) + 1) / 2


def taken_in_turn(images: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Different images of the requested categories."""
    result = torch.empty(len(asked), *images.shape[1:])
    for label in asked.unique():
        here, pool = asked == label, images[labels == label]
        result[here] = pool[torch.arange(int(here.sum())) % len(pool)]
    return result


@pytest.fixture(scope="module", params=["random", pytest.param("auto", marks=pytest.mark.slow)])
def evaluation(request: pytest.FixtureRequest) -> Evaluation:
    """Of eight generators on 300 digits, in the order of `NAMES`."""
    digits = index(DataConfig(source=Digits(), resolution=8, channels=1, cache="off"))
    order = np.random.default_rng(0).permutation(len(digits.ids))
    pixels, labels = digits.images(order).pixels, digits.labels[torch.from_numpy(order)]
    count = LEARNED + HELD_OUT
    dataset = dataset_of(
        pixels[:LEARNED].numpy(),
        pixels[LEARNED:count].numpy(),
        labels=labels[:count].tolist(),
        categories=digits.categories,
    )
    learned, spare = to_float(pixels[:LEARNED]), to_float(pixels[count:])
    own, new = labels[:LEARNED], labels[count:]
    noise = torch.rand(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    firsts = torch.stack([spare[new == label][0] for label in range(10)])
    generators = [
        lambda asked: taken_in_turn(spare, new, asked),
        lambda asked: taken_in_turn(learned, own, asked),
        lambda asked: noisy(taken_in_turn(learned, own, asked), 0.1),
        lambda asked: spare[:1].repeat(len(asked), 1, 1, 1),
        lambda asked: firsts[asked],
        lambda asked: blurred(taken_in_turn(spare, new, asked), 6),
        lambda asked: noise,
        lambda asked: torch.full((len(asked), 1, 8, 8), torch.nan),
    ]
    return evaluate(
        Fake(dataset, generators),
        dataset,
        num=SAMPLES,
        guidances=range(len(generators)),
        features=request.param,
    )


NAMES = (
    "real", "copycat", "noisy copycat", "constant", "one per category", "blurred", "noise",
    "diverged",
)  # fmt: skip


def row_of(evaluation: Evaluation, name: str) -> FidelityRow:
    return evaluation.rows[2 + NAMES.index(name)]


@pytest.mark.parametrize(
    ("name", "worse"),
    [
        # its only image is a real one, and good
        ("constant", ("kid_held_out", "kid_training", "variety")),
        ("one per category", ("variety",)),
        ("blurred", ("kid_held_out", "kid_training", "good", "variety")),
        ("noise", ("kid_held_out", "kid_training", "good", "variety", "nearest")),
        ("diverged", ("kid_held_out", "kid_training", "good", "variety")),
    ],
)
def test_bad_generators_are_surely_worse_than_real_images(
    evaluation: Evaluation, name: str, worse: tuple[str, ...]
) -> None:
    real, figures = row_of(evaluation, "real").figures(), row_of(evaluation, name).figures()
    for column in worse:
        if column in ("good", "variety"):
            assert figures[column].high < real[column].low, column
        else:
            assert figures[column].low > real[column].high, column


@pytest.mark.parametrize("name", ["copycat", "noisy copycat"])
def test_a_copycat_is_named_and_not_praised(evaluation: Evaluation, name: str) -> None:
    row = row_of(evaluation, name)
    copies, quality = describe(row, evaluation.rows[0], evaluation.left_out)
    assert f": it copies: {SAMPLES} of {SAMPLES} samples" in copies
    assert quality.endswith("as it copies, this says nothing about new images.")
    real, learned = evaluation.rows[0].figures(), evaluation.rows[1].figures()
    figures = row.figures()
    assert figures["copies"].low > real["copies"].high
    assert figures["close"].low > real["close"].high
    assert figures["authentic"].high < real["authentic"].low
    assert figures["distance_test"].high < real["distance_test"].low
    # the row of training images shows what a copycat gets
    assert learned["copies"].value == learned["close"].value == 1
    assert learned["kid_training"].value < 0


def test_new_real_images_are_as_good_as_held_out_ones(evaluation: Evaluation) -> None:
    row, held_out = row_of(evaluation, "real"), evaluation.rows[0].figures()
    for column in ("kid_training", "good", "variety", "copies"):
        own, other = row.figures()[column], held_out[column]
        assert own.low <= other.high, column
        assert other.low <= own.high, column
    copies, quality = describe(row, evaluation.rows[0], evaluation.left_out)
    assert "no sign of copying" in copies
    gap = row.figures()["kid_difference"]
    assert gap.low <= 0 <= gap.high
    assert "look like real ones" in quality
    assert "copies" not in quality


def test_the_sentence_on_a_collapsed_generator_says_that_variety_is_missing(
    evaluation: Evaluation,
) -> None:
    row = row_of(evaluation, "one per category")
    _, quality = describe(row, evaluation.rows[0], evaluation.left_out)
    figures = row.figures()
    assert f"cover {figures['variety'].value:.0%} of the variety" in quality
    assert figures["variety"].value < 0.5
    assert figures["variety"].high < evaluation.rows[0].figures()["variety"].low
