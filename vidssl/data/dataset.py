"""Training clips: the sample at a position of a training stream, decoded, cut and augmented."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from pydantic import ConfigDict
from torch import Tensor
from torch.utils.data import Dataset

from vidssl.config import Fraction, Names, PositiveFloat, PositiveInt, Text
from vidssl.core.errors import DecodeError, UserError
from vidssl.data.augment import downscale
from vidssl.data.decoding import check_decoder, open_video, select_decoder
from vidssl.data.decoding.base import Decoder, Video
from vidssl.data.order import SampleOrder, positions_per_step
from vidssl.data.sampling import Rule, repeated_positions, sample_clips, split_repeat
from vidssl.data.shards import Sample, Shards

MAX_ATTEMPTS = 20  # samples tried at one position before the run stops
STREAM_STRIDE = 1 << 48  # position i of stream s has the global position s * STREAM_STRIDE + i
MAX_CACHED_VIDEO_BYTES = 256 << 20  # decoded; a larger video is decoded clip by clip, even with a cache
EXHAUSTED = ""  # key of an Example whose attempts all failed; it has no video

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
    video: Tensor  # u8 [3, T, H, W]
    failures: list[DecodeFailure]  # samples that were tried at this position before


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


Weights = tuple[PositiveFloat, ...]


@dataclass(frozen=True)
class ExtraStream:
    """A further stream of clips in every step, for example of another length, or of images."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    train: Names  # as in DataConfig, up to `rule`
    frames: PositiveInt
    # clips of this stream per step, counted in run.batch; a multiple of run.lanes x data.repeat
    clips: PositiveInt
    stride: PositiveInt | None = None
    fps: PositiveFloat | None = None
    weights: Weights | None = None
    rule: Rule = "exact"

    def __post_init__(self) -> None:
        check_rate("data.extra_streams", self.stride, self.fps)


@dataclass(frozen=True)
class DataConfig:
    """The `data` section: which shards are read, and which frames make a clip."""

    train: Names  # packed folders or their URLs (http, https, s3, ...); reader stream: see data/stream.py
    frames: PositiveInt  # per clip
    stride: PositiveInt | None = None  # between the frames of a clip, in frames of the video
    fps: PositiveFloat | None = None  # frames per second of a clip; give either stride or fps
    rule: Rule = "exact"  # how stride and fps select frames; 'vjepa' reproduces V-JEPA's frame selection
    reader: Literal["indexed", "stream"] = "indexed"  # stream: for shards without an index (data/stream.py)
    # reader stream: samples, not yet decoded, that each loader process shuffles
    shuffle_buffer: PositiveInt = 256
    weights: Weights | None = None  # share of the clips from each of `train`; None: in proportion to size
    extra_streams: tuple[ExtraStream, ...] = ()
    repeat: PositiveInt = 1  # clips per decoded video (repeated augmentation), all in the same batch
    short_side: PositiveInt | None = None  # pixels; larger frames are scaled down to it; None: as stored
    decoder: Decoder = "auto"  # see decoding.select_decoder
    max_decode_error_rate: Fraction = 0.05  # fraction of samples that may fail to decode before the run stops
    # missing or changed shard; skip: its samples fail to decode
    on_missing: Literal["error", "skip"] = "error"
    cache_dir: Text | None = None  # folder for remote shards; None: the user's cache folder
    cache_gb: PositiveFloat = 100  # size limit of cache_dir, 10**9 bytes
    decode_timeout_s: PositiveFloat = 60  # seconds per sample (only with efficiency.decode_in_subprocess)
    # 2**20 bytes by which a sample may grow the decoding process (only with efficiency.decode_in_subprocess)
    memory_mb: PositiveInt = 4096

    def __post_init__(self) -> None:
        check_rate("data", self.stride, self.fps)
        if self.reader == "stream":
            unusable = (
                ("weights", self.weights),
                ("repeat", self.repeat > 1),
                ("extra_streams", self.extra_streams),
            )
            if names := [f"data.{name}" for name, used in unusable if used]:
                raise UserError(
                    f"data.reader stream cannot serve {', '.join(names)}: it needs an index; "
                    "run python -m data_prep.scan on the shards and use data.reader indexed"
                )

    def streams(self) -> list["DataConfig"]:
        """The configuration of each stream as if it were the only one."""
        shared_fields = [f.name for f in dataclasses.fields(ExtraStream) if f.name != "clips"]
        extra = [{name: getattr(s, name) for name in shared_fields} for s in self.extra_streams]
        return [self, *(dataclasses.replace(self, **fields, extra_streams=()) for fields in extra)]

    def clips(self, batch: int) -> list[int]:
        """Clips of each stream in a global batch."""
        extra = [s.clips for s in self.extra_streams]
        return [batch - sum(extra), *extra]


def check_rate(where: str, stride: int | None, fps: float | None) -> None:
    if (stride is None) == (fps is None):
        raise UserError(f"{where}: give either stride (in frames) or fps (frames a second)")


def decode_clip(
    data: bytes,
    ext: str,
    meta: dict[str, Any],
    select: SelectFrames,
    decoder: Decoder,
    short_side: int | None,
) -> np.ndarray:
    """Returns the selected frames u8 [T, H, W, 3], scaled down to `short_side`. data: the media bytes."""
    with open_video(data, ext, meta, decoder) as video:
        return downscale(video.get(select(video.times)), short_side)


