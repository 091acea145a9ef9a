"""From images to decoded samples through an autoencoder of the run's own: every stage resumes on
its own, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sfumato.autoencoders import KLConfig, LatentAutoencoder, io
from sfumato.autoencoders import measure as measure_latents
from sfumato.cli.trajectory_images import trajectory_image
from sfumato.conditioners import DoodleConfig
from sfumato.contexts import ContextConfig
from sfumato.data import AugmentConfig, BatchPlan, DataConfig, Folder, batches, to_float
from sfumato.data.augment import augment
from sfumato.data.loader import variant_draws
from sfumato.errors import CheckpointError, ConfigError
from sfumato.networks import DiTConfig, UNetConfig
from sfumato.observability.images import GAP, grid_image
from sfumato.recipes import Run, autoencoder_stage
from sfumato.recipes.autoencoder_stage import PretrainedAutoencoder, TrainedAutoencoder
from sfumato.runs import load, resume, train
from sfumato.runs.preparation import open_data
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import (
    AdversarialConfig,
    Budget,
    CheckpointConfig,
    LogConfig,
    LossesConfig,
    PreviewConfig,
    Trainer,
    ValidationConfig,
    latent_cache,
)
from tests.helpers.runs import fingerprint, images, tiny_run

KL = KLConfig(channels=(16, 16), latent_channels=4, blocks=1, groups=8)


class Crash(BaseException):
    """The process is gone."""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"), size=16)


def own(**changes) -> TrainedAutoencoder:
    settings = {
        "network": KL,
        "losses": LossesConfig(
            adversarial=AdversarialConfig(start=0.5, channels=16, layers=1), equivariance=0.5
        ),
        "features": "random",
        "augmented_copies": 3,
        "batch_size": 10,
        "micro_batch": 4,
        "precision": "float32",
        "budget": Budget(steps=8),
        "log": LogConfig(every_steps=1),
        "checkpoint": CheckpointConfig(every_steps=3),
        "validation": ValidationConfig(every_steps=4, samples=10, copy_samples=0),
        "preview": PreviewConfig(every_steps=5, num=3),
    }
    return TrainedAutoencoder(**{**settings, **changes})


def latent_run(folder: Path, **changes) -> Run:
    data = DataConfig(
        source=Folder(str(folder)),
        resolution=16,
        channels=1,
        augment=AugmentConfig(flip="horizontal"),
    )
    return tiny_run(
        folder, **{"data": data, "autoencoder": own(), "budget": Budget(steps=6), **changes}
    )


def traces(run: Path) -> dict[str, str]:
    """Hashes of what both stages left."""
    final = hashlib.sha256((run / "autoencoder" / "final" / io.WEIGHTS).read_bytes()).hexdigest()
    return {"final": final, "autoencoder": str(_losses(run / "autoencoder")), **fingerprint(run)}


def _losses(stage: Path) -> list:
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line.get("train/loss"), line.get("validation/ema/psnr")) for line in lines
    ]


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return train(latent_run(folder), run=tmp_path_factory.mktemp("whole") / "run")


def test_one_command_leads_to_decoded_samples(whole: Path) -> None:
    pipeline = load(whole)
    images = pipeline.sample(3, category="odd", steps=2)
    assert images.shape == (3, 1, 16, 16)
    assert pipeline.model.network.image_channels == 4
    assert isinstance(pipeline.autoencoder, LatentAutoencoder)
    again = load(whole).sample(2, category="odd", steps=2, batch_size=1)
    assert (again - images[:2]).abs().max() < 1e-4
    for stage in (whole, whole / "autoencoder"):
        assert list((stage / "samples").glob("step-*/grid.png"))
    said = json.loads((whole / "autoencoder" / "final" / io.STATISTICS).read_text())
    assert {"psnr", "ssim", "l1", "informative", "dead_channels"} <= set(said)


def test_the_way_from_noise_is_drawn_in_images(whole: Path) -> None:
    pipeline, recorded = load(whole), []
    images = pipeline.sample(3, category="odd", steps=2, seed=1, on_step=recorded.append)
    strip = np.asarray(
        trajectory_image(recorded, images=1, columns=10, decode=pipeline.decode)
    ).astype(int)
    assert len(recorded) == 2
    result = np.asarray(grid_image(images[:1])).astype(int)[GAP:-GAP, GAP:-GAP]
    side = len(result)
    assert np.abs(strip[-side - GAP : -GAP, -side - GAP : -GAP] - result).max() <= 1
    assert result.std() > 0


def test_held_out_images_are_measured_without_compiling_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither along the way nor at the end."""
    graphs = []
    compile_module = torch.nn.Module.compile

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compile_module(self, backend=counted)
    )
    autoencoder = own(compile="on", losses=LossesConfig(), micro_batch=None, budget=Budget(steps=2))
    train(latent_run(folder, autoencoder=autoencoder, budget=Budget(steps=1)), run=tmp_path / "run")
    assert graphs
    assert all(graphs)  # those of training alone


