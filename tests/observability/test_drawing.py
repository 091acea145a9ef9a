"""Grids and plots put the right pixels in the right place."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from sfumato.cli.explain import IMAGES, _with_contrast
from sfumato.cli.trajectory_images import dimmed
from sfumato.diffusion import NoiseLevel
from sfumato.observability.images import (
    GAP,
    PAPER,
    SMALLEST_TILE,
    grid_image,
    save_png,
    to_pil,
    to_uint8,
)
from sfumato.observability.plot import COLOURS, Line, line_plot, ticks


def levels(count: int, side: int = 8, channels: int = 1) -> torch.Tensor:
    """Flat images of rising brightness."""
    return torch.linspace(0, 1, count).view(-1, 1, 1, 1).expand(count, channels, side, side)


def test_floats_become_bytes_rounded_and_clamped() -> None:
    images = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.7]).view(1, 1, 1, 5)
    assert to_uint8(images)[0, 0, :, 1].tolist() == [0, 0, 128, 255, 255]


def test_gray_stays_gray_and_colour_keeps_its_order() -> None:
    assert to_pil(torch.zeros(1, 4, 5)).mode == "L"
    colour = to_pil(torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1).expand(3, 4, 5))
    assert colour.size == (5, 4)
    assert colour.getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [(1, None, (1, 1)), (10, None, (4, 3)), (16, None, (4, 4)), (7, 5, (5, 2))],
)
def test_a_grid_is_as_square_as_it_gets_unless_told(
    count: int, columns: int | None, shape: tuple[int, int]
) -> None:
    sheet = grid_image(levels(count), columns=columns)
    tile = SMALLEST_TILE + GAP
    assert sheet.size == (GAP + shape[0] * tile, GAP + shape[1] * tile)


def test_small_images_are_enlarged_by_whole_pixels_and_large_ones_kept() -> None:
    assert grid_image(levels(1, side=9)).size == (GAP + 63 + GAP,) * 2
    assert grid_image(levels(1, side=100)).size == (GAP + 100 + GAP,) * 2
    checks = (torch.arange(64).view(1, 1, 8, 8) // 8 + torch.arange(8)) % 2
    tile = np.asarray(grid_image(checks.float()))[GAP:-GAP, GAP:-GAP, 0]
    assert (tile.reshape(8, 7, 8, 7) == 255 * checks[0, 0].numpy()[:, None, :, None]).all()


def test_tiles_run_along_rows_first() -> None:
    sheet = grid_image(levels(6, side=SMALLEST_TILE), columns=3)
    seen = [
        sheet.getpixel(
            (GAP + column * (SMALLEST_TILE + GAP) + 5, GAP + row * (SMALLEST_TILE + GAP) + 5)
        )[0]
        for row in range(2)
        for column in range(3)
    ]
    assert seen == [0, 51, 102, 153, 204, 255]


def test_a_place_without_a_image_is_paper() -> None:
    assert (
        grid_image(levels(3), columns=2).getpixel(
            (GAP + SMALLEST_TILE + GAP + 5, GAP + SMALLEST_TILE + GAP + 5)
        )
        == PAPER
    )


def test_labels_take_room_of_their_own() -> None:
    plain = grid_image(levels(4), columns=2)
    labelled = grid_image(
        levels(4), columns=2, row_labels=["noisy", "guess of x0"], labels=["a", "b"]
    )
    left, top = labelled.width - plain.width, labelled.height - plain.height
    assert left > 11 * 6
    assert top > 13
    assert (np.asarray(labelled)[top + GAP :, left + GAP :] == np.asarray(plain)[GAP:, GAP:]).all()
    assert np.asarray(labelled)[:, :left].min() < 100


def test_inputs_fill_a_row_of_their_own_and_no_more() -> None:
    plain = np.asarray(grid_image(levels(4), columns=2))
    inputs = {
        "image": torch.ones(1, 8, 8),
        "mask": torch.zeros(1, 8, 8),
        "doodle": torch.ones(1, 8, 8),
    }
    sheet = np.asarray(grid_image(levels(4), columns=2, inputs=inputs))
    tile = SMALLEST_TILE + GAP
    assert sheet.shape[1] == GAP + 3 * tile
    below = sheet[-(GAP + 2 * tile) :]
    assert (below[GAP : GAP + SMALLEST_TILE, GAP : GAP + SMALLEST_TILE] == 0).all()
    assert sheet.shape[0] > plain.shape[0] + tile
    first = sheet[-(GAP + 3 * tile) : -(GAP + 2 * tile)]
    middles = [int(first[tile // 2, GAP + column * tile + 5, 0]) for column in range(3)]
    assert middles == [255, 0, 255]


@pytest.mark.parametrize("logsnr", [-4.0, 0.0, 4.0])
def test_noisy_images_are_shown_on_one_scale_whatever_the_schedule(logsnr: float) -> None:
    x0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = math.exp(-logsnr / 2)
    # variance exploding, straight, variance preserving
    alphas = (1.0, 1 / (1 + ratio), 1 / math.hypot(1, ratio))
    found = [
        NoiseLevel(
            torch.tensor(a, dtype=torch.float64), torch.tensor(a * ratio, dtype=torch.float64)
        )
        for a in alphas
    ]
    shown = [dimmed(level.mix(x0, eps), level) for level in found]
    for other in shown[1:]:
        torch.testing.assert_close(other, shown[0])
    assert torch.equal(dimmed(x0, NoiseLevel(torch.tensor(1.0), torch.tensor(0.0))), x0)


def test_a_png_carries_its_settings_and_makes_its_folder(tmp_path: Path) -> None:
    settings = {"seed": 3, "category": ["ü", "7"], "guidance": 1.5}
    path = save_png(to_pil(torch.zeros(1, 2, 2)), tmp_path / "a" / "b.png", settings)
    with Image.open(path) as image:
        assert json.loads(image.text["sfumato"]) == settings
    with Image.open(save_png(to_pil(torch.zeros(1, 2, 2)), tmp_path / "c.png")) as image:
        assert image.text == {}


finite = st.floats(-1e12, 1e12)


@given(finite, finite)
@example(0.0, 5e-324)
@example(1e12, 1e12 + 1e-4)
def test_ticks_are_few_even_and_enclose_the_range(a: float, b: float) -> None:
    low, high = sorted((a, b))
    marks = ticks(low, high)
    steps = np.diff(marks)
    assert 2 <= len(marks) <= 9
    slack = 1e-6 * (marks[-1] - marks[0]) + 1e-9 * max(abs(low), abs(high))
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert (steps > 0).all()
    assert np.ptp(steps) <= 1e-6 * steps[0] + 1e-9 * max(abs(low), abs(high))


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
        (0.1, 0.3, [0.1, 0.15, 0.2, 0.25, 0.3]),
        (0, 1e-12, [0, 2e-13, 4e-13, 6e-13, 8e-13, 1e-12]),
    ],
)
def test_ticks_are_round(low: float, high: float, marks: list[float]) -> None:
    assert ticks(low, high) == marks


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-9, 1e20])
def test_one_value_has_ticks_around_it(value: float) -> None:
    marks = ticks(value, value)
    assert marks[0] < value < marks[-1]


def coloured(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of about that colour, legend and its corner left out."""
    pixels = np.asarray(image).astype(int)
    pixels[:110, 440:] = 255
    return np.argwhere(np.abs(pixels - colour).sum(-1) < 60)


