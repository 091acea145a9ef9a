"""The sheet of conditions, samples and real images: what stands where."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from sfumato.conditioners import ConditioningInfo
from sfumato.evaluation.gallery import TILE, gallery
from sfumato.observability.images import GAP, PAPER

INFO = ConditioningInfo(channels=1)


def tiles(sheet: Image.Image, rows: int, columns: int) -> np.ndarray:
    """The sheet's tiles (rows, columns, TILE, TILE, 3), from its lower right corner."""
    pixels = np.asarray(sheet)
    step = TILE + GAP
    body = pixels[pixels.shape[0] - rows * step :, pixels.shape[1] - columns * step :]
    return body.reshape(rows, step, columns, step, 3).swapaxes(1, 2)[:, :, :TILE, :TILE]


def test_samples_stand_above_their_real_images_and_below_what_was_asked() -> None:
    values = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None]
    samples, real = ((values * sign).expand(3, 3, 8, 8) for sign in (1, -1))
    doodle = torch.ones(3, 1, 8, 8)
    doodle[1, :, 2, 5] = -1
    doodle[2] = torch.nan
    found = tiles(
        gallery({"doodle": doodle, "text": ["a", "b", "c"]}, samples, real, info=INFO), 3, 3
    )
    assert (found[1, :, 0, 0, 0] == [0, 128, 255]).all()
    assert (found[2, :, 0, 0, 0] == [255, 128, 0]).all()
    assert (found[0, 0] == 255).all()
    assert (found[0, 2] == 128).all()
    dark = np.argwhere(found[0, 1, :, :, 0] == 0)
    assert dark.min(0).tolist() == [2 * 12, 5 * 12]
    assert dark.max(0).tolist() == [3 * 12 - 1, 6 * 12 - 1]


def test_points_are_dots_with_y_upwards() -> None:
    points = torch.full((2, 3, 3), torch.nan)
    points[0, 0] = torch.tensor([1.0, 1.0, 0.3])
    points[1, :2] = torch.tensor([[-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    blank = torch.zeros(2, 1, 8, 8)
    found = tiles(gallery({"points": points}, blank, blank, info=INFO), 3, 2)[0, ..., 0]
    assert found[0, 0, -1] == 0
    assert (found[0] == 0).sum() == 4
    assert found[1, -1, 0] == 0
    assert found[1, TILE // 2, TILE // 2] == 0
    assert (found[1] == 0).sum() == 4 + 9


def test_at_most_ten_columns_evenly_chosen() -> None:
    samples = torch.linspace(-1, 1, 31)[:, None, None, None].expand(31, 1, 8, 8)
    found = tiles(
        gallery(
            {"category": torch.arange(31) % 2},
            samples,
            samples,
            info=ConditioningInfo(channels=1, categories=("cat", "dog")),
        ),
        2,
        10,
    )
    assert found[0, [0, -1], 0, 0, 0].tolist() == [0, 255]
    assert (np.diff(found[0, :, 0, 0, 0].astype(int)) > 20).all()


def test_words_stand_above_in_as_many_lines_as_they_need() -> None:
    image = torch.zeros(1, 1, 8, 8)
    bare, short, long = (
        gallery(context, image, image, info=INFO)
        for context in ({}, {"text": ["a cat"]}, {"text": ["a cat that has a name of many words"]})
    )
    assert bare.height < short.height < long.height
    assert (np.asarray(short)[: short.height - bare.height] != PAPER).any()


def test_images_larger_than_a_tile_keep_their_size() -> None:
    image = torch.zeros(1, 1, 2 * TILE, 2 * TILE)
    assert gallery({}, image, image, info=INFO).height >= 2 * 2 * TILE
