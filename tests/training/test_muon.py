"""Muon against the iteration it stands for and against PyTorch's own; which weights it steps; that
it resumes bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato.condition import ContextSizes
from sfumato.conditioners.learned_text import LearnedTextConditioner, LearnedTextConfig
from sfumato.conditioners.tokenizer import WordTokenizer
from sfumato.errors import ConfigError
from sfumato.networks import DiTConfig, UNet, UNetConfig
from sfumato.runs import resume, train
from sfumato.training import MuonConfig, OptimizerConfig
from sfumato.training.optimizers import Muon, hidden_weights, newton_schulz, orthogonalize
from tests.helpers.runs import fingerprint, images, tiny_run
from tests.training.test_resume import interrupted


def quintic(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The published iteration, on the whole matrix."""
    x = matrix / matrix.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(16, 144), (48, 16), (24, 24)])
@pytest.mark.parametrize("decades", [0, 3])
def test_orthogonal_equals_the_published_iteration(shape: tuple[int, int], decades: int) -> None:
    matrix = torch.randn(shape) * torch.logspace(0, -decades, shape[1])
    exact = quintic(matrix.double())
    assert (orthogonalize(matrix).double() - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("shape", [(16, 144), (24, 24), (96, 288)])
def test_a_gpus_iteration_is_the_published_one_rounded(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    x /= x.norm()
    exact = quintic(x.double())
    assert (newton_schulz(x).double() - exact).norm() < 1e-3 * exact.norm()
    assert (newton_schulz(x.bfloat16()).double() - exact).norm() < 5e-2 * exact.norm()


@pytest.mark.parametrize(
    "how", [orthogonalize, lambda x: newton_schulz((x / x.norm()).bfloat16()).float()]
)
def test_singular_values_come_near_one(how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    values = torch.linalg.svdvals(how(torch.randn(32, 288)))
    assert 0.6 < values.min() < values.max() < 1.3


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 8)), torch.zeros(4, 8))


def test_steps_equal_pytorchs_own_on_matrices() -> None:
    ours = nn.Linear(64, 48, bias=False)
    theirs = copy.deepcopy(ours)
    start = ours.weight.detach().clone()
    steppers = [
        Muon(ours.parameters(), lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.Muon(
            theirs.parameters(),
            lr=0.02,
            momentum=0.95,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
    ]
    for _ in range(4):
        gradient = torch.randn(48, 64)
        for layer, stepper in zip((ours, theirs), steppers, strict=True):
            layer.weight.grad = gradient.clone()
            stepper.step()
    moved = (theirs.weight - start).norm()
    assert moved > 0.5
    assert (ours.weight - theirs.weight).norm() < 0.03 * moved  # theirs iterates in bfloat16


def test_a_kernel_is_stepped_as_the_matrix_of_its_outputs_in_any_memory_format() -> None:
    kernel = torch.randn(32, 32, 3, 3)
    conv, flat = (
        nn.Conv2d(32, 32, 3, bias=False).to(memory_format=torch.channels_last),
        nn.Linear(288, 32, bias=False),
    )
    conv.weight.data.copy_(kernel)
    flat.weight.data.copy_(kernel.flatten(1))
    for layer in (conv, flat):
        layer.weight.grad = torch.linspace(-1, 1, kernel.numel()).sin().view(layer.weight.shape)
        Muon([layer.weight], lr=0.1, momentum=0.9, weight_decay=0.1).step()
    assert torch.equal(conv.weight.flatten(1), flat.weight)


def test_hidden_layers_are_muons_and_everything_is_stepped_once() -> None:
    text = LearnedTextConditioner(LearnedTextConfig(size=32), words=WordTokenizer(tuple("abc")))
    config = UNetConfig(
        channels=32, multipliers=(1, 2), blocks=1, attention_depths=(1,), head_channels=32
    )
    model = nn.ModuleDict(
        {
            "network": UNet(config, image_channels=3, context=ContextSizes(vector=32, tokens=32)),
            "text": text,
        }
    )
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = (
        [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        for optimizer in OptimizerConfig(muon=MuonConfig()).build(model)
    )
    assert sorted(name for group in (*adamw, *muon) for name in group) == sorted(names.values())
    for name in (
        "network.middle.block.conv_in.weight",
        "text.transformer.layers.0.self_attn.in_proj_weight",
    ):
        assert name in muon[0]
    for name in ("network.input.weight", "network.output.weight"):
        assert name in adamw[0]
    for name in ("text.embedding.weight", "text.positions"):
        assert name in adamw[1]
    assert all(
        name.endswith("bias")
        or "norm" in name
        or name in ("text.embedding.weight", "text.positions")
        for name in adamw[1]
    )


@pytest.mark.parametrize(
    "network",
    [
        DiTConfig(patch_size=4, hidden_size=64, depth=1),
        UNetConfig(channels=32, multipliers=(1,), attention_depths=()),
    ],
)
def test_first_and_last_layers_are_adamws_however_large(network: DiTConfig | UNetConfig) -> None:
    built = network.build(image_channels=48)
    stepped = {id(p) for p in hidden_weights(built)}
    assert stepped
    assert not stepped & {
        id(p)
        for layer in (*built.input_layers(), *built.output_layers())
        for p in layer.parameters()
    }


def test_a_model_without_hidden_layers_is_adamws() -> None:
    small = nn.Linear(8, 8)
    assert hidden_weights(small) == []
    assert len(OptimizerConfig(muon=MuonConfig()).build(small)) == 1


def test_impossible_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match="momentum = 1"):
        MuonConfig(momentum=1)


@pytest.mark.parametrize("after", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    settings = tiny_run(
        images(tmp_path / "images"),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=3, muon=MuonConfig()),
    )
    whole = fingerprint(train(settings, run=tmp_path / "whole"))
    assert fingerprint(resume(interrupted(settings, tmp_path / "run", monkeypatch, after))) == whole
