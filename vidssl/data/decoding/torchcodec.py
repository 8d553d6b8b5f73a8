"""Frames by torchcodec: an optional decoder. It needs FFmpeg's shared libraries (4 to 8) on the machine."""

from collections.abc import Iterator

import numpy as np

from vidssl.core.errors import DecodeError, UserError
from vidssl.data.decoding.base import Video, _line
from vidssl.data.decoding.pyav import PyAVVideo

try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, OSError, RuntimeError) as e:  # the package, or FFmpeg's libraries, are missing
    raise UserError(
        f"data.decoder: torchcodec cannot be loaded ({str(e).strip().splitlines()[0]}): pip install torchcodec, and "
        "FFmpeg's shared libraries (4 to 8)"
    ) from None

_ERRORS = (RuntimeError, ValueError, IndexError, StopIteration)


class TorchCodecVideo(Video):
    """Frames by torchcodec, on one thread; it applies the rotation itself, and reads all packets to number the frames.

    The times are those that PyAV finds in the packets.
    """

    decoder = "torchcodec"

    def __init__(self, data: bytes, meta: dict):
        packets = PyAVVideo(data, meta)
        self.times, self.size, self.codec = packets.times, packets.size, packets.codec
        try:
            self._reader = VideoDecoder(data, num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="exact")
        except _ERRORS as e:
            raise DecodeError("decode_error", f"torchcodec: {_line(e)}") from e
        if len(self._reader) != len(self):
            raise DecodeError(
                "decode_error", f"torchcodec counts {len(self._reader)} frames, packed were {len(self)}"
            )

    def _frames(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        try:
            yield from self._reader.get_frames_at(wanted.tolist()).data.numpy()
        except _ERRORS as e:
            raise DecodeError("decode_error", f"torchcodec: {_line(e)}") from e
