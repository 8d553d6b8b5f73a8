"""The video stream of a file: PyAV's opener and decoding loop for training and data preparation."""

import errno
import gc
import io
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
from av.stream import Disposition

from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import MAX_FRAMES, check_length, check_size, error_line
from vidssl.data.decoding.crop import Crop, read_crop
from vidssl.data.decoding.time_stamps import MAX_GAP_S, repair_times
from vidssl.data.extensions import VIDEO_EXTENSIONS

# FFmpeg recognises a file by its content, and some formats (playlists, concat scripts) open further files or
# addresses that their content names. Only the containers of VIDEO_EXTENSIONS are opened, and no protocol.
CONTAINERS = (
    *("mov", "mp4", "avi", "matroska", "webm", "mpeg", "mpegvideo"),
    *("m4v", "mpegts", "asf", "flv", "live_flv", "ogg", "gif"),
)
OPEN_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
# As it opens a file of H.264, FFmpeg decodes up to 20 frames to find how far frames are reordered. For files
# that pack encoded it need not: their headers say it. One packet is parsed, and no frame decoded.
QUICK_OPTIONS = {"probesize": "32", "formatprobesize": str(1 << 20)}
QUICK_CODEC_OPTIONS = {"skip_frame": "all"}

ERRORS = (av.FFmpegError, OSError, ValueError)  # ValueError: a seek before the start of a file in memory
RATES = (0.01, 1000.0)  # frames per second that a file may name
DEFAULT_RATE = 25.0  # frames per second of a file that names no rate, or none in that range
SAME_START_S = 2e-3  # seconds; some containers keep time stamps in milliseconds


class FrameTimes(NamedTuple):
    """first: seconds of the first frame by its stamp, repaired. seconds: f64 [n], since the first frame,
    strictly increasing. repairs: reason -> number of frames whose stamp is not used."""

    first: float
    seconds: np.ndarray
    repairs: dict[str, int]


