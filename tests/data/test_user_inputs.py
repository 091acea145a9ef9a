"""Masks and images as people draw them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data.user_inputs import load_user_image, load_user_mask

SIDE = 8
PAINTED = np.zeros((SIDE, SIDE), bool)
PAINTED[2:5, 1:4] = True


def rgba(colour: tuple[int, int, int], hidden: tuple[int, int, int]) -> Image.Image:
    """A painted part of one colour on transparent ground, which hides another."""
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[..., :3], pixels[PAINTED, :3], pixels[PAINTED, 3] = hidden, colour, 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 30, 40)])
@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
def test_what_is_painted_on_transparent_ground_is_the_mask(
    colour: tuple[int, int, int], hidden: tuple[int, int, int], ending: str, tmp_path: Path
) -> None:
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    rgba(colour, hidden).save(tmp_path / f"mask.{ending}", **options)
    assert (
        load_user_mask(tmp_path / f"mask.{ending}", height=SIDE, width=SIDE)[0].numpy() == PAINTED
    ).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_white_is_the_mask_where_nothing_is_transparent(mode: str, tmp_path: Path) -> None:
    Image.fromarray((255 * PAINTED).astype(np.uint8)).convert(mode).save(tmp_path / "mask.png")
    assert (
        load_user_mask(tmp_path / "mask.png", height=SIDE, width=SIDE)[0].numpy() == PAINTED
    ).all()


def test_black_and_white_on_transparent_ground_lie_on_black(tmp_path: Path) -> None:
    pixels = np.asarray(rgba((255, 255, 255), (255, 255, 255))).copy()
    pixels[6] = (0, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert (
        load_user_mask(tmp_path / "mask.png", height=SIDE, width=SIDE)[0].numpy() == PAINTED
    ).all()


def test_reading_warns_of_nothing_and_gives_a_copy(tmp_path: Path) -> None:
    rgba((9, 9, 9), (9, 9, 9)).save(tmp_path / "mask.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_user_mask(tmp_path / "mask.png", height=SIDE, width=SIDE).zero_()
        load_user_image(tmp_path / "mask.png", channels=3, height=SIDE, width=SIDE).zero_()


def test_an_image_is_premultiplied_and_deep_where_the_model_is(tmp_path: Path) -> None:
    rgba((200, 100, 50), (255, 0, 255)).save(tmp_path / "a.png")
    found = load_user_image(
        tmp_path / "a.png", channels=4, height=SIDE, width=SIDE, alpha="premultiplied"
    )
    assert torch.equal(found[:3, ~PAINTED], torch.zeros(3, int((~PAINTED).sum())))
    assert (found[:3, PAINTED].T * 255).round().unique(dim=0).tolist() == [[200, 100, 50]]
    Image.fromarray(np.full((SIDE, SIDE), 12_345, np.uint16)).save(tmp_path / "deep.png")
    deep = load_user_image(tmp_path / "deep.png", channels=1, height=SIDE, width=SIDE, bits=16)
    assert (deep * 65535).round().unique().tolist() == [12_345]
