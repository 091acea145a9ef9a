"""What a model is told of its training set: of what it learns from, and of nothing that is held
out.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato import config
from sfumato.conditioners import (
    AttributesConfig,
    CategoryConfig,
    ConditioningInfo,
    LearnedTextConfig,
    PointsConfig,
)
from sfumato.contexts import ContextConfig
from sfumato.data import AugmentConfig, DataConfig, Folder
from sfumato.errors import ConfigError
from sfumato.generation.diffusion_model import SamplingConfig
from sfumato.recipes import Run
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder
from sfumato.recipes.presets import Survey
from sfumato.runs import preparation
from sfumato.runs.preparation import build_model, open_data

ALL = {
    "category": CategoryConfig(),
    "text": LearnedTextConfig(),
    "attributes": AttributesConfig(),
    "points": PointsConfig(),
}


def image(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def folder(
    root: Path, facts: dict[str, dict[str, Any]], points: dict[str, str] | None = None
) -> Folder:
    """An image for each name, with the JSON and the cloud that lie beside it."""
    for number, (name, fact) in enumerate(facts.items()):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number))
        path.with_suffix(".json").write_text(json.dumps(fact))
    for name, cloud in (points or {}).items():
        (root / f"{name}.points.csv").write_text(cloud)
    return Folder(str(root))


def conditioning_info(source: Folder, contexts: dict[str, Any], **options: Any) -> ConditioningInfo:
    data = DataConfig(source=source, resolution=8, channels=1, cache="off", **options)
    run = Run(name="x", data=data, conditioner=ContextConfig(**contexts))
    return preparation.conditioning_info(run, open_data(run))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Eight training images, and two that are held out by name and say other things."""
    facts = {
        f"{'ab'[i % 2]}/{i}": {
            "captions": [f"red {i}", "Red"],
            "attributes": {"age": i, "tall": 1} if i < 4 else {},
        }
        for i in range(8)
    }
    facts |= {
        f"b/held{i}": {"caption": "secret", "holdout": "set", "attributes": {"age": 1000, "odd": 5}}
        for i in range(2)
    }
    return folder(
        tmp_path_factory.mktemp("told"), facts, {"a/0": "0,0,0\n", "b/1": "1,2,3\n", "a/2": "1,2\n"}
    )


def learned(source: Folder) -> list[int]:
    """Numbers of the images that are learned from."""
    run = Run(name="x", data=DataConfig(source=source, resolution=8, channels=1, cache="off"))
    dataset = open_data(run)
    return [int(Path(dataset.entries[i].name).stem) for i in dataset.training]


def test_words_are_those_of_the_captions_that_are_learned_from(told: Folder) -> None:
    words = conditioning_info(told, ALL).words
    assert words[0] == "red"
    assert set(words) == {"red", *map(str, learned(told))}


def test_attributes_are_described_by_the_images_that_have_them(told: Folder) -> None:
    info = conditioning_info(told, ALL)
    ages = np.array([i for i in learned(told) if i < 4])
    assert info.attributes == ("age", "odd", "tall")
    assert info.means[0] == pytest.approx(ages.mean())
    assert info.deviations[0] == pytest.approx(ages.std())
    # a label: 0 where it is not given
    assert info.means[2] == pytest.approx(len(ages) / len(learned(told)))
    assert math.isnan(info.means[1])  # only images that are held out have it


def test_categories_dimensions_and_augmentation(told: Folder) -> None:
    info = conditioning_info(told, ALL, augment=AugmentConfig(karras=0.1))
    assert (info.categories, info.dimensions, info.channels, info.augmentation) == (
        ("a", "b"),
        3,
        1,
        9,
    )


def test_what_is_not_read_is_not_told(told: Folder) -> None:
    info = conditioning_info(told, {"category": CategoryConfig()})
    assert (info.words, info.dimensions, info.augmentation) == ((), 0, 0)


def test_facts_survive_a_checkpoint(told: Folder) -> None:
    info = conditioning_info(told, ALL)
    stored = json.loads(json.dumps(config.plain(info)))
    again = config.parse(ConditioningInfo, stored, where="checkpoint")
    assert str(again) == str(info)  # NaN included


@pytest.mark.parametrize("name", ["category", "text", "attributes", "points"])
def test_contexts_that_the_data_do_not_hold_are_refused(tmp_path: Path, name: str) -> None:
    run = Run(
        name="x",
        data=DataConfig(
            source=folder(tmp_path, {str(i): {} for i in range(4)}), resolution=8, cache="off"
        ),
        conditioner=ContextConfig(**{name: ALL[name]}),
    )
    with pytest.raises(
        ConfigError, match=rf"conditioner\.{name}: needs .*, but the dataset has none"
    ):
        build_model(run, preparation.conditioning_info(run, open_data(run)))


def test_categories_that_no_training_image_has_are_told_and_keep_their_numbers(
    tmp_path: Path,
) -> None:
    facts: dict[str, dict[str, Any]] = {f"{'ac'[i % 2]}/{i}": {} for i in range(8)}
    facts |= {f"b/{i}": {"holdout": "set"} for i in range(2)}
    found = conditioning_info(folder(tmp_path, facts), {"category": CategoryConfig()})
    assert (found.categories, found.untrained) == (("a", "b", "c"), ("b",))


def test_presets_count_categories_without_named_holdouts(tmp_path: Path) -> None:
    facts: dict[str, dict[str, Any]] = {f"{'ac'[i % 2]}/{i}": {} for i in range(8)}
    facts |= {f"b/{i}": {"holdout": "set"} for i in range(2)} | {"a/held": {"holdout": "set"}}
    assert Survey.of(folder(tmp_path, facts).listing()).categories == {"a": 4, "c": 4}


def test_clipping_is_refused_in_latents() -> None:
    sampling = SamplingConfig(clip=True)
    assert Run(name="x", sampling=sampling).sampling.clip
    with pytest.raises(ConfigError, match="latents, whose values have no bounds"):
        Run(name="x", sampling=sampling, autoencoder=TrainedAutoencoder())
