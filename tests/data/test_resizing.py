"""Resizing antialiases and crops to the centre: compared with Lanczos' formula worked out here in
float64.
"""

import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from sfumato.data.decoding import PixelFormat, decode
from tests.helpers.image_bytes import encode, noise, smooth


def square(side: int) -> PixelFormat:
    return PixelFormat(shapes=((side, side),), channels=3)


def lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def weights(size: int, start: float, length: float, target: int) -> np.ndarray:
    """Rows of `target` filters over `size` samples, for the window [start, start + length): widened
    when it shrinks.
    """
    scale = length / target
    centres = start + (np.arange(target) + 0.5) * scale
    rows = lanczos((np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1.0))
    return rows / rows.sum(1, keepdims=True)


def reference(image: np.ndarray, resolution: int) -> np.ndarray:
    """The centre square of (H, W, 3) at `resolution`, (3, R, R), float."""
    height, width = image.shape[:2]
    side = min(height, width)
    down = weights(height, (height - side) / 2, side, resolution)
    across = weights(width, (width - side) / 2, side, resolution)
    return np.einsum("ih,jw,hwc->cij", down, across, image.astype(float))


@pytest.mark.parametrize(
    ("height", "width"),
    [(40, 40), (41, 67), (90, 30), (12, 12), (16, 33), (10, 7), (16, 16), (67, 41)],
)
def test_it_is_lanczos_of_the_centre_square(height: int, width: int) -> None:
    # nothing overshoots, so that the order of Pillow's two passes does not show
    image = noise(height, width) // 2 + 64
    pixels = decode(encode(image), square(16)).pixels
    # Pillow rounds after each of its two passes
    assert np.abs(pixels - reference(image, 16)).max() <= 1.5


def test_the_reference_can_tell_a_crop_that_is_off_by_a_pixel() -> None:
    image = smooth(40, 67)
    assert np.abs(reference(image, 16) - reference(image[:, 1:], 16)).max() > 2


def test_stripes_too_fine_for_the_target_turn_gray_instead_of_aliasing() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = decode(encode(stripes), square(13)).pixels
    middle = pixels[:, 2:-2, 2:-2].astype(int)
    assert np.abs(middle - 127.5).max() < 8
    nearest = np.asarray(
        Image.fromarray(stripes).resize((13, 13), Image.Resampling.NEAREST)
    ).astype(int)
    assert np.abs(nearest - 127.5).max() > 100  # what a resize without a filter would show


def test_the_middle_is_what_is_kept() -> None:
    image = np.zeros((30, 90, 3), np.uint8)
    image[:, 30:60] = 200
    pixels = decode(encode(image), square(10)).pixels
    assert (pixels[:, :, 2:-2] >= 198).all()
    pixels = decode(encode(image.transpose(1, 0, 2).copy()), square(10)).pixels
    assert (pixels[:, 2:-2] >= 198).all()


@pytest.mark.parametrize(("height", "width"), [(600, 800), (803, 601)])
def test_a_big_jpeg_decoded_small_is_close_to_one_decoded_in_full(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(smooth(height, width), "JPEG", quality=92)
    sizes = []

    def spy(
        image: JpegImagePlugin.JpegImageFile, mode: str | None, size: tuple[int, int]
    ) -> object:
        done = drafted(image, mode, size)
        sizes.append(image.size)
        return done

    drafted = JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    form = square(32)
    pixels = decode(data, form).pixels
    # it was decoded small, at no less than twice the target
    assert 64 <= min(sizes[0]) < min(height, width) / 4
    full = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    difference = np.abs(pixels.astype(int) - decode(encode(full), form).pixels)
    assert difference.mean() < 0.7
    assert difference.max() <= 4


def test_a_rotated_big_jpeg_is_upright_and_uncut() -> None:
    upright = smooth(300, 500)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(np.ascontiguousarray(np.rot90(upright)), "JPEG", quality=95, exif=exif)
    decoded = decode(data, square(16))
    assert decoded.notes == ("exif_rotated",)
    assert decoded.size == (500, 300)
    assert np.abs(decoded.pixels - reference(upright, 16)).max() < 6