def with_pyav_fallback(
    decode: Callable[[Decoder], np.ndarray], ext: str, meta: dict[str, Any], decoder: Decoder
) -> np.ndarray:
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
    """Reads and decodes clips. Keeps decoded videos until `limit` bytes are used; nothing is evicted."""

    def __init__(self, shards: Shards, short_side: int | None, limit: int, decoder: Decoder = "auto"):
        check_decoder(decoder)
        self.shards = shards
        self.short_side = short_side
        self.free_bytes = limit
        self.decoder = decoder
        self.on_decode: Callable[[], None] = do_nothing  # called when the bytes of a sample have been read
        self.videos: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def read_clip(self, sample: Sample, select: SelectFrames) -> np.ndarray:
        """Returns the selected frames u8 [T, H, W, 3]."""
        key = sample.shard, sample.offset
        if key not in self.videos:
            data = self.shards.read(sample)
            self.on_decode()
            return with_pyav_fallback(
                lambda decoder: self._decode(sample, data, select, decoder),
                sample.ext,
                sample.meta,
                self.decoder,
            )
        frames, times = self.videos[key]
        return frames[select(times)]

    def _decode(self, sample: Sample, data: bytes, select: SelectFrames, decoder: Decoder) -> np.ndarray:
        with open_video(data, sample.ext, sample.meta, decoder) as video:
            size = len(video) * video.size[0] * video.size[1] * 3
            if self.free_bytes <= 0 or size > MAX_CACHED_VIDEO_BYTES:
                return downscale(video.get(select(video.times)), self.short_side)
            key = sample.shard, sample.offset
            if self._store(key, video):
                frames, times = self.videos[key]
                return frames[select(times)]
        # Opened anew, since a decoder that failed once may go on failing.
        return decode_clip(data, sample.ext, sample.meta, select, decoder, self.short_side)

    def _store(self, key: tuple[int, int], video: Video) -> bool:
        """Returns False if some frame does not decode: clips of other frames may still decode."""
        try:
            frames = downscale(video.get(np.arange(len(video.times))), self.short_side)
        except DecodeError:
            return False
        self.videos[key] = frames, video.times
        self.free_bytes -= frames.nbytes
        return True


class TrainClips(Dataset[Example]):
    """The clips of one stream; clip, crop and replacement depend on (shards, seed, position)."""

    def __init__(
        self,
        shards: Shards,
        order: SampleOrder,
        data: DataConfig,
        augment: Callable,
        cache_bytes: int = 0,
        stream: int = 0,
    ):
        """stream: number of this stream, if a run has several."""
        self.shards = shards
        self.order = order
        self.data = data
        self.augment = augment
        self.stream = stream
        self.clip_reader = ClipReader(shards, data.short_side, cache_bytes, data.decoder)
        # (positions, attempt) and clips u8 [repeat, T, H, W, 3] of the sample decoded last
        self._last_decoded: tuple[Any, np.ndarray] = (None, np.empty(0))

    def __getitem__(self, position: int) -> Example:
        return first_decodable(position, self.try_position)

    def sample_at(self, position: int, attempt: int) -> Sample:
        """Returns the sample that is tried at `position` after `attempt` failures."""
        p, _ = split_repeat(position, self.data.repeat, self.order.lanes)
        return self.shards.sample(*(self.order.replacement(p, attempt) if attempt else self.order.locate(p)))

    def _rng(self, position: int) -> np.random.Generator:
        """Generator of the clip at `position`; its first number is the start of the clip within the video."""
        return np.random.default_rng((self.order.seed, 3, position + self.stream * STREAM_STRIDE))

    def _decode_repeats(self, position: int, attempt: int, sample: Sample) -> np.ndarray:
        """Returns all clips of the sample at `position`, decoded together: if one fails, all fail."""
        d = self.data
        positions = repeated_positions(position, d.repeat, self.order.lanes)
        if self._last_decoded[0] != (positions, attempt):
            self._last_decoded = None, np.empty(0)  # frees the clips before the next are decoded
            starts = [self._rng(p).uniform() for p in positions]
            rate = {"frames": d.frames, "stride": d.stride, "fps": d.fps, "rule": d.rule}
            frames = self.clip_reader.read_clip(
                sample, lambda times: sample_clips(times, starts, **rate).ravel()
            )
            clips = rearrange(frames, "(r t) h w c -> r t h w c", r=len(positions))
            if d.repeat == 1:
                return clips
            self._last_decoded = (positions, attempt), clips
        return self._last_decoded[1]

    def try_position(self, position: int, attempt: int) -> Example | DecodeFailure:
        sample = self.sample_at(position, attempt)
        _, repeat = split_repeat(position, self.data.repeat, self.order.lanes)
        rng = self._rng(position)
        rng.uniform()  # the start of the clip
        try:
            frames = self._decode_repeats(position, attempt, sample)[repeat]
        except DecodeError as e:
            return DecodeFailure(sample.key, e.reason)
        video = self.augment(frames, rng)
        label = sample.meta.get("label", -1)
        return Example(position + self.stream * STREAM_STRIDE, sample.key, label, video, [])


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