def test_a_plot_draws_every_line_where_it_belongs() -> None:
    xs = [i / 50 for i in range(51)]
    plot = line_plot("title", "x", [Line("up", xs, xs), Line("down", xs, [1 - x for x in xs])])
    assert plot.size == (640, 380)
    up, down = coloured(plot, COLOURS[0]), coloured(plot, COLOURS[1])
    assert np.corrcoef(up.T)[0, 1] < -0.99  # rows are counted from the top
    assert np.corrcoef(down.T)[0, 1] > 0.99
    assert np.ptp(up[:, 1]) > 300


def test_points_that_are_not_finite_are_gaps() -> None:
    xs = [float(i) for i in range(11)]
    whole = line_plot("t", "x", [Line("a", xs, xs)])
    gap = line_plot("t", "x", [Line("a", xs, [math.nan if 4 <= x <= 6 else x for x in xs])])
    middle = range(310, 360)
    assert any(column in middle for column in coloured(whole, COLOURS[0])[:, 1])
    assert not any(column in middle for column in coloured(gap, COLOURS[0])[:, 1])


@pytest.mark.parametrize(
    "ys", [[], [math.nan], [1.0], [2.0, 2.0], [0.0, 1e-13], [-math.inf, math.inf]]
)
def test_no_data_is_too_odd_for_a_plot(ys: list[float]) -> None:
    assert line_plot("t", "x", [Line("a", list(range(len(ys))), ys)]).size == (640, 380)


@pytest.mark.parametrize("blank", [0, 5, 8])
def test_what_is_drawn_on_its_way_into_noise_is_not_blank(blank: int) -> None:
    """The first few images of a set may be black: slices beyond the body, sprites that are
    empty.
    """
    images = torch.cat([-torch.ones(blank, 1, 4, 4), torch.randn(9 - blank, 1, 4, 4)])
    chosen = _with_contrast(images)
    assert len(chosen) == IMAGES
    shown = 9 - blank
    assert torch.equal(chosen[:shown], images[blank : blank + IMAGES])
