"""An evaluation of any set and model ends in figures with all that they rest on, or says what is
missing.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.conditioners import ConditioningInfo
from sfumato.data import DataConfig, Dataset, Digits, index, to_float
from sfumato.data.copies import CopyIndex
from sfumato.evaluation import extractors, report
from sfumato.evaluation.classifier import Classifier, train_classifier
from sfumato.evaluation.fidelity import choose_conditions, choose_reference
from sfumato.evaluation.report import EvaluationReport, evaluate_pipeline, fidelity_table
from sfumato.evaluation.statistics import ReferenceStatistics
from sfumato.generation.request import ResolvedRequest
from tests.helpers.image_sets import dataset_of, photographs

KEYS = {"value", "low", "high", "n", "metric", "extractor", "reference"}


class Fake:
    """A pipeline that returns training images of the requested categories, with some noise."""

    def __init__(self, dataset: Dataset, *reads: str, noise: float = 0.2) -> None:
        self.dataset, self.reads, self.noise = dataset, reads, noise
        self.asked: list[tuple[float, list[int]]] = []
        self.image_shape = dataset.image_shape
        self.info = ConditioningInfo(
            channels=dataset.config.channels, categories=dataset.categories
        )
        self.sampling = SimpleNamespace(guidance=1.5 if reads else 1.0)
        conditioner = SimpleNamespace(
            parts={"category": None},
            training_context=lambda images, context, seed, first: context,
        )
        self.model = SimpleNamespace(conditioner=conditioner)

    def sample_request(
        self, request: ResolvedRequest, *, seed: int, guidance: float, batch_size: int = 0
    ) -> Tensor:
        count = len(request.start)
        asked = request.context.get("category", torch.full((count,), -1)).tolist()
        self.asked.append((guidance, asked))
        training = self.dataset.with_common_shape(self.dataset.training)
        labels = self.dataset.labels[torch.from_numpy(training)]
        pools = {label: training[(labels == label).numpy()] for label in set(asked)}
        pools = {label: pool if len(pool) else training for label, pool in pools.items()}
        chosen = [pools[label][i % len(pools[label])] for i, label in enumerate(asked)]
        images = to_float(self.dataset.images(chosen).pixels)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return ((images + self.noise * noise).clamp(-1, 1) + 1) / 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a trained network, and with a classifier that is trained for a moment."""
    monkeypatch.setattr(extractors, "_package", lambda: None)
    monkeypatch.setattr(report, "train_classifier", functools.partial(train_classifier, steps=20))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return index(DataConfig(source=Digits(), resolution=8, channels=1, holdout=0.15))


@pytest.fixture(scope="module")
def classifier(digits: Dataset) -> Classifier:
    return train_classifier(digits, digits.training, steps=300)


def of_digits(digits: Dataset, count: int, held_out: int, labels: Any = None) -> Dataset:
    order = np.random.default_rng(1).permutation(len(digits.ids))[: count + held_out]
    pixels = digits.images(order).pixels.numpy()
    own = digits.labels[torch.from_numpy(order)].tolist()
    return dataset_of(
        pixels[:count],
        pixels[count:],
        labels=own if labels is None else labels(own),
        categories=digits.categories,
    )


def figures_in(value: Any) -> list[dict[str, Any]]:
    """All figures of a JSON document; every number must be in one, or say how many or what."""
    if isinstance(value, dict) and "value" in value:
        assert set(value) == KEYS
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict):
        loose = {key for key, part in value.items() if isinstance(part, float)}
        assert loose <= {"adherence_guidance"}
    return [figure for part in parts for figure in figures_in(part)]


def check(result: EvaluationReport) -> dict[str, Any]:
    """Return the report's JSON, in which nothing is missing."""
    plain = json.loads(result.json(), parse_constant=lambda name: pytest.fail(name))
    figures = figures_in(plain)
    assert len(figures) >= 6
    for figure in figures:
        assert figure["n"] >= 1
        assert all(figure[key] for key in ("metric", "extractor", "reference"))
        if figure["n"] > 1:
            assert figure["low"] <= figure["value"] + 1e-9
            assert figure["value"] <= figure["high"] + 1e-9
    assert len(plain["sentences"]) == 2
    assert all(sentence in result.table() for sentence in plain["sentences"])
    return plain


