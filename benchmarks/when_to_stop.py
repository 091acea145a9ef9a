"""When the verdict says stop, beside what is only known afterwards: the error on 200 images that the
run never sees, and the share of samples that are copies.

    python benchmarks/when_to_stop.py [--quick] [--json FILE] [--sets digits-60,emoji-200] [--seeds 3]

Small sets are trained without dropout and augmentation, so that they overfit; `digits` and `emoji`
whole are trained by their recipes, where no stop but "converged" may appear. Of 200 samples a
look, two rules count copies: three times nearer to one training image than to any other, and the
near-duplicates of `sfumato evaluate`.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import machine, options, report
from PIL import Image

from sfumato.condition import to_device
from sfumato.data import AugmentConfig, DataConfig, Dataset, Emoji, Folder, to_float
from sfumato.data.copies import NO_COPY, CopyIndex
from sfumato.data.sources.digits import Digits
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest
from sfumato.networks import UNetConfig
from sfumato.recipes.builtin import digits, emoji
from sfumato.recipes.run import Run
from sfumato.runs import prepare
from sfumato.runs.preparation import open_data
from sfumato.runs.training import build_trainer
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Budget, MuonConfig, OptimizerConfig, PowerEMA, PreviewConfig
from sfumato.training.config import CheckpointConfig, ValidationConfig
from sfumato.training.denoising_error import make_triples, measure
from sfumato.training.hooks import Hook, Session
from sfumato.training.looks import Looks
from sfumato.training.stopping import verdict

UNSEEN, SAMPLES, SAMPLING_STEPS = 200, 200, 15
COPIES = ("copies", "near_duplicates")
STEPS = {"digits-60": 450, "digits-240": 600, "emoji-200": 700, "digits": 1600, "emoji": 3000}


class Truth(Hook):
    """At each look, the error on unseen images and the share of copies among samples."""

    name = "truth"
    tolerated = ()

    def __init__(self, looks: Looks, unseen: Dataset, learned: Dataset, run: Run) -> None:
        self.looks, self.run_settings = looks, run
        self.training = to_float(learned.images(learned.training)[0])
        self.index = CopyIndex.of(learned)
        positions = unseen.training[:UNSEEN]
        self.context = unseen.context(positions)
        x0 = to_float(unseen.images(positions)[0])
        self.triples = make_triples(x0, run.objective.schedule, seed=7, bins=10)
        self.rows: list[dict[str, Any]] = []

    def due(self, trainer: Any, *, finished: bool) -> bool:
        """Return True where a look was just taken."""
        looks = self.looks.looks(trainer)
        return bool(looks) and looks[-1].step == trainer.state.counters.step

    def run(self, trainer: Any, session: Session) -> None:
        """Measure, and keep a row."""
        model, looks = trainer.state.average, self.looks.looks(trainer)
        with torch.no_grad():
            condition = model.conditioner(to_device(self.context, trainer.device), UNSEEN)
        errors = measure(model.denoiser(), self.triples, condition, batch_size=500)
        found, samples = verdict(looks), self._samples(trainer)
        self.rows.append(
            {
                "step": found.step,
                "views": found.views,
                "unseen": float(errors.eps_square.mean()),
                "unseen_images": errors.by_image().tolist(),
                "copies": ratio_copies(samples, self.training),
                "near_duplicates": float((self.index.find(samples) != NO_COPY).mean()),
                "state": found.state,
                "ratio": found.ratio,
                "best_step": found.best_step,
            }
        )

    def _samples(self, trainer: Any) -> torch.Tensor:
        pipeline = Pipeline(
            model=trainer.state.average,
            autoencoder=trainer.task.autoencoder,
            sampling=replace(self.run_settings.sampling, steps=SAMPLING_STEPS, guidance=1.0),
            info=trainer.task.info,
            image_shape=trainer.dataset.image_shape,
        )
        count = len(trainer.dataset.categories)
        context = {"category": torch.arange(SAMPLES) % count} if count > 1 else {}
        request = ResolvedRequest.of(context, trainer.dataset.image_shape, SAMPLES)
        return pipeline.sample_request(request, seed=5) * 2 - 1


def ratio_copies(images: torch.Tensor, training: torch.Tensor) -> float:
    """Return the share of images three times nearer to one training image than to the next."""
    nearest = torch.cdist(images.flatten(1), training.flatten(1)).sort(dim=1).values
    return float((nearest[:, 0] < nearest[:, 1] / 3).float().mean())


def write_sets(name: str, root: Path, seed: int) -> tuple[Path, Path]:
    """Write the images of a set to folders by category: those to train on, and unseen ones."""
    kind, _, count = name.partition("-")
    source = Digits() if kind == "digits" else Emoji(size=64)
    side, channels = (8, 1) if kind == "digits" else (16, 3)
    data = open_data(
        replace(digits(), data=DataConfig(source=source, resolution=side, channels=channels))
    )
    order = torch.randperm(
        len(data.entries), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    firsts: dict[int, int] = {}
    for position in order:
        firsts.setdefault(int(data.clusters[position]), position)
    chosen = list(firsts.values())
    unseen, learned = chosen[:UNSEEN], chosen[UNSEEN:]
    learned = learned[: int(count)] if count else learned
    for part, positions in (("learned", learned), ("unseen", unseen)):
        for position in positions:
            pixels = data.images([position])[0][0].permute(1, 2, 0).numpy()
            folder = root / part / (data.entries[position].category or "none")
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            image.save(folder / f"{position:05d}.png")
    return root / "learned", root / "unseen"


def settings(name: str, learned: Path, seed: int) -> Run:
    """The run: small sets without dropout and augmentation, whole sets by their recipe."""
    kind, _, count = name.partition("-")
    base = digits() if kind == "digits" else emoji()
    side, channels = (8, 1) if kind == "digits" else (16, 3)
    data = replace(base.data, source=Folder(str(learned)), resolution=side, channels=channels)
    common = {
        "data": data,
        "seed": seed,
        "budget": Budget(steps=STEPS[name]),
        "validation": ValidationConfig(every_minutes=60),
        "preview": PreviewConfig(every_minutes=60, num=2),
        "checkpoint": CheckpointConfig(every_minutes=60),
    }
    if not count:
        return replace(base, **common)
    network = replace(base.network, dropout=0.0)
    if kind == "emoji":
        network = UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention_depths=(1,))
    return replace(
        base,
        **{**common, "data": replace(data, augment=AugmentConfig())},
        network=network,
        optimizer=OptimizerConfig(
            learning_rate=4e-3, warmup_steps=10, schedule="constant", muon=MuonConfig()
        ),
        ema=PowerEMA(0.1),
    )


def trained(name: str, seed: int, place: Path) -> list[dict[str, Any]]:
    """Train one run, and return its rows."""
    learned, unseen = write_sets(name, place / "images", seed)
    run = settings(name, learned, seed)
    prepared = prepare(run)
    trainer = build_trainer(prepared, RunDirectory.create(place / "run"))
    looks = next(hook for hook in trainer.hooks if isinstance(hook, Looks))
    others = open_data(
        replace(run, data=replace(run.data, source=Folder(str(unseen)), holdout=0.01))
    )
    truth = Truth(looks, others, trainer.dataset, run)
    trainer.task.info = prepared.info
    trainer.hooks = (*trainer.hooks, truth)
    trainer.run()
    return truth.rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """When each state first appeared, with the copies there, and how good the best look is."""
    least = min(rows, key=lambda row: row["unseen"])
    firsts: dict[str, dict[str, Any]] = {}
    for row in rows:
        firsts.setdefault(row["state"], row)
    kept = next(row for row in rows if row["step"] == rows[-1]["best_step"])
    return {
        "least": {key: least[key] for key in ("step", "views", "unseen", *COPIES)},
        "first": {
            state: {
                "views": row["views"],
                **{name: row[name] for name in COPIES},
                "risen": row["unseen"] / least["unseen"] - 1,
            }
            for state, row in firsts.items()
        },
        "best_views_over_least": kept["views"] / least["views"],
        "best_error_over_least": kept["unseen"] / least["unseen"],
        "last": {key: rows[-1][key] for key in ("views", *COPIES, "state")},
    }


def main() -> None:
    """Train the sets that were named."""
    asked = options(__doc__.splitlines()[0], sets="digits-60,emoji-200,digits", seeds=3)
    sets, seeds = asked.sets.split(","), 1 if asked.quick else asked.seeds
    results: dict[str, Any] = {}
    for name in sets[: 1 if asked.quick else None]:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as place:
                rows = trained(name, seed, Path(place))
            results[f"{name}, seed {seed}"] = {"summary": summary(rows), "rows": rows}
            print(name, seed, summary(rows), flush=True)
    report({"machine": machine(), "sets": results}, asked.json)


if __name__ == "__main__":
    main()
