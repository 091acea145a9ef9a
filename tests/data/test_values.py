"""The same values give the same image, whatever their type and container; alpha, ranges and frames
are what the container says.
"""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from sfumato.data import DataConfig, Folder, Npz, index
from sfumato.data.decoding import PixelFormat, RejectedImage, Scale, decode, read_header, read_raw
from sfumato.data.listing import Entry, Inline
from sfumato.data.value_range import choose_scale
from sfumato.errors import ConfigError, DataError
from tests.helpers.image_bytes import encode, noise, png

H, W, SIDE = 20, 28, 10


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))


def grain(bands: int, seed: int = 0) -> np.ndarray:
    """(H, W, bands) of 8 bits."""
    return np.random.default_rng(seed).integers(0, 256, (H, W, bands), dtype=np.uint8)


def calm(bands: int) -> np.ndarray:
    """The same away from black and white, where Pillow cuts 8-bit images off between its two
    passes.
    """
    return 80 + grain(bands) // 3


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def tif(array: np.ndarray, **options) -> bytes:
    """One page (H, W, C) as tifffile writes it."""
    buffer = io.BytesIO()
    planar = options.pop("planarconfig", None)
    bands = array.shape[2]
    values = array[..., 0] if bands == 1 else array
    if bands > 1 and planar == "separate":
        values = np.moveaxis(array, 2, 0)
    kind = options.pop("photometric", "rgb" if bands == 3 else "minisblack")
    tifffile.imwrite(
        buffer,
        values,
        photometric=kind,
        planarconfig=None if bands == 1 else planar or "contig",
        metadata=None,
        **options,
    )
    return buffer.getvalue()


def repacked(data: bytes, compression: str) -> bytes:
    """A TIFF that Pillow packs: LZW and PackBits, which tifffile alone does not write."""
    return encode(Image.open(io.BytesIO(data)), "TIFF", compression=compression)


def form(channels: int, **options) -> PixelFormat:
    return PixelFormat(shapes=((SIDE, SIDE),), channels=channels, **options)


def pixels(data: bytes, channels: int, **options) -> np.ndarray:
    return decode(data, form(channels, **options)).pixels.astype(int)


# --- one set of values, every type and container --------------------------------------------------

