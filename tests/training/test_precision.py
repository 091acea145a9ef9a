"""`precision=auto` is decided by what the machine can do, and never by passes of the model."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato.training import Budget, Trainer, TrainingConfig, precision
from sfumato.training.autotune import resolve_precision
from sfumato.training.precision import choose, faster, has_bfloat16
from sfumato.training.state import Counters
from tests.helpers.runs import images, tiny_run

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"amx_tile": True, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False, "sve_bf16": False}, False),
        ({}, None),
    ],
)
def test_flags_of_the_processor_decide(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16(CPU) is expected


def test_an_older_torch_has_linux_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    said = {"text": "processor : 0\nflags\t\t: fpu avx2 avx512_bf16\n"}
    monkeypatch.setattr(Path, "read_text", lambda self: said["text"])
    assert has_bfloat16(CPU) is True
    said["text"] = "processor : 0\nFeatures\t: fp asimd\n"
    assert has_bfloat16(CPU) is False

    def missing(self: Path) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", missing)
    assert has_bfloat16(CPU) is None


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_a_gpu_is_asked_for_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imagined 9000")
    chosen, line = choose(nn.Linear(4, 4), GPU)
    assert chosen == expected
    assert "Imagined 9000" in line


def test_without_instructions_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(
        precision, "_timed", lambda *args, **how: pytest.fail("a product was timed")
    )
    assert choose(nn.Linear(4, 4), CPU) == (
        "float32",
        "precision float32: this processor has no bfloat16 instructions",
    )


@pytest.mark.parametrize("found", [True, None])
@pytest.mark.parametrize(
    ("bfloat16", "expected"),
    [(0.5, "bfloat16"), (0.89, "bfloat16"), (0.91, "float32"), (3.0, "float32")],
)
def test_else_a_product_decides_and_bfloat16_must_win_by_a_tenth(
    monkeypatch: pytest.MonkeyPatch, found: bool | None, bfloat16: float, expected: str
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: found)
    taken = {torch.float32: 0.010, torch.bfloat16: 0.010 * bfloat16}
    monkeypatch.setattr(precision, "_timed", lambda weight, columns, dtype, **how: taken[dtype])
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(2, 2))
    chosen, line = choose(network, CPU)
    assert chosen == expected
    assert "10.0 ms in float32" in line
    assert "in bfloat16" in line


def test_a_hopeless_product_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    weight = torch.ones(2, 2)
    assert precision._timed(weight, weight, torch.float32, enough=0.5) == 1.0
    assert next(ticks) == 2


@pytest.mark.parametrize("network", [nn.Identity(), nn.Conv2d(1, 1, 1), nn.Linear(5000, 3000)])
def test_the_product_has_a_size_for_any_network(network: nn.Module) -> None:
    name, line = faster(precision._widest(network), CPU)
    assert name in precision.CHOICES
    assert line.startswith(f"precision {name}: ")


def test_no_pass_of_the_model_is_taken_and_what_was_settled_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Trainer, "_trial", lambda self: pytest.fail("a pass of the model was taken")
    )
    said: list[str] = []
    config, counters = TrainingConfig(precision="auto"), Counters()
    resolve_precision(config, counters, nn.Linear(4, 4), say=said.append)
    assert counters.precision in precision.CHOICES
    assert len(said) == 1
    # as an older checkpoint, or another machine, settled it
    resumed = Counters(precision="bfloat16")
    resolve_precision(config, resumed, nn.Linear(4, 4), say=said.append)
    assert resumed.precision == "bfloat16"
    assert len(said) == 1
    from sfumato.runs import train

    train(
        tiny_run(images(tmp_path / "images"), precision="auto", budget=Budget(steps=1)),
        run=tmp_path / "run",
    )
