"""A model of the digits but 7 is controlled by doodles, and is its base without one.

The base is that of test_digits_without_7.py, trained for less. About three minutes on one core.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato.conditioners.doodle import extract_lines
from sfumato.data import Folder
from sfumato.recipes import recipe
from tests.end_to_end.test_digits_without_7 import OTHERS, digits  # noqa: F401

pytestmark = pytest.mark.slow

LOW = "validation/adherence/doodle/low"  # of the 95 % interval


@pytest.fixture(scope="module")
def base(digits: Path) -> Path:  # noqa: F811
    """A model of the digits but 7."""
    run = recipe("digits")
    run = replace(run, data=replace(run.data, source=Folder(str(digits / "others"))))
    settings = ["budget={steps: 400}", "batch_size=32", "preview.every_steps=400"]
    return sfumato.train(run, overrides=settings, run=digits / "base")


def outlines(images: torch.Tensor) -> torch.Tensor:
    """Doodles (n, 1, 8, 8) in [0, 1] of images in [0, 1], as training makes them."""
    draws = torch.full((len(images), 51), 0.5)
    return (extract_lines(2 * images - 1, draws, wobble=0.0, dropped=0.0) + 1) / 2


def sevens() -> torch.Tensor:
    """Images of the digit that the base has never seen, (n, 1, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images[data.target == 7] / 16, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("seed", [0, 1])
def test_doodles_steer_it_and_nothing_changes_without_one(
    base: Path,
    digits: Path,  # noqa: F811
    seed: int,
) -> None:
    torch.set_num_threads(1)
    run = sfumato.finetune(
        base,
        str(digits / "others"),
        overrides=[
            "adapter.kind=control-lora",
            "budget.steps=300",
            "optimizer.warmup_steps=15",
            f"seed={seed}",
        ],
        run=digits / f"doodles-{seed}",
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lows = [line[LOW] for line in lines if LOW in line]
    assert lows[-1] > 0.05
    tuned, before = sfumato.load(run), sfumato.load(base)
    asked = {"category": OTHERS, "seed": 3, "guidance": 1.3}
    plain = before.sample(45, **asked)
    assert torch.equal(tuned.sample(45, **asked), plain)
    assert torch.equal(tuned.sample(45, doodle=torch.ones(1, 8, 8), **asked), plain)
    # a digit that it has never seen, drawn beside other categories
    images = sevens()[:45]
    steered = tuned.sample(45, doodle=outlines(images), **asked)
    own, other, unsteered = (
        float((generated - real).square().mean())
        for generated, real in ((steered, images), (steered, images.roll(1, 0)), (plain, images))
    )
    assert own < 0.9 * other
    assert own < 0.75 * unsteered
