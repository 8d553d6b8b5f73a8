"""What stands at a position of the training stream: a clip, after as many attempts as that takes."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor
from torch.utils.data import Dataset

from vidssl.config import Count, Names, Positive, Share
from vidssl.core.errors import DecodeError, UserError
from vidssl.data.augment import scale
from vidssl.data.decoding import check_decoder, open_video, select_decoder
from vidssl.data.decoding.base import Decoder, Video
from vidssl.data.order import Stream, batches, make_order
from vidssl.data.sampling import Rule, repeated_positions, sample_clips, split_repeat
from vidssl.data.shards import Sample, Shards

ATTEMPTS = 20  # samples tried at one position before the run gives up


class DecodeFailure(NamedTuple):
    """A sample that could not be decoded, and why."""

    key: str
    reason: str


class Example(NamedTuple):
    position: int
    key: str
    label: int
    video: Tensor  # u8 [3, T, H, W]
    bad: list[DecodeFailure]  # what could not be decoded and was replaced


def first_decodable(position: int, attempt: Callable[[int, int], Example | DecodeFailure]) -> Example:
    """attempt: (position, number) -> clip or why not; without a key: all of them failed."""
    bad: list[DecodeFailure] = []
    for number in range(ATTEMPTS):
        got = attempt(position, number)
        if isinstance(got, Example):
            return got._replace(bad=bad)
        bad.append(got)
    return Example(position, "", -1, torch.empty(0), bad)


STREAM_STRIDE = 1 << 48  # positions from the start of one stream to that of the next


Weights = tuple[Positive, ...]


@dataclass(frozen=True)
class ExtraStream:
    """A further stream of clips in every step: of another length, or images."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    train: Names  # as in Data, up to `rule`
    frames: Count
    clips: Count  # how many of the run.batch clips of a step are of this stream; a multiple of run.lanes x data.repeat
    stride: Count | None = None
    fps: Positive | None = None
    weights: Weights | None = None
    rule: Rule = "exact"

    def __post_init__(self) -> None:
        check_rate("data.extra_streams", self.stride, self.fps)


@dataclass(frozen=True)
class DataConfig:
    """The `data` section: what is read, and which frames make a clip."""

    train: Names  # packed folders, or addresses of such (http, https, s3, ...)
    frames: Count  # in a clip
    stride: Count | None = None  # between them, in frames of the video
    fps: Positive | None = None  # or in frames a second; give one of the two
    rule: Rule = (
        "exact"  # how stride and fps are meant; "vjepa": as V-JEPA's loader does, for published recipes
    )
    weights: Weights | None = None  # share of the clips that are of each of `train`; None: by their sizes
    extra_streams: tuple[ExtraStream, ...] = ()  # further streams
    repeat: Count = (
        1  # clips of a video that is decoded once (repeated augmentation): of a batch so many show the same
    )
    short_side: Count | None = None  # pixels; larger frames are scaled to it when decoded; None: as stored
    decoder: Decoder = "auto"  # see decoding.select_decoder
    max_decode_error_rate: Share = 0.05  # fraction of samples that may fail to decode before the run stops
    on_missing: Literal["error", "skip"] = (
        "error"  # a shard that is missing or changed; skip: its samples are bad
    )
    cache_dir: str | None = None  # where remote shards are kept; None: the user's cache folder
    cache_gb: Positive = 100  # how much of them
    decode_timeout_s: Positive = (
        60  # seconds a sample may take to decode (with efficiency.decode_in_subprocess)
    )
    memory_mb: Count = 4096  # 2**20 bytes by which a sample may make its decoding process grow (the same)

    def __post_init__(self) -> None:
        check_rate("data", self.stride, self.fps)

    def streams(self) -> list["DataConfig"]:
        """Each stream as if it were the only one."""
        own = [f.name for f in dataclasses.fields(ExtraStream) if f.name != "clips"]
        return [
            self,
            *(
                dataclasses.replace(self, **{k: getattr(a, k) for k in own}, extra_streams=())
                for a in self.extra_streams
            ),
        ]

    def clips(self, batch: int) -> list[int]:
        """Clips of each stream in a global batch."""
        also = [a.clips for a in self.extra_streams]
        return [batch - sum(also), *also]


