"""The training loader: position in the stream -> bytes -> frames -> uint8 clip; batches of them, in any worker."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vidssl.config import Count, Names, Positive, Share
from vidssl.data.augment import scale
from vidssl.data.clips import Rule, choose
from vidssl.data.decoders import Video, open_video
from vidssl.data.order import Order, batches
from vidssl.data.shards import Sample, Shards
from vidssl.errors import DecodeError, UserError

ATTEMPTS = 20  # samples tried at one position before the run gives up


@dataclass(frozen=True)
class Data:
    """The `data` section: what is read, and which frames make a clip."""

    train: Names  # packed folders
    frames: Count  # in a clip
    stride: Count | None = None  # between them, in frames of the video
    fps: Positive | None = None  # or in frames a second; give one of the two
    rule: Rule = "exact"  # how stride and fps are meant; "reference": as V-JEPA's loader does, for published recipes
    short_side: Count | None = None  # pixels; larger frames are scaled to it when decoded; None: as stored
    max_bad: Share = 0.05  # fraction of samples that may fail to decode before the run stops

    def __post_init__(self) -> None:
        if (self.stride is None) == (self.fps is None):
            raise UserError("data: give either stride (in frames) or fps (frames a second)")


class Item(NamedTuple):
    position: int
    key: str
    label: int
    video: Tensor  # u8 [3, T, H, W]
    bad: list[tuple[str, str]]  # (key, reason) of samples that could not be decoded and were replaced


class Batch(NamedTuple):
    video: Tensor  # u8 [B, 3, T, H, W]
    label: Tensor  # i64 [B]
    position: Tensor  # i64 [B]
    key: list[str]
    bad: list[tuple[str, str]]


def collate(items: list[Item]) -> Batch:
    return Batch(
        torch.stack([i.video for i in items]),
        torch.tensor([i.label for i in items]),
        torch.tensor([i.position for i in items]),
        [i.key for i in items],
        [b for i in items for b in i.bad],
    )


WHOLE = 256 << 20  # bytes; a video is decoded as a whole for the cache only if its frames take less


class FrameCache:
    """Whole decoded videos of this process, up to `limit` bytes; what does not fit is decoded clip by clip."""

    def __init__(self, shards: Shards, short_side: int | None, limit: int):
        self.shards, self.short_side, self.left = shards, short_side, limit
        self.videos: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def clip(self, sample: Sample, pick: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """pick: times f64 [n] in seconds -> indices i64 [T]; returns frames u8 [T, H, W, 3]."""
        place = sample.shard, sample.offset
        if place not in self.videos:
            video = self._open(sample)
            size = len(video.times) * video.size[0] * video.size[1] * 3
            if size <= WHOLE and self.left > 0 and not self._keep(place, video):
                video = self._open(sample)  # anew: a decoder that failed once may go on failing
            if place not in self.videos:
                return scale(video.get(pick(video.times)), self.short_side)
        frames, times = self.videos[place]
        return frames[pick(times)]

    def _open(self, sample: Sample) -> Video:
        return open_video(self.shards.read(sample), sample.ext, sample.meta)

    def _keep(self, place: tuple[int, int], video: Video) -> bool:
        """False if some frame does not decode: a clip of the others still may, as it would without a cache."""
        try:
            frames = scale(video.get(np.arange(len(video.times))), self.short_side)
        except DecodeError:
            return False
        self.videos[place] = frames, video.times
        self.left -= frames.nbytes
        return True


class TrainClips(Dataset[Item]):
    """Clip, crop and replacement at position g are functions of (shards, seed, g)."""

    def __init__(self, shards: Shards, order: Order, data: Data, augment: Callable, cache_bytes: int = 0):
        self.shards, self.order, self.data, self.augment = shards, order, data, augment
        self.cache = FrameCache(shards, data.short_side, cache_bytes)

    def __getitem__(self, g: int) -> Item:
        rng, d = np.random.default_rng((self.order.seed, 3, g)), self.data
        start = rng.uniform()
        bad: list[tuple[str, str]] = []
        for attempt in range(ATTEMPTS):
            place = self.order.replacement(g, attempt) if attempt else self.order.at(g)
            sample = self.shards.sample(*place)
            try:
                frames = self.cache.clip(sample, lambda times: choose(times, d.frames, d.stride, d.fps, start, d.rule))
            except DecodeError as e:
                bad.append((sample.key, e.reason))
                continue
            return Item(g, sample.key, sample.meta.get("label", -1), self.augment(frames, rng), bad)
        return Item(g, "", -1, torch.empty(0), bad)


class Tally:
    """Counts what could not be decoded; stops the run when it is too much."""

    def __init__(self, limit: float):
        self.limit, self.seen, self.reasons, self.last = limit, 0, Counter[str](), ""

    def add(self, positions: list[int], bad: list[tuple[str, str]], failed: bool) -> None:
        self.seen += len(positions)
        self.reasons.update(reason for _, reason in bad)
        self.last = bad[-1][0] if bad else self.last
        share = self.reasons.total() / self.seen
        if failed or (self.seen >= 200 and share > self.limit):
            raise UserError(
                f"{self.reasons.total()} of {self.seen} samples could not be decoded ({dict(self.reasons)}; last "
                f"{self.last}): over data.max_bad {self.limit}; python -m data_prep.verify names the files"
            )


def train_batches(
    clips: TrainClips, start: int, stop: int, batch: int, rank: int, world: int, workers: int
) -> Iterator[Batch]:
    """This process's batches of steps start..stop-1, in order, whatever the number of workers."""
    tally = Tally(clips.data.max_bad)
    loader = DataLoader(
        clips,
        batch_sampler=batches(start, stop, batch, clips.order.lanes, rank, world),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=list,  # items as they are, so that a position where all failed can be told from the others
        prefetch_factor=4 if workers else None,
    )
    for items in loader:
        bad = [b for i in items for b in i.bad]
        tally.add([i.position for i in items], bad, failed=any(not i.key for i in items))
        yield collate(items)
