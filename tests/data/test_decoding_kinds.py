"""Every kind of image comes out as exactly the numbers that were put in: colours, depth, alpha, way
up, profile, crop and name.
"""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, ImageOps

from sfumato.data.decoding import Decoded, PixelFormat, RejectedImage, decode, fit_within
from sfumato.data.pixel_format import covering_box as _covering
from tests.helpers.image_bytes import chunk, encode, noise, png, smooth

H, W = 6, 10
BACKGROUND = (10, 130, 250)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


def form(channels: int = 3, *, height: int = H, width: int = W, bits: int = 8) -> PixelFormat:
    return PixelFormat(
        shapes=((height, width),), channels=channels, bits=bits, background=BACKGROUND
    )


def values(data: bytes, *args, **options) -> np.ndarray:
    """(H, W, C) as int64."""
    return decode(data, form(*args, **options)).pixels.transpose(1, 2, 0).astype(np.int64)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def grain(*shape: int, top: int = 256, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, shape, dtype=dtype)


def luma(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def over(
    front: np.ndarray, alpha: np.ndarray, background: tuple[int, ...] = BACKGROUND
) -> np.ndarray:
    """What is seen of a colour of some opacity on a background."""
    share = alpha[..., None].astype(np.float64) / 255
    return share * front + (1 - share) * np.array(background, np.float64)


# --- colours: four numbers of channels from every mode --------------------------------------------

RGB, ALPHA, GRAY = grain(H, W, 3), grain(H, W, seed=1), grain(H, W, seed=2)


def gray_over(gray: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return luma(over(np.repeat(gray[..., None], 3, 2), alpha))


def premultiplied(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, as 8-bit pixels hold it."""
    share = alpha / 255 if colours.ndim == 2 else alpha[..., None] / 255
    return np.rint(colours * share)


def stacked(*planes: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [plane[..., None] if plane.ndim == 2 else plane for plane in planes], axis=2
    )


FULL = np.full((H, W), 255)
KINDS = {
    "L": (
        GRAY,
        {
            1: GRAY,
            2: stacked(GRAY, FULL),
            3: stacked(GRAY, GRAY, GRAY),
            4: stacked(GRAY, GRAY, GRAY, FULL),
        },
    ),
    "LA": (
        stacked(GRAY, ALPHA).astype(np.uint8),
        {
            1: gray_over(GRAY, ALPHA),
            2: stacked(premultiplied(GRAY, ALPHA), ALPHA),
            3: over(stacked(GRAY, GRAY, GRAY), ALPHA),
            4: stacked(premultiplied(stacked(GRAY, GRAY, GRAY), ALPHA), ALPHA),
        },
    ),
    "RGB": (RGB, {1: luma(RGB), 2: stacked(luma(RGB), FULL), 3: RGB, 4: stacked(RGB, FULL)}),
    "RGBA": (
        stacked(RGB, ALPHA).astype(np.uint8),
        {
            1: luma(over(RGB, ALPHA)),
            2: stacked(premultiplied(luma(RGB), ALPHA), ALPHA),
            3: over(RGB, ALPHA),
            4: stacked(premultiplied(RGB, ALPHA), ALPHA),
        },
    ),
}


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", KINDS)
@pytest.mark.parametrize("container", ["PNG", "TIFF", "npy"])
def test_channels_of_every_mode(mode: str, channels: int, container: str) -> None:
    stored, expected = KINDS[mode]
    data = npy(stored) if container == "npy" else encode(Image.fromarray(stored), container)
    kept = PixelFormat(
        shapes=((H, W),), channels=channels, background=BACKGROUND, alpha="on"
    )  # arrays do not say it themselves
    found = (
        decode(data, kept if container == "npy" else form(channels))
        .pixels.transpose(1, 2, 0)
        .astype(np.int64)
    )
    wanted = expected[channels].reshape(H, W, channels).astype(np.float64)
    assert found.shape == wanted.shape
    # Composition and luminance are rounded, twice at most; everything else is a copy.
    copied = (
        mode in ("L", "RGB")
        or channels == {"LA": 2, "RGBA": 4}[mode]
        or (mode, channels) == ("LA", 4)
    )
    tolerance = 0 if copied and not (mode == "RGB" and channels < 3) else 1.6
    assert np.abs(found - wanted).max() <= tolerance
    if channels in (2, 4) and mode in ("LA", "RGBA"):
        assert (found[..., -1] == ALPHA).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_clear_is_exactly_the_background_and_opaque_exactly_the_front(
    mode: str, channels: int
) -> None:
    alpha = np.where(np.arange(H * W).reshape(H, W) % 2, 255, 0)
    front = stacked(GRAY, GRAY, GRAY) if mode == "LA" else RGB
    stored = stacked(GRAY if mode == "LA" else RGB, alpha).astype(np.uint8)
    shown = np.where(alpha[..., None] == 255, front, np.array(BACKGROUND))
    expected = (
        shown
        if channels == 3
        else np.asarray(Image.fromarray(shown.astype(np.uint8)).convert("L"))[..., None]
    )
    assert (values(encode(Image.fromarray(stored)), channels) == expected).all()


def palette() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    colours, numbers = grain(16, 3, seed=3), grain(H, W, top=16, seed=4)
    image = Image.frombytes("P", (W, H), numbers.tobytes())
    image.putpalette(colours.tobytes())
    return image, colours, numbers


@pytest.mark.parametrize("container", ["PNG", "GIF", "TIFF", "BMP"])
def test_palette_images_are_their_colours(container: str) -> None:
    image, colours, numbers = palette()
    found = decode(encode(image, container), form())
    assert (found.pixels.transpose(1, 2, 0) == colours[numbers]).all()
    assert found.notes == ("palette_converted",)
    assert (values(encode(image, container), 4) == stacked(colours[numbers], FULL)).all()


def test_palette_images_with_degrees_of_transparency() -> None:
    image, colours, numbers = palette()
    opacity = grain(16, seed=5)
    opacity[0] = 0  # Pillow writes one that is nowhere less than 255 as opaque
    data = encode(image, transparency=opacity.tobytes())
    shown = premultiplied(colours[numbers], opacity[numbers])
    assert (values(data, 4) == stacked(shown, opacity[numbers])).all()
    assert np.abs(values(data, 3) - over(colours[numbers], opacity[numbers])).max() <= 1
    assert (values(data, 2)[..., 1] == opacity[numbers]).all()
    assert decode(data, form()).notes == ("palette_converted", "transparency_filled")
    assert decode(data, form(4)).notes == ("palette_converted",)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_colour_of_a_png_that_is_declared_clear(mode: str) -> None:
    image = GRAY if mode == "L" else RGB
    clear = int(GRAY[2, 3]) if mode == "L" else tuple(int(level) for level in RGB[2, 3])
    data = encode(Image.fromarray(image), transparency=clear)
    hidden = (image == np.array(clear)).reshape(H, W, -1).all(2)
    colours = image if mode == "RGB" else stacked(GRAY, GRAY, GRAY)
    assert hidden[2, 3]
    assert (
        values(data, 4) == stacked(colours * ~hidden[..., None], np.where(hidden, 0, 255))
    ).all()
    assert (values(data, 3) == np.where(hidden[..., None], np.array(BACKGROUND), colours)).all()
    assert "transparency_filled" in decode(data, form()).notes


@pytest.mark.parametrize("container", ["PNG", "TIFF", "BMP"])
def test_one_bit_is_black_and_white(container: str) -> None:
    bits = grain(H, W, top=2, seed=6) * 255
    image = Image.fromarray(bits).convert("1")
    for channels in (1, 3):
        assert (values(encode(image, container), channels) == bits[..., None]).all()
    assert (values(encode(image, container), 4)[..., 3] == 255).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_cmyk_is_what_pillow_shows(channels: int) -> None:
    image = Image.fromarray(grain(H, W, 4, seed=7), "CMYK")
    data = encode(image, "TIFF")
    c, m, y, k = (plane.astype(np.float64) for plane in np.asarray(image).transpose(2, 0, 1))
    seen = np.stack([(255 - ink) * (255 - k) / 255 for ink in (c, m, y)], axis=2)
    wanted = {
        1: luma(seen)[..., None],
        2: stacked(luma(seen), FULL),
        3: seen,
        4: stacked(seen, FULL),
    }[channels]
    assert np.abs(values(data, channels) - wanted).max() <= 2
    assert decode(data, form(channels)).notes == ("cmyk_converted",)


def test_an_adobe_cmyk_jpeg_is_not_inverted() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    found = values(encode(image, "JPEG", quality=100), height=16, width=16)
    assert np.abs(found - (255, 0, 0)).max() <= 3


# --- depth ----------------------------------------------------------------------------------------

DEEP = grain(H, W, top=65536, dtype=np.uint16, seed=8)


@pytest.mark.parametrize("container", ["PNG", "TIFF", "npy"])
def test_sixteen_bit_gray_is_kept_exactly_when_sixteen_bits_are_asked_for(container: str) -> None:
    data = npy(DEEP) if container == "npy" else encode(Image.fromarray(DEEP), container)
    for channels in (1, 3):
        found = decode(data, form(channels, bits=16))
        assert found.pixels.dtype == np.uint16
        assert (found.pixels == DEEP).all()
        assert found.notes == ()


@pytest.mark.parametrize("container", ["PNG", "TIFF", "npy"])
def test_sixteen_bit_gray_in_eight_is_rounded_not_cut(container: str) -> None:
    data = npy(DEEP) if container == "npy" else encode(Image.fromarray(DEEP), container)
    found = decode(data, form(1))
    assert (found.pixels[0] == np.rint(DEEP / 257)).all()
    assert found.notes == ("sixteen_bit_reduced",)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [2, 4])
def test_sixteen_bit_gray_gets_an_opaque_alpha_as_eight_bit_gray_does(
    channels: int, bits: int
) -> None:
    found = values(encode(Image.fromarray(DEEP)), channels, bits=bits)
    top = 65535 if bits == 16 else 255
    assert (found[..., -1] == top).all()
    assert (found[..., 0] == (DEEP if bits == 16 else np.rint(DEEP / 257))).all()


def test_big_endian_sixteen_bit_tiff() -> None:
    entries = [
        (256, 3, W),
        (257, 3, H),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, H),
    ]
    entries += [(279, 4, 2 * H * W)]
    body = DEEP.astype(">u2").tobytes()
    table = b"".join(
        struct.pack(">HHI", tag, kind, 1)
        + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, value in entries
    )
    data = (
        b"MM\0*"
        + struct.pack(">I", 8 + len(body))
        + body
        + struct.pack(">H", len(entries))
        + table
        + b"\0\0\0\0"
    )
    assert (decode(data, form(1, bits=16)).pixels == DEEP).all()
    assert (decode(data, form(1)).pixels[0] == np.rint(DEEP / 257)).all()


@pytest.mark.parametrize(("colour", "bands"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_in_eight_is_noted(colour: int, bands: int) -> None:
    levels = grain(H, W, bands, seed=9)
    levels[..., -1] = levels[..., -1] if bands == 3 else 255
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in levels)
    data = png(W, H, depth=16, colour=colour, rows=rows)
    found = decode(data, form(bands))
    assert (found.pixels.transpose(1, 2, 0) == levels).all()
    assert "sixteen_bit_reduced" in found.notes
    assert (
        decode(data, form(bands, bits=16)).pixels.transpose(1, 2, 0) == levels.astype(int) * 257
    ).all()


@pytest.mark.parametrize("mode", KINDS)
def test_eight_bits_in_sixteen_are_multiples_of_257(mode: str) -> None:
    stored, expected = KINDS[mode]
    bands = len(mode)
    for data in (encode(Image.fromarray(stored)), npy(stored)):
        if data.startswith(b"\x93") and mode in ("LA", "RGBA"):
            continue  # an array's last channel is not alpha
        assert (
            values(data, bands, bits=16) == expected[bands].reshape(H, W, bands).astype(int) * 257
        ).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("bands", [1, 3, 4, 7])
@pytest.mark.parametrize("bits", [8, 16])
def test_arrays_of_any_number_of_channels(bands: int, dtype: type, bits: int) -> None:
    stored = grain(H, W, bands, top=np.iinfo(dtype).max + 1, dtype=dtype, seed=10)
    top, scale = 2**bits - 1, np.iinfo(dtype).max
    expected = np.rint(stored.astype(np.float64) * top / scale)
    assert (values(npy(stored), bands, bits=bits) == expected).all()
    if bands == 1:
        assert (values(npy(stored[..., 0]), 1, bits=bits) == expected).all()
        assert (values(npy(stored), 3, bits=bits) == expected).all()
    if bands == 7:
        with pytest.raises(RejectedImage, match=r"7 channels, where data\.channels is 3"):
            decode(npy(stored), form(3, bits=bits))
        with pytest.raises(RejectedImage, match=r"channels, where data\.channels is 7"):
            decode(encode(RGB), form(7, bits=bits))


@pytest.mark.parametrize("order", ["F", "C"])
def test_arrays_in_another_memory_layout_or_of_another_type_are_refused_or_right(
    order: str,
) -> None:
    stored = np.asarray(RGB, order=order)
    try:
        assert (values(npy(stored)) == RGB).all()
    except RejectedImage:
        assert order == "F"
    for wrong in (
        RGB.astype(np.float32),
        RGB.astype(bool),
        RGB.astype(complex),
        RGB.astype(np.int8),
        RGB[None],
        np.zeros((0, 3), np.uint8),
    ):
        with pytest.raises(RejectedImage):
            decode(npy(wrong), form())
    with pytest.raises(RejectedImage):
        decode(npy(RGB)[:-1], form())
    with pytest.raises(RejectedImage):
        decode(npy(np.zeros((8, 8, 65), np.uint8)), form(64))


@pytest.mark.parametrize(
    "literal",
    ["-" * 9000 + "1", "[" * 190 + "]" * 190, "1+" * 4000 + "1", "{'shape':" * 40 + "}" * 40],
)
def test_an_array_header_that_makes_python_stumble_is_refused(literal: str) -> None:
    header = literal.encode()
    with pytest.raises(RejectedImage):
        decode(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 100, form())


# --- scaling and cropping, against Lanczos' formula -----------------------------------------------


def lanczos(size: int, target: int, low: float, high: float) -> np.ndarray:
    """Weights (target, size) of an antialiased Lanczos-3 resampling of [low, high]."""
    scale = (high - low) / target
    stretch = max(scale, 1.0)
    centres = low + (np.arange(target) + 0.5) * scale
    x = (np.arange(size)[None, :] + 0.5 - centres[:, None]) / stretch
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(1, keepdims=True)


def cover(width: int, height: int, target: tuple[int, int]) -> tuple[float, float, float, float]:
    """left, top, right, bottom of the largest centred part with the aspect ratio of `target`
    (height, width).
    """
    if width * target[0] > height * target[1]:
        wide = height * target[1] / target[0]
        return (width - wide) / 2, 0, (width + wide) / 2, height
    tall = width * target[0] / target[1]
    return 0, (height - tall) / 2, width, (height + tall) / 2


def resampled(image: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    left, top, right, bottom = cover(image.shape[1], image.shape[0], target)
    rows, columns = (
        lanczos(image.shape[0], target[0], top, bottom),
        lanczos(image.shape[1], target[1], left, right),
    )
    return np.stack(
        [
            rows @ plane @ columns.T
            for plane in np.atleast_3d(image).astype(np.float64).transpose(2, 0, 1)
        ],
        axis=2,
    )


sides = st.integers(5, 40)


@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides, target=st.tuples(sides, sides), deep=st.booleans())
def test_scaling_and_cropping_are_lanczos_over_the_covering_box(
    height: int, width: int, target: tuple[int, int], deep: bool
) -> None:
    # Eight bits are rounded between the two directions, and cut off at black and white; so there
    # stay away from these.
    image = (
        grain(height, width, top=65536, dtype=np.uint16, seed=11)
        if deep
        else 96 + grain(height, width, top=64, seed=11)
    )
    expected = resampled(image, target)[..., 0]
    options = {"height": target[0], "width": target[1]}
    if deep:
        wide = values(encode(Image.fromarray(image)), 1, bits=16, **options)[..., 0]
        assert np.abs(wide - expected.clip(0, 65535)).max() <= 1
        narrow = values(npy(image), 1, **options)[..., 0]
        assert np.abs(narrow - expected.clip(0, 65535) / 257).max() <= 0.51
    else:
        found = values(encode(Image.fromarray(image)), 1, **options)[..., 0]
        assert np.abs(found - expected).max() <= 1.5


@pytest.mark.parametrize(("width", "height"), [(475, 471), (482, 471), (503, 471)])
def test_no_size_is_refused_for_a_rounding_error(width: int, height: int) -> None:
    assert decode(encode(Image.new("L", (width, height))), form(height=28, width=28)).pixels.shape[
        1:
    ] == (28, 28)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(20, 6000), height=st.integers(20, 6000), target=st.tuples(sides, sides))
def test_the_covering_part_lies_within_the_image(
    width: int, height: int, target: tuple[int, int]
) -> None:
    left, top, right, bottom = _covering(width, height, target)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (left, top, right, bottom) == pytest.approx(cover(width, height, target), abs=1e-6)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("target", [(6, 6), (6, 4), (4, 10), (2, 10), (6, 10)])
def test_cropping_without_scaling_is_a_slice(target: tuple[int, int], bits: int) -> None:
    top, left = (H - target[0]) // 2, (W - target[1]) // 2
    inside = (slice(top, top + target[0]), slice(left, left + target[1]))
    options = {"height": target[0], "width": target[1], "bits": bits}
    for data in (encode(RGB), encode(RGB, "BMP"), encode(RGB, "WEBP", lossless=True), npy(RGB)):
        assert (
            values(data, 3, **options) == RGB[inside].astype(int) * (257 if bits == 16 else 1)
        ).all()
    assert (values(npy(DEEP), 1, **{**options, "bits": 16}) == DEEP[inside][..., None]).all()
    assert (
        values(encode(Image.fromarray(DEEP)), 1, **{**options, "bits": 16})
        == DEEP[inside][..., None]
    ).all()


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("size", "target", "factor"),
    [((24, 16), (8, 8), 2), ((16, 40), (8, 16), 2), ((30, 30), (10, 6), 3)],
)
def test_cropping_and_halving_blocks_gives_the_blocks(
    size: tuple[int, int], target: tuple[int, int], factor: int, deep: bool
) -> None:
    """A ramp is scaled to the ramp of its block means, away from the rim, because the filter is
    symmetric.
    """
    y, x = np.mgrid[: size[0], : size[1]]
    ramp = (700 * x + 400 * y if deep else 3 * x + 2 * y).astype(np.uint16 if deep else np.uint8)
    top, left = (size[0] - factor * target[0]) // 2, (size[1] - factor * target[1]) // 2
    assert top >= 0
    assert left >= 0
    part = ramp[top : top + factor * target[0], left : left + factor * target[1]].astype(np.float64)
    means = part.reshape(target[0], factor, target[1], factor).mean((1, 3))
    found = values(npy(ramp), 1, height=target[0], width=target[1], bits=16 if deep else 8)[..., 0]
    inner = (slice(3, -3), slice(3, -3)) if min(target) > 6 else (slice(3, -3), slice(2, -2))
    assert np.abs(found - means)[inner].max() <= 1


def test_colour_does_not_bleed_out_of_what_is_transparent() -> None:
    image = np.zeros((16, 16, 4), np.uint8)
    image[:, :7] = (255, 0, 0, 0)
    image[:, 7:] = (0, 0, 255, 255)
    white = PixelFormat(shapes=((8, 8),), channels=3)
    pixels = decode(encode(Image.fromarray(image)), white).pixels.astype(int)
    assert (pixels[0] == pixels[1]).all()  # white and blue hold as much red as green
    assert pixels[2].min() >= 254
    kept = decode(encode(Image.fromarray(image)), PixelFormat(shapes=((8, 8),), channels=4)).pixels
    assert kept[0].max() == 0


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((1023, 769), (24, 24)),
        ((1000, 600), (16, 40)),
        ((517, 1200), (60, 34)),
        ((263, 250), (50, 60)),
    ],
)
def test_a_jpeg_decoded_at_reduced_size_is_where_the_whole_one_is(
    size: tuple[int, int], target: tuple[int, int]
) -> None:
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = (
        127.5 + 60 * np.sin(2 * np.pi * 5 * x / width + 1) + 50 * np.cos(2 * np.pi * 4 * y / height)
    )
    image = np.repeat(np.rint(waves).astype(np.uint8)[..., None], 3, 2)
    data = encode(image, "JPEG", quality=97, subsampling=0)
    found = values(data, height=target[0], width=target[1])
    expected = resampled(image[..., 0], target)
    slope = 2 * np.pi * max(5 * 60 / width, 4 * 50 / height)  # of a pixel of the original
    assert np.abs(found - expected)[2:-2, 2:-2].max() <= max(3.0, 0.6 * slope)
    assert abs((found - expected).mean()) < 0.3


@pytest.mark.parametrize(
    ("size", "turn", "shape"),
    [
        ((100, 60), 1, (30, 50)),
        ((60, 100), 1, (50, 30)),
        ((100, 60), 6, (50, 30)),
        ((20, 12), 1, (12, 20)),
        ((97, 61), 8, (48, 30)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_fitted_keeps_the_aspect_ratio_and_the_whole_image(
    size: tuple[int, int], turn: int, shape: tuple[int, int], kind: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    image = smooth(size[1], size[0])
    data = encode(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    fit = fit_within(data, 30)
    assert fit.shapes == (shape,)
    assert fit.channels == 3
    found = decode(data, fit)
    assert found.pixels.shape == (3, *shape)
    assert "upscaled" not in found.notes
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(float)
    corners = found.pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]].T.astype(float)
    # nothing was cut away
    assert np.abs(corners - upright[[0, 0, -1, -1], [0, -1, 0, -1]]).max() < 25


def test_fitted_keeps_the_aspect_ratio_of_an_array() -> None:
    assert fit_within(npy(grain(60, 100, 3)), 30).shapes == ((30, 50),)


def test_fitted_of_rubbish_leaves_the_reason_to_decode() -> None:
    for data in (b"", b"hello", b"\x93NUMPY rubbish", encode(RGB)[:30]):
        with pytest.raises(RejectedImage):
            decode(data, fit_within(data, 16))


def test_fitted_unpacks_nothing_that_is_over_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(10_000, 10_000, depth=1, colour=0, rows=(b"\0" * 1251) * 10_000)
    assert len(data) < 20_000
    loaded: list[str] = []
    whole = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda image: (loaded.append("all"), whole(image))[1]
    )
    with pytest.raises(RejectedImage, match="more than 80 million pixels"):
        decode(data, fit_within(data, 16))
    assert loaded == []


# --- which way up ---------------------------------------------------------------------------------

LOSSLESS = {
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 100, "subsampling": 0},
}


def turned(orientation: int, kind: str, image: np.ndarray = RGB) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif, **LOSSLESS[kind])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_orientation_in_every_container_is_what_pillow_says(
    kind: str, orientation: int
) -> None:
    data = turned(orientation, kind)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    height, width = upright.shape[:2]
    found = decode(data, form(height=height, width=width))
    assert (found.pixels.transpose(1, 2, 0) == upright).all()
    assert found.size == (width, height)
    assert "upscaled" not in found.notes
    assert ("exif_rotated" in found.notes) == (orientation > 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("target", [(5, 8), (8, 5), (4, 4)])
def test_turned_images_are_scaled_and_cropped_as_if_they_were_upright(
    kind: str, orientation: int, target: tuple[int, int]
) -> None:
    data = turned(orientation, kind, smooth(20, 30))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    found = values(data, height=target[0], width=target[1])
    expected = values(encode(upright), height=target[0], width=target[1])
    assert np.abs(found - expected).max() <= (6 if kind == "JPEG" else 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_bucket_is_that_of_the_upright_image(orientation: int) -> None:
    shapes = PixelFormat(shapes=((12, 6), (8, 8), (6, 12)), channels=3)
    found = decode(turned(orientation, "JPEG", smooth(20, 40)), shapes)
    assert found.shape == (0 if orientation >= 5 else 2)
    assert found.pixels.shape[1:] == shapes.shapes[found.shape]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bit_images_turn_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(DEEP), exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (
        values(data, 1, height=upright.shape[0], width=upright.shape[1], bits=16)[..., 0] == upright
    ).all()


BROKEN_EXIF = {
    "nothing": b"Exif\0\0",
    "rubbish": b"Exif\0\0" + bytes(range(200)),
    "offset": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "count": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0",
    "cut": b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01",
    "text": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",
    "many": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x02\0\x06\0\x06\0\0\0\0",
    "rational": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x01\0\0\0\x1a\0\0\0\0\0\0\0\1\0\0\0\0",
    "loop": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0",
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("harm", BROKEN_EXIF)
def test_damaged_exif_costs_no_image(kind: str, harm: str) -> None:
    body = BROKEN_EXIF[harm]
    if kind == "JPEG":
        whole = encode(RGB, "JPEG", quality=100, subsampling=0)
        data = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + whole[2:]
    elif kind == "PNG":
        whole = encode(RGB)
        data = whole[:33] + chunk(b"eXIf", body.removeprefix(b"Exif\0\0")) + whole[33:]
    else:
        data = encode(RGB, "WEBP", lossless=True, exif=body)
    found = decode(data, form())
    plain = decode(encode(RGB, kind, **LOSSLESS[kind]), form())
    if "exif_rotated" not in found.notes:
        assert (found.pixels == plain.pixels).all()
    assert sorted(found.pixels.reshape(-1)) == sorted(plain.pixels.reshape(-1)) or found.size == (
        H,
        W,
    )


# --- colour profiles ------------------------------------------------------------------------------

D50 = (0.9642, 1.0, 0.8249)
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def fixed(number: float) -> bytes:
    return struct.pack(">i", round(number * 65536))


def xyz(point: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(fixed, point))


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def profile(primaries: tuple | None, gamma: float, name: str) -> bytes:
    """An ICC profile, version 2.1: three primaries or gray, and one exponent."""
    text = name.encode() + b"\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * (4 + 4 + 2 + 1 + 67)
    tags = [(b"desc", described), (b"cprt", b"text\0\0\0\0none\0"), (b"wtpt", xyz(D50))]
    if primaries is None:
        tags.append((b"kTRC", curve(gamma)))
    else:
        tags += [
            (b"%cXYZ" % letter, xyz(point)) for letter, point in zip(b"rgb", primaries, strict=True)
        ]
        tags += [(b"%cTRC" % letter, curve(gamma)) for letter in b"rgb"]
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for kind, content in tags:
        content += b"\0" * (-len(content) % 4)
        table += kind + struct.pack(">II", place + len(body), len(content))
        body += content
    space = b"GRAY" if primaries is None else b"RGB "
    head = (
        struct.pack(">I", place + len(body))
        + b"\0\0\0\0"
        + b"\x02\x10\0\0"
        + b"mntr"
        + space
        + b"XYZ "
    )
    head += (
        struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + b"".join(map(fixed, D50))
    )
    return head + b"\0" * (128 - len(head)) + struct.pack(">I", len(tags)) + table + body


PROFILES = {
    "Adobe-like": (ADOBE, 563 / 256),
    "Display-P3-like": (P3, 2.2),
    "linear": (SRGB, 1.0),
}


def in_srgb(image: np.ndarray, primaries: tuple, gamma: float) -> np.ndarray:
    """What sRGB calls the colours that a profile means, by the definition of both."""
    light = (image / 255) ** (round(gamma * 256) / 256) @ np.array(primaries)
    linear = (light @ np.linalg.inv(np.array(SRGB))).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_profile_is_converted_to_srgb(name: str, kind: str) -> None:
    primaries, gamma = PROFILES[name]
    icc = profile(primaries, gamma, name)
    data = encode(RGB, kind, icc_profile=icc, **LOSSLESS[kind])
    stored = np.asarray(Image.open(io.BytesIO(data)))
    found = decode(data, form())
    assert "icc_converted_to_srgb" in found.notes
    pixels = found.pixels.transpose(1, 2, 0).astype(int)
    whole = ImageCms.profileToProfile(
        Image.open(io.BytesIO(data)),
        ImageCms.ImageCmsProfile(io.BytesIO(icc)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    assert np.abs(pixels - np.asarray(whole).astype(int)).max() <= 2
    # shadows are steep
    assert np.abs(pixels - in_srgb(stored, primaries, gamma)).max() <= (4 if gamma == 1 else 2.5)
    assert np.abs(pixels - stored).max() > 10  # and it was no small matter


def test_a_profile_of_gray_images_is_converted_too() -> None:
    icc = profile(None, 1.0, "linear gray")
    data = encode(GRAY, icc_profile=icc)
    linear, target = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(
        linear, target, "L", "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC
    )
    whole = np.asarray(ImageCms.applyTransform(Image.fromarray(GRAY), transform)).astype(int)
    light = GRAY / 255
    defined = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    for channels in (1, 3):
        found = decode(data, form(channels))
        pixels = found.pixels.transpose(1, 2, 0)
        assert found.notes == ("icc_converted_to_srgb",)
        assert np.abs(pixels - whole[..., :channels]).max() <= 1
        assert np.abs(pixels - defined[..., None])[GRAY > 20].max() <= 2


def test_alpha_stays_beside_converted_colours() -> None:
    icc = profile(ADOBE, 563 / 256, "Adobe-like")
    data = encode(Image.fromarray(stacked(RGB, ALPHA).astype(np.uint8)), icc_profile=icc)
    found = values(data, 4)
    assert (found[..., 3] == ALPHA).all()
    share = ALPHA[..., None] / 255
    assert np.abs(found[..., :3] - in_srgb(RGB, ADOBE, 563 / 256) * share).max() <= 2.5


def test_an_srgb_profile_changes_nothing() -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind, options in LOSSLESS.items():
        found = decode(encode(RGB, kind, icc_profile=icc, **options), form())
        assert (found.pixels == decode(encode(RGB, kind, **options), form()).pixels).all()
        assert found.notes == ()


def test_a_profile_is_known_by_its_curves_and_not_by_its_name() -> None:
    icc = profile(SRGB, 1.0, "linear sRGB")  # as GIMP's and Elle Stone's are called
    found = values(encode(RGB, icc_profile=icc))
    assert np.abs(found - in_srgb(RGB, SRGB, 1.0)).max() <= 4


GARBAGE = {
    "text": b"not a profile",
    "zeros": b"\0" * 500,
    "cut": profile(ADOBE, 2.2, "Adobe-like")[:300],
    "gray for colour": profile(None, 2.2, "gray"),
    "LAB": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("icc", GARBAGE)
def test_a_useless_profile_is_ignored_and_noted(kind: str, icc: str) -> None:
    found = decode(encode(RGB, kind, icc_profile=GARBAGE[icc], **LOSSLESS[kind]), form())
    assert (found.pixels == decode(encode(RGB, kind, **LOSSLESS[kind]), form()).pixels).all()
    assert found.notes == ("icc_profile_ignored",)


# --- names of contents ----------------------------------------------------------------------------


def name(data: bytes, side: int = 4) -> str:
    found: Decoded = decode(
        data, PixelFormat(shapes=((side, side),), channels=3, alpha="on"), identify=True
    )
    assert len(found.id) == 32
    return found.id


def test_the_name_is_of_the_values_however_they_are_stored() -> None:
    ways = [encode(RGB, compress_level=level) for level in (0, 1, 6, 9)]
    ways += [
        encode(RGB, "BMP"),
        encode(RGB, "TIFF"),
        encode(RGB, "TIFF", compression="tiff_lzw"),
        npy(RGB),
    ]
    ways += [
        encode(RGB, "WEBP", lossless=True),
        encode(RGB, optimize=True),
        encode(RGB, dpi=(300, 300)),
    ]
    assert len({name(data) for data in ways}) == 1
    gray = [
        encode(GRAY),
        encode(GRAY, "TIFF"),
        encode(GRAY, "BMP"),
        npy(GRAY),
        npy(GRAY[..., None]),
    ]
    assert len({name(data) for data in gray}) == 1
    four = stacked(RGB, ALPHA).astype(np.uint8)
    clear = [encode(Image.fromarray(four), kind) for kind in ("PNG", "TIFF")]
    clear += [encode(Image.fromarray(four), "WEBP", lossless=True, exact=True), npy(four)]
    assert len({name(data) for data in clear}) == 1


def test_the_name_of_sixteen_bit_values_does_not_depend_on_their_container() -> None:
    ways = [
        encode(Image.fromarray(DEEP)),
        encode(Image.fromarray(DEEP), "TIFF"),
        npy(DEEP),
        npy(DEEP[..., None]),
    ]
    names = {decode(data, form(1), identify=True).id for data in ways}
    assert len(names) == 1


def test_the_name_depends_on_no_setting() -> None:
    for data in (encode(RGB), encode(RGB, "JPEG"), encode(RGB, "WEBP"), npy(RGB)):
        assert name(data, 4) == name(data, 8)
        assert (
            decode(data, form(1), identify=True).id
            == decode(data, form(3, bits=16), identify=True).id
            == name(data)
        )
        assert decode(data, form()).id == ""


def test_large_jpegs_and_phones_double_jpegs_have_one_name_at_every_resolution() -> None:
    big = Image.fromarray(smooth(200, 300))
    for kind, options in (("JPEG", {}), ("MPO", {"save_all": True, "append_images": [big]})):
        data = encode(big, kind, **options)
        assert len({name(data, side) for side in (8, 40, 100)}) == 1, kind


def test_other_values_shapes_orders_depths_and_ways_up_have_other_names() -> None:
    changed = RGB.copy()
    changed[3, 4, 1] ^= 1
    others = [
        RGB,
        changed,
        RGB[::-1],
        RGB[:, ::-1],
        RGB[..., ::-1],
        RGB.transpose(1, 0, 2),
        RGB.reshape(W, H, 3),
        RGB[..., :1],
    ]
    others += [RGB.astype(np.uint16), stacked(RGB, FULL).astype(np.uint8), RGB.reshape(4, 15, 3)]
    names = [name(npy(np.ascontiguousarray(other))) for other in others if other.dtype == np.uint8]
    names += [decode(npy(RGB.astype(np.uint16)), form(), identify=True).id]
    names += [name(turned(orientation, "PNG")) for orientation in range(2, 9)]
    assert len(set(names)) == len(names)
    assert name(turned(1, "PNG")) == name(encode(RGB))


def test_a_jpeg_is_named_by_its_bytes() -> None:
    data = encode(RGB, "JPEG", quality=90)
    again = encode(RGB, "JPEG", quality=90, comment=b"hello")
    assert (values(data) == values(again)).all()
    assert name(data) != name(again)
    assert name(data) == name(bytes(data))


def test_a_profile_is_part_of_the_name() -> None:
    assert name(encode(RGB, icc_profile=profile(P3, 2.2, "P3"))) != name(encode(RGB))


# --- what must not be read ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"])
def test_a_cut_image_never_gives_pixels(kind: str) -> None:
    data = encode(noise(24, 30), kind)
    for cut in range(1, len(data) - 24, 13):
        with pytest.raises(RejectedImage):
            decode(data[:cut], form())


def test_cut_images_with_exif_and_profiles_give_no_pixels_either() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG"):
        data = encode(noise(24, 30), kind, exif=exif, icc_profile=profile(P3, 2.2, "P3"))
        for cut in range(1, len(data) - 24, 29):
            with pytest.raises(RejectedImage):
                decode(data[:cut], form())


def test_a_wrong_checksum_in_a_png_is_refused() -> None:
    data = bytearray(encode(RGB))
    data[-14] ^= 1  # the last byte of the checksum of the pixels
    found = None
    try:
        found = decode(bytes(data), form())
    except RejectedImage:
        return
    assert (found.pixels.transpose(1, 2, 0) == RGB).all()  # or the pixels are whole


def test_twelve_bits_of_gray_are_not_sixteen() -> None:
    """White in a 12-bit TIFF is 4095."""
    body = bytes([0xFF, 0xFF, 0xFF]) * (H * W // 2)
    entries = [
        (256, 3, W),
        (257, 3, H),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, H),
    ]
    entries += [(279, 4, len(body))]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    data = (
        b"II*\0"
        + struct.pack("<I", 8 + len(body))
        + body
        + struct.pack("<H", len(entries))
        + table
        + b"\0\0\0\0"
    )
    try:
        found = decode(data, form(1))
    except RejectedImage:
        return
    assert (found.pixels == 255).all()
