"""Whatever the bytes, `decode` gives pixels of the asked shape or says why not: no other exception,
crash, hang or flood of memory.
"""

import io
import json
import os
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.data.decoding import PixelFormat, RejectedImage, decode, fit_within, read_header
from tests.helpers.corrupt import assert_pixels_or_reason
from tests.helpers.image_bytes import chunk, encode, noise, png, smooth

MIB = 1 << 20
REFUSED_MIB = 48  # over the size of the file itself: what refusing a bomb may cost
SECONDS_PER_FILE = 10  # before a worker that hangs is ended


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


# --- a corpus that reaches every branch of the parsers --------------------------------------------


def corpus() -> dict[str, bytes]:
    """Small whole files, by kind and what is special about them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "an image"
    from PIL import ImageCms

    icc = (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"sRGB", b"eRGB")
    )
    rgb, gray = Image.fromarray(noise(20, 30)), Image.fromarray(noise(20, 30)[..., 0])
    clear, deep = (
        rgb.convert("RGBA"),
        Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100),
    )
    clear.putalpha(gray)
    frames = {"save_all": True, "append_images": [Image.fromarray(noise(20, 30, seed=1))]}
    row = b"\0" + struct.pack(">3H", 2570, 5140, 7710) * 8
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"words " * 20)) + chunk(
        b"iTXt", b"Title\0\1\0en\0t\0" + zlib.compress(b"name")
    )
    array, floats = io.BytesIO(), io.BytesIO()
    np.save(array, noise(20, 30), allow_pickle=False)
    np.save(floats, noise(20, 30) / np.float32(255), allow_pickle=False)

    def tiff(dtype: type, **options) -> bytes:
        """Five bands as scientists write them."""
        buffer, bands = (
            io.BytesIO(),
            np.concatenate([noise(20, 30), noise(20, 30, seed=1)[..., :2]], axis=2),
        )
        values = (bands / 255).astype(dtype) if np.dtype(dtype).kind == "f" else bands.astype(dtype)
        planar = options.pop("planarconfig", "contig")
        values = values if planar == "contig" else np.moveaxis(values, 2, 0)
        tifffile.imwrite(buffer, values, photometric="minisblack", planarconfig=planar, **options)
        return buffer.getvalue()

    return {
        "jpeg": encode(rgb, "JPEG", exif=exif),
        "jpeg progressive": encode(
            Image.fromarray(smooth(60, 90)), "JPEG", progressive=True, icc_profile=icc
        ),
        "jpeg cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "jpeg gray restarts": encode(gray, "JPEG", restart_marker_blocks=2),
        "jpeg two": encode(rgb, "MPO", **frames),
        "png": encode(rgb, exif=exif, icc_profile=icc),
        "png alpha": encode(clear, optimize=True),
        "png palette": encode(rgb.quantize(16), transparency=3),
        "png one bit": encode(gray.convert("1")),
        "png deep": encode(deep),
        "png deep colour": png(8, 8, depth=16, colour=2, rows=row * 8, extra=text),
        "png clear colour": encode(gray, transparency=7),
        "png animated": encode(rgb, **frames),
        "webp": encode(rgb, "WEBP", exif=exif, icc_profile=icc),
        "webp lossless": encode(clear, "WEBP", lossless=True),
        "webp alpha": encode(clear, "WEBP"),
        "webp animated": encode(rgb, "WEBP", **frames),
        "gif": encode(rgb, "GIF", **frames),
        "gif clear": encode(rgb.quantize(8), "GIF", transparency=2),
        "bmp": encode(rgb, "BMP"),
        "bmp palette": encode(rgb.quantize(16), "BMP"),
        "tiff": encode(rgb, "TIFF", exif=exif),
        "tiff lzw": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": encode(rgb, "TIFF", compression="jpeg"),
        "tiff deflate deep": encode(deep, "TIFF", compression="tiff_adobe_deflate"),
        "tiff fax": encode(gray.convert("1"), "TIFF", compression="group4"),
        "tiff bands": tiff(np.uint16),
        "tiff bands planar deflate": tiff(
            np.uint8, planarconfig="separate", compression="zlib", predictor=True, rowsperstrip=6
        ),
        "tiff bands floats tiles": tiff(
            np.float32, tile=(16, 16), compression="zlib", byteorder=">"
        ),
        "tiff big": tiff(np.uint16, bigtiff=True, byteorder=">"),
        "tiff lzw floats": encode(
            Image.fromarray(noise(20, 30)[..., 0] / np.float32(255)), "TIFF", compression="tiff_lzw"
        ),
        "npy": array.getvalue(),
        "npy floats": floats.getvalue(),
    }


FORMS = [
    PixelFormat(shapes=((8, 8),), channels=3),
    PixelFormat(shapes=((12, 6), (8, 8), (6, 12)), channels=4, bits=16),
    PixelFormat(shapes=((5, 9),), channels=1, background=(0, 0, 0)),
    PixelFormat(shapes=((8, 8),), channels=5, bits=16),
]


def mutated(data: bytes, generator: np.random.Generator, others: list[bytes]) -> bytes:
    """`data` with one to three kinds of harm."""
    harmed = bytearray(data)
    for _ in range(generator.integers(1, 4)):
        size = max(1, len(harmed))
        place = int(generator.integers(0, min(size, 120) if generator.random() < 0.5 else size))
        match int(generator.integers(0, 9)):
            case 0:  # bits
                for at in generator.integers(0, size, generator.integers(1, 9)):
                    if harmed:
                        harmed[at] ^= 1 << int(generator.integers(0, 8))
            case 1:  # bytes, where parsers branch
                for at in generator.integers(
                    place, min(size, place + 40), generator.integers(1, 5)
                ):
                    if harmed:
                        harmed[at] = int(
                            generator.choice(
                                [0, 1, 127, 128, 254, 255, int(generator.integers(0, 256))]
                            )
                        )
            case 2:  # a gap
                del harmed[place : place + int(generator.integers(1, 65))]
            case 3:  # something between
                harmed[place:place] = generator.bytes(int(generator.integers(1, 65)))
            case 4:  # the end missing
                del harmed[int(generator.integers(0, size)) :]
            case 5:  # a stretch again
                harmed[place:place] = harmed[place : place + int(generator.integers(1, 200))]
            case 6:  # a number: a length, a size, an offset
                number = int(
                    generator.choice(
                        [
                            0,
                            1,
                            0x7FFF,
                            0xFFFF,
                            0x10000,
                            0x7FFFFFFF,
                            0x80000000,
                            0xFFFFFFFF,
                            len(harmed),
                        ]
                    )
                )
                code = str(generator.choice([">I", "<I", ">H", "<H"]))
                harmed[place : place + struct.calcsize(code)] = struct.pack(
                    code, number & (2 ** (8 * struct.calcsize(code)) - 1)
                )
            case 7:  # another file's head or tail
                other = others[int(generator.integers(0, len(others)))]
                cut = int(generator.integers(0, min(len(other), 200)))
                harmed = (
                    bytearray(other[:cut]) + harmed[place:]
                    if generator.random() < 0.5
                    else harmed[:place] + other[cut:]
                )
            case 8:  # chunks of a PNG: changed inside, with a checksum to match
                harmed = bytearray(rechecked(bytes(harmed), generator))
    return rechecked(bytes(harmed)) if generator.random() < 0.5 else bytes(harmed)


def rechecked(data: bytes, generator: np.random.Generator | None = None) -> bytes:
    """A PNG whose chunks have the right checksums, so that the parser goes on; with a generator,
    one byte is changed before.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, place = data[:8], 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if place + 12 + size > len(data):
            break
        kind, body = data[place + 4 : place + 8], bytearray(data[place + 8 : place + 8 + size])
        if generator is not None and body and generator.random() < 0.4:
            body[int(generator.integers(0, len(body)))] = int(generator.integers(0, 256))
        out += chunk(kind, bytes(body))
        place += 12 + size
    return out + data[place:]


