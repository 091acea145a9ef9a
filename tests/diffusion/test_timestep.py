"""`Timestep`: the index that networks trained on a table of levels are given."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.diffusion import (
    Cosine,
    LinearBetas,
    NoiseLevel,
    ScaledLinear,
    Timestep,
    ZeroTerminalSNR,
)

TABLES = {
    "stable diffusion": Timestep(schedule=ScaledLinear()),
    "ddpm": Timestep(schedule=LinearBetas()),
    "zero terminal SNR": Timestep(schedule=ZeroTerminalSNR(ScaledLinear())),
    "cosine of 50": Timestep(schedule=Cosine(), table_size=50),
}


@pytest.mark.parametrize("name", TABLES)
def test_an_entry_has_its_own_index(name: str) -> None:
    timestep = TABLES[name]
    count = timestep.table_size
    level = timestep.schedule(torch.arange(1, count + 1, dtype=torch.float64) / count)
    expected = torch.arange(count, dtype=torch.float64)
    assert float((timestep(level) - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_it_depends_on_the_log_snr_alone_and_is_linear_in_log_sigma(scale: float) -> None:
    timestep = TABLES["stable diffusion"]
    low, high = (timestep.schedule(torch.tensor(i / 1000, dtype=torch.float64)) for i in (501, 502))
    for part in (0.0, 0.25, 0.9):
        ratio = math.exp(
            (1 - part) * math.log(low.sigma / low.alpha) + part * math.log(high.sigma / high.alpha)
        )
        level = NoiseLevel(
            torch.tensor(scale, dtype=torch.float64),
            torch.tensor(scale * ratio, dtype=torch.float64),
        )
        assert float(timestep(level)) == pytest.approx(500 + part, abs=1e-7)


def test_beyond_the_table_it_stays_at_the_ends() -> None:
    zero, one = torch.zeros(()), torch.ones(())
    for timestep in TABLES.values():
        assert float(timestep(NoiseLevel(one, zero))) == 0
        assert float(timestep(NoiseLevel(zero, one))) == timestep.table_size - 1


def test_it_rises_with_the_noise_for_every_level() -> None:
    times = torch.linspace(0, 1, 4001, dtype=torch.float64)
    for timestep in TABLES.values():
        index = timestep(Cosine()(times))
        assert bool((index.diff() >= 0).all())
        assert bool(
            (index.diff()[(index > 0)[:-1] & (index < timestep.table_size - 1)[1:]] > 0).all()
        )
