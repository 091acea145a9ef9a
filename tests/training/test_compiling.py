"""When the network is compiled: as asked, or where the run is long enough to make up for it. That
the results are the same:
tests/networks/test_compiled.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.errors import ConfigError
from sfumato.networks import DiT, DiTConfig
from sfumato.runs import load, resume, train
from sfumato.training import (
    Budget,
    OptimizerConfig,
    Trainer,
    TrainingConfig,
    ValidationConfig,
    autotune,
)
from sfumato.training.state import Counters
from tests.helpers.runs import fingerprint, images, tiny_run

TRANSFORMER = DiTConfig(hidden_size=32, depth=1, head_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the classes of compiled networks."""
    calls: list[str] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: calls.append(type(self).__name__)
    )
    return calls


@pytest.mark.parametrize("how", ["auto", "off"])
def test_a_short_run_is_not_compiled(
    folder: Path, tmp_path: Path, compiled: list[str], how: str
) -> None:
    train(
        tiny_run(folder, network=TRANSFORMER, budget=Budget(steps=2), compile=how),
        run=tmp_path / "run",
    )
    assert compiled == []


def test_what_is_asked_for_is_done(folder: Path, tmp_path: Path, compiled: list[str]) -> None:
    train(tiny_run(folder, budget=Budget(steps=2), compile="on"), run=tmp_path / "run")
    assert compiled == ["UNet"]


def test_a_transformer_is_compiled_where_the_run_is_long(
    folder: Path, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiT, "compile_after_s", 1e-3)
    train(tiny_run(folder, network=TRANSFORMER, budget=Budget(steps=2)), run=tmp_path / "run")
    assert compiled == ["DiT"]
    monkeypatch.setattr(
        Trainer,
        "_trial",
        lambda self: pytest.fail("measured once in a run's life: a busy machine changes nothing"),
    )
    resume(tmp_path / "run", overrides={"budget.steps": 3})
    assert compiled == ["DiT", "DiT"]


@pytest.mark.parametrize(
    ("seconds", "steps", "pays"), [(1.0, 60, False), (1.0, 1200, True), (0.01, 1200, False)]
)
def test_on_a_gpu_short_runs_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int, pays: bool
) -> None:
    monkeypatch.setattr(autotune, "_device", lambda network: torch.device("cuda"))
    monkeypatch.setattr(autotune, "_timed", lambda *args: seconds)
    config, counters = TrainingConfig(budget=Budget(steps=steps), precision="float32"), Counters()
    assert (
        autotune._pays(config, counters, torch.nn.Identity(), 100, lambda: lambda dtype: None)
        == pays
    )
    assert counters.pass_s == seconds


def test_a_u_net_is_not_compiled_however_long_the_run(
    folder: Path, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "steps_of", lambda self, seconds, *, batch_size, images: 10**9)
    train(tiny_run(folder, budget=Budget(steps=2)), run=tmp_path / "run")
    assert compiled == []


def test_without_a_compiler_nothing_is_compiled(
    folder: Path,
    tmp_path: Path,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(DiT, "compile_after_s", 1e-3)
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    train(tiny_run(folder, network=TRANSFORMER, budget=Budget(steps=2)), run=tmp_path / "run")
    assert compiled == []
    said = " ".join("".join(capsys.readouterr()).split())
    assert (
        "not compiling the network, which would be faster: it needs a C++ compiler and Python's headers"
        in said
    )
    with pytest.raises(ConfigError, match=r"apt install g\+\+ python3-dev"):
        train(tiny_run(folder, budget=Budget(steps=2), compile="on"), run=tmp_path / "asked")
    assert not (tmp_path / "asked" / "config.yaml").exists()  # refused before anything was done
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        load(tmp_path / "run").compile()


def test_held_out_images_are_looked_at_without_compiling_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = []

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        frames.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compile_module(self, backend=counted)
    )
    settings = tiny_run(
        folder,
        network=TRANSFORMER,
        budget=Budget(steps=4),
        compile="on",
        batch_size=10,
        micro_batch=None,
    )
    train(settings, run=tmp_path / "run")
    assert len(frames) == 1


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_compiled_and_resumed_it_ends_as_if_left_alone(
    folder: Path, tmp_path: Path, micro_batch: int | None
) -> None:
    """Bit for bit, though what is compiled for the first shape met is not what is compiled for
    others.
    """
    # whatever the budget
    constant = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant")
    changed = {
        "optimizer": constant,
        "compile": "on",
        "micro_batch": micro_batch,
        "validation": ValidationConfig(every_steps=100, copy_samples=0),
    }
    settings = tiny_run(folder, network=TRANSFORMER, budget=Budget(steps=6), **changed)
    torch.compiler.reset()
    whole = train(settings, run=tmp_path / "whole")
    torch.compiler.reset()
    cut = train(replace(settings, budget=Budget(steps=3)), run=tmp_path / "cut")
    torch.compiler.reset()
    resume(cut, overrides=["budget.steps=6"])
    found, expected = fingerprint(cut), fingerprint(whole)
    for part in ("model", "ema", "optimizer", "losses"):
        assert found[part] == expected[part]


@pytest.mark.slow
def test_compiled_sampling_makes_the_same_images(folder: Path, tmp_path: Path) -> None:
    train(tiny_run(folder, network=TRANSFORMER, budget=Budget(steps=20)), run=tmp_path / "run")
    pipeline = load(tmp_path / "run")
    eager = pipeline.sample(10, seed=3, steps=5, batch_size=4)
    pipeline.compile()
    assert (pipeline.sample(10, seed=3, steps=5, batch_size=4) - eager).abs().max() < 1e-3