FILES = corpus()


@pytest.mark.parametrize("kind", FILES)
def test_the_corpus_is_of_images(kind: str) -> None:
    bands = read_header(FILES[kind]).bands
    assert assert_pixels_or_reason(FILES[kind], FORMS[3 if bands == 5 else 0])


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore")
def test_a_few_harmed_files_are_images_or_a_reason(kind: str) -> None:
    read = 0
    for number in range(40):
        generator = np.random.Generator(np.random.Philox(key=number))
        harmed = mutated(FILES[kind], generator, list(FILES.values()))
        read += assert_pixels_or_reason(
            harmed, FORMS[3 if "bands" in kind or "big" in kind else number % 3]
        )
    assert read < 40  # harm is noticed


@settings(max_examples=120, deadline=None)
@given(kind=st.sampled_from(sorted(FILES)), data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_small_mutations_are_images_or_a_reason(kind: str, data: st.DataObject) -> None:
    harmed = bytearray(FILES[kind])
    places = st.one_of(st.integers(0, min(len(harmed), 150) - 1), st.integers(0, len(harmed) - 1))
    for place, value in data.draw(
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6)
    ):
        harmed[place] = value
    first, length = data.draw(st.tuples(places, st.sampled_from([0, 0, 1, 4, 30])))
    del harmed[first : first + length]
    whole = bytes(harmed)
    assert_pixels_or_reason(whole, FORMS[0])
    assert_pixels_or_reason(whole, fit_within(whole, 8))


