"""What a model makes comes back from files: alpha, depth, channels and the values of the source,
checked by other readers.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import ConfigError
from sfumato.observability.image_formats import FORMATS, PixelEncoding, settings_of, usual_format
from sfumato.observability.images import to_display_rgb
from sfumato.observability.png_tiff_encoders import png16
from sfumato.storage.atomic import atomic_file

SETTINGS = {"seed": 3, "prompt": ["ü", "\udcff"], "index": 1}
KINDS = [
    PixelEncoding(channels=channels, bits=bits, alpha=alpha, value_range=value_range)
    for channels in (1, 2, 3, 4, 5)
    for bits in (8, 16)
    for alpha in ("none", "straight", "premultiplied")
    for value_range in (None, (103.0, 250.0), (-1.5, 2.5))
    if channels in (2, 4) or alpha == "straight"
]


def image(values: PixelEncoding, side: int = 6) -> torch.Tensor:
    """Random, premultiplied where the model's images are; transparent on the left and opaque on the
    right.
    """
    made = torch.rand(values.channels, side, side + 2, generator=torch.Generator().manual_seed(1))
    if values.has_alpha:
        made[-1, :, :2], made[-1, :, -2:] = 0.0, 1.0
        made[:-1] = made[:-1] * made[-1:] if values.alpha == "premultiplied" else made[:-1]
    return made


def expected(values: PixelEncoding, made: torch.Tensor, levels: int) -> np.ndarray:
    """Colours and alpha in [0, 1], straight, the colour of what cannot be seen 0; written from the
    definition, pixel by pixel.
    """
    out = made.double().numpy().copy()
    if values.has_alpha:
        for y, x in np.ndindex(out.shape[1:]):
            opaque = out[-1, y, x]
            if round(opaque * levels) == 0:
                out[:-1, y, x] = 0
            elif values.alpha == "premultiplied":
                out[:-1, y, x] = np.minimum(out[:-1, y, x] / opaque, 1)
    return out


def unpacked(data: bytes) -> np.ndarray:
    """Values of a PNG of 16 bits, by the specification (filters none, sub and up)."""
    place, packed, head = 8, b"", (0, 0, 0, 0)
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", data, place + 8 + length)[0] == zlib.crc32(kind + body)
        head = struct.unpack_from(">IIBB", body) if kind == b"IHDR" else head
        packed += body if kind == b"IDAT" else b""
        place += 12 + length
    width, height, bits, colour = head
    assert bits == 16
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
    rows = np.zeros((height, lines.shape[1] - 1), np.uint8)
    for y, line in enumerate(lines):
        assert line[0] in (0, 2)
        rows[y] = line[1:] + (rows[y - 1] if line[0] == 2 and y else 0)
    return rows.view(">u2").reshape(height, width, channels).astype(int)


def fits(name: str, values: PixelEncoding) -> bool:
    """Whether a format can hold such images, said without its code."""
    in_pillow = values.channels <= 4 and not (values.channels in (2, 4) and values.alpha == "none")
    return {
        "png": in_pillow,
        "tiff": True,
        "npy": True,
        "webp": in_pillow and values.bits == 8,
        "jpg": in_pillow and values.bits == 8 and values.channels in (1, 3),
    }[name]


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_holds_an_image_or_says_why_not(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    for number, values in enumerate(KINDS):
        if not fits(name, values):
            with pytest.raises(ConfigError, match="hold"):
                form.require(values)
            continue
        form.require(values)
        made = image(values)
        if name == "npy":
            (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
        path = form.write(made, tmp_path / f"{number:05d}.{name}", values, SETTINGS)
        assert settings_of(path) == SETTINGS
        seen = form.read(path, values)
        close = (
            0.06
            if name == "jpg"
            else 0.51 / (2**values.bits - 1)
            if not form.holds_source_values(values)
            else 0.51 / 147
        )
        wanted = torch.from_numpy(expected(values, made, 2**values.bits - 1)).float()
        error = (seen - wanted).abs()
        assert float(error.mean() if name == "jpg" else error.max()) <= close + 1e-6, values
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_png_keeps_alpha_and_depth(channels: int, mode: str, bits: int, tmp_path: Path) -> None:
    values = PixelEncoding(channels=channels, bits=bits)
    path = FORMATS["png"].write(image(values), tmp_path / "a.png", values, SETTINGS)
    wanted = np.rint(expected(values, image(values), 2**bits - 1) * (2**bits - 1)).transpose(
        1, 2, 0
    )
    with Image.open(path) as opened:
        assert opened.mode == (
            mode if bits == 8 else {1: "I;16", 2: "RGBA", 3: "RGB", 4: "RGBA"}[channels]
        )
        assert json.loads(opened.text["sfumato"]) == SETTINGS
        seen = (
            np.asarray(opened if channels == 1 else opened.convert(mode))
            .astype(int)
            .reshape(*wanted.shape)
        )
    if bits == 8:
        assert (seen == wanted).all()
    else:
        assert (unpacked(path.read_bytes()) == wanted).all()
        # Pillow reads 16-bit colour as 8-bit
        assert (seen == (wanted if channels == 1 else wanted // 256)).all()


def test_a_png_of_16_bits_is_that_of_pillow_where_it_writes_one() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (7, 5, 1)).astype(np.uint16)
    assert (unpacked(png16(pixels, {})) == pixels).all()


@pytest.mark.parametrize(
    ("kind", "channels"), [(np.uint8, 1), (np.uint8, 3), (np.uint16, 1), (np.float32, 1)]
)
def test_tiff_opens_elsewhere(channels: int, kind: type, tmp_path: Path) -> None:
    value_range = (-1.5, 2.5) if kind is np.float32 else None
    values = PixelEncoding(
        channels=channels, bits=16 if kind is np.uint16 else 8, value_range=value_range
    )
    path = FORMATS["tiff"].write(image(values), tmp_path / "a.tiff", values, SETTINGS)
    with Image.open(path) as opened:
        assert opened.size == (8, 6)
        assert json.loads(opened.tag_v2[270]) == SETTINGS
        scale = 255 if kind is np.uint8 else 65535
        wanted = expected(values, image(values), scale)
        wanted = wanted * 4 - 1.5 if kind is np.float32 else np.rint(wanted * scale)
        assert (
            np.abs(np.asarray(opened).reshape(6, 8, channels) - wanted.transpose(1, 2, 0)).max()
            < 1e-6
        )


def test_values_of_the_source_are_restored_where_a_format_can_hold_them(tmp_path: Path) -> None:
    made = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3)
    twelve, real = (
        PixelEncoding(channels=1, bits=16, value_range=found)
        for found in ((100.0, 4100.0), (-1.0, 3.0))
    )
    for name, wanted in (
        ("png", [100, 2100, 4100]),
        ("tiff", [100, 2100, 4100]),
        ("npy", [100, 2100, 4100]),
    ):
        path = FORMATS[name].write(made, tmp_path / f"a.{name}", twelve, {})
        found = np.load(path) if name == "npy" else np.asarray(Image.open(path))
        assert found.ravel().tolist() == wanted
        assert FORMATS[name].holds_source_values(twelve)
    for name, wanted in (("tiff", [-1, 1, 3]), ("npy", [-1, 1, 3])):
        path = FORMATS[name].write(made, tmp_path / f"b.{name}", real, {})
        found = np.load(path) if name == "npy" else np.asarray(Image.open(path))
        assert found.dtype == np.float32
        assert found.ravel().tolist() == wanted
    assert not FORMATS["png"].holds_source_values(real)


def test_the_usual_format_is_png_where_it_can_be() -> None:
    assert {
        values.channels: usual_format(values) for values in KINDS if values.alpha == "straight"
    } == {
        1: "png",
        2: "png",
        3: "png",
        4: "png",
        5: "tiff",
    }
    assert usual_format(PixelEncoding(channels=4, alpha="none")) == "tiff"


def test_a_file_of_anything_else_carries_no_settings(tmp_path: Path) -> None:
    for name in ("a.png", "b.tiff", "c.jpg", "d.webp", "e.npy", "f.txt"):
        (tmp_path / name).write_bytes(b"not an image")
        assert settings_of(tmp_path / name) is None
    Image.new("RGB", (4, 4)).save(tmp_path / "g.png")
    assert settings_of(tmp_path / "g.png") is None


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.png"

    def fail() -> None:
        with atomic_file(target) as file:
            file.write(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert list(target.parent.iterdir()) == []


def test_alpha_is_shown_over_a_checkerboard_and_other_channels_as_colours() -> None:
    clear = torch.zeros(1, 4, 16, 16)
    board = to_display_rgb(clear)
    assert set(board.unique().tolist()) == {0.800000011920929, 1.0}
    opaque = clear.clone()
    opaque[:, 0], opaque[:, 3] = 1.0, 1.0
    assert torch.equal(
        to_display_rgb(opaque), torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    )
    half = torch.full((1, 2, 16, 16), 0.5)
    torch.testing.assert_close(to_display_rgb(half), 0.25 + 0.5 * board)
    torch.testing.assert_close(to_display_rgb(half, "premultiplied"), 0.5 + 0.5 * board)
    half[:, 0] = 0.9  # more than its alpha, which no premultiplied colour can be
    torch.testing.assert_close(to_display_rgb(half, "premultiplied"), 0.5 + 0.5 * board)
    five = torch.rand(1, 5, 4, 4)
    assert torch.equal(to_display_rgb(five), five[:, :3])
    assert torch.equal(to_display_rgb(five[:, :4], "none"), five[:, :3])
    assert torch.equal(
        to_display_rgb(five[:, :2], "none"), torch.cat([five[:, :2], torch.zeros(1, 1, 4, 4)], 1)
    )
