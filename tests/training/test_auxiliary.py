"""Losses and weights beside the model: their formulas, their training, and that nothing of them
stays.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sfumato import load
from sfumato.condition import Condition
from sfumato.diffusion import Denoised, Flow, Linear, NetworkDenoiser, NoiseLevel, Objective
from sfumato.errors import ConfigError
from sfumato.networks import DiTConfig, UNetConfig
from sfumato.networks.perceptual import RandomFeatures
from sfumato.nn.loss_uncertainty import LearnedUncertainty, NoUncertainty, weight_by_uncertainty
from sfumato.runs import train
from sfumato.training import AlignmentConfig, AuxiliaryConfig, Budget, DispersiveConfig
from sfumato.training.auxiliary import cosine_alignment_loss, dispersive_loss, upsample_to
from tests.helpers.runs import fingerprint, images, tiny_run

NETWORKS = [
    UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention_depths=(), head_channels=32),
    DiTConfig(patch_size=2, hidden_size=32, depth=3, head_dim=16, registers=2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


def test_learned_uncertainty_finds_the_loss_of_each_level() -> None:
    """Trained on losses that are known, e^u becomes them."""
    torch.manual_seed(0)
    uncertainty = LearnedUncertainty()
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.02)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1500)
        logsnr = torch.rand(64) * 12 - 6
        loss = torch.exp(logsnr / 4) * (0.8 + 0.4 * torch.rand(64))
        optimizer.zero_grad()
        weight_by_uncertainty(loss, uncertainty(logsnr)).mean().backward()
        optimizer.step()
    asked = torch.tensor([-5.0, 0.0, 5.0])
    torch.testing.assert_close(uncertainty(asked).exp(), torch.exp(asked / 4), rtol=0.15, atol=0)


def test_before_training_it_changes_nothing() -> None:
    loss, logsnr = torch.rand(5), torch.randn(5)
    logsnr[0] = float("inf")
    for kind in (LearnedUncertainty(), NoUncertainty()):
        assert torch.equal(weight_by_uncertainty(loss, kind(logsnr)), loss)


def test_dispersion_is_the_log_mean_over_pairs() -> None:
    maps = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    flat = maps.flatten(1).float()
    pairs = [torch.exp(-((a - b) ** 2).mean() / 0.5) for a in flat for b in flat]
    torch.testing.assert_close(
        dispersive_loss(maps, 0.5), torch.log(torch.stack(pairs).mean()).expand(4)
    )
    apart = maps * 3
    assert dispersive_loss(apart, 0.5)[0] < dispersive_loss(maps, 0.5)[0] <= 0


def test_misalignment_is_one_less_the_cosine() -> None:
    made, wanted = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 6, 6)
    pooled = F.avg_pool2d(wanted, 2)
    centred = pooled - pooled.mean((2, 3), keepdim=True)
    expected = (1 - (made * centred).sum(1) / made.norm(dim=1) / centred.norm(dim=1)).mean((1, 2))
    torch.testing.assert_close(cosine_alignment_loss(made, wanted), expected)
    assert cosine_alignment_loss(centred, wanted).abs().max() < 1e-6


def test_contrast_takes_the_distance_to_the_next_target_off() -> None:
    x0, noise, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    denoiser = NetworkDenoiser(network=lambda x, level, condition: 0.3 * x, parameterization=Flow())
    level = NoiseLevel(1 - t, t)
    plain, contrasted = (
        Objective(schedule=Linear(), contrastive_weight=contrast)(
            denoiser, x0, level=level, noise=noise
        ).per_sample
        for contrast in (0.0, 0.05)
    )
    output = denoiser.predict(level.like(x0).mix(*Denoised(x0, noise)), level, Condition())
    others = (noise - x0)[[2, 0, 1]]
    torch.testing.assert_close(
        contrasted, plain - 0.05 * (output - others).square().flatten(1).mean(1)
    )


@pytest.mark.parametrize("network", NETWORKS, ids=["unet", "dit"])
def test_hidden_maps_reach_both_losses_and_their_gradients_the_network(network) -> None:
    torch.manual_seed(0)
    built = network.build(image_channels=3)
    config = AuxiliaryConfig(dispersive=DispersiveConfig(), alignment=AlignmentConfig(stop_at=0.5))
    auxiliary = config.build(built, encoder=lambda name: RandomFeatures())
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    built(torch.randn(2, 3, 8, 8), torch.rand(2), Condition())
    early, late = auxiliary.losses(images, progress=0.4), auxiliary.losses(images, progress=0.5)
    assert set(early) == {"dispersive", "alignment"}
    assert set(late) == {"dispersive"}
    sum(weight * value.sum() for weight, value in early.values()).backward()
    reached = {
        name.split(".")[0]
        for name, p in built.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert reached & {"down", "blocks", "patches", "input"}
    assert auxiliary.terms["alignment"].project.weight.grad.abs().sum() > 0


def test_the_encoder_is_neither_saved_nor_copied() -> None:
    network = NETWORKS[0].build(image_channels=3)
    encoder = RandomFeatures()
    auxiliary = AuxiliaryConfig(alignment=AlignmentConfig()).build(
        network, encoder=lambda name: encoder
    )
    assert {name.split(".")[1] for name in auxiliary.state_dict() if name.startswith("terms")} == {
        "alignment"
    }
    assert not any("layers" in name for name in auxiliary.state_dict())
    assert copy.deepcopy(auxiliary).terms["alignment"]._frozen.value is encoder


@pytest.mark.parametrize("wrong", [{"weight": -1}, {"stop_at": 0}, {"stop_at": 2}])
@pytest.mark.parametrize("kind", [DispersiveConfig, AlignmentConfig])
def test_impossible_settings_are_refused(kind, wrong: dict) -> None:
    with pytest.raises(ConfigError, match="hint"):
        kind(**wrong)


def test_a_contrast_without_a_minimum_is_refused() -> None:
    with pytest.raises(ConfigError, match="contrast"):
        Objective(contrastive_weight=1.0)


def test_a_run_with_all_of_them_trains_logs_and_loads_without_them(
    folder: Path, tmp_path: Path
) -> None:
    settings = tiny_run(
        folder,
        auxiliary=AuxiliaryConfig(
            uncertainty=True,
            dispersive=DispersiveConfig(),
            alignment=AlignmentConfig(encoder="random", stop_at=0.5),
        ),
    )
    run = train(settings, run=tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert all("train/dispersive" in line for line in steps)
    assert ["train/alignment" in line for line in steps] == [line["step"] <= 7 for line in steps]
    pipeline = load(run)
    assert not list(pipeline.model.auxiliary.parameters())
    assert pipeline.sample(2).shape == (2, 1, 8, 8)


def test_alignment_trains_in_bfloat16_too(folder: Path, tmp_path: Path) -> None:
    auxiliary = AuxiliaryConfig(
        uncertainty=True, alignment=AlignmentConfig(encoder="random", stop_at=1)
    )
    settings = tiny_run(folder, auxiliary=auxiliary, precision="bfloat16", budget=Budget(steps=2))
    lines = map(json.loads, (train(settings, run=tmp_path / "run") / "metrics.jsonl").open())
    assert all(0 < line["train/alignment"] < 2 for line in lines if "train/loss" in line)


@pytest.mark.parametrize("side", [8, 32, 64, 96])
def test_small_images_are_enlarged_until_an_encoder_sees_places(side: int) -> None:
    shape = upsample_to(torch.zeros(1, 3, side, 2 * side), 64).shape
    assert shape == (1, 3, max(64, side), 2 * max(64, side))


def test_an_encoder_of_one_place_still_has_something_to_say() -> None:
    """Its mean over places would be all there is of it."""
    wanted = torch.randn(2, 5, 1, 1)
    assert cosine_alignment_loss(wanted.expand(2, 5, 4, 4), wanted).abs().max() < 1e-6
    assert cosine_alignment_loss(torch.randn(2, 5, 1, 1), torch.randn(2, 5, 4, 4)).isfinite().all()


def test_uncertainty_and_contrast_are_refused_together(folder: Path) -> None:
    with pytest.raises(ConfigError, match="contrast"):
        tiny_run(
            folder,
            auxiliary=AuxiliaryConfig(uncertainty=True),
            objective=Objective(contrastive_weight=0.05),
        )


def test_resumed_it_equals_the_uninterrupted_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.runs import resume
    from sfumato.training.trainer import Trainer

    settings = tiny_run(
        folder,
        auxiliary=AuxiliaryConfig(uncertainty=True, alignment=AlignmentConfig(encoder="random")),
    )
    whole = train(settings, run=tmp_path / "whole")
    step = Trainer.train_step

    def crashing(trainer: Trainer, batch):
        if trainer.state.counters.step == 9:
            raise KeyboardInterrupt
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", crashing)
    with pytest.raises(KeyboardInterrupt):
        train(settings, run=tmp_path / "killed")
    monkeypatch.setattr(Trainer, "train_step", step)
    assert fingerprint(resume(tmp_path / "killed")) == fingerprint(whole)


@pytest.mark.parametrize("count", [8, 26, 64])
def test_dispersion_of_maps_that_share_nearly_everything_has_the_gradient_of_float64(
    count: int,
) -> None:
    """From 26 maps on distances come from products, in which what is shared cancels: the gradient
    was once off by a fifth.
    """
    generator = torch.Generator().manual_seed(0)
    maps = (
        torch.randn(1, 32, generator=generator) + torch.randn(count, 32, generator=generator) / 3000
    )
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = maps.to(dtype).requires_grad_()
        flat = leaf.flatten(1)
        if dtype is torch.float64:
            squared = (flat[:, None] - flat[None]).square().sum(2) / flat.shape[1]
            loss = torch.logsumexp(-squared.flatten() / 1e-7, 0)
        else:
            loss = dispersive_loss(leaf, 1e-7)[0]
        gradients.append(torch.autograd.grad(loss, leaf)[0].double())
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.01