@settings(max_examples=80, deadline=None)
@given(header=st.text(st.characters(max_codepoint=127), max_size=120), body=st.binary(max_size=40))
def test_array_headers_of_any_text_are_a_reason(header: str, body: bytes) -> None:
    text = header.encode()
    assert not assert_pixels_or_reason(
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body, FORMS[0]
    )


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.one_of(st.integers(-4, 70), st.just(10**9), st.booleans()), max_size=4),
    descr=st.sampled_from(["|u1", "<u2", ">u2", "|O", "|V8", "<f8", "|b1", "|S3", "u1"]),
    fortran=st.sampled_from([True, False, 1, None]),
    body=st.binary(max_size=300),
)
def test_array_headers_of_any_shape_are_pixels_or_a_reason(
    shape: list, descr: str, fortran: object, body: bytes
) -> None:
    text = repr({"descr": descr, "fortran_order": fortran, "shape": tuple(shape)}).encode()
    read = assert_pixels_or_reason(
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body, FORMS[0]
    )
    if read:
        assert all(type(side) is int and side > 0 for side in shape)
        assert np.prod(shape) * np.dtype(descr).itemsize <= len(body)


@pytest.mark.parametrize(
    "kind",
    [
        "EPS",
        "PDF",
        "ICO",
        "PPM",
        "TGA",
        "PCX",
        "SGI",
        "DDS",
        "JPEG2000",
        "AVIF",
        "XBM",
        "PSD",
        "SVG",
    ],
)
def test_other_formats_are_refused_whatever_they_are_called(kind: str) -> None:
    if kind == "PSD":
        data = (
            b"8BPS\0\1"
            + b"\0" * 6
            + struct.pack(">HIIHH", 3, 8, 8, 8, 3)
            + b"\0" * 12
            + b"\0\0"
            + b"\7" * 192
        )
    elif kind == "SVG":
        data = (
            b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>"
        )
    else:
        image = Image.new("1" if kind == "XBM" else "RGB", (16, 16), 1)
        data = encode(image, kind)
    with pytest.raises(RejectedImage, match="not an image in a known format"):
        decode(data, FORMS[0])


# --- in processes of their own, which are measured ------------------------------------------------


def program(body: str) -> str:
    """A script that sees this file's helpers."""
    here = str(Path(__file__).parent)
    head = f"import sys, json, time, faulthandler\nsys.path.insert(0, {here!r})\nfrom test_fuzz_images import *\n"
    return head + textwrap.dedent(body)


