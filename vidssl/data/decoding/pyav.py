"""Bytes -> frames.

Two video decoders stand behind one interface. PyAV counts frames as they come out of the decoder, which is right for
any file. decord counts packets, which is wrong for some, so it serves only where `data_prep.pack` compared both. A file
that pack did not measure is decoded once by PyAV to know its frames.

Pixels: RGB, 8 bit, 0..255; alpha is dropped; non-square pixels stay as stored; HDR is converted without tone mapping.
"""

import gc
import io
import math
from collections.abc import Container, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import MAX_FRAMES, MAX_PIXELS, Video, _line, check_length
from vidssl.data.decoding.rotation import RotationReader


class PyAVVideo(Video):
    """Frames by PyAV, on one thread.

    Without `meta` the whole file is decoded once to learn what is in it (`.packets_match`: whether the packets' time
    stamps alone would have told the same). With the `meta` that pack wrote, opening costs no decoding, and where pack
    found the packets to be right (no "times" in meta) `get` seeks to the key frame before the first wanted frame.
    """

    decoder = "pyav"
    _container: Any = None

    def __init__(self, data: bytes, meta: dict | None = None):
        self._data, self._reformat = data, VideoReformatter().reformat
        self._pts: list[int] | None = None  # one a frame, where seeking by them gives the right frames
        self._turn = RotationReader()
        self._open()
        check_length(meta["frames"] if meta else 0)
        if meta is not None and "times" in meta:
            even = np.arange(meta["frames"]) / (meta["fps"] or 1.0)
            self.times = even if meta["times"] is None else np.array(meta["times"], dtype=np.float64)
            self.size = (meta["height"], meta["width"])
            return
        packets = self._packet_pts()
        if meta is not None and len(packets) == meta.get("frames"):
            self.times, self.size = self._clean(packets), (meta["height"], meta["width"])
            if meta.get("decoder") == "pyav" and len(set(packets)) == len(packets):
                self._pts = packets
        else:
            self._index(packets)

    def close(self) -> None:
        if self._container is not None:
            self._container.close()

    def __del__(self) -> None:
        """PyAV's containers and frames lie in reference cycles: what grew old enough would stay for thousands of files,
        so it is looked for while it is young."""
        self.close()
        gc.collect(1)

    def _open(self) -> None:
        """(Re)open the container at its first packet."""
        self.close()
        try:
            self._container = av.open(io.BytesIO(self._data))
        except (av.FFmpegError, ValueError) as e:
            raise DecodeError("not_a_video", getattr(e, "strerror", None) or _line(e)) from e
        stream: Any = self._container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise DecodeError("no_video_stream")
        if stream.codec_context is None:
            raise DecodeError("no_decoder", "the codec is not built into FFmpeg")
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            raise DecodeError(
                "too_large", f"{stream.codec_context.width}x{stream.codec_context.height} pixels"
            )
        stream.codec_context.thread_count = 1  # loader workers are processes
        self._stream, self.codec = stream, stream.codec_context.codec.canonical_name
        self.rate = float(stream.average_rate or stream.guessed_rate or 0)
        self._fresh = True  # nothing was read from it since

    def _packet_pts(self) -> list[int]:
        """Time stamps, sorted, of the packets that ought to be shown; reads the container, decodes nothing."""
        try:
            shown = (
                p.pts for p in self._container.demux(self._stream) if p.pts is not None and not p.is_discard
            )
            pts = sorted(islice(shown, MAX_FRAMES + 1))
        except av.FFmpegError:
            pts = []  # the decoding pass says what is wrong
        self._fresh = False
        check_length(len(pts))
        return pts

    def _decode(self, pts: int | None = None, only: Container[int] | None = None) -> Iterator[av.VideoFrame]:
        """Every frame that decodes, from the first one or from the key frame before `pts`; skips damaged packets.

        only: time stamps; a frame with another one is decoded only where further frames refer to it. With x264's
        default B-frames that spares about half of the frames.
        """
        if pts is None:
            if not self._fresh:
                self._open()
        else:
            try:
                self._container.seek(pts, stream=self._stream, backward=True)
            except av.FFmpegError:
                self._open()  # no seeking here: the frame comes all the same, later
        self._fresh = False
        context, mode = self._stream.codec_context, ""
        try:
            for packet in self._container.demux(self._stream):
                skip = "DEFAULT" if only is None or packet.pts in only else "NONREF"
                if skip != mode:
                    context.skip_frame = mode = skip
                try:
                    yield from packet.decode()
                except av.FFmpegError:
                    self.errors += 1
        except av.FFmpegError:
            self.errors += 1  # the container ends in the middle: what came before it stands

    def _index(self, packets: list[int]) -> None:
        """Decode everything once: times, size, rotation."""
        pts: list[int | None] = []
        for frame in self._decode():
            if frame.width * frame.height > MAX_PIXELS:
                raise DecodeError("too_large", f"{frame.width}x{frame.height} pixels")
            if not pts:
                turn = self._turn(frame)
                self.rotation = turn.degrees
                self.size = (frame.width, frame.height) if turn.swap else (frame.height, frame.width)
            pts.append(frame.pts)
            check_length(len(pts))
        if not pts:
            raise DecodeError(
                "decode_error" if self.errors else "no_frames", f"{self.errors} damaged packets"
            )
        self.times = self._clean(pts)
        self.packets_match = pts == packets and not self.errors

    def _clean(self, pts: Sequence[int | None]) -> np.ndarray:
        """Time stamps -> seconds from 0, f64 [n]; missing, repeated or backward stamps: the average rate is used."""
        known = [p for p in pts if p is not None]
        if len(known) == len(pts) and all(a < b for a, b in pairwise(known)):
            seconds = (np.array(known, dtype=np.float64) - known[0]) * float(self._stream.time_base)
            if math.isfinite(seconds[-1]):
                return seconds
        return np.arange(len(pts)) / (self.rate or 25.0)

    def _frames(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        if self._pts is None:
            yield from self._counted(wanted)
            return
        stamps = [self._pts[i] for i in wanted]
        found = 0
        for frame in self._decode(stamps[0], only=set(stamps)):
            if frame.pts == stamps[found]:
                yield self._rgb(frame)
                found += 1
            if found == len(stamps) or (not found and frame.pts is not None and frame.pts > stamps[0]):
                break
        if found < len(
            stamps
        ):  # this seek went past the frame, or the stamps changed: count from the start instead
            yield from self._counted(wanted[found:])

    def _counted(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        left = iter(wanted.tolist())
        want = next(left)
        for i, frame in enumerate(self._decode()):
            if i == want:
                yield self._rgb(frame)
                want = next(left, None)
                if want is None:
                    return

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """[H,W,3] as shown; a stream that changes its size is scaled to that of its first frame, as players do."""
        turn = self._turn(frame)
        width, height = self.size if turn.swap else self.size[::-1]
        return turn(self._reformat(frame, width, height, "rgb24", threads=1).to_ndarray())
