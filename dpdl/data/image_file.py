"""One PNG or JPEG file to pixels, within limits. Needs Pillow, so it is imported only where it is used."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image

from dpdl.errors import DataError

FORMATS = ("PNG", "JPEG")  # Pillow decodes dozens more, which a file could ask for by its content
CHANNELS = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # of Pillow's modes: what becomes grey, what colour
LARGEST_IMAGE = 2**24  # pixels: 4096 x 4096. A few kilobytes of PNG can announce billions.

Pixels = npt.NDArray[np.uint8]  # [H, W] grey or [H, W, 3] colour
Size = tuple[int, int]  # width and height

_DAMAGED = (  # what Pillow raises for a broken file
    Image.DecompressionBombError,
    EOFError,
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
)


def decode(content: bytes, *, where: str, size: Size | None, size_of: str) -> Pixels:
    """The pixels of an image file; its size is checked before any of them is decoded.

    Args:
        content: the file.
        where: what to call it in errors.
        size: width and height that it must have; None allows all up to LARGEST_IMAGE.
        size_of: where that size comes from, for the error.

    Returns:
        Shape [H, W] for a grey image, [H, W, 3] for a coloured one, uint8.

    Raises:
        DataError: not a PNG or JPEG image, damaged, of another size, too large, or with more than 8 bits a
            channel or an alpha channel, which would be lost in silence.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            its_size = f"{where} has {image.width} x {image.height} pixels"
            if image.width * image.height > LARGEST_IMAGE:
                raise DataError(f"{its_size}; the limit is {LARGEST_IMAGE}. Scale it, or take it out.")
            if size is not None and image.size != size:
                other = f"{size_of} has {size[0]} x {size[1]}"
                raise DataError(f"{its_size}, but {other}; all must be of one size. Scale it, or take it out.")
            if image.mode not in CHANNELS:
                raise DataError(f"{where} has mode {image.mode}. Save it as 8-bit grey or RGB, without alpha.")
            return np.asarray(image.convert(CHANNELS[image.mode]))
    except _DAMAGED as error:
        raise DataError(f"{where} is not a readable PNG or JPEG image: {error}. Take it out.") from error
