"""Masks of the loss: errors count where they are white, exactly as a mean over those elements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfumato.condition import Condition
from sfumato.data import AugmentConfig, Batch, DataConfig, Dataset, Folder, batches, index
from sfumato.diffusion import Denoised, Flow, Linear, NetworkDenoiser, Objective
from sfumato.errors import DataError
from sfumato.recipes import Run
from sfumato.runs.preparation import prepare
from sfumato.runs.training import build_trainer
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Trainer
from sfumato.training.loss_mask import loss_weights
from tests.helpers.runs import tiny_run

SIDE = 8


class Constant:
    """A network whose output is a parameter, so that the loss's gradient can be read off it."""

    def __init__(self, output: Tensor) -> None:
        self.output = output.requires_grad_()

    def __call__(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        return self.output


def parts(count: int = 3, channels: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, SIDE, SIDE)
    return tuple(torch.randn(shape, generator=generator) for _ in range(3))


def loss(x0: Tensor, noise: Tensor, network: Constant, weights: Tensor | None) -> Tensor:
    denoiser = NetworkDenoiser(network=network, parameterization=Flow())
    level = Linear()(torch.linspace(0.2, 0.8, len(x0)))
    return Objective()(denoiser, x0, level=level, noise=noise, weights=weights).per_sample


def test_the_loss_and_its_gradient_are_those_of_the_weighted_mean() -> None:
    x0, noise, output = parts()
    weights = torch.zeros(3, 1, SIDE, SIDE)
    weights[0, :, :3, :5] = 1
    weights[1] = torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    weights[2, :, 4, 4] = 1
    network = Constant(output)
    loss(x0, noise, network, weights).sum().backward()
    target = Flow().target(Denoised(x0, noise), Linear()(torch.linspace(0.2, 0.8, 3)))
    error = (output.detach() - target).double().numpy()
    w = np.broadcast_to(weights.double().numpy(), error.shape)
    expected = 2 * w * error / w.sum((1, 2, 3), keepdims=True)
    gradient = network.output.grad
    assert gradient is not None
    assert np.abs(gradient.numpy() - expected).max() < 1e-6
    assert bool((gradient[w == 0] == 0).all())  # exactly
    values = (w * error**2).sum((1, 2, 3)) / w.sum((1, 2, 3))
    assert np.abs(loss(x0, noise, network, weights).detach().numpy() - values).max() < 1e-6


def test_a_white_mask_changes_no_bit_and_a_black_one_teaches_nothing() -> None:
    x0, noise, output = parts()
    plain, white, black = Constant(output.clone()), Constant(output.clone()), Constant(output)
    without = loss(x0, noise, plain, None)
    masked = loss(x0, noise, white, torch.ones(3, 1, SIDE, SIDE))
    assert torch.equal(without, masked)
    without.sum().backward()
    masked.sum().backward()
    assert plain.output.grad is not None
    assert white.output.grad is not None
    assert torch.equal(plain.output.grad, white.output.grad)
    none = loss(x0, noise, black, torch.zeros(3, 1, SIDE, SIDE))
    none.sum().backward()
    assert none.tolist() == [0, 0, 0]
    assert black.output.grad is not None
    assert not black.output.grad.any()


def test_masks_become_weights_of_latents_by_their_area() -> None:
    mask = torch.full((3, 1, 4, 4), -1.0)
    mask[0, 0, :2, :2] = 1
    mask[0, 0, 0, 2] = 1
    mask[2] = torch.nan  # no mask
    weights = loss_weights({"loss_mask": mask}, slice(0, 3), like=torch.zeros(3, 7, 2, 2))
    assert weights is not None
    assert weights[:, 0].tolist() == [[[1, 0.25], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]]
    assert loss_weights({}, slice(0, 3), like=torch.zeros(3, 7, 2, 2)) is None
    one = loss_weights({"loss_mask": mask}, slice(2, 3), like=torch.zeros(1, 7, 2, 2))
    assert one is not None
    assert one.flatten().tolist() == [1, 1, 1, 1]


def images(folder: Path, *, masks: str = "", num: int = 16) -> Path:
    """Gray images; a mask is white in the left half, or everywhere."""
    folder.mkdir()
    for number in range(num):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE), np.uint8)
        white = np.full((SIDE, SIDE), 255, np.uint8)
        if masks != "white":
            white[:, SIDE // 2 :] = 0
        if masks == "alpha":
            Image.merge("LA", [Image.fromarray(pixels), Image.fromarray(white)]).save(
                folder / f"{number:02d}.png"
            )
            continue
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        if masks:
            Image.fromarray(white).save(folder / f"{number:02d}.mask.png")
    return folder


def dataset(folder: Path, **settings: object) -> Dataset:
    config = DataConfig(source=Folder(str(folder)), resolution=SIDE, channels=1, cache="off")
    return index(replace(config, **settings))


@pytest.mark.parametrize(("masks", "setting"), [("half", "files"), ("alpha", "alpha")])
def test_a_mask_is_read_from_its_file_or_the_image_itself(
    tmp_path: Path, masks: str, setting: str
) -> None:
    read = dataset(images(tmp_path / "x", masks=masks), loss_mask=setting)
    expected = torch.ones(2, 1, SIDE, SIDE)
    expected[..., SIDE // 2 :] = -1
    assert torch.equal(read.context(read.training[:2])["loss_mask"], expected)
    assert read.remarks[-1] == (
        "data.loss_mask: 16 of 16 images have a mask; errors count in 50% of their area"
    )
    assert "mask" not in read.context(read.training[:2])


def test_an_image_without_a_mask_counts_everywhere_and_a_black_one_is_said(tmp_path: Path) -> None:
    folder = images(tmp_path / "x", masks="half")
    (folder / "03.mask.png").unlink()
    Image.new("L", (SIDE, SIDE)).save(folder / "05.mask.png")
    (folder / "07.mask.png").write_bytes(b"no image")
    read = dataset(folder, loss_mask="files")
    names = [entry.name for entry in read.entries]
    maps = read.annotations.context(np.arange(16))["loss_mask"]
    assert [names[i] for i in range(16) if maps[i].isnan().all()] == ["03.png", "07.png"]
    assert read.notes["mask_unreadable"] == ["07.png"]
    assert read.remarks[-2:] == (
        "data.loss_mask: 14 of 16 images have a mask; errors count in 46% of their area, and "
        "everywhere in the others",
        "warning: 1 masks are black: nothing is learned from their images",
    )


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [("files", "none of 16 images has a mask"), ("alpha", "is transparent anywhere")],
)
def test_masks_that_are_not_there_are_refused(tmp_path: Path, setting: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        dataset(images(tmp_path / "x"), loss_mask=setting)


def trained(folder: Path, place: Path, **data: object) -> tuple[Trainer, Batch]:
    """A trainer before its first step, and its first batch."""
    run: Run = tiny_run(folder)
    settings = {"augment": AugmentConfig(flip="horizontal"), **data}
    prepared = prepare(
        replace(run, data=replace(run.data, **settings), conditioner=type(run.conditioner)())
    )
    place.mkdir()
    trainer = build_trainer(prepared, RunDirectory(place))
    return trainer, next(batches(trainer.dataset, trainer.plan, start=0))


def gradients(trainer: Trainer, batch: Batch) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of the weights; and the network's output with its gradient."""
    outputs: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    model = trainer.state.model
    model.zero_grad()
    handle = model.network.register_forward_hook(keep)
    (group,) = batch.groups
    losses = trainer.task.loss(
        model, batch, group, slice(0, len(group)), progress=0.0, dtype=torch.float32
    )
    losses.per_sample.mean().backward()
    handle.remove()
    (output,) = outputs
    assert output.grad is not None
    weights = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return weights, output.grad, losses.per_sample.detach()


def test_training_learns_nothing_outside_of_the_mask_and_all_inside(tmp_path: Path) -> None:
    """The images are mirrored at random, and their masks with them."""
    trainer, batch = trained(
        images(tmp_path / "half", masks="half"), tmp_path / "run", loss_mask="files"
    )
    _, gradient, _ = gradients(trainer, batch)
    (group,) = batch.groups
    inside = (group.context["loss_mask"] > 0).expand_as(gradient)
    assert 0 < int(inside[:, 0, 0, 0].sum()) < len(group)  # some are mirrored
    assert bool((gradient[~inside] == 0).all())
    assert bool((gradient[inside] != 0).all())


def test_a_white_mask_trains_bit_for_bit_as_none(tmp_path: Path) -> None:
    plain = trained(images(tmp_path / "plain"), tmp_path / "run")
    white = trained(
        images(tmp_path / "white", masks="white"), tmp_path / "other", loss_mask="files"
    )
    a, b = gradients(*plain), gradients(*white)
    assert torch.equal(a[2], b[2])
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