def check_rate(where: str, stride: int | None, fps: float | None) -> None:
    if (stride is None) == (fps is None):
        raise UserError(f"{where}: give either stride (in frames) or fps (frames a second)")


WHOLE = 256 << 20  # bytes; a video is decoded as a whole for the cache only if its frames take less


def do_nothing() -> None:
    pass


class FrameCache:
    """Whole decoded videos of this process, up to `limit` bytes; what does not fit is decoded clip by clip."""

    def __init__(self, shards: Shards, short_side: int | None, limit: int, decoder: Decoder = "auto"):
        check_decoder(decoder)
        self.shards, self.short_side, self.left, self.decoder = shards, short_side, limit, decoder
        self.on_decode: Callable[[], None] = do_nothing  # called when a sample's bytes have been read
        self.videos: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def clip(self, sample: Sample, pick: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """pick: times f64 [n] in seconds -> indices i64 [T]; returns frames u8 [T, H, W, 3]."""
        if (sample.shard, sample.offset) not in self.videos:
            data = self.shards.read(sample)
            self.on_decode()
            try:
                return self._decode(sample, data, pick, self.decoder)
            except DecodeError:
                if select_decoder(sample.ext, sample.meta, self.decoder) not in ("decord", "torchcodec"):
                    raise
                return self._decode(sample, data, pick, "pyav")  # the decoder of last resort
        frames, times = self.videos[sample.shard, sample.offset]
        return frames[pick(times)]

    def _decode(
        self, sample: Sample, data: bytes, pick: Callable[[np.ndarray], np.ndarray], decoder: Decoder
    ) -> np.ndarray:
        with open_video(data, sample.ext, sample.meta, decoder) as video:
            size = len(video) * video.size[0] * video.size[1] * 3
            if size > WHOLE or self.left <= 0:
                return scale(video.get(pick(video.times)), self.short_side)
            if self._keep((sample.shard, sample.offset), video):
                frames, times = self.videos[sample.shard, sample.offset]
                return frames[pick(times)]
        # Opened again, because a decoder that failed once may go on failing.
        with open_video(data, sample.ext, sample.meta, decoder) as video:
            return scale(video.get(pick(video.times)), self.short_side)

    def _keep(self, place: tuple[int, int], video: Video) -> bool:
        """False if some frame does not decode: a clip of the others still may, as it would without a cache."""
        try:
            frames = scale(video.get(np.arange(len(video.times))), self.short_side)
        except DecodeError:
            return False
        self.videos[place] = frames, video.times
        self.left -= frames.nbytes
        return True


class TrainClips(Dataset[Example]):
    """Clip, crop and replacement at position g of a stream are functions of (shards, seed, g)."""

    def __init__(
        self,
        shards: Shards,
        order: Stream,
        data: DataConfig,
        augment: Callable,
        cache_bytes: int = 0,
        number: int = 0,
    ):
        """number: of the stream, where a run has several."""
        self.shards, self.order, self.data, self.augment, self.number = shards, order, data, augment, number
        self.cache = FrameCache(shards, data.short_side, cache_bytes, data.decoder)
        self._decoded: tuple[Any, np.ndarray] = (
            None,
            np.empty(0),
        )  # the last sample's clips u8 [repeat, T, H, W, 3]

    def __getitem__(self, g: int) -> Example:
        return first_decodable(g, self.attempt)

    def _sample(self, g: int, attempt: int) -> Sample:
        p, _ = split_repeat(g, self.data.repeat, self.order.lanes)
        return self.shards.sample(*(self.order.replacement(p, attempt) if attempt else self.order.at(p)))

    def _rng(self, g: int) -> np.random.Generator:
        """Of the clip at g; its first number is where in the video the clip starts."""
        return np.random.default_rng((self.order.seed, 3, g + self.number * STREAM_STRIDE))

    def _clips(self, g: int, attempt: int, sample: Sample) -> np.ndarray:
        """All clips of the sample at g, decoded together: what one of them cannot show, none can."""
        d, together = self.data, repeated_positions(g, self.data.repeat, self.order.lanes)
        if self._decoded[0] != (together, attempt):
            self._decoded = None, np.empty(0)  # so that they are not held beside the next ones
            starts = [self._rng(copy).uniform() for copy in together]
            rate = {"frames": d.frames, "stride": d.stride, "fps": d.fps, "rule": d.rule}
            frames = self.cache.clip(sample, lambda times: sample_clips(times, starts, **rate).ravel())
            clips = frames.reshape(len(together), d.frames, *frames.shape[1:])
            if d.repeat == 1:
                return clips
            self._decoded = (together, attempt), clips
        return self._decoded[1]

    def attempt(self, g: int, attempt: int) -> Example | DecodeFailure:
        sample, rng, (_, copy) = (
            self._sample(g, attempt),
            self._rng(g),
            split_repeat(g, self.data.repeat, self.order.lanes),
        )
        rng.uniform()  # the start
        try:
            frames = self._clips(g, attempt, sample)[copy]
        except DecodeError as e:
            return DecodeFailure(sample.key, e.reason)
        position = g + self.number * STREAM_STRIDE
        return Example(position, sample.key, sample.meta.get("label", -1), self.augment(frames, rng), [])


class Streams(Dataset[Example]):
    """Several streams; also what a decoding process does (`isolated_dataset.AttemptDataset`)."""

    def __init__(self, clips: list[TrainClips]):
        self.clips = clips

    @property
    def on_decode(self) -> Callable[[], None]:
        return self.clips[0].cache.on_decode

    @on_decode.setter
    def on_decode(self, call: Callable[[], None]) -> None:
        for clips in self.clips:
            clips.cache.on_decode = call

    def __getitem__(self, position: int) -> Example:
        return first_decodable(position, self.attempt)

    def attempt(self, position: int, attempt: int) -> Example | DecodeFailure:
        return self.clips[position // STREAM_STRIDE].attempt(position % STREAM_STRIDE, attempt)

    def key(self, position: int, attempt: int) -> str:
        return self.clips[position // STREAM_STRIDE]._sample(position % STREAM_STRIDE, attempt).key

    def positions(
        self, start: int, stop: int, sizes: list[int], rank: int, world: int
    ) -> Iterator[list[int]]:
        """Of process `rank` of `world` at steps start..stop-1; sizes: clips of each stream in a global batch.

        Clips of one video follow each other.
        """
        each = [
            batches(start, stop, n, c.order.lanes, rank, world)
            for c, n in zip(self.clips, sizes, strict=True)
        ]
        for parts in zip(*each, strict=True):
            for c, part in zip(self.clips, parts, strict=True):
                part.sort(key=lambda g, c=c: split_repeat(g, c.data.repeat, c.order.lanes))  # type: ignore[misc]
            yield [i * STREAM_STRIDE + g for i, part in enumerate(parts) for g in part]


def make_streams(
    data: DataConfig,
    shards: list[Shards],
    augment: Callable,
    seed: int,
    lanes: int,
    window: int,
    cache_bytes: int,
) -> Streams:
    """shards: of each stream."""
    streams = []
    for i, (d, s) in enumerate(zip(data.streams(), shards, strict=True)):
        sizes = [s.counts[s.folder_of == f] for f in range(len(s.folders))]
        order = make_order(sizes, list(d.weights) if d.weights else None, seed, lanes, window, i)
        streams.append(TrainClips(s, order, d, augment, cache_bytes // len(shards), i))
    return Streams(streams)
