"""Every kind of image that people have comes out as the pixels they see; every other file is
refused with its reason.
"""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from sfumato.data import decoding
from sfumato.data.decoding import PixelFormat, RejectedImage, decode
from tests.helpers.image_bytes import chunk, encode, noise, png

SIDE = 8
SQUARE = ((SIDE, SIDE),)
COLOUR, GRAY = PixelFormat(shapes=SQUARE, channels=3), PixelFormat(shapes=SQUARE, channels=1)


def flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), colour)


def opened(data: bytes, form: PixelFormat = COLOUR) -> tuple[np.ndarray, list[str]]:
    """Pixels, and what had to be done to them."""
    decoded = decode(data, form)
    assert decoded.shape == 0  # the only one that there is
    assert decoded.id == ""  # not asked for
    return decoded.pixels, list(decoded.notes)


def only_colour(data: bytes, form: PixelFormat = COLOUR) -> list[int]:
    """The one colour of an image that has no other."""
    pixels, _ = opened(data, form)
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


def reason(data: bytes) -> str:
    with pytest.raises(RejectedImage) as caught:
        decode(data, COLOUR)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_images_of_the_right_size_are_kept_bit_for_bit(kind: str) -> None:
    image = noise(SIDE, SIDE)
    pixels, notes = opened(encode(image, kind), COLOUR)
    assert (pixels == image.transpose(2, 0, 1)).all()
    assert pixels.dtype == np.uint8
    assert notes == []


def test_gray_is_the_luminance_of_colour_and_colour_repeats_gray() -> None:
    assert only_colour(encode(flat("RGB", (255, 0, 0))), GRAY) == [76]  # 0.299 of 255
    assert only_colour(encode(flat("L", 200))) == [200, 200, 200]


def test_sixteen_bits_become_the_nearest_of_eight() -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(SIDE, SIDE)
    pixels, notes = opened(encode(values), GRAY)
    assert (pixels[0] == np.rint(values / 257)).all()
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert notes == ["sixteen_bit_reduced"]


def test_sixteen_bit_colour() -> None:
    row = b"\0" + struct.pack(">3H", 257 * 10, 257 * 20, 257 * 30) * SIDE
    assert only_colour(png(SIDE, SIDE, depth=16, colour=2, rows=row * SIDE)) == [10, 20, 30]


@pytest.mark.parametrize(
    ("ink", "seen"),
    [((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 255, 0), (255, 255, 0)), ((0, 0, 0, 255), (0, 0, 0))],
)
def test_cmyk(ink: tuple[int, ...], seen: tuple[int, ...]) -> None:
    pixels, notes = opened(encode(flat("CMYK", ink), "JPEG", quality=100), COLOUR)
    assert notes == ["cmyk_converted"]
    assert np.abs(pixels.mean((1, 2)) - seen).max() < 3