class VideoStream:
    """The best video stream of a file, decoded on one thread. Damaged packets are skipped and counted.

    rate: average frames per second that the file names, 0 if it names none. time_base: seconds per unit of a
    time stamp.
    """

    def __init__(self, file: BinaryIO, motion_vectors: bool = False, quick: bool = False):
        """motion_vectors: decoded frames carry those that the codec stored. quick: open it without decoding
        frames, as the headers of a file that pack encoded allow."""
        self._file = file
        self._quick = quick
        self._codec_options = {"flags2": "+export_mvs"} if motion_vectors else {}
        self._container: Any = None
        self._stream: Any = None
        self.damaged_packets = 0
        self._open()

    def close(self) -> None:
        """Closes the container, not the file, and collects young garbage.

        PyAV's containers and frames are in reference cycles; those that grew old would keep their memory, and
        the file's bytes, for thousands of files.
        """
        self._close_container()
        gc.collect(1)

    def _close_container(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None
            self._stream = None  # it refers to the container

    def _open(self) -> None:
        """Opens the file at its first packet."""
        self._close_container()
        self._file.seek(0)
        try:
            self._container = open_container(self._file, self._quick)
        except ERRORS as e:
            if is_disk_error(e):
                raise
            detail = getattr(e, "strerror", None) or error_line(e)
            if isinstance(e, av.error.ArgumentError):
                detail = "its content is of no container of " + ", ".join(VIDEO_EXTENSIONS)
            raise DecodeError("not_a_video", detail) from e
        try:
            self._select_stream()
        except DecodeError:
            self.close()
            raise

    def _select_stream(self) -> None:
        stream: Any = self._container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise DecodeError("no_video_stream")
        context = stream.codec_context
        if context is None:
            raise DecodeError("no_decoder", "the codec is not built into FFmpeg")
        check_size(context.width, context.height)
        context.thread_count = 1  # loader workers and inspections are processes
        if self._codec_options:
            context.options = self._codec_options
        self._stream = stream
        self._at_start = True
        self.codec = context.codec.canonical_name
        self.rate = float(stream.average_rate or stream.guessed_rate or 0)
        self.time_base = float(stream.time_base or 0)

    @property
    def usual_rate(self) -> float:
        """Frames per second for frames without time stamps."""
        return self.rate if RATES[0] <= self.rate <= RATES[1] else DEFAULT_RATE

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel divided by its height, as the container or the codec says; 1 if neither does."""
        return self._stream.sample_aspect_ratio or Fraction(1)

    def read_crop(self) -> Crop | None:
        """What the container cuts off the frames as they are stored; None for a part beyond them."""
        name = self._container.format.name
        pictures = [stream.index for stream in self._container.streams.video]
        track = self._stream.id if name.startswith("mov") else pictures.index(self._stream.index)
        return read_crop(self._file, name, track)

    def frame_times(self, pts: Sequence[int | None]) -> FrameTimes:
        """Times of all frames from their time stamps, in the order of display."""
        origin = next((p for p in pts if p is not None), 0)
        # Subtracted as integers, so that the first frame is at exactly 0 seconds.
        seconds = np.array([np.nan if p is None else float(p - origin) for p in pts]) * self.time_base
        times, repairs = repair_times(seconds, self.usual_rate)
        first = float(times[0]) if len(times) else 0.0
        return FrameTimes(origin * self.time_base + first, times - first, repairs)

    def delay(self, seconds: float) -> float:
        """Seconds from the start of the file's clock to the first frame; seconds: its time stamp.

        The clock that players show starts with the earliest stream: sound may begin before the picture.
        FFmpeg's `-ss` counts from there. 0 if what the file says of its start cannot be.
        """
        start = self._container.start_time
        delay = 0.0 if start is None else seconds - start / av.time_base
        return delay if SAME_START_S < delay <= MAX_GAP_S else 0.0

    def rewind(self) -> None:
        """Goes back to the first packet. Opens the file again, since not every container seeks to its start;
        not quickly, since this is asked only of a file that is not as pack left it."""
        if self._quick or not self._at_start:
            self._quick = False
            self._open()

    def seek(self, pts: int) -> None:
        """Goes to the key frame at or before a time stamp; to the start if the container does not seek."""
        try:
            self._container.seek(pts, stream=self._stream, backward=True)
            self._at_start = False
        except av.FFmpegError:
            self._open()

    def packet_pts(self) -> list[int]:
        """Returns the sorted time stamps of all packets to be displayed. Decodes nothing."""
        if self._quick and not self._stream.codec_context.has_b_frames:
            # Frames are stored in the order of display, so those of the container's index are the same.
            entries = self._stream.index_entries
            check_length(len(entries))
            return [entry.timestamp for entry in entries]
        self.rewind()
        self._at_start = False
        displayed = (
            p.pts for p in self._container.demux(self._stream) if p.pts is not None and not p.is_discard
        )
        try:
            pts = sorted(islice(displayed, MAX_FRAMES + 1))
        except ERRORS as e:
            if is_disk_error(e):
                raise
            pts = []  # decoding finds out what is wrong
        check_length(len(pts))
        return pts

    def decode(self, only: Collection[int] | None = None) -> Iterator[av.VideoFrame]:
        """Yields every frame that decodes, from the present position to the end.

        only: time stamps; a frame with another one is decoded only if further frames refer to it, and none
        after the packets of all of them. With x264's default B-frames that spares about half of the frames.
        """
        self._at_start = False
        context = self._stream.codec_context
        waiting = set(only or ())
        skip_frame = ""
        try:
            for packet in self._container.demux(self._stream):
                stamp = packet.pts
                # What has no stamp may be the second field of a frame.
                is_last = only is not None and not waiting and stamp is not None
                waiting.discard(stamp)
                skip = "DEFAULT" if only is None or stamp in only else "NONREF"
                if skip != skip_frame:
                    context.skip_frame = skip_frame = skip
                for frame in self._frames_of(None if is_last else packet):
                    check_size(frame.width, frame.height)
                    yield frame
                if is_last:
                    return
        except ERRORS as e:
            if is_disk_error(e):
                raise
            self.damaged_packets += 1  # the container ends early; the frames before are valid

    def _frames_of(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """The frames that a packet makes ready; None: those that the decoder still holds."""
        try:
            return self._stream.codec_context.decode(packet)
        except av.FFmpegError:
            self.damaged_packets += 1
            return []


def open_container(file: BinaryIO, quick: bool = False) -> Any:
    """Opens a file of one of CONTAINERS for reading; other content raises av.error.ArgumentError. quick: see
    VideoStream."""
    if quick:
        return av.open(file, options=QUICK_CODEC_OPTIONS, container_options={**OPEN_OPTIONS, **QUICK_OPTIONS})
    return av.open(file, container_options=OPEN_OPTIONS)


def check_container(data: bytes) -> None:
    """Raises DecodeError unless `data` is of one of CONTAINERS; for decoders whose formats cannot be
    restricted."""
    VideoStream(io.BytesIO(data)).close()


def is_disk_error(e: Exception) -> bool:
    """Whether the disk failed, not the file: damage makes FFmpeg seek outside of the file (EINVAL)."""
    return isinstance(e, OSError) and not isinstance(e, av.FFmpegError) and e.errno != errno.EINVAL
