"""The interface of an open video, and the limits beyond which a file is refused."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from vidssl.core.errors import DecodeError
from vidssl.data.decoding.crop import NO_CROP, Crop
from vidssl.data.decoding.motion_vectors import MotionField
from vidssl.data.decoding.planes import RGB, Box, PixelFormat, PlaneBuffer

# A file beyond these limits is damaged or hostile ("too_large", "too_long"), or pack must cut it into clips.
MAX_PIXELS = 8192 * 8192  # of one frame
MAX_FRAMES = 2_000_000  # of one file: 18 hours at 30 frames per second
MAX_BYTES = 8 << 30  # of one file as stored
MAX_DECODED = 4 << 30  # bytes of the frames of one `get`

V = TypeVar("V", bound="Video")


class Video:
    """An open video.

    times: f64 [n], seconds since the first frame. size: (height, width) as displayed. crop: what is cut off
    the frames that the decoder gives, which are turned and mirrored already.
    """

    times: np.ndarray
    size: tuple[int, int]
    decoder: str
    codec: str = ""
    rotation: int = 0  # degrees clockwise, already applied; known after a full decode
    crop: Crop = NO_CROP
    # What else the file asks players to do -> its value; known after a full decode.
    not_applied: Mapping[str, str] = MappingProxyType({})
    errors: int = 0  # damaged packets skipped so far

    def __len__(self) -> int:
        return len(self.times)

    def __enter__(self: V) -> V:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the decoder and its buffers."""

    def get(self, indices: np.ndarray | list[int]) -> np.ndarray:
        """Returns the frames at `indices` ([k], any order, repeats allowed) as u8 [k,H,W,3]."""
        wanted = np.asarray(indices, dtype=np.int64)
        unique = self._check_indices(wanted, self.size[0] * self.size[1])
        inverse = np.searchsorted(unique, wanted)
        frames = np.empty((len(unique), *self.size, 3), np.uint8)
        for i, frame in enumerate(self.iter_frames(unique)):
            frames[i] = frame
        if len(unique) == len(inverse) and (np.diff(inverse) == 1).all():  # ascending: no copy needed
            return frames
        return frames[inverse]

    def get_planes(
        self, clips: Sequence[np.ndarray], regions: Sequence[Box]
    ) -> tuple[PixelFormat, list[np.ndarray]]:
        """Returns clips as the decoder gives them, cropped to a region each, converted only
        where that must be.

        clips: frame indices i64 [T] each, any order, repeats allowed. regions: corners are even. Returns a u8
        [n] for each clip (see `PlaneBuffer`), all of one format.
        """
        unique = self._check_indices(np.concatenate(clips), sum(r.height * r.width for r in regions))
        places: dict[int, list[tuple[int, int]]] = {}  # frame -> clip, and index in that
        for i, clip in enumerate(clips):
            for place, index in enumerate(clip.tolist()):
                places.setdefault(index, []).append((i, place))
        buffers: list[PlaneBuffer] = []
        format = RGB
        decoded = 0
        for index, (format, planes) in zip(unique.tolist(), self.iter_planes(unique), strict=False):
            if not buffers:
                pairs = zip(clips, regions, strict=True)
                buffers = [PlaneBuffer(format.chroma, len(clip), region) for clip, region in pairs]
            for i, place in places[index]:
                buffers[i].write(place, planes)
            decoded += 1
        self._check_decoded(decoded, unique)
        return format, [buffer.pixels for buffer in buffers]

    def motion(self, indices: np.ndarray) -> MotionField:
        """Returns the motion of the frames at `indices` (i64 [T]), which must have been decoded, of a video
        that was opened for that (see `open_video`). Raises DecodeError if the file has none."""
        raise DecodeError("no_motion_vectors", f"{self.decoder} hands on none")

    def iter_planes(self, indices: np.ndarray) -> Iterator[tuple[PixelFormat, list[np.ndarray]]]:
        """Yields the frames at `indices` (i64 [k], ascending, unique), all in one format."""
        for frame in self.iter_frames(indices):
            yield RGB, [frame]

    def iter_frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the frames u8 [H,W,3] at `indices` (i64 [k], ascending, unique) one at a time."""
        yield from self._shown(self._decode_frames(indices), indices)

    def _shown(self, frames: Iterable[np.ndarray], indices: np.ndarray) -> Iterator[np.ndarray]:
        """Cuts `crop` off decoded frames; checks their size and number."""
        decoded = 0
        for decoded_frame in frames:
            frame = self.crop.apply(decoded_frame)
            if frame.shape != (*self.size, 3):
                raise DecodeError("decode_error", f"frame of shape {frame.shape}, expected {(*self.size, 3)}")
            yield frame
            decoded += 1
        self._check_decoded(decoded, indices)

    def _check_decoded(self, decoded: int, indices: np.ndarray) -> None:
        if decoded < len(indices):
            raise DecodeError("decode_error", f"frame {indices[decoded]} of {len(self)} does not decode")

    def _check_indices(self, indices: np.ndarray, pixels: int) -> np.ndarray:
        """Returns the unique ones of `indices`, ascending. pixels: of one frame each."""
        unique = np.unique(indices)
        if not len(unique) or unique[0] < 0 or unique[-1] >= len(self):
            raise IndexError(f"frame indices must be in 0..{len(self) - 1} and not empty")
        if len(unique) * pixels * 3 > MAX_DECODED:
            raise DecodeError("too_large", f"{len(unique)} frames of {self.size[1]}x{self.size[0]} pixels")
        return unique

    def _decode_frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """`iter_frames` of one decoder, without its checks; whole frames, which `crop` is cut off."""
        raise NotImplementedError


def check_size(width: int, height: int) -> None:
    """Raises DecodeError for a frame of more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise DecodeError("too_large", f"{width}x{height} pixels")


def check_length(frames: int) -> None:
    """Raises DecodeError for a video of more than MAX_FRAMES."""
    if frames > MAX_FRAMES:
        raise DecodeError("too_long", f"more than {MAX_FRAMES} frames")


def error_line(error: BaseException) -> str:
    """The informative line of an error message, at most 200 characters, without the stack traces of C++."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    informative = (line for line in lines if "ERROR" in line or "Check failed" in line)
    return next(informative, lines[0] if lines else "failed")[:200]