def outcome(body: str, *arguments: str, timeout: float) -> dict:
    """What a script printed as JSON on its last line."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program(body), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, (
        f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return json.loads(done.stdout.splitlines()[-1])


def peaks(
    files: dict[str, bytes], folder: Path, *, cap_mib: int = 4096
) -> dict[str, tuple[str, float, float]]:
    """Of each file: what became of it, MiB of memory over what a process that is ready to decode
    holds, seconds.

    Each is decoded in a fork of one warm process, whose address space is capped.
    """
    for number, data in enumerate(files.values()):
        (folder / f"{number}.bin").write_bytes(data)
    script = """
    import resource
    from sfumato.data import duplicates
    form = PixelFormat(shapes=((32, 32),), channels=3)
    for data in FILES.values():
        assert_pixels_or_reason(data, form)
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[2]) * MIB,) * 2)
    results = []
    for number in range(int(sys.argv[3])):
        read, write = os.pipe()
        if os.fork() == 0:
            faulthandler.dump_traceback_later(60, exit=True)
            data = Path(sys.argv[1], f"{number}.bin").read_bytes()
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            try:
                fit = fit_within(data, 32)
                decode(data, form, identify=True)
                said = "decoded"
            except RejectedImage as rejected:
                said = "refused: " + str(rejected)
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(write, json.dumps([said, (after - before) / 1024, time.perf_counter() - start]).encode())
            os._exit(0)
        os.close(write)
        results.append(json.loads(os.read(read, 10_000) or b'["died", 0, 0]'))
        os.close(read)
        os.wait()
    print(json.dumps(results))
    """
    results = outcome(script, str(folder), str(cap_mib), str(len(files)), timeout=600)
    return dict(zip(files, [tuple(result) for result in results], strict=True))


def giant_tiff() -> dict[str, bytes]:
    """TIFFs whose tags speak of far more than is there."""

    def tiff(entries: list[tuple[int, int, int, int]], body: bytes = b"") -> bytes:
        table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + b"\0\0\0\0" + body

    plain = [
        (256, 3, 1, 8),
        (257, 3, 1, 8),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (278, 3, 1, 8),
    ]
    big = [(256, 4, 1, 60_000), (257, 4, 1, 60_000), *plain[2:], (273, 4, 1, 8), (279, 4, 1, 64)]
    many = [*plain, (273, 4, 0x0FFFFFFF, 8), (279, 4, 0x0FFFFFFF, 8)]
    text = [*plain, (270, 2, 0x7FFFFFFF, 100), (273, 4, 1, 8), (279, 4, 1, 64)]
    long = [*plain, (273, 4, 1, 8), (279, 4, 1, 0x7FFFFFFF)]
    bands = [
        (256, 3, 1, 8),
        (257, 3, 1, 8),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (277, 3, 1, 65535),
        (273, 4, 1, 8),
    ]
    return {
        "tiff of 60,000 x 60,000": tiff(big, b"\0" * 64),
        "tiff of 268 million strips": tiff(many, b"\0" * 64),
        "tiff with 2 GiB of text": tiff(text, b"\0" * 200),
        "tiff with a strip of 2 GiB": tiff(long, b"\0" * 64),
        "tiff of 65,535 bands": tiff(bands, b"\0" * 64),
        "tiff whose directories run in a circle": b"II*\0\x08\0\0\0"
        + struct.pack("<H", 0)
        + struct.pack("<I", 8),
    }


def webp_canvas(width: int, height: int) -> bytes:
    """An animated WebP of some size with one frame of 1 x 1."""
    still = encode(Image.new("RGB", (1, 1), (1, 2, 3)), "WEBP", lossless=True)[12:]
    animation = b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    frame = b"\0" * 6 + b"\0" * 6 + struct.pack("<I", 100)[:3] + b"\0" + still
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = (
        b"WEBPVP8X"
        + struct.pack("<I", 10)
        + b"\2\0\0\0"
        + canvas
        + animation
        + b"ANMF"
        + struct.pack("<I", len(frame))
        + frame
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bombs() -> dict[str, bytes]:
    zeros, rows = zlib.compress(b"\0" * 100_000_000, 9), (b"\0" + b"\7" * 8) * 8

    def commented(kind: bytes, body: bytes) -> bytes:
        return png(8, 8, depth=8, colour=0, rows=rows, extra=chunk(kind, body))

    many = b"".join(
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 900_000)) for _ in range(300)
    )
    head = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    return {
        "png of 50,000 x 50,000": png(50_000, 50_000, depth=1, colour=0, rows=b"\0" * 1000),
        "png of 9,000 x 9,000": png(9_000, 9_000, depth=8, colour=6, rows=b"\0" * 1000),
        "png of 13,000 x 13,000, all of it": png(
            13_000, 13_000, depth=1, colour=0, rows=b"\0" * (1626 * 13_000)
        ),
        "png 8 x 8 with 100 MB of pixels": png(
            8, 8, depth=8, colour=0, rows=rows + b"\0" * 100_000_000
        ),
        "zTXt": commented(b"zTXt", b"Comment\0\0" + zeros),
        "iTXt": commented(b"iTXt", b"Comment\0\1\0\0\0" + zeros),
        "iCCP": commented(b"iCCP", b"name\0\0" + zeros),
        "zTXt after the pixels": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"zTXt", b"Comment\0\0" + zeros)
        + chunk(b"IEND", b""),
        "300 texts": png(8, 8, depth=8, colour=0, rows=rows, extra=many),
        "gif of 60,000 x 60,000": b"GIF89a"
        + struct.pack("<HHBBB", 60_000, 60_000, 0x80, 0, 0)
        + b"\0" * 6
        + b",\0\0\0\0"
        + struct.pack("<HHB", 60_000, 60_000, 0)
        + b"\x02\x02\x4c\x01\0;",
        "gif with a frame beyond its screen": b"GIF89a"
        + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0)
        + b"\0" * 6
        + b",\0\0\0\0"
        + struct.pack("<HHB", 65_535, 65_535, 0)
        + b"\x02\x02\x4c\x01\0;",
        "webp canvas of 16,383 x 16,383": webp_canvas(16_383, 16_383),
        "bmp of 60,000 x 60,000": b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
        + b"\0" * 46,
        "jpeg of 65,535 x 65,535": encode(Image.new("L", (8, 8)), "JPEG").replace(
            b"\xff\xc0\0\x0b\x08\0\x08\0\x08", b"\xff\xc0\0\x0b\x08\xff\xff\xff\xff"
        ),
        **giant_tiff(),
    }


def long_gif(frames: int) -> bytes:
    """An animation of so many frames of 16 x 16."""
    head = (
        b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0x80, 0, 0) + bytes([40, 40, 40, 255, 255, 255])
    )
    one = b"!\xf9\x04\0\0\0\0\0," + struct.pack("<HHHHB", 0, 0, 16, 16, 0)
    still = encode(Image.new("L", (16, 16), 0), "GIF")
    pixels = still[still.index(b",\0\0\0\0\x10\0\x10\0") + 10 :].removesuffix(b";")
    return head + (one + pixels) * frames + b";"


MAY_DECODE = {
    "png 8 x 8 with 100 MB of pixels",
    "zTXt after the pixels",
    "tiff with 2 GiB of text",
    "tiff with a strip of 2 GiB",
}


@pytest.mark.slow
def test_bombs_are_refused_at_the_price_of_their_bytes_and_long_animations_cost_a_glance(
    tmp_path: Path,
) -> None:
    files = bombs()
    assert len(files["png of 50,000 x 50,000"]) < 1024
    assert all(len(data) < 2 * MIB for data in files.values())
    pair = [Image.fromarray(noise(16, 16, seed=seed)) for seed in range(2)]
    long = {"save_all": True, "append_images": [pair[i % 2] for i in range(1, 300)]}
    animations = {
        "gif": long_gif(10_000),
        "webp": encode(pair[0], "WEBP", **long),
        "apng": encode(pair[0], "PNG", **long),
    }
    wrong = []
    for what, (said, mib, seconds) in peaks({**files, **animations}, tmp_path).items():
        fate = (
            said == "decoded"
            if what in animations
            else said.startswith("refused: ") or what in MAY_DECODE
        )
        if not fate or said.partition(":")[0] not in ("refused", "decoded") or mib > REFUSED_MIB:
            wrong.append(f"{what}: {said}, {mib:.0f} MiB, {seconds:.2f} s")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_largest_honest_images_stay_below_two_gibibytes(tmp_path: Path) -> None:
    side = 8900  # 79 million pixels
    band = b"\0" + b"\7" * (4 * side)
    rows = band * side
    files = {
        "rgba": png(side, side, depth=8, colour=6, rows=rows),
        "gray": png(side, side, depth=8, colour=0, rows=(b"\0" + b"\7" * side) * side),
        "deep": png(side, side, depth=16, colour=0, rows=(b"\0" + b"\7" * (2 * side)) * side),
        "jpeg": encode(Image.new("RGB", (side, side), (9, 99, 199)), "JPEG"),
        "webp canvas": webp_canvas(side, side),
    }
    for what, (said, mib, seconds) in peaks(files, tmp_path, cap_mib=8192).items():
        print(f"{what}: {said}, {mib:.0f} MiB, {seconds:.1f} s")  # noqa: T201
        assert said == "decoded", (what, said)
        assert mib < 2048, (what, mib)


FUZZ = """
import resource
kinds, count, key = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3])
chosen = {name: data for name, data in FILES.items() if name.split()[0] in kinds}
names, everything = sorted(chosen), list(FILES.values())
for data in everything:
    assert_pixels_or_reason(data, FORMS[0])
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 3 * 1024 * MIB,) * 2)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
alive, slowest, begun, wrong = 0, (0.0, ""), time.perf_counter(), []
for number in range(count):
    generator = np.random.Generator(np.random.Philox(key=[key, number]))
    name = names[number % len(names)]
    data = mutated(chosen[name], generator, everything)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    start = time.perf_counter()
    try:
        alive += assert_pixels_or_reason(data, FORMS[number % 3])
    except BaseException as error:
        wrong.append(f"{name}, number {number}: {type(error).__name__}: {str(error)[:200]}")
    slowest = max(slowest, (time.perf_counter() - start, f"{name}, number {number}"))
