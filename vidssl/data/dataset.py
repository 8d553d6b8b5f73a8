"""Training clips: the sample at a position of a training stream, decoded, cut and augmented."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from vidssl.core.errors import DecodeError
from vidssl.data.augment import downscale
from vidssl.data.decoding import check_decoder, open_video, select_decoder
from vidssl.data.decoding.base import Video
from vidssl.data.device_augment import ClipPlanes
from vidssl.data.extensions import IMAGE_EXTENSIONS
from vidssl.data.motion import read_motion
from vidssl.data.order import SampleOrder, positions_per_step
from vidssl.data.planes import cut_clips
from vidssl.data.sampling import repeated_positions, split_repeat
from vidssl.data.schema import DataConfig, Decoder
from vidssl.data.shards import Sample, Shards
from vidssl.data.timing import Timing, choose_frames, draw_timing

if TYPE_CHECKING:
    from vidssl.data.cache import HostCache
    from vidssl.data.device_cache import CachedClip, VideoIndex

MAX_ATTEMPTS = 20  # samples tried at one position before the run stops
STREAM_STRIDE = 1 << 48  # position i of stream s has the global position s * STREAM_STRIDE + i
EXHAUSTED = ""  # key of an Example whose attempts all failed; it has no video

T = TypeVar("T")
SelectFrames = Callable[[np.ndarray], np.ndarray]  # times f64 [n] in seconds -> frame indices i64 [T]


class DecodeFailure(NamedTuple):
    """A sample that could not be decoded, and why."""

    key: str
    reason: str


class Example(NamedTuple):
    """One training clip."""

    position: int
    key: str
    label: int
    # u8 [3, T, H, W]; planes with data.augment_on=device, the place of the frames with data.cache=device
    video: Tensor | ClipPlanes | CachedClip
    failures: list[DecodeFailure]  # samples that were tried at this position before
    motion: Tensor | None = None  # f16 [2, T, h, w], with data.motion_vectors: see motion.py


def first_decodable(position: int, try_position: Callable[[int, int], Example | DecodeFailure]) -> Example:
    """Returns the first clip among MAX_ATTEMPTS attempts; an Example with the key EXHAUSTED if all fail.

    try_position: (position, number of the attempt) -> clip or failure.
    """
    failures: list[DecodeFailure] = []
    for attempt in range(MAX_ATTEMPTS):
        result = try_position(position, attempt)
        if isinstance(result, Example):
            return result._replace(failures=failures)
        failures.append(result)
    return Example(position, EXHAUSTED, -1, torch.empty(0), failures)


class Decoded(NamedTuple):
    """The clips of one video."""

    # u8 [clips, T, H, W, 3], scaled down to data.short_side, or what a device makes each of (see Example)
    clips: np.ndarray | Sequence[ClipPlanes | CachedClip]
    motion: Sequence[Tensor | None]  # of each


def decode_clips(
    video: Video,
    chosen: np.ndarray,
    data: DataConfig,
    augment: Any,
    draw_rngs: Callable[[], list[np.random.Generator]],
) -> Decoded:
    """Decodes clips of an open video. chosen: frames i64 [clips, T]; draw_rngs: returns the generators of
    their augmentation anew."""
    clips: np.ndarray | Sequence[ClipPlanes]
    if data.augment_on == "device":
        clips = cut_clips(video, list(chosen), augment, draw_rngs(), data.short_side)
    else:
        frames = downscale(video.get(chosen.ravel()), data.short_side)
        clips = rearrange(frames, "(r t) h w c -> r t h w c", r=len(chosen))
    if not data.motion_vectors:
        return Decoded(clips, [None] * len(clips))
    motion = read_motion(video, list(chosen), augment, draw_rngs(), data.short_side)
    return Decoded(clips, motion)


def with_pyav_fallback(decode: Callable[[Decoder], T], ext: str, meta: dict[str, Any], decoder: Decoder) -> T:
    """Returns decode(decoder), or decode("pyav") if decord or torchcodec cannot decode the file."""
    try:
        return decode(decoder)
    except DecodeError:
        if select_decoder(ext, meta, decoder) not in ("decord", "torchcodec"):
            raise
        return decode("pyav")


def do_nothing() -> None:
    """The default of callbacks, picklable."""


class ClipReader:
    """Opens samples, or knows the cache of decoded videos, if there is one."""

    def __init__(self, shards: Shards, decoder: Decoder = "auto", motion_vectors: bool = False):
        check_decoder(decoder)
        self.shards = shards
        self.decoder = decoder
        self.motion_vectors = motion_vectors
        self.on_decode: Callable[[], None] = do_nothing  # called when the bytes of a sample have been read
        self.cache: HostCache | None = None  # of all samples (cache.py)

    def read(self, sample: Sample, use: Callable[[Video], T]) -> T:
        """Returns use(the open video). It is called again if another decoder must be tried."""
        data = self.shards.read(sample)
        self.on_decode()

        def decode(decoder: Decoder) -> T:
            with open_video(data, sample.ext, sample.meta, decoder, self.motion_vectors) as video:
                return use(video)

        return with_pyav_fallback(decode, sample.ext, sample.meta, self.decoder)


class TrainClips(Dataset[Example]):
    """The clips of one stream; clip, crop and replacement depend on (shards, seed, position)."""

    def __init__(
        self,
        shards: Shards,
        order: SampleOrder,
        data: DataConfig,
        augment: Callable,
        stream: int = 0,
    ):
        """stream: number of this stream, if a run has several."""
        self.shards = shards
        self.order = order
        self.data = data
        self.augment: Any = augment  # with data.augment_on=device a TrainingCrop
        self.stream = stream
        self.clip_reader = ClipReader(shards, data.clip_decoder, data.motion_vectors)
        self.index: VideoIndex | None = None  # of the videos on a device, with data.cache=device
        # (positions, attempt) and the Decoded of the sample decoded last
        self._last_decoded: tuple[Any, Any] = (None, None)

    def __getitem__(self, position: int) -> Example:
        return first_decodable(position, self.try_position)

    def sample_at(self, position: int, attempt: int) -> Sample:
        """Returns the sample that is tried at `position` after `attempt` failures."""
        p, _ = split_repeat(position, self.data.repeat, self.order.lanes)
        return self.shards.sample(*(self.order.replacement(p, attempt) if attempt else self.order.locate(p)))

    def _draw(self, position: int) -> tuple[Timing, np.random.Generator]:
        """Returns the draws of the clip at `position` along time, and the generator of its augmentation."""
        rng = np.random.default_rng((self.order.seed, 3, position + self.stream * STREAM_STRIDE))
        return draw_timing(self.data, rng), rng

    def _decode_repeats(self, position: int, attempt: int, sample: Sample, augment: Any) -> Decoded:
        """Returns all clips of the sample at `position`, decoded together: if one fails, all fail."""
        d = self.data
        positions = repeated_positions(position, d.repeat, self.order.lanes)
        if self._last_decoded[0] != (positions, attempt):
            self._last_decoded = None, None  # frees the clips before the next are decoded
            timings = [self._draw(p)[0] for p in positions]

            def select(times: np.ndarray) -> np.ndarray:
                return np.stack([choose_frames(times, d, timing, augment.one_frame) for timing in timings])

            def draw_rngs() -> list[np.random.Generator]:
                return [self._draw(p)[1] for p in positions]

            if self.index is not None:
                clips = self.index.find_clips(sample, select, augment, draw_rngs())
                decoded = Decoded(clips, [None] * d.repeat)
            elif self.clip_reader.cache is not None:
                decoded = Decoded(self.clip_reader.cache.read_clips(sample, select), [None] * d.repeat)
            else:
                decoded = self.clip_reader.read(
                    sample, lambda v: decode_clips(v, select(v.times), d, augment, draw_rngs)
                )
            if d.repeat == 1:
                return decoded
            self._last_decoded = (positions, attempt), decoded
        return self._last_decoded[1]

    def try_position(self, position: int, attempt: int) -> Example | DecodeFailure:
        sample = self.sample_at(position, attempt)
        _, repeat = split_repeat(position, self.data.repeat, self.order.lanes)
        augment = self.augment.for_clip(self.data.clip_frames, sample.ext in IMAGE_EXTENSIONS)
        try:
            decoded = self._decode_repeats(position, attempt, sample, augment)
        except DecodeError as e:
            return DecodeFailure(sample.key, e.reason)
        clip = decoded.clips[repeat]
        is_decoded = isinstance(clip, np.ndarray)
        video = augment(clip, self._draw(position)[1]) if is_decoded else clip
        label = sample.meta.get("label", -1)
        position += self.stream * STREAM_STRIDE
        return Example(position, sample.key, label, video, [], decoded.motion[repeat])


class MultiStreamDataset(Dataset[Example]):
    """The clips of all streams of a run, by global position."""

    def __init__(self, clips: list[TrainClips]):
        self.clips = clips

    @property
    def on_decode(self) -> Callable[[], None]:
        return self.clips[0].clip_reader.on_decode

    @on_decode.setter
    def on_decode(self, call: Callable[[], None]) -> None:
        for clips in self.clips:
            clips.clip_reader.on_decode = call

    def __getitem__(self, position: int) -> Example:
        return first_decodable(position, self.try_position)

    def try_position(self, position: int, attempt: int) -> Example | DecodeFailure:
        return self.clips[position // STREAM_STRIDE].try_position(position % STREAM_STRIDE, attempt)

    def key(self, position: int, attempt: int) -> str:
        """Returns the key of the sample that is tried at `position` after `attempt` failures."""
        return self.clips[position // STREAM_STRIDE].sample_at(position % STREAM_STRIDE, attempt).key

    def positions(
        self, start: int, stop: int, sizes: list[int], rank: int, world: int
    ) -> Iterator[list[int]]:
        """Yields the global positions of process `rank` of `world` at steps start..stop-1.

        sizes: clips of each stream in a global batch. The clips of one video are neighbours.
        """
        per_stream = [
            positions_per_step(start, stop, n, c.order.lanes, rank, world)
            for c, n in zip(self.clips, sizes, strict=True)
        ]
        for step in zip(*per_stream, strict=True):
            for c, positions in zip(self.clips, step, strict=True):
                positions.sort(key=partial(split_repeat, repeat=c.data.repeat, lanes=c.order.lanes))
            yield [s * STREAM_STRIDE + p for s, positions in enumerate(step) for p in positions]
