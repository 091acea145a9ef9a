"""An evaluation compares samples with real images, and each figure with what held-out real images
get.
"""

import functools
import json
from dataclasses import replace

import pytest
import torch

from sfumato.conditioners import ConditioningInfo
from sfumato.data import DataConfig, Dataset, Digits, index, to_float
from sfumato.errors import DataError
from sfumato.evaluation import evaluate, extractors, fidelity
from sfumato.evaluation.adherence import Estimate, wilson
from sfumato.evaluation.classifier import Classifier, train_classifier
from sfumato.generation.request import ResolvedRequest


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return index(DataConfig(source=Digits(), resolution=8, channels=1, holdout=0.15))


@pytest.fixture(scope="module")
def classifier(digits: Dataset) -> Classifier:
    return train_classifier(digits, digits.training, steps=300)


class Fake:
    """A pipeline that shows what it is given: real images of the categories asked for, made worse
    by `harm`.
    """

    def __init__(self, dataset: Dataset, harm) -> None:
        self.dataset, self.harm, self.asked = dataset, harm, []
        self.reads, self.image_shape = ("category",), dataset.image_shape
        self.info = ConditioningInfo(channels=1, categories=dataset.categories)

    def sample_request(
        self, request: ResolvedRequest, *, seed: int, guidance: float, batch_size: int
    ) -> torch.Tensor:
        asked = request.context.get("category", torch.arange(len(request.start)) % 10).tolist()
        self.asked.append((len(asked), tuple(asked), seed, guidance))
        labels = self.dataset.labels[torch.from_numpy(self.dataset.training)]
        pools = [self.dataset.training[(labels == number).numpy()] for number in range(10)]
        chosen = [pools[number][i // len(pools)] for i, number in enumerate(asked)]
        return (self.harm(to_float(self.dataset.images(chosen)[0])) + 1) / 2


def noisy(size: float):
    return lambda x: (
        x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ).clamp(-1, 1)


@pytest.fixture
def rows(digits: Dataset, classifier: Classifier, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fidelity, "train_classifier", lambda dataset, positions, **_: classifier)
    return lambda harm, **options: (
        evaluate(Fake(digits, harm), digits, **{"num": 200, **options}).rows
    )


def test_the_classifier_learns_and_is_the_same_every_time(
    digits: Dataset, classifier: Classifier
) -> None:
    assert classifier.held_out_accuracy > 0.9
    images = to_float(digits.images(digits.holdout)[0])
    read, features = classifier.predict(images)
    labels = digits.context(digits.holdout)["category"]
    assert float((read == labels).double().mean()) == classifier.held_out_accuracy
    assert features.shape == (len(images), 64)
    assert features.dtype == torch.float64
    few = functools.partial(train_classifier, digits, digits.training, steps=3)
    weights = [
        torch.cat([p.flatten() for p in trained.network.parameters()])
        for trained in (few(), few(), few(seed=1))
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_a_classifier_leaves_the_global_generator_alone(digits: Dataset) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_classifier(digits, digits.training, steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_image_reads_the_same_alone_and_in_company(
    digits: Dataset, classifier: Classifier
) -> None:
    images = to_float(digits.images(digits.training[:300])[0])
    labels, features = classifier.predict(images)
    alone, their_features = classifier.predict(images[299:])
    assert alone[0] == labels[299]
    torch.testing.assert_close(their_features[0], features[299], rtol=1e-4, atol=1e-5)


def test_a_copycat_reads_well_and_is_caught(rows) -> None:
    held_out, copycat = rows(noisy(0.02))
    assert copycat.copies > 0.97
    assert held_out.copies < 0.01
    assert copycat.category_accuracy > 0.95
    assert copycat.nearest < 0.2 * held_out.nearest


def test_rubbish_reads_by_chance_and_is_far_away(rows) -> None:
    held_out, rubbish = rows(lambda x: noisy(1.0)(torch.zeros_like(x)))
    assert rubbish.category_accuracy < 0.35
    assert rubbish.frechet > 5 * held_out.frechet
    assert rubbish.copies == 0


def test_the_wrong_category_is_not_category_accuracy(rows) -> None:
    _, shifted = rows(lambda x: x.roll(1, 0))
    assert shifted.category_accuracy < 0.1
    low, high = shifted.interval
    assert low <= shifted.category_accuracy <= high


def test_the_first_row_is_real_images_and_each_guidance_has_its_own(
    digits: Dataset, classifier: Classifier, rows
) -> None:
    given = rows(noisy(0.1), guidances=(1.0, 2.5), num=50)
    assert [row.name for row in given] == [
        "held-out real images",
        "samples, guidance 1",
        "samples, guidance 2.5",
    ]
    assert [row.n for row in given] == [len(digits.holdout), 50, 50]
    assert given[0].category_accuracy == pytest.approx(classifier.held_out_accuracy)
    assert {row.frechet_n for row in given} == {50}  # five of each digit in every row


def test_categories_are_asked_for_in_turn_with_the_seed_given(
    digits: Dataset, classifier: Classifier, monkeypatch
) -> None:
    monkeypatch.setattr(fidelity, "train_classifier", lambda dataset, positions, **_: classifier)
    fake, calls, told = Fake(digits, noisy(0.1)), [], []
    result = evaluate(
        fake, digits, num=30, seed=9, guidances=(1.5,), on_samples=lambda *call: calls.append(call),
        on_progress=lambda fraction, text: told.append(fraction),
    )  # fmt: skip
    assert fake.asked == [(30, tuple(range(10)) * 3, 9, 1.5)]
    (scale, images, neighbours), *rest = calls
    assert (scale, len(images), len(neighbours.index), rest) == (1.5, 30, 30, [])
    assert told == sorted(told)
    assert told[-1] == 1
    assert json.loads(json.dumps(result.plain()))["rows"][1]["n"] == 30
    assert result.extractor == classifier.name
    assert result.training == len(digits.training)


class Unsteered(Fake):
    """The same, of all categories in turn, asked for none."""

    def sample(
        self, num: int, *, request: ResolvedRequest, seed: int, guidance: float, batch_size: int
    ) -> torch.Tensor:
        assert not request.context
        return super().sample(
            num,
            request=ResolvedRequest.of({"category": torch.arange(num) % 10}, self.image_shape, num),
            seed=seed,
            guidance=guidance,
            batch_size=batch_size,
        )


@pytest.mark.parametrize("installed", [True, False])
def test_without_categories_distances_are_measured_and_copies_found(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """In the features of a frozen network, trained where its package is there."""
    if not installed:
        monkeypatch.setattr(extractors, "_package", lambda: None)
    results = []
    for harm in (lambda x: x, lambda x: noisy(1.0)(torch.zeros_like(x))):
        fake = Unsteered(digits, harm)
        fake.reads = ()
        results.append(evaluate(fake, replace(digits, categories=()), num=100))
    (real, copies), (_, rubbish) = (result.rows for result in results)
    assert results[0].extractor == (
        "EfficientNet-Lite0 (ImageNet)" if installed else "random features"
    )
    assert results[0].classifier_accuracy is None
    assert {
        (row.category_accuracy, row.interval, row.frechet_n) for row in (real, copies, rubbish)
    } == {(None, None, 100)}
    assert copies.copies > 0.97
    assert rubbish.copies == real.copies == 0
    assert rubbish.frechet > 3 * copies.frechet
    assert json.loads(json.dumps(results[0].plain()))["rows"][0]["category_accuracy"] is None


def test_images_without_a_category_are_left_out(
    digits: Dataset, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may hold some beside its sub-folders."""
    labels = digits.labels.clone()
    labels[::3] = -1
    some = replace(digits, labels=labels)
    assert train_classifier(some, some.training, steps=2).name.endswith(
        f"n{int((labels[torch.from_numpy(some.training)] >= 0).sum())}"
    )
    monkeypatch.setattr(fidelity, "train_classifier", lambda dataset, positions, **_: classifier)
    held_out, copycat = evaluate(Fake(some, noisy(0.02)), some, num=50).rows
    assert held_out.n == int((labels[torch.from_numpy(some.holdout)] >= 0).sum())
    assert copycat.category_accuracy > 0.95


def test_no_frechet_distance_is_given_of_few_images(
    digits: Dataset, classifier: Classifier, monkeypatch
) -> None:
    monkeypatch.setattr(fidelity, "train_classifier", lambda dataset, positions, **_: classifier)
    result = evaluate(Fake(digits, noisy(0.02)), digits, num=20)
    assert {(row.frechet, row.frechet_n) for row in result.rows} == {(None, 20)}
    assert result.remarks == [
        "a Fréchet distance is not given for held-out real images and samples, guidance 1: it "
        "would be computed from 20 images, "
        "and below 30 it mostly measures their number"
    ]
    copies = result.rows[1]
    assert copies.copies_interval == wilson(copies.copies, 20)


def test_a_missing_distance_of_samples_alone_is_said_too(
    digits: Dataset, classifier: Classifier, monkeypatch
) -> None:
    """Samples are asked for what held-out images are, which may be few of a category."""
    monkeypatch.setattr(fidelity, "train_classifier", lambda dataset, positions, **_: classifier)
    zeros = torch.zeros(50, dtype=torch.long)
    monkeypatch.setattr(
        fidelity,
        "_conditions",
        lambda pipeline, dataset, holdout, num: ({"category": zeros}, zeros),
    )
    result = evaluate(Fake(digits, noisy(0.02)), digits, num=50)
    assert [row.frechet is None for row in result.rows] == [False, True]
    assert result.remarks[-1].startswith(
        "a Fréchet distance is not given for samples, guidance 1: it would be computed from 5 images"
    )


def test_one_held_out_image_is_too_few(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.data.holdout.MIN_HOLDOUT_IMAGES", 0)
    few = replace(digits, config=replace(digits.config, holdout=1e-9))
    assert len(few.holdout) == 1
    with pytest.raises(DataError, match="1 image is held out and has a category, of 1797"):
        evaluate(Fake(few, noisy(0.1)), few)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (8, 10, 0.4902, 0.9433),
        (10, 10, 0.7225, 1.0),
        (1, 29, 0.0061, 0.1718),
        (95, 100, 0.8882, 0.9785),
    ],
)
def test_wilsons_interval(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes / n, n) == pytest.approx((low, high), abs=1e-4)


def test_proportions_have_wilsons_interval_and_other_means_the_normal_one() -> None:
    none = Estimate.of(torch.zeros(30))
    assert (none.mean, none.low, none.high) == (0.0, *wilson(0.0, 30))
    assert none.high > 0.1
    half = Estimate.of(torch.tensor([0.0, 1.0, torch.nan, 1.0, 0.0]))
    assert (half.low, half.high) == wilson(0.5, 4)
    other = Estimate.of(torch.tensor([0.0, 0.5, 1.0]))
    assert (other.mean, other.high - other.mean) == pytest.approx((0.5, 1.96 * 0.5 / 3**0.5))


def test_a_small_set_is_not_shown_to_the_classifier_thousands_of_times(digits: Dataset) -> None:
    """It took five minutes for twelve images."""
    shares: list[float] = []
    few = digits.training[:20]
    classifier = train_classifier(digits, few, on_progress=shares.append)
    assert len(shares) == 200 * 20 // 20
    assert shares[-1] == 1
    own, _ = classifier.predict(to_float(digits.images(few)[0]))
    assert (own == digits.labels[torch.from_numpy(few)]).double().mean() > 0.9
