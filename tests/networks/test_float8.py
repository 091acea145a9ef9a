"""Linear layers in eight bits: what is computed, what stays as it was, and that a training goes
through.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.networks import DiTConfig, UNetConfig
from sfumato.nn.float8 import convert_to_float8
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder
from sfumato.runs import load, resume, train
from sfumato.training import Budget
from tests.helpers.runs import images, tiny_run

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To eight bits and back, the largest magnitude being the largest there is."""
    scale = LARGEST[dtype] / x.abs().max()
    return (x * scale).to(dtype).float() / scale


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).norm().item() / b.norm().item()


def test_products_are_those_of_rounded_tensors() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 128)
    within = nn.ModuleList([copy.deepcopy(plain)])
    convert_to_float8(within, [within[0]])
    network = within[0]
    x, given = torch.randn(32, 64, requires_grad=True), torch.randn(32, 128)
    found = network(x)
    weight, bias = plain.weight, plain.bias
    eight, wide = torch.float8_e4m3fn, torch.float8_e5m2
    expected = rounded(x.detach(), eight) @ rounded(weight.detach(), eight).T + bias
    assert error(found, expected) < 1e-5
    assert error(found, plain(x)) > 1e-2
    x_gradient, weight_gradient = torch.autograd.grad((found * given).sum(), (x, network.weight))
    assert error(x_gradient, rounded(given, wide) @ rounded(weight.detach(), eight)) < 1e-5
    assert error(weight_gradient, rounded(given, wide).T @ rounded(x.detach(), eight)) < 1e-5


def test_weights_stay_what_they_are() -> None:
    network = DiTConfig(hidden_size=64, depth=2, head_dim=32).build(image_channels=3)
    before, names = dict(network.named_parameters()), list(network.state_dict())
    convert_to_float8(network, network.float8_layers())
    after = dict(network.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert list(network.state_dict()) == names
    assert sum(type(module).__name__ == "Float8Linear" for module in network.modules()) >= 2 * 7
    assert type(network.output) is nn.Linear


def test_it_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"network\.kind=dit"):
        train(tiny_run(images(tmp_path / "images"), precision="float8"), run=tmp_path / "run")
    with pytest.raises(ConfigError, match="an autoencoder is convolutions"):
        TrainedAutoencoder(precision="float8")


def test_a_network_without_such_layers_is_refused() -> None:
    network = UNetConfig(channels=64).build(image_channels=3)
    with pytest.raises(ConfigError, match="precision=bfloat16"):
        convert_to_float8(network, network.float8_layers())


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    network = DiTConfig(hidden_size=64, depth=1).build(image_channels=3)
    with pytest.raises(ConfigError, match=r"sfumato\[float8\]"):
        convert_to_float8(network, network.float8_layers())


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_run_trains_in_it_resumes_and_is_loaded_as_any_other(tmp_path: Path) -> None:
    network = DiTConfig(hidden_size=64, depth=1, head_dim=32)
    settings = tiny_run(
        images(tmp_path / "images"), network=network, precision="float8", budget=Budget(steps=3)
    )
    run = train(settings, run=tmp_path / "run")
    resume(run, overrides={"budget.steps": 5})
    plain = train(replace(settings, precision="bfloat16"), run=tmp_path / "plain")
    assert len(losses(run)) == 5
    # the output layer begins at zero, whatever the blocks give
    assert losses(run)[0] == losses(plain)[0]
    assert losses(run)[2] != losses(plain)[2]
    made = load(run).sample(2, steps=2)
    assert made.isfinite().all()
