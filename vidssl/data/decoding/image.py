"""Pictures as videos of one frame."""

import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import MAX_PIXELS, Video

_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


class ImageVideo(Video):
    """A picture: one frame, EXIF orientation applied. Of an animated WebP or PNG the first picture."""

    decoder = "image"

    def __init__(self, data: bytes):
        try:
            with Image.open(io.BytesIO(data)) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise DecodeError("too_large", f"{file.width}x{file.height} pixels")
                self.codec = (file.format or "").lower()
                image = ImageOps.exif_transpose(file)
                if image.mode.startswith("I"):  # 16-bit grey: PIL would clip it, not scale it
                    image = Image.fromarray(
                        (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                    )
                self._pixels = np.asarray(image.convert("RGB"))
        except _IMAGE_ERRORS as e:
            reason = "not_an_image" if isinstance(e, Image.UnidentifiedImageError) else "decode_error"
            raise DecodeError(reason, str(e)) from e
        self.times, self.size = np.zeros(1), self._pixels.shape[:2]

    def _frames(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        yield self._pixels
