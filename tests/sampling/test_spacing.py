"""Where the levels of a sampling grid lie: the indices of diffusers' timesteps, written out."""

from __future__ import annotations

import pytest
import torch

from sfumato.diffusion import Karras, Linear, ScaledLinear, UniformLogSNR
from sfumato.errors import ScheduleError
from sfumato.sampling import Even, Leading, grid

TABLE = ScaledLinear()


def entries(levels) -> list[int]:
    """Indices of the levels in the table of Stable Diffusion, -1 for clean data."""
    alphas = torch.cat([torch.ones(1, dtype=torch.float64), (1 - TABLE.betas()).cumprod(0).sqrt()])
    distance = (alphas[:, None] - levels.alpha[None]).abs()
    assert float(distance.min(0).values.max()) < 1e-12
    return (distance.argmin(0) - 1).tolist()


@pytest.mark.parametrize(
    ("steps", "offset", "end", "expected"),
    [
        (4, 0, "clean", [750, 500, 250, 0, -1]),
        (4, 1, "clean", [751, 501, 251, 1, -1]),
        (4, 1, "first", [751, 501, 251, 1, 0]),
        (3, 1, "first", [667, 334, 1, 0]),  # 1000 // 3 = 333
        (1, 1, "clean", [1, -1]),
        (4, 0, "first", [750, 500, 250, 0]),  # and no step from entry 0 to itself
    ],
)
def test_leading_takes_every_nth_entry_from_the_clean_end(
    steps: int, offset: int, end: str, expected: list[int]
) -> None:
    assert entries(grid(TABLE, steps, spacing=Leading(offset=offset, end=end))) == expected


def test_even_is_trailing() -> None:
    assert entries(grid(TABLE, 4)) == [999, 749, 499, 249, -1]


def test_strength_takes_the_last_steps_of_the_same_entries() -> None:
    whole = grid(TABLE, 10, spacing=Leading(offset=1))
    part = grid(TABLE, 10, strength=0.6, spacing=Leading(offset=1))
    assert torch.equal(part.alpha, whole.alpha[-7:])
    assert torch.equal(part.sigma, whole.sigma[-7:])


def test_clean_data_end_a_grid_at_their_own_scale() -> None:
    levels = grid(UniformLogSNR(), 5, spacing=Leading(table_size=50))
    assert (float(levels.alpha[-1]), float(levels.sigma[-1])) == (1, 0)
    assert float(grid(Karras(), 5).alpha[-1]) == 1


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_the_default_is_even_in_time(strength: float) -> None:
    levels = grid(Linear(), 10, strength=strength, spacing=Even())
    count = round(10 * strength)
    expected = torch.linspace(strength, 0, count + 1, dtype=torch.float64)
    assert torch.equal(levels.sigma, expected)
    assert torch.equal(grid(Linear(), 10, strength=strength).sigma, levels.sigma)


def test_more_steps_than_entries_are_refused() -> None:
    with pytest.raises(ScheduleError, match="take at most 50 steps"):
        grid(TABLE, 51, spacing=Leading(table_size=50))


def test_a_single_step_that_leads_nowhere_is_refused() -> None:
    with pytest.raises(ScheduleError, match="one step would begin where it ends"):
        grid(TABLE, 10, strength=0.1, spacing=Leading(end="first"))
    assert entries(grid(TABLE, 1, spacing=Leading(end="first", offset=1))) == [1, 0]
