"""The images that are memorized first: planted outliers and copies are named, in their order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.data import Folder
from sfumato.data.check import IntendedModel, inspect_data, write
from sfumato.data.check import risk as module
from sfumato.data.check.risk import images_at_risk
from sfumato.data.thumbnails import signatures


def thumbnails(count: int, *, kinds: int = 12, seed: int = 0) -> np.ndarray:
    """Images of a few kinds, of 8 x 8 blocks: those of a kind are alike."""
    rng = np.random.default_rng(seed)
    kind = rng.normal(size=(kinds, 8, 8, 3))
    blocks = kind[rng.integers(0, kinds, count)] + 0.4 * rng.normal(size=(count, 8, 8, 3))
    values = (128 + 40 * blocks).clip(0, 255).astype(np.uint8)
    return values.repeat(4, axis=1).repeat(4, axis=2)


def outliers(count: int) -> np.ndarray:
    """Images of kinds that no other image is of."""
    return thumbnails(count, kinds=count * 50, seed=9)


def brute(small: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distance of each image to the nearest one, or its mirror image, of another group."""
    values = signatures(small).astype(np.float64)
    mirrored = signatures(np.ascontiguousarray(small[:, :, ::-1])).astype(np.float64)
    result = np.stack(
        [
            np.minimum(
                np.linalg.norm(values - value, axis=1), np.linalg.norm(values - other, axis=1)
            )
            for value, other in zip(values, mirrored, strict=True)
        ]
    )
    result[groups[:, None] == groups] = np.inf
    return result.min(1), result.argmin(1)


def test_distances_are_those_of_all_pairs_and_planted_outliers_come_first() -> None:
    small = np.concatenate([thumbnails(150), outliers(3)])
    groups = np.arange(len(small))
    groups[[10, 20, 30, 40]] = 10  # near-duplicates of one another do not count
    positions = 2 * np.arange(len(small)) + 5
    found = images_at_risk(small, groups, positions)
    distances, nearest = brute(small, groups)
    assert {image.position for image in found.sparse[:3]} == set(positions[150:].tolist())
    leaders = np.setdiff1d(np.arange(len(small)), [20, 30, 40])
    ranked = np.argsort(-distances[leaders].round(4), kind="stable")  # two may be each other's
    order = leaders[ranked][: len(found.sparse)]
    assert [image.position for image in found.sparse] == positions[order].tolist()
    assert [image.nearest for image in found.sparse] == positions[nearest[order]].tolist()
    assert [image.distance for image in found.sparse] == pytest.approx(distances[order], rel=1e-4)
    assert found.median == pytest.approx(np.median(distances), rel=1e-4)
    assert (found.searched, found.total, len(found.sparse)) == (150, 150, 12)
    assert found.repeated == (tuple(positions[[10, 20, 30, 40]].tolist()),)
    names = [f"{number}.png" for number in range(400)]
    sentence = found.sentence(names)
    assert f"{names[found.sparse[0].position]}, " in sentence
    assert f"{distances.max() / np.median(distances):.1f} times as far" in sentence
    assert "(25.png, 4 times)" in sentence
    assert "searched" not in sentence


def test_of_many_images_only_the_likely_ones_are_compared_with_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = np.concatenate([thumbnails(500), outliers(4)])
    groups = np.arange(len(small))
    monkeypatch.setattr("sfumato.data.copies.CALIBRATED_ON", 150)
    monkeypatch.setattr(module, "MEASURED_EXACTLY", 60)
    found = images_at_risk(small, groups, groups)
    distances, _ = brute(small, groups)
    order = np.argsort(-distances)[: len(found.sparse)]
    assert {image.position for image in found.sparse[:4]} == set(range(500, 504))
    assert len({image.position for image in found.sparse} & set(order.tolist())) >= 10
    assert all(
        image.distance == pytest.approx(distances[image.position], rel=1e-4)
        for image in found.sparse
    )
    monkeypatch.setattr(module, "SCREENED", 400)
    part = images_at_risk(small, groups, groups)
    assert (part.searched, part.total) == (400, 504)
    assert "(400 of 504 images were searched)" in part.sentence([str(i) for i in groups])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_of_too_few_images_none_is_named(count: int) -> None:
    found = images_at_risk(thumbnails(count), np.arange(count), np.arange(count))
    assert found.sparse == found.repeated == ()
    assert found.sentence(["a", "b", "c"]) == ""


def test_copies_of_one_image_have_no_distance() -> None:
    found = images_at_risk(thumbnails(6), np.zeros(6, np.int64), np.arange(6))
    assert (found.sparse, found.median) == ((), 0.0)
    assert found.repeated == (tuple(range(6)),)


def test_the_report_names_the_images_that_are_memorized_first(tmp_path: Path) -> None:
    names = []
    for number, image in enumerate(np.concatenate([thumbnails(40, kinds=3), outliers(1)])):
        names.append(f"{number:02d}.png")
        Image.fromarray(image).save(tmp_path / names[-1])
    for copy in ("again.png", "held.png"):
        (tmp_path / copy).write_bytes((tmp_path / "07.png").read_bytes())
    found = inspect_data(
        Folder(str(tmp_path)).listing(), source="images", plan=IntendedModel(resolution=32)
    )
    write(found, tmp_path / "report")
    record = json.loads((tmp_path / "report" / "data.json").read_text())["memorized_first"]
    assert record["sparse"][0]["file"] == "40.png"
    assert record["sparse"][0]["medians"] == pytest.approx(
        record["sparse"][0]["distance"] / record["median_distance"], abs=0.01
    )
    assert [sorted(group) for group in record["repeated"]] == [["07.png", "again.png", "held.png"]]
    page = (tmp_path / "report" / "data_report.html").read_text()
    section = page[page.index('id="memorized_first"') : page.index("What to leave out")]
    assert "Memorized first, if any: those farthest from all others (40.png, " in section
    assert f"{record['sparse'][0]['medians']:.1f} × · 40.png" in section
    assert "3 times · " in section
