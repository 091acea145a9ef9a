"""Reading of images stored as NumPy arrays."""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np

from sfumato.data.pixel_format import MAX_BANDS, RawImage, RejectedImage, check_size, is_numeric


class ArrayHeader(NamedTuple):
    """The header of an .npy file, and the offset at which its values begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int

    @classmethod
    def of(cls, data: bytes) -> ArrayHeader:
        """Parse the header of bytes that begin like an .npy file.

        Raises:
            ValueError: if they do not continue like one, or are not of format version 1.0.
        """
        stream = io.BytesIO(data)
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("an array of an unknown format")
        try:
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        except MemoryError:  # what Python's parser says to brackets without end
            raise ValueError("the array's header") from None
        return cls(shape, dtype, fortran, stream.tell())


def array_header(data: bytes) -> ArrayHeader:
    """Parse the header of an image.

    Raises:
        RejectedImage, ValueError: if it is not (H, W) or (H, W, C) of numbers, or its size is never
            decoded.
    """
    header = ArrayHeader.of(data)
    shape, dtype = header.shape, header.dtype
    bands = shape[2] if len(shape) == 3 else 1
    if not is_numeric(dtype) or len(shape) not in (2, 3) or not 1 <= bands <= MAX_BANDS:
        hint = "; data.frames=all or max reads (N, H, W, C)" if len(shape) == 4 else ""
        raise RejectedImage(
            f"an array of {dtype} {shape}; images are (H, W) or (H, W, C) of numbers, C at most "
            f"{MAX_BANDS}{hint}"
        )
    check_size(shape[1], shape[0])
    return header


def read_array(data: bytes) -> RawImage:
    """Read the values of an image stored as .npy; no channel is alpha, since nothing says so.

    Raises:
        RejectedImage, ValueError: as `array_header`, or if the array is truncated.
    """
    header = array_header(data)
    values = np.frombuffer(data, header.dtype, offset=header.offset)
    if values.size != math.prod(header.shape):
        raise RejectedImage("damaged: the array is cut short")
    shaped = values.reshape(header.shape, order="F" if header.fortran else "C")
    return RawImage(shaped[..., None] if shaped.ndim == 2 else shaped)
