"""Images as videos of one frame."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import Video, check_size
from vidssl.data.decoding.motion_vectors import MotionField

ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


# Pillow recognises a file by its content, and some formats start other programs (EPS: Ghostscript) or have
# decoders that are rarely tried. GIF is common under other extensions.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")


def open_image(file: BinaryIO | Path) -> Image.Image:
    """Opens an image of one of FORMATS; other content raises PIL.UnidentifiedImageError."""
    return Image.open(file, formats=FORMATS)


class ImageVideo(Video):
    """An image: one frame, EXIF orientation applied; the first frame of an animated WebP or PNG."""

    decoder = "image"

    def __init__(self, data: bytes):
        try:
            with open_image(io.BytesIO(data)) as file:
                check_size(file.width, file.height)
                self.codec = (file.format or "").lower()
                image = ImageOps.exif_transpose(file)
                if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip instead of scale
                    levels = np.asarray(image).astype(np.int64) >> 8
                    image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
                self._pixels = np.asarray(image.convert("RGB"))
        # Its message has the address of `data`, which differs in each run.
        except Image.UnidentifiedImageError as e:
            raise DecodeError("not_an_image", "no known image format") from e
        except ERRORS as e:
            raise DecodeError("decode_error", str(e)) from e
        self.times = np.zeros(1)
        self.size = self._pixels.shape[:2]

    def motion(self, indices: np.ndarray) -> MotionField:
        return MotionField(np.zeros((len(indices), 2, 1, 1), np.float32), (0.0, 0.0))

    def _decode_frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        yield self._pixels
