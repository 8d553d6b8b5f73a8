"""Frames by PyAV, the decoder that is right for any file."""

import io
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from types import MappingProxyType

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import Video, check_length
from vidssl.data.decoding.crop import NO_CROP, Crop
from vidssl.data.decoding.motion_vectors import MotionField, MotionReader
from vidssl.data.decoding.planes import RGB, PixelFormat, frame_planes, planar_format
from vidssl.data.decoding.presentation import presentation_of
from vidssl.data.decoding.rotation import Rotation, RotationReader
from vidssl.data.decoding.video_stream import VideoStream


class PyAVVideo(Video):
    """Frames by PyAV, on one thread.

    Without `meta` the whole file is decoded once to find its frames; `packets_match` is then whether the time
    stamps of the packets alone would have given the same. With the `meta` that pack recorded, opening decodes
    nothing; `get` seeks to the key frame before the first frame if pack found the packets right (no "times"
    in meta), else it counts frames from the start.
    """

    decoder = "pyav"
    packets_match = False
    # reason: number of frames; known after a full decode
    time_repairs: Mapping[str, int] = MappingProxyType({})

    def __init__(self, data: bytes, meta: dict | None = None, motion_vectors: bool = False):
        """motion_vectors: `motion` can tell those of frames that were decoded."""
        is_ours = meta is not None and "original" in meta and "times" not in meta  # pack encoded it
        self._stream = VideoStream(io.BytesIO(data), motion_vectors, quick=is_ours)
        self._motion = MotionReader() if motion_vectors else None
        self._reformat = VideoReformatter().reformat
        self._read_rotation = RotationReader()
        self._pts: list[int] | None = None  # of each frame, if seeking by time stamps gives the right frames
        self.codec = self._stream.codec
        self.rate = self._stream.rate
        try:
            self._index(meta)
        except DecodeError:
            self.close()
            raise

    def _index(self, meta: dict | None) -> None:
        """Finds times and size, and whether frames can be sought by the time stamps of the packets."""
        if meta is None:
            self._decode_all()
            return
        check_length(meta["frames"])
        self.size = (meta["height"], meta["width"])
        self.crop = Crop(*meta.get("crop", ()))
        if "times" in meta:
            even = np.arange(meta["frames"]) / (meta["fps"] or 1.0)
            self.times = even if meta["times"] is None else np.array(meta["times"], dtype=np.float64)
            return
        packets = self._stream.packet_pts()
        if len(packets) != meta["frames"]:  # not the file that was packed
            self._decode_all()
            return
        self.times = self._stream.frame_times(packets).seconds
        if meta.get("decoder") == "pyav" and len(set(packets)) == len(packets):
            self._pts = packets

    @property
    def errors(self) -> int:  # type: ignore[override]
        return self._stream.damaged_packets

    def close(self) -> None:
        self._stream.close()

    def _decode_all(self) -> None:
        """Decodes the file once: times, size, rotation."""
        packets = self._stream.packet_pts()
        self._stream.rewind()
        pts: list[int | None] = []
        for frame in self._stream.decode():
            if not pts:
                shown = presentation_of(self._stream, frame)
                self.rotation = shown.rotation.degrees
                self.size = shown.size
                self.crop = shown.crop
                self.not_applied = shown.not_applied
            pts.append(frame.pts)
            check_length(len(pts))
        if not pts:
            reason = "decode_error" if self.errors else "no_frames"
            raise DecodeError(reason, f"{self.errors} damaged packets")
        _, self.times, self.time_repairs = self._stream.frame_times(pts)
        self.packets_match = pts == packets and not self.errors and not self.time_repairs

    def iter_planes(self, indices: np.ndarray) -> Iterator[tuple[PixelFormat, list[np.ndarray]]]:
        """Planes in the format of the first frame, to which a frame of another one is converted. RGB where
        they cannot be taken, and for frames that are turned or cropped."""
        frames = self._stored_frames(indices)
        first = next(frames, None)
        if first is None:
            return
        frames = chain([first], frames)
        is_whole = self.crop == NO_CROP and (first.height, first.width) == self.size
        is_plain = is_whole and self._read_rotation(first) == Rotation()
        format = planar_format(first) if is_plain else None
        if format is None:
            for shown in self._shown(map(self._to_rgb, frames), indices):
                yield RGB, [shown]
            return
        layout = first.width, first.height, first.format.name
        for frame in frames:
            yield format, frame_planes(self._reformat(frame, *layout, threads=1))

    def _decode_frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        yield from map(self._to_rgb, self._stored_frames(indices))

    def motion(self, indices: np.ndarray) -> MotionField:
        assert self._motion is not None
        return self._motion.field(indices, self.codec)

    def _stored_frames(self, indices: np.ndarray) -> Iterator[av.VideoFrame]:
        """The frames at `indices` as the decoder gives them."""
        for index, frame in zip(indices.tolist(), self._find_frames(indices), strict=False):
            if self._motion is not None:
                self._motion.keep(index, frame, self._read_rotation(frame), self.crop)
            yield frame

    def _decode(self, only: Collection[int] | None = None) -> Iterator[av.VideoFrame]:
        for frame in self._stream.decode(only):
            if self._motion is not None:
                self._motion.see(frame)
            yield frame

    def _find_frames(self, indices: np.ndarray) -> Iterator[av.VideoFrame]:
        if self._pts is None:
            yield from self._decode_counting(indices)
            return
        wanted = [self._pts[i] for i in indices]
        found = 0
        self._stream.seek(wanted[0])
        for frame in self._decode(only=set(wanted)):
            if frame.pts == wanted[found]:
                yield frame
                found += 1
            if found == len(wanted) or (not found and frame.pts is not None and frame.pts > wanted[0]):
                break
        if found < len(wanted):  # the seek went past the frame, or the time stamps changed
            yield from self._decode_counting(indices[found:])

    def _decode_counting(self, indices: np.ndarray) -> Iterator[av.VideoFrame]:
        """Decodes from the first frame and counts."""
        wanted = iter(indices.tolist())
        index = next(wanted)
        self._stream.rewind()
        for i, frame in enumerate(self._decode()):
            if i == index:
                yield frame
                index = next(wanted, None)
                if index is None:
                    return

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """u8 [H,W,3] as displayed, before `crop`. Frames of another size are scaled to that of the first, as
        players do."""
        rotation: Rotation = self._read_rotation(frame)
        whole = self.crop.whole_size(self.size)
        width, height = whole if rotation.transpose else whole[::-1]
        return rotation.apply(self._reformat(frame, width, height, "rgb24", threads=1).to_ndarray())
