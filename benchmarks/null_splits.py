"""How often a verdict would accuse a model that has seen neither of two sets: held-out images of a
run are split at random into "held-out" and "training" ones, and the rules are applied.

    python benchmarks/null_splits.py RUN|LOOKS [--splits 300] [--json FILE]

For each number h of images on each side it prints how often the ratio is surely above its
thresholds, and how often its 95 % interval covers 1.

LOOKS is what `when_to_stop.py --json` writes: the errors of a training on 200 unseen images at each
look. They are scaled so that no look is better than another, and it is counted how often a look sees
a rise since the least error, and how often a whole training is told to stop as harmful.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from machine import machine, options, report

import sfumato
from sfumato.condition import to_device
from sfumato.data import index, to_float
from sfumato.recipes.resolver import resolve
from sfumato.training.denoising_error import make_triples, measure
from sfumato.training.evidence import SURE, Look, error_ratio
from sfumato.training.monitors import latents
from sfumato.training.stopping import FEWEST_LOOKS, LEANS, OVERFITS, rules, verdict

SIDES = (12, 25, 50)


def errors_of(path: Path) -> torch.Tensor:
    """Return the run's error on each held-out image, as a look measures it, (P,)."""
    run, pipeline = resolve(path), sfumato.load(path)
    dataset = index(run.data, annotations=run.conditioner.names)
    positions = dataset.with_common_shape(dataset.holdout)
    images = to_float(dataset.images(positions).pixels)
    x0 = latents(pipeline.autoencoder, images, seed=run.seed, batch_size=100)
    triples = make_triples(x0, run.objective.schedule, seed=run.seed, bins=10)
    with torch.no_grad():
        context = to_device(dataset.context(positions), torch.device("cpu"))
        condition = pipeline.model.conditioner(
            pipeline.model.conditioner.training_context(images, context, seed=run.seed, first=0),
            len(positions),
        )
    return measure(pipeline.model.denoiser(), triples, condition, batch_size=500).by_image()


def null_rates(errors: torch.Tensor, side: int, splits: int) -> dict[str, float]:
    """Return how often each rule fires between two random parts of `side` images each."""
    generator = torch.Generator().manual_seed(side)
    counts = dict.fromkeys(("leans", "overfits", "covered"), 0)
    for _ in range(splits):
        chosen = errors[torch.randperm(len(errors), generator=generator)[: 2 * side]]
        first, second = chosen[:side], chosen[side:]
        low = error_ratio(first, second, level=SURE).low
        wide = error_ratio(first, second, level=0.95)
        counts["leans"] += low > LEANS
        counts["overfits"] += low > OVERFITS
        counts["covered"] += wide.low <= 1 <= wide.high
    return {name: count / splits for name, count in counts.items()}


def null_looks(rows: list[dict[str, Any]], side: int, splits: int) -> dict[str, float]:
    """Return how often a rise is seen where nothing rises, with `side` images held out."""
    errors = torch.tensor([row["unseen_images"] for row in rows]).double()
    errors *= errors[-1].mean() / errors.mean(1, keepdim=True)
    generator = torch.Generator().manual_seed(side)
    rises = harmful = number = 0
    for _ in range(splits):
        chosen = errors[:, torch.randperm(errors.shape[1], generator=generator)[: 2 * side]]
        looks = [
            Look(
                step=row["step"],
                views=row["views"],
                held_out=tuple(each[:side].tolist()),
                seen=tuple(each[side:].tolist()),
            )
            for row, each in zip(rows, chosen, strict=True)
        ]
        prefixes = [looks[:stop] for stop in range(FEWEST_LOOKS, len(looks) + 1)]
        rises += sum(rules(prefix).rises for prefix in prefixes)
        number += len(prefixes)
        harmful += any(verdict(prefix).harmful for prefix in prefixes)
    return {"rises": rises / number, "harmful": harmful / splits, "looks": number / splits}


def measure_looks(path: Path, splits: int) -> dict[str, Any]:
    """Measure the trainings of a file of `when_to_stop.py`."""
    return {
        f"{name}, h = {side}": null_looks(result["rows"], side, splits)
        for name, result in json.loads(path.read_text())["sets"].items()
        for side in SIDES
    }


def main() -> None:
    """Measure the run that was named."""
    path = Path(sys.argv.pop(1))
    asked = options(__doc__.splitlines()[0], splits=300)
    if path.suffix == ".json":
        rates = measure_looks(path, asked.splits)
        report({"machine": machine(), "rates": rates}, asked.json)
        return
    errors = errors_of(path)
    rates = {
        f"h = {side}": null_rates(errors, side, asked.splits)
        for side in SIDES
        if 2 * side <= len(errors)
    }
    report({"machine": machine(), "held-out images": len(errors), "rates": rates}, asked.json)


if __name__ == "__main__":
    main()