def test_images_are_started_from_and_completed_in_latents(whole: Path) -> None:

    pipeline, image = load(whole), torch.rand(1, 16, 16)
    mask = torch.zeros(1, 16, 16)
    mask[:, :, 7:] = 1  # not at a latent's border
    filled = pipeline.sample(2, image=image, mask=mask, steps=2)
    assert torch.allclose(filled[..., :7], image[..., :7].expand(2, -1, -1, -1), atol=1e-5)
    near, far = (
        pipeline.sample(1, image=image, strength=strength, steps=4) for strength in (0.1, 1.0)
    )
    given = pipeline.autoencoder.decode(pipeline.autoencoder.encode(image[None] * 2 - 1))
    through = ((given + 1) / 2).clamp(0, 1)
    assert (near - through).square().mean() < (far - through).square().mean()


def crash_in(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Have the process end in a stage; undone with the monkeypatch."""
    if stage.startswith("training"):
        left, real = [int(stage.split()[1])], Trainer.train_step

        def step(self, batch):
            if not left[0]:
                raise Crash
            left[0] -= 1
            return real(self, batch)

        monkeypatch.setattr(Trainer, "train_step", step)
    elif stage == "measuring":
        monkeypatch.setattr(autoencoder_stage, "measure", lambda *_: (_ for _ in ()).throw(Crash))
    elif stage == "saving":
        monkeypatch.setattr(io, "save_file", lambda *_: (_ for _ in ()).throw(Crash))
    else:
        real_moments, chunks = latent_cache._moments, [1]

        def moments(*arguments):
            if not chunks[0]:
                raise Crash
            chunks[0] -= 1
            return real_moments(*arguments)

        monkeypatch.setattr(latent_cache, "_moments", moments)


@pytest.mark.parametrize(
    "stage",
    [
        "measuring",
        *(  # 5 and 11 end as if left alone in the two tests below, too
            pytest.param(stage, marks=pytest.mark.slow)
            for stage in ("training 0", "training 5", "encoding", "training 8", "training 11")
        ),
    ],
)
def test_killed_in_any_stage_and_resumed_it_ends_as_if_left_alone(
    stage: str, folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
        crash_in(patch, stage)
        with pytest.raises(Crash):
            train(latent_run(folder), run=tmp_path / "run")
    assert traces(resume(tmp_path / "run")) == traces(whole)


def test_what_an_autoencoder_cannot_go_on_with_is_refused_and_leaves_the_run_as_it_was(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_in(patch, "training 5")
        with pytest.raises(Crash):
            train(latent_run(folder), run=tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match="seed, batch_size"):
        resume(tmp_path / "run", overrides=["autoencoder.seed=5"])
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert traces(resume(tmp_path / "run")) == traces(whole)


def test_a_finished_stage_is_not_repeated(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_in(patch, "training 11")
        with pytest.raises(Crash):
            train(latent_run(folder), run=tmp_path / "run")
    final = tmp_path / "run" / "autoencoder" / "final" / io.WEIGHTS
    before = final.stat().st_mtime_ns
    monkeypatch.setattr(TrainedAutoencoder, "_train", None)
    monkeypatch.setattr(latent_cache, "_moments", None)
    described = (tmp_path / "run" / "config.yaml").read_text()
    for override, line in (
        ("budget.steps=9", r"budget\.steps: 8 -> 9"),
        ("losses.adversarial=null", r"losses\.adversarial"),
    ):
        with pytest.raises(ConfigError, match=f"trained already, and cannot be changed: {line}"):
            resume(tmp_path / "run", overrides=[f"autoencoder.{override}"])
    assert (tmp_path / "run" / "config.yaml").read_text() == described
    assert traces(resume(tmp_path / "run")) == traces(whole)
    assert final.stat().st_mtime_ns == before


def trainer_of(folder: Path, run: Path, **changes) -> Trainer:
    settings = latent_run(folder, autoencoder=own(**changes))
    trainer = settings.autoencoder.trainer(
        open_data(settings), RunDirectory.create(run).stage("autoencoder")
    )
    trainer.state.counters.precision = "float32"
    return trainer


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_both_optimizers_step_on_every_batch(
    micro_batch: int | None, folder: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(folder, tmp_path / "run", micro_batch=micro_batch)
    supply = batches(trainer.dataset, trainer.plan, start=0)
    for _ in range(3):
        before = {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
        trainer.train_step(next(supply))
        moved = {
            name
            for name, value in trainer.state.model.state_dict().items()
            if not torch.equal(value, before[name])
        }
        assert any(name.startswith("codec.encoder") for name in moved)
        assert any(name.startswith("codec.decoder") for name in moved)
        assert any(name.startswith("adversary") for name in moved)


def test_accumulation_changes_only_rounding_before_the_adversary_is_heard(
    folder: Path, tmp_path: Path
) -> None:
    losses = LossesConfig(adversarial=AdversarialConfig(start=1.0, channels=16, layers=1))
    trainers = [
        trainer_of(folder, tmp_path / str(size), micro_batch=size, losses=losses)
        for size in (None, 4)
    ]
    for trainer in trainers:
        trainer._backward(next(batches(trainer.dataset, trainer.plan, start=0)), torch.float32)
    for a, b in zip(*(trainer.state.model.parameters() for trainer in trainers), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-3 * a.grad.norm() + 1e-6


def test_the_adversary_is_heard_from_its_start_on(whole: Path) -> None:
    lines = [
        json.loads(line)
        for line in (whole / "autoencoder" / "metrics.jsonl").read_text().splitlines()
    ]
    heard = {line["step"]: "train/pleasing" in line for line in lines if "train/loss" in line}
    assert heard == {step: step > 4 for step in range(1, 9)}


def test_latents_and_images_are_shrunk_and_turned_alike(folder: Path, tmp_path: Path) -> None:
    """Asked with latents that are the images made smaller: what comes of them must be what comes of
    the images, made smaller.
    """
    ramp = torch.linspace(-1, 1, 16)
    images = torch.stack(
        [ramp[None, :, None].expand(1, 16, 16), ramp[None, None, :].expand(1, 16, 16)]
    )
    z = F.avg_pool2d(images, 2)
    task = trainer_of(folder, tmp_path / "moved", losses=LossesConfig(equivariance=1.0)).task
    sides, turned = set(), set()
    for first in range(60):
        moved, target = task._transform(z, images, first)
        assert target.shape[2] == 2 * moved.shape[2]
        assert (moved - F.avg_pool2d(target, 2)).abs().max() < 0.2
        sides.add(moved.shape[2])
        corners = target[0, 0, [[0, 0], [-1, -1]], [[0, -1], [0, -1]]]
        turned |= {tuple(corners.sign().flatten().tolist())} if moved.shape[2] > 2 else set()
    assert len(sides) > 2
    assert len(turned) == 4
    still = trainer_of(folder, tmp_path / "still", losses=LossesConfig(equivariance=0.0)).task
    assert all(torch.equal(still._transform(z, images, first)[1], images) for first in range(20))


def encoded(folder: Path, **changes):
    settings = latent_run(folder, **changes)
    dataset = open_data(settings)
    torch.manual_seed(0)
    codec = (
        autoencoder_stage.KLAutoencoder(KL, image_channels=dataset.config.channels)
        .eval()
        .requires_grad_(False)
    )
    statistics = measure_latents(codec, [to_float(dataset.images(dataset.training)[0])])
    autoencoder = LatentAutoencoder(codec, statistics.mean, statistics.deviation)
    made = latent_cache.with_latents(
        dataset, autoencoder, identity="test", variants=3, pixels=settings.conditioner.needs_images
    )
    return settings, autoencoder, made


def test_kept_latents_are_those_of_the_augmented_images(folder: Path) -> None:
    settings, autoencoder, dataset = encoded(folder)
    plan = BatchPlan(seed=0, shapes=dataset.shapes[dataset.training], batch_size=12)
    group = next(batches(dataset, plan, start=0)).groups[0]
    assert group.images.shape == (12, 0, 16, 16)
    positions = dataset.training[plan.batch(0)]
    images = to_float(dataset.images(positions)[0])
    matched = set()
    for moments, position, image in zip(group.moments, positions, images, strict=True):
        variants = [
            autoencoder.moments(
                augment(
                    settings.data.augment, image[None], variant_draws(dataset.ids[position], v)
                ).images
            )[0]
            for v in range(3)
        ]
        errors = [float((moments - other).abs().max()) for other in variants]
        assert min(errors) < 0.02  # float16
        matched.add(int(np.argmin(errors)))
    assert len(matched) > 1


def test_images_come_along_where_something_is_made_of_them(folder: Path) -> None:
    _, autoencoder, dataset = encoded(
        folder, conditioner=ContextConfig(doodle=DoodleConfig(synthetic=1.0))
    )
    plan = BatchPlan(seed=0, shapes=dataset.shapes[dataset.training], batch_size=12)
    group = next(batches(dataset, plan, start=0)).groups[0]
    assert group.images.shape == (12, 1, 16, 16)
    assert (autoencoder.moments(group.images) - group.moments).abs().max() < 0.02


def test_an_edited_image_is_encoded_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = images(tmp_path / "mine", size=16)
    added: list[str] = []
    real = latent_cache.Writer.add

    def add(self, key: str, *rest) -> None:
        added.extend([key] if "/" in key else [])  # pixels are kept under the id alone
        real(self, key, *rest)

    monkeypatch.setattr(latent_cache.Writer, "add", add)
    _, _, dataset = encoded(place)
    assert 0 < len(dataset.training) < len(dataset.ids)  # held-out images are not encoded
    assert sorted(added) == sorted(
        f"{dataset.ids[p]}/{variant}" for p in dataset.training for variant in range(3)
    )
    added.clear()
    edited = place / dataset.entries[dataset.training[0]].name
    Image.fromarray(np.full((16, 16), 99, np.uint8)).save(edited)
    _, _, after = encoded(place)
    assert len(set(after.ids) - set(dataset.ids)) == 1
    (new,) = {after.ids[p] for p in after.training} - {dataset.ids[p] for p in dataset.training}
    assert sorted(added) == [f"{new}/{variant}" for variant in range(3)]


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGBA", 4), ("constant", 3)])
def test_other_kinds_of_images(mode: str, channels: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(24):
        pixels = generator.integers(0, 256, (16, 16, channels), np.uint8)
        if mode == "constant" and number % 2:
            pixels[:] = number
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(
            tmp_path / f"{number:02d}.png"
        )
    data = DataConfig(source=Folder(str(tmp_path)), resolution=16, channels=channels)
    settings = latent_run(
        tmp_path,
        data=data,
        conditioner=ContextConfig(),
        budget=Budget(steps=2),
        autoencoder=own(budget=Budget(steps=2)),
    )
    run = train(settings, run=tmp_path / "run")
    assert load(run).sample(2, steps=2).shape == (2, channels, 16, 16)


def test_anybodys_autoencoder_is_copied_and_measured(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    place = tmp_path / "given"
    given = io.load(whole / "autoencoder" / "final")
    io.save(given, place, {})
    run = train(
        latent_run(folder, autoencoder=PretrainedAutoencoder(path=str(place))), run=tmp_path / "run"
    )
    for file in place.iterdir():
        file.unlink()
    assert load(run).sample(1, category="odd", steps=2).shape == (1, 1, 16, 16)
    used = io.load(run / "autoencoder" / "final")
    settings = latent_run(folder)
    dataset = open_data(settings)
    statistics = measure_latents(used, [to_float(dataset.images(dataset.training)[0])])
    assert statistics.mean.abs().max() < 1e-3
    assert (statistics.deviation - 1).abs().max() < 1e-3


def test_sizes_that_do_not_divide_are_refused_before_anything_is_trained(
    folder: Path, tmp_path: Path
) -> None:
    data = DataConfig(source=Folder(str(folder)), resolution=15, channels=1)
    with pytest.raises(ConfigError, match="multiple of 2"):
        train(latent_run(folder, data=data), run=tmp_path / "run")


@pytest.mark.parametrize(
    "network",
    [
        UNetConfig(channels=32, multipliers=(1, 1, 1), attention_depths=(), head_channels=32),
        DiTConfig(patch_size=4, hidden_size=64),
    ],
)
def test_latents_of_any_size_are_padded_inside_the_network_and_what_that_costs_is_said(
    folder: Path,
    tmp_path: Path,
    network: UNetConfig | DiTConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Latents of 6 x 6 where the network takes multiples of 4."""
    data = DataConfig(source=Folder(str(folder)), resolution=12, channels=1)
    run = train(
        latent_run(folder, data=data, network=network, budget=Budget(steps=2)), run=tmp_path / "run"
    )
    assert load(run).sample(2, steps=2).shape == (2, 1, 12, 12)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "images of 12 x 12 are padded to multiples of 8 inside the network, 78% more work than "
        "at 8 x 8" in said
    )
