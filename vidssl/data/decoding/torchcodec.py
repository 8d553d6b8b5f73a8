"""Frames by torchcodec: an optional decoder. It needs FFmpeg's shared libraries (4 to 8) on the machine."""

from collections.abc import Iterator

import numpy as np

from vidssl.core.errors import DecodeError, UserError
from vidssl.data.decoding.base import Video, error_line
from vidssl.data.decoding.pyav import PyAVVideo

try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, OSError, RuntimeError) as e:  # the package, or FFmpeg's libraries, are missing
    raise UserError(
        f"data.decoder: torchcodec cannot be loaded ({str(e).strip().splitlines()[0]}): "
        "pip install torchcodec, and FFmpeg's shared libraries (4 to 8)"
    ) from None

ERRORS = (RuntimeError, ValueError, IndexError, StopIteration)


class TorchCodecVideo(Video):
    """Frames by torchcodec, on one thread. torchcodec applies the rotation itself, and reads all packets to
    count frames.

    The times are those that PyAV finds in the packets.
    """

    decoder = "torchcodec"

    def __init__(self, data: bytes, meta: dict):
        with PyAVVideo(data, meta) as packets:
            self.times = packets.times
            self.size = packets.size
            self.crop = packets.crop
            self.codec = packets.codec
        try:
            self._reader = VideoDecoder(data, num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="exact")
        except ERRORS as e:
            raise DecodeError("decode_error", f"torchcodec: {error_line(e)}") from e
        frames = len(self._reader)
        if frames != len(self):
            raise DecodeError("decode_error", f"torchcodec counts {frames} frames, packed were {len(self)}")

    def close(self) -> None:
        self._reader = None

    def _decode_frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        try:
            yield from self._reader.get_frames_at(indices.tolist()).data.numpy()
        except ERRORS as e:
            raise DecodeError("decode_error", f"torchcodec: {error_line(e)}") from e