def test_palette() -> None:
    image = Image.frombytes("P", (SIDE, SIDE), bytes([0, 1] * (SIDE * SIDE // 2)))
    image.putpalette([10, 20, 30, 200, 100, 50])
    pixels, notes = opened(encode(image), COLOUR)
    assert notes == ["palette_converted"]
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels[:, 0, 1].tolist() == [200, 100, 50]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_palette_with_a_transparent_colour_shows_the_background(transparency: int | bytes) -> None:
    image = Image.frombytes("P", (SIDE, SIDE), bytes([0, 1] * (SIDE * SIDE // 2)))
    image.putpalette([10, 20, 30, 200, 100, 50])
    form = PixelFormat(shapes=SQUARE, channels=3, background=(1, 2, 3))
    pixels, notes = opened(encode(image, transparency=transparency), form)
    assert notes == ["palette_converted", "transparency_filled"]
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels[:, 0, 1].tolist() == [1, 2, 3]


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 130, 250)])
@pytest.mark.parametrize(
    ("mode", "colour"), [("RGBA", (200, 100, 0, 64)), ("LA", (180, 64)), ("RGBA", (9, 9, 9, 0))]
)
def test_transparency_is_composited_on_the_background(
    mode: str, colour: tuple[int, ...], background: tuple[int, int, int]
) -> None:
    *front, alpha = colour
    expected = [
        alpha / 255 * f + (1 - alpha / 255) * b for f, b in zip(front * 3, background, strict=False)
    ]
    form = PixelFormat(shapes=SQUARE, channels=3, background=background)
    data = encode(flat(mode, colour))
    assert np.abs(np.array(only_colour(data, form)) - expected).max() <= 1
    assert opened(data, form)[1] == ["transparency_filled"]


def test_opaque_alpha_is_nothing_to_note() -> None:
    pixels, notes = opened(encode(flat("RGBA", (5, 6, 7, 255))), COLOUR)
    assert pixels[:, 3, 3].tolist() == [5, 6, 7]
    assert notes == []


def test_one_bit() -> None:
    image = flat("1", 0)
    image.putpixel((2, 1), 1)
    pixels, _ = opened(encode(image), GRAY)
    assert pixels[0, 1, 2] == 255
    assert int(pixels.sum()) == 255


TO_STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", TO_STORED)
def test_exif_orientation_is_undone(orientation: int) -> None:
    upright = noise(SIDE, SIDE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, notes = opened(
        encode(np.ascontiguousarray(TO_STORED[orientation](upright)), exif=exif), COLOUR
    )
    assert (pixels == upright.transpose(2, 0, 1)).all()
    assert notes == (["exif_rotated"] if orientation > 1 else [])


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_means_nothing_is_no_rotation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, notes = opened(encode(noise(SIDE, SIDE), exif=exif), COLOUR)
    assert (pixels == noise(SIDE, SIDE).transpose(2, 0, 1)).all()
    assert notes == []


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_used(kind: str) -> None:
    frames = [flat("RGB", (level, level, level)) for level in (40, 120, 200)]
    pixels, notes = opened(encode(frames[0], kind, save_all=True, append_images=frames[1:]), COLOUR)
    assert "animated_first_frame_used" in notes
    assert np.abs(pixels.astype(int) - 40).max() <= 3


def test_small_images_are_enlarged_and_noted() -> None:
    pixels, notes = opened(encode(Image.new("RGB", (SIDE - 1, SIDE), (7, 8, 9))), COLOUR)
    assert pixels.shape == (3, SIDE, SIDE)
    assert notes == ["upscaled"]
    assert opened(encode(noise(SIDE, SIDE)), COLOUR)[1] == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_refused_wherever_it_was_cut(kind: str) -> None:
    whole = encode(noise(40, 60), kind)
    decode(whole, COLOUR)
    for cut in [*range(40), *range(40, int(0.99 * len(whole)), 101)]:
        assert reason(whole[:cut])


def test_a_truncated_progressive_jpeg_is_refused() -> None:
    whole = encode(noise(40, 60), "JPEG", progressive=True)
    for share in (0.3, 0.6, 0.9, 0.98):
        assert reason(whole[: int(share * len(whole))]).startswith("damaged: ")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_an_empty_file_says_so() -> None:
    assert reason(b"") == "empty file"


@pytest.mark.parametrize(
    "text",
    [
        b"hello",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0" * 4096,
    ],
)
def test_text_and_zeros_are_no_images(text: bytes) -> None:
    assert reason(text) == "not an image in a known format (JPEG, PNG, WEBP, BMP, GIF, TIFF)"


@pytest.mark.parametrize(
    "kind", ["EPS", "PPM", "TGA", "PCX", "ICO", "PDF", "SGI", "JPEG2000", "DDS"]
)
def test_parsers_that_are_not_listed_never_see_the_bytes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(noise(16, 16), kind)
    if kind != "PDF":  # which Pillow only writes
        Image.open(io.BytesIO(data)).close()
    for other in set(Image.OPEN) - set(decoding.FORMATS):
        monkeypatch.setitem(Image.OPEN, other, (lambda *_: pytest.fail("was asked to open"), None))
    assert reason(data).startswith("not an image in a known format")


@pytest.mark.parametrize(
    ("mode", "value", "word"),
    [("F", 3.5, "floating-point"), ("F", -0.5, "floating-point"), ("I", 70_000, "32-bit integer")],
)
def test_values_without_a_known_white_name_the_setting(mode: str, value: float, word: str) -> None:
    said = reason(encode(flat(mode, value), "TIFF"))
    assert said.startswith(
        f"{word} values from {value:g} to {value:g}: set data.range=[BLACK, WHITE]"
    )


@pytest.mark.parametrize(("width", "height"), [(1, 4000), (4000, 1), (210, 10)])
def test_slivers_are_refused(width: int, height: int) -> None:
    assert reason(encode(Image.new("RGB", (width, height)))).startswith(
        f"{width} x {height}: sides "
    )
    decode(encode(Image.new("RGB", (200, 10))), COLOUR)


@pytest.mark.parametrize("side", [9_000, 50_000])
def test_decompression_bombs_are_refused_before_a_pixel_is_decoded(side: int) -> None:
    bomb = png(side, side, depth=1, colour=0, rows=b"\0" * 1000)
    assert len(bomb) < 1024
    tracemalloc.start()
    said = reason(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "more than 80 million pixels" in said
    assert peak < 1 << 20
    # the same bytes, an honest size
    assert only_colour(png(8, 8, depth=1, colour=0, rows=b"\0\0" * 8), GRAY) == [0]


def test_bombs_in_the_text_of_a_png_are_refused() -> None:
    def with_comment(size: int) -> bytes:
        comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * size))
        return png(8, 8, depth=8, colour=0, rows=(b"\0" + b"\7" * 8) * 8, extra=comment)

    assert "too large" in reason(with_comment(50_000_000))
    assert only_colour(with_comment(100)) == [7, 7, 7]


def test_long_animations_cost_no_more_than_a_glance() -> None:
    frames = [Image.new("L", (8, 8), level % 256) for level in range(3000)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    tracemalloc.start()
    decode(data, GRAY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data)


def test_more_bytes_than_the_cap_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(noise(SIDE, SIDE))
    monkeypatch.setattr(decoding, "MAX_BYTES", len(data))
    decode(data, COLOUR)
    assert "more than" in reason(data + b"\0")
