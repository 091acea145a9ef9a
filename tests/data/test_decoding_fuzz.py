"""Whatever the bytes, `decode` gives pixels of the asked shape or raises RejectedImage with a
reason, and nothing else.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.data.decoding import PixelFormat
from tests.helpers.corrupt import assert_pixels_or_reason
from tests.helpers.image_bytes import encode, noise

FORM = PixelFormat(shapes=((8, 8),), channels=3)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
FILES = {
    "jpeg": encode(noise(20, 30), "JPEG", exif=ROTATED),
    "progressive": encode(noise(20, 30), "JPEG", progressive=True),
    "png": encode(noise(20, 30), "PNG", exif=ROTATED),
    "palette": encode(Image.fromarray(noise(20, 30)).quantize(16), "PNG", transparency=3),
    "webp": encode(noise(20, 30), "WEBP", exif=ROTATED),
    "gif": encode(
        noise(20, 30), "GIF", save_all=True, append_images=[Image.fromarray(noise(20, 30, seed=1))]
    ),
    "bmp": encode(noise(20, 30), "BMP"),
    "tiff": encode(noise(20, 30), "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mutated_bytes_are_pixels_or_a_reason(kind: str, data: st.DataObject) -> None:
    mutated = bytearray(FILES[kind])
    head = st.integers(0, min(len(mutated), 200) - 1)  # headers are where the parsers branch
    places = st.one_of(head, st.integers(0, len(mutated) - 1))
    for place, value in data.draw(
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)
    ):
        mutated[place] = value
    if data.draw(st.booleans()):
        first, length = data.draw(st.tuples(places, st.integers(1, 64)))
        del mutated[first : first + length]
    assert_pixels_or_reason(bytes(mutated), FORM)


@settings(max_examples=60, deadline=None)
@given(
    start=st.sampled_from(
        [
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"BM",
            b"II*\0",
            b"MM\0*",
            b"RIFF\0\0\0\0WEBP",
        ]
    ),
    rest=st.binary(max_size=200),
)
def test_a_signature_and_rubbish_is_a_reason(start: bytes, rest: bytes) -> None:
    assert not assert_pixels_or_reason(start + rest, FORM)


@pytest.mark.parametrize("kind", FILES)
def test_the_unharmed_files_are_images(kind: str) -> None:
    assert assert_pixels_or_reason(FILES[kind], FORM)