RAW = Scale(integers=(0, 255), floats=(0, 255))
TYPES = {
    "uint8": (lambda v: v, Scale()),
    "uint16 x 257": (lambda v: v.astype(np.uint16) * 257, Scale()),
    "uint16": (lambda v: v.astype(np.uint16), RAW),
    "int16": (lambda v: v.astype(np.int16) - 100, Scale(integers=(-100, 155))),
    "int32": (
        lambda v: v.astype(np.int32) * 1000 + 10**6,
        Scale(integers=(10**6, 10**6 + 255_000)),
    ),
    "uint32": (lambda v: v.astype(np.uint32), RAW),
    "float16": (lambda v: v.astype(np.float16), RAW),
    "float32": (lambda v: v.astype(np.float32) / 255, Scale()),
    "float64": (lambda v: v.astype(np.float64) * 3 - 7, Scale(floats=(-7, 758))),
}
TIFFS: dict[str, dict] = {
    "big": {"bigtiff": True},
    "big, big-endian": {"bigtiff": True, "byteorder": ">"},
} | {
    f"{order}, {planar}, {packed}, {'tiles' if tile else 'strips'}": {
        "byteorder": order,
        "planarconfig": planar,
        "compression": packed,
        "predictor": predictor,
        **({"tile": (16, 16)} if tile else {"rowsperstrip": 7}),
    }
    for order, planar, (packed, predictor), tile in itertools.product(
        "<>",
        ("contig", "separate"),
        ((None, None), ("zlib", None), ("zlib", True), ("lzma", None)),
        (False, True),
    )
}


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", TYPES)
def test_equal_values_are_equal_pixels_in_every_type_and_container(kind: str, bands: int) -> None:
    values = calm(bands)
    expected = pixels(npy(values), bands, bits=16)
    convert, scale = TYPES[kind]
    stored = convert(values)
    ways = {
        "npy": npy(stored),
        "npy, big-endian": npy(stored.astype(stored.dtype.newbyteorder(">"))),
    }
    for name, options in TIFFS.items():
        # which tifffile alone does not write
        if not (stored.dtype.kind == "f" and options.get("predictor")):
            ways[name] = tif(stored, **options)
    for name, data in ways.items():
        found = pixels(data, bands, bits=16, scale=scale)
        # Pillow scales 8-bit images of 1 and 3 channels in 8 bits, which it rounds to twice.
        tolerance = 2 * 257 if bands in (1, 3) else 3
        assert np.abs(found - expected).max() <= tolerance, name
    assert np.abs(pixels(ways["npy"], bands, scale=scale) - pixels(npy(values), bands)).max() <= 1


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_what_libtiff_packs_is_unpacked_value_for_value(kind: str, compression: str) -> None:
    stored = TYPES[kind][0](grain(1))
    data = repacked(tif(stored), compression)
    assert (read_raw(data).array == stored).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_the_predictor_of_floats_is_undone(compression: str) -> None:
    stored = grain(1).astype(np.float32) / 7
    data = encode(
        Image.fromarray(stored[..., 0]), "TIFF", compression=compression, tiffinfo={317: 3}
    )
    assert (read_raw(data).array == stored).all()


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_sixteen_bit_colour_in_png_is_read_whole(bands: int) -> None:
    values = np.random.default_rng(3).integers(0, 65536, (H, W, bands), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = png(W, H, depth=16, colour={2: 4, 3: 2, 4: 6}[bands], rows=rows)
    found = read_raw(data)
    assert (found.array == values).all()
    assert found.alpha == (bands in (2, 4))


@pytest.mark.parametrize("filter_type", range(5))
def test_every_filter_of_a_png_is_undone_at_sixteen_bits(filter_type: int) -> None:
    values = np.random.default_rng(4).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    raw = values.astype(">u2").view(np.uint8).reshape(5, -1).astype(int)
    left = np.pad(raw, ((0, 0), (6, 0)))[:, :-6]
    above = np.pad(raw, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(left, ((1, 0), (0, 0)))[:-1]
    estimate = left + above - corner
    distance = [np.abs(estimate - other) for other in (left, above, corner)]
    nearest = np.where(
        (distance[0] <= distance[1]) & (distance[0] <= distance[2]),
        left,
        np.where(distance[1] <= distance[2], above, corner),
    )
    guess = [0, left, above, (left + above) // 2, nearest][filter_type]
    rows = b"".join(
        bytes([filter_type]) + ((row) % 256).astype(np.uint8).tobytes() for row in raw - guess
    )
    assert (read_raw(png(7, 5, depth=16, colour=2, rows=rows)).array == values).all()


@pytest.mark.parametrize("depth", [8, 16, 32])
@pytest.mark.parametrize("bands", [1, 3])
def test_white_is_zero_is_its_inverse_at_every_depth(depth: int, bands: int) -> None:
    values = grain(bands).astype(f"u{depth // 8}") * ((2**depth - 1) // 255)
    scale = Scale(integers=(0, 2**32 - 1)) if depth == 32 else Scale()
    positive = pixels(tif(values), bands, scale=scale)
    inverse = np.invert(values)
    negative = tif(inverse, photometric="miniswhite") if bands == 1 else tif(values)
    assert np.abs(pixels(negative, bands, scale=scale) - positive).max() <= 1


def test_the_order_of_channels_is_kept() -> None:
    values = np.zeros((H, W, 5), np.uint16) + np.array([1, 2, 3, 4, 5], np.uint16) * 10 * 257
    for data in (npy(values), tif(values), tif(values, planarconfig="separate", byteorder=">")):
        assert pixels(data, 5)[:, 3, 3].tolist() == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_of_many_bands_are_turned_upright(orientation: int) -> None:
    values = grain(5)
    turned = tif(values, extratags=[(274, "H", 1, orientation, True)])
    gray = encode(Image.fromarray(values[..., 0]), exif=_exif(orientation))
    found = decode(turned, form(5, scale=Scale()))
    assert found.size == decode(gray, form(1)).size == read_header(turned).size
    assert np.abs(found.pixels[0].astype(int) - pixels(gray, 1)[0]).max() <= 1


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- alpha ----------------------------------------------------------------------------------------


def ways_of_alpha(values: np.ndarray) -> dict[str, bytes]:
    """Four channels of 8 bits, the last of which is alpha and says so."""
    deep = values.astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    image = Image.fromarray(values)
    return {
        "PNG": encode(image),
        "PNG 16": png(W, H, depth=16, colour=6, rows=rows),
        "WebP": encode(image, "WEBP", lossless=True, exact=True),
        "TIFF": encode(image, "TIFF"),
        "TIFF 16": tif(deep, photometric="rgb", extrasamples=["unassalpha"]),
    }


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_hidden_colours_change_no_pixel(channels: int) -> None:
    values = grain(4)
    values[:, : W // 2, 3] = 0
    other = values.copy()
    other[:, : W // 2, :3] = 255 - other[:, : W // 2, :3]
    for name, data in ways_of_alpha(values).items():
        assert (pixels(data, channels) == pixels(ways_of_alpha(other)[name], channels)).all(), name


def test_all_that_say_alpha_give_the_same_premultiplied_pixels() -> None:
    values = grain(4)
    share = values[..., 3:] / 255
    expected = np.concatenate([values[..., :3] * share, values[..., 3:]], axis=2)
    for name, data in ways_of_alpha(values).items():
        found = decode(data, PixelFormat(shapes=((H, W),), channels=4)).pixels.transpose(1, 2, 0)
        assert np.abs(found - expected).max() <= 1, name
        assert (found[..., :3] <= found[..., 3:]).all()


def test_alpha_that_is_multiplied_in_already_is_not_multiplied_twice() -> None:
    values = grain(4)
    values[..., :3] = np.minimum(values[..., :3], values[..., 3:])
    data = tif(values.astype(np.uint16) * 257, photometric="rgb", extrasamples=["assocalpha"])
    found = decode(data, PixelFormat(shapes=((H, W),), channels=4)).pixels.transpose(1, 2, 0)
    assert np.abs(found.astype(int) - values).max() <= 1


@pytest.mark.parametrize("bands", [2, 4])
def test_the_last_of_an_array_is_alpha_only_where_the_settings_say_so(bands: int) -> None:
    values = grain(bands)
    plain = decode(npy(values), PixelFormat(shapes=((H, W),), channels=bands))
    assert (plain.pixels.transpose(1, 2, 0) == values).all()
    assert plain.notes == ("no_alpha",)
    clear = decode(npy(values), PixelFormat(shapes=((H, W),), channels=bands, alpha="on"))
    assert (
        np.abs(
            clear.pixels.transpose(1, 2, 0)[..., :-1] - values[..., :-1] * (values[..., -1:] / 255)
        ).max()
        <= 1
    )
    with pytest.raises(RejectedImage, match=r"data\.alpha=on if the last is alpha"):
        decode(npy(values), form(3))
    assert decode(npy(values), form(3, alpha="on")).notes == ("transparency_filled",)
    stored = encode(Image.fromarray(values))
    kept = decode(stored, PixelFormat(shapes=((H, W),), channels=bands, alpha="off"))
    assert (kept.pixels.transpose(1, 2, 0) == values).all()


def test_a_set_in_which_some_last_channels_are_alpha_is_refused(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.npy").write_bytes(npy(grain(4, seed=number)))
        (tmp_path / f"{number}.png").write_bytes(encode(Image.fromarray(grain(4, seed=9 + number))))
    with pytest.raises(DataError, match="not marked as alpha"):
        index(DataConfig(source=Folder(str(tmp_path)), resolution=8, channels=4))
    assert (
        index(DataConfig(source=Folder(str(tmp_path)), resolution=8, channels=4, alpha="on")).alpha
        == "premultiplied"
    )
    assert (
        index(DataConfig(source=Folder(str(tmp_path)), resolution=8, channels=4, alpha="off")).alpha
        == "none"
    )


# --- ranges ---------------------------------------------------------------------------------------


def entries(*arrays: np.ndarray | bytes) -> list[Entry]:
    return [
        Entry(name=f"{number}", image=Inline(array if isinstance(array, bytes) else npy(array)))
        for number, array in enumerate(arrays)
    ]


def of(top: float, dtype: type, count: int = 6) -> list[np.ndarray]:
    return [(np.random.default_rng(i).random((H, W, 1)) * top).astype(dtype) for i in range(count)]


@pytest.mark.parametrize(
    ("arrays", "scale"),
    [
        (of(255, np.uint8), Scale()),
        (of(20, np.uint8), Scale()),
        (of(65535, np.uint16), Scale()),
        (of(30_000, np.uint16), Scale()),
        (of(4095.9, np.uint16), Scale(integers=(0, 4095))),
        (of(1023.9, np.uint16), Scale(integers=(0, 1023))),
        (of(16383.9, np.int32), Scale(integers=(0, 16383))),
        (of(1, np.float32), Scale()),
        (of(0.4, np.float64), Scale()),
    ],
)
def test_the_type_says_what_is_white_where_it_can(arrays: list[np.ndarray], scale: Scale) -> None:
    assert choose_scale("auto", entries(*arrays)).scale == scale


def test_dim_signed_and_unbounded_values_get_the_range_of_the_set() -> None:
    # another microscope
    dim = [array + 90 for array in of(400, np.uint16, 20)] + [of(60_000, np.uint16, 1)[0] // 2 + 90]
    chosen = choose_scale("auto", entries(*dim))
    low, high = chosen.scale.integers
    assert 85 <= low <= 95
    assert 480 <= high <= 495
    assert "1 of which are brighter and clipped" in chosen.lines[0]
    scan = [array - 1000 for array in of(3000, np.int16)]
    low, high = choose_scale("auto", entries(*scan)).scale.integers
    assert -1000 <= low < -950
    assert 1950 < high < 2000
    assert choose_scale("auto", entries(*of(7, np.float32))).scale.floats == pytest.approx(
        (0, 7), abs=0.1
    )


def test_a_range_is_of_the_set_and_never_of_an_image(tmp_path: Path) -> None:
    for number, top in enumerate([100, 400, 800, 1600, 2400, 3200]):
        np.save(
            tmp_path / f"{number}.npy", np.linspace(0, top, H * W).reshape(H, W).astype(np.int32)
        )
    data = index(DataConfig(source=Folder(str(tmp_path)), resolution=8, channels=1))
    brightest = data.images(np.arange(6)).pixels.amax((1, 2, 3)).tolist()
    assert brightest == sorted(brightest)
    assert brightest[0] < 30
    assert data.scale.range == data.summary()["value_range"]


def test_a_mixed_set_of_8_and_16_bits_is_consistent() -> None:
    values = calm(1)
    chosen = choose_scale("auto", entries(values, values.astype(np.uint16) * 257)).scale
    assert chosen == Scale()
    assert (
        np.abs(pixels(npy(values), 1) - pixels(npy(values.astype(np.uint16) * 257), 1)).max() <= 1
    )


def test_twelve_bits_packed_and_in_sixteen_are_alike(tmp_path: Path) -> None:
    values = (np.random.default_rng(1).random((H, W, 1)) * 4095).astype(np.uint16)
    values[0, 0] = 4095
    chosen = choose_scale("auto", entries(values)).scale
    scaled = decode(npy(values), PixelFormat(shapes=((H, W),), channels=1, scale=chosen)).pixels[0]
    assert (scaled == np.rint(values[..., 0] * (255 / 4095))).all()


def test_values_outside_a_range_are_cut_and_noted() -> None:
    values = np.linspace(0, 100, H * W).reshape(H, W, 1).astype(np.float32)
    found = decode(npy(values), form(1, scale=Scale(floats=(25, 75))))
    assert "values_outside_range" in found.notes
    assert (found.pixels.min(), found.pixels.max()) == (0, 255)


def test_values_that_are_not_finite_reject_their_image_alone(tmp_path: Path) -> None:
    for number, array in enumerate(of(5, np.float32)):
        np.save(tmp_path / f"{number}.npy", array)
    bad = of(5, np.float32, 1)[0]
    bad[3, :4] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    data = index(DataConfig(source=Folder(str(tmp_path)), resolution=8, channels=1))
    assert [(reject.name, reject.reason) for reject in data.rejects] == [
        ("bad.npy", "4 of its values are not finite (NaN or infinity)")
    ]


def test_a_range_that_is_set_is_taken_for_what_is_stored(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "scan.npz",
        images=np.stack([array - 1000 for array in of(3000, np.int16)])[..., 0],
    )
    data = index(
        DataConfig(
            source=Npz(str(tmp_path / "scan.npz")), resolution=8, channels=1, range=(-1000, 2000)
        )
    )
    assert data.scale.range == (-1000, 2000)
    assert "as set by data.range" in data.remarks[0]
    for wrong in ((5, 5), (5, 1), (0, float("nan"))):
        with pytest.raises(ConfigError, match=r"data\.range"):
            DataConfig(range=wrong)


def test_what_is_as_before_keeps_its_key() -> None:
    assert (
        repr(form(3))
        == "PixelFormat(shapes=((10, 10),), channels=3, bits=8, background=(255, 255, 255))"
    )
    assert (
        len(
            {
                repr(form(4)),
                repr(form(4, alpha="on")),
                repr(form(3)),
                repr(form(3, scale=Scale(floats=(0.0, 2.0)))),
            }
        )
        == 4
    )


# --- frames ---------------------------------------------------------------------------------------


def several(kind: str, frames: np.ndarray) -> bytes:
    """(N, H, W) of 8 bits as one file."""
    if kind == "npy":
        return npy(frames[..., None])
    if kind == "tif":
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, frames.astype(np.uint16) * 257, photometric="minisblack")
        return buffer.getvalue()
    images = [Image.fromarray(frame).convert("L") for frame in frames]
    lossless = {"lossless": True} if kind == "webp" else {}
    return encode(
        images[0],
        {"png": "PNG", "gif": "GIF", "webp": "WEBP"}[kind],
        save_all=True,
        append_images=images[1:],
        **lossless,
    )


STACKS = [np.random.default_rng(i).integers(0, 256, (4, H, W), dtype=np.uint8) for i in range(5)]


@pytest.mark.parametrize("kind", ["tif", "npy", "png", "gif", "webp"])
def test_frames_are_taken_first_all_or_at_their_maximum(kind: str, tmp_path: Path) -> None:
    for number, stack in enumerate(STACKS):
        (tmp_path / f"{number}.{kind}").write_bytes(several(kind, stack))
        (tmp_path / f"{number}.txt").write_text("a stack")

    def read(frames: str):
        return index(
            DataConfig(source=Folder(str(tmp_path)), resolution=H, channels=1, frames=frames)
        )

    middle = slice((W - H) // 2, (W + H) // 2)
    if kind != "npy":  # four dimensions are no image by themselves
        first = read("first")
        assert "15 frames left out: 5 files hold several" in " ".join(first.remarks)
        assert (first.images(np.array([2])).pixels[0, 0].numpy() == STACKS[2][0][:, middle]).all()
    every = read("all")
    assert [entry.name for entry in every.entries[:5]] == [
        *(f"0.{kind}#000{i}" for i in range(4)),
        f"1.{kind}#0000",
    ]
    assert {entry.group for entry in every.entries} == {f"{number}.{kind}" for number in range(5)}
    assert all(entry.captions == ("a stack",) for entry in every.entries)
    assert not [line for line in every.remarks if "left out" in line]
    assert (every.images(np.array([6])).pixels[0, 0].numpy() == STACKS[1][2][:, middle]).all()
    brightest = read("max")
    assert (
        brightest.images(np.array([3])).pixels[0, 0].numpy() == STACKS[3].max(0)[:, middle]
    ).all()


def test_thumbnails_and_masks_inside_a_tiff_are_not_frames(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(grain(1)[..., 0], photometric="minisblack")
        writer.write(grain(1)[::2, ::2, 0], photometric="minisblack", subfiletype=1)
    found = decode(buffer.getvalue(), form(1))
    assert found.frames == 1
    assert "animated_first_frame_used" not in found.notes


@pytest.mark.parametrize("bits", [10, 24])
def test_tiffs_that_cannot_be_read_say_what_they_are(bits: int) -> None:
    data = bytearray(tif(grain(5).astype(np.uint16)))
    page = tifffile.TiffFile(io.BytesIO(bytes(data))).pages[0]
    at = page.tags["BitsPerSample"].valueoffset
    data[at : at + 10] = np.full(5, bits, "<u2").tobytes()
    with pytest.raises(
        RejectedImage,
        match=f"a TIFF of 5 .* of {bits}-bit integers, compression none: not read; save it",
    ):
        decode(bytes(data), form(5))
    assert noise(2, 2).shape == (2, 2, 3)