faulthandler.cancel_dump_traceback_later()
print(json.dumps({
    "alive": alive, "slowest": slowest, "wrong": wrong, "seconds": time.perf_counter() - begun,
    "grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024,
}))
""".replace("SECONDS,", f"{SECONDS_PER_FILE},")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "count"), [("jpeg,png,webp", 10_000), ("gif,bmp,tiff,npy", 4_000)]
)
def test_thousands_of_harmed_files_are_images_or_a_reason(kinds: str, count: int) -> None:
    found = outcome(FUZZ, kinds, str(count), "1", timeout=1200)
    print(f"{kinds}: {found}")  # noqa: T201
    assert not found["wrong"], "\n".join(found["wrong"][:20])
    # the harm was neither nothing nor everything
    assert 0.05 * count < found["alive"] < 0.95 * count
    assert found["grown_mib"] < 1024


@pytest.mark.slow
def test_a_jpeg_of_hundreds_of_scans_is_refused() -> None:
    """Each empty scan is a hundred bytes long, and walks over all of an image's blocks."""
    data = encode(Image.new("L", (8900, 8900), 77), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda")) : -2]
    with pytest.raises(RejectedImage, match="more than 64 scans"):
        decode(data[:-2] + 400 * scan + b"\xff\xd9", FORMS[0])