def test_every_figure_says_what_it_rests_on(digits: Dataset) -> None:
    dataset = of_digits(digits, 200, 60)
    result = evaluate_pipeline(Fake(dataset, "category"), dataset, num=40)
    plain = check(result)
    assert [row["name"] for row in plain["rows"]] == [
        "held-out real images", "training images", "samples, guidance 1", "samples, guidance 1.5",
    ]  # fmt: skip
    assert [row["n"] for row in plain["rows"]] == [60, 40, 40, 40]
    samples = plain["rows"][3]
    assert samples["kid_held_out"]["reference"] == "60 held-out images"
    assert samples["kid_training"]["reference"] == "200 training images"
    assert samples["category_accuracy"]["n"] == 40
    assert samples["frechet"] is None
    assert any("no Fréchet distance" in remark for remark in plain["remarks"])
    assert plain["classifier"]["n"] == 60
    assert {row["context"] for row in plain["adherence"]} == {"category"}
    table = result.table()
    for column in ("KID to held-out", "KID to training", "good", "variety", "category accuracy"):
        assert column in table
    assert "samples, guidance 1.5: " in plain["sentences"][0]
    assert set(result.images) == {
        "nearest-guidance-1.png", "nearest-guidance-1.5.png", "asked-by-category.png",
    }  # fmt: skip


def test_a_model_without_conditions_is_asked_for_nothing(digits: Dataset) -> None:
    dataset = of_digits(digits, 200, 60)
    fake = Fake(dataset)
    plain = check(evaluate_pipeline(fake, dataset, num=30))
    assert [guidance for guidance, _ in fake.asked] == [1.0]
    assert [row["name"] for row in plain["rows"][2:]] == ["samples, guidance 1"]
    assert {row["category_accuracy"] for row in plain["rows"]} == {None} == {plain["classifier"]}
    assert plain["rows"][2]["kid_training"]["reference"] == "200 training images"
    table = evaluate_pipeline(fake, dataset, num=30).table()
    assert "category accuracy" not in table
    assert "classifier" not in table


def test_categories_are_asked_for_as_often_as_the_set_has_them(digits: Dataset) -> None:
    dataset = of_digits(digits, 200, 50, lambda own: [0] * 150 + [1] * 48 + [2] * 2 + [0] * 50)
    fake = Fake(dataset, "category")
    reference = choose_reference(dataset, fake.reads)
    conditions = choose_conditions(fake, dataset, reference, 100)
    assert torch.bincount(conditions.context["category"]).tolist() == [75, 24, 1]
    assert conditions.context["category"][:30].unique().tolist() == [0, 1]
    plain = check(evaluate_pipeline(fake, dataset, num=100))
    # one rare category does not cut the others down
    assert [row["n"] for row in plain["rows"]] == [50, 100, 100, 100]
    assert plain["rows"][3]["kid_held_out"]["n"] == 100


def test_many_small_categories(digits: Dataset) -> None:
    dataset = of_digits(digits, 90, 30, lambda own: [i % 30 for i in range(120)])
    dataset = replace_categories(dataset, 30)
    plain = check(evaluate_pipeline(Fake(dataset, "category"), dataset, num=20))
    assert plain["rows"][3]["kid_training"]["value"] is not None


def replace_categories(dataset: Dataset, count: int) -> Dataset:
    result = replace(dataset, categories=tuple(map(str, range(count))))
    result.__dict__["parts"] = dataset.parts
    return result


