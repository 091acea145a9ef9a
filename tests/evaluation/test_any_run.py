"""Runs in latents, and on images of several shapes, are evaluated, swept and reported as others."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.data import BucketConfig, DataConfig, Folder
from sfumato.recipes import Run
from sfumato.training import Budget
from tests.helpers.cli import sfumato as cli
from tests.helpers.runs import images, tiny_run
from tests.training.test_latents import latent_run, own


@pytest.fixture(autouse=True)
def _quick_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are compared in random features: what the trained network gives is tested elsewhere."""
    monkeypatch.setattr("sfumato.evaluation.extractors._package", lambda: None)


def in_latents(root: Path) -> Run:
    autoencoder = own(budget=Budget(steps=2), losses=type(own().losses)(), augmented_copies=1)
    return latent_run(images(root / "images"), autoencoder=autoencoder, budget=Budget(steps=3))


def of_several_shapes(root: Path) -> Run:
    rng = np.random.default_rng(0)
    for number in range(40):
        height, width = ((8, 16), (16, 8), (12, 12))[number % 3]
        path = root / "images" / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width), np.uint8)).save(path)
    data = DataConfig(
        source=Folder(str(root / "images")),
        channels=1,
        resolution=12,
        buckets=BucketConfig(count=3, step=4),
    )
    return tiny_run(root / "images", data=data, budget=Budget(steps=3))


class Cells(HTMLParser):
    """The text of the cells of a page's tables."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "td":
            self.cells.append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


@pytest.mark.slow
@pytest.mark.parametrize("make", [in_latents, of_several_shapes])
def test_it_is_evaluated_and_every_figure_says_what_it_rests_on(make: Any, tmp_path: Path) -> None:
    run = sfumato.train(make(tmp_path), run=tmp_path / "run")
    result = cli("evaluate", run, "--num", 20)
    assert result.code == 0, result.err
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert len(found["sentences"]) >= 2
    figures = [
        figure for row in found["rows"] for figure in row.values() if isinstance(figure, dict)
    ]
    assert len(figures) > 10
    for figure in figures:
        assert figure["n"] > 0
        assert all(figure[name] for name in ("metric", "extractor", "reference"))
        assert figure["low"] is None or figure["low"] <= figure["value"] <= figure["high"]
    result = cli("report", run)
    assert result.code == 0, result.err
    page = Cells()
    page.feed((run / "report.html").read_text())
    said = [cell for cell in page.cells if "n = " in cell]
    assert len(said) > 10
    assert not [cell for cell in page.cells if "nan" in cell.lower() or "None" in cell]