def test_images_without_a_category_are_not_misread(
    digits: Dataset, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may hold some beside its sub-folders."""
    monkeypatch.setattr(report, "train_classifier", lambda *args, **options: classifier)
    labels: list[int] = []

    def every_second(own: list[int]) -> list[int]:
        labels.extend(label if i % 2 else -1 for i, label in enumerate(own))
        return labels

    dataset = of_digits(digits, 200, 60, every_second)
    plain = check(evaluate_pipeline(Fake(dataset, "category"), dataset, num=60))
    held_out = plain["rows"][0]
    assert held_out["n"] == held_out["category_accuracy"]["n"] == 30
    assert held_out["category_accuracy"]["value"] > 0.9
    assert plain["rows"][3]["kid_training"]["reference"] == "100 training images"
    assert plain["rows"][3]["copies"]["reference"] == "200 training images"
    accuracy = next(row for row in plain["adherence"] if row["figure"] == "category accuracy")
    assert accuracy["real"]["n"] == 30
    assert accuracy["real"]["value"] > 0.9
    assert any("without a category are not compared" in remark for remark in plain["remarks"])


def test_a_sample_is_shown_above_its_nearest_image_where_some_have_no_category(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = of_digits(digits, 100, 30, lambda own: [-1, 1] * 65)
    drawn: list[Tensor] = []

    def draw(images: Tensor, **options: object) -> Any:
        drawn.append(images)
        return SimpleNamespace()

    monkeypatch.setattr(report, "grid_image", draw)
    monkeypatch.setattr(report, "gallery", lambda *args, **options: SimpleNamespace())
    evaluate_pipeline(Fake(dataset, "category", noise=0.0), dataset, num=20, guidance=[1.0])
    upper, lower = drawn[0].chunk(2)
    assert len(upper) == report.NUM_PAIRS
    torch.testing.assert_close(upper, lower)


@pytest.mark.parametrize(("learned", "held_out"), [(2, 0), (1, 1), (2, 1), (6, 2), (30, 0)])
@pytest.mark.parametrize("reads", [(), ("category",)])
def test_few_images_are_evaluated_as_far_as_they_go(
    digits: Dataset, learned: int, held_out: int, reads: tuple[str, ...]
) -> None:
    dataset = of_digits(digits, learned, held_out)
    result = evaluate_pipeline(Fake(dataset, *reads, noise=0.0), dataset, num=4)
    plain = check(result)
    assert plain["rows"][-1]["copies"]["value"] == (
        1.0 if learned > 1 else pytest.approx(0.5, abs=0.5)
    )
    assert any("held out" in remark for remark in plain["remarks"])
    if not held_out:
        assert plain["rows"][0]["n"] == 0
        assert plain["rows"][-1]["kid_held_out"] is None
    if learned == 30:
        assert "it copies" in plain["sentences"][0]


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_any_number_of_channels(channels: int) -> None:
    pixels = np.repeat(photographs(60), 2, axis=1)[:, :channels]
    dataset = dataset_of(pixels[:40], pixels[40:])
    plain = check(evaluate_pipeline(Fake(dataset), dataset, num=20))
    said = " ".join(plain["remarks"])
    assert ("alpha is not compared" in said) == (channels in (2, 4))
    assert ("3 of 5 channels" in said) == (channels == 5)


def test_a_frechet_distance_is_given_from_ten_images_for_each_dimension(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dataset = of_digits(digits, 200, 60)
    monkeypatch.setattr("sfumato.evaluation.quality.FRECHET_IMAGES_PER_DIMENSION", 1)
    monkeypatch.setattr("sfumato.evaluation.fidelity.FRECHET_IMAGES_PER_DIMENSION", 1)
    monkeypatch.setattr("sfumato.evaluation.sentences.FRECHET_IMAGES_PER_DIMENSION", 1)
    result = evaluate_pipeline(Fake(dataset), dataset, num=128)
    plain = check(result)
    assert [row["frechet"] is None for row in plain["rows"]] == [True, False, False]
    assert "FID" in fidelity_table(result.fidelity)
    assert not any("Fréchet" in remark for remark in plain["remarks"])
    # the same from the file of statistics, whatever set is at hand
    result.save(tmp_path / "evaluation.json")
    statistics = ReferenceStatistics.read(tmp_path / "statistics.npz", dimensions=128)
    few = of_digits(digits, 60, 60)
    again = check(evaluate_pipeline(Fake(dataset), few, num=128, statistics=statistics))
    found, expected = again["rows"][2]["frechet"], plain["rows"][2]["frechet"]
    assert found["value"] == pytest.approx(expected["value"], rel=1e-9)
    assert found["reference"] == "the statistics statistics.npz"


def test_features_of_real_images_are_computed_once(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    dataset = of_digits(digits, 50, 20)
    first = evaluate_pipeline(Fake(dataset), dataset, num=10)
    assert len(list((tmp_path / "features").iterdir())) == 2
    monkeypatch.setattr(
        "sfumato.evaluation.quality.to_float", lambda pixels: pytest.fail("read again")
    )
    assert evaluate_pipeline(Fake(dataset), dataset, num=10).json() == first.json()


def test_samples_are_compared_with_training_images_once(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, compared = of_digits(digits, 50, 20), []
    thumbnails = CopyIndex.thumbnails_of

    def counted(self: CopyIndex, images: Tensor) -> Any:
        compared.append(len(images))
        return thumbnails(self, images)

    monkeypatch.setattr(CopyIndex, "thumbnails_of", counted)
    evaluate_pipeline(Fake(dataset, "category"), dataset, num=10)
    assert compared == [20, 10, 10, 10]  # held-out and training images, two guidance scales


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


def test_a_small_set_is_not_shown_to_the_classifier_thousands_of_times(digits: Dataset) -> None:
    """It took five minutes for twelve images."""
    shares: list[float] = []
    few = digits.training[:20]
    classifier = train_classifier(digits, few, on_progress=shares.append)
    assert len(shares) == 200 * 20 // 20
    assert shares[-1] == 1
    own, _ = classifier.predict(to_float(digits.images(few)[0]))
    assert (own == digits.labels[torch.from_numpy(few)]).double().mean() > 0.9
