"""Fills the cache of decoded videos (cache.py): says what that takes, refuses what does not fit, decodes."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vidssl.core.errors import DecodeError, UserError
from vidssl.core.log import logger
from vidssl.core.memory import free_memory
from vidssl.core.progress import Progress
from vidssl.data.augment import downscale
from vidssl.data.cache import DecodedVideo, HostCache, VideoCache
from vidssl.data.dataset import DecodeFailure, TrainClips, do_nothing
from vidssl.data.decoding import open_video, select_decoder
from vidssl.data.decoding.base import Video
from vidssl.data.device_cache import DeviceCache
from vidssl.data.isolated_dataset import IsolatedDataset
from vidssl.data.schema import DataConfig, Decoder
from vidssl.data.shards import Sample, Shards

FREE_SHARE = 0.8  # of the free memory that a cache may take: the model and its workers need some, too
GROUP_FRAMES = 64  # frames that are decoded before they are scaled down together
GIVE_UP_AFTER = 32  # frames in a row that do not decode, after which no further frame of a video is tried
SMALLEST_SIDE = 32  # pixels; no smaller data.short_side is proposed

Place = tuple[int, int]  # (shard, number within the shard) of a sample


# Decoding


def decode_video(
    data: bytes,
    ext: str,
    meta: dict[str, Any],
    decoder: Decoder,
    short_side: int | None,
    on_group: Callable[[], None] = do_nothing,
) -> DecodedVideo:
    """Decodes all frames, scaled down to `short_side`; on_group is called after every few. data: the media
    bytes.

    Frames that do not decode with the others are tried one by one, as clips would. Raises DecodeError if the
    file cannot be opened or no frame decodes.
    """
    if select_decoder(ext, meta, decoder) in ("decord", "torchcodec"):
        try:
            with open_video(data, ext, meta, decoder) as video:
                whole, done, times = _decode_ahead(video, short_side, on_group, strict=True)
                return DecodedVideo(whole[:done], times, {})
        except DecodeError:
            decoder = "pyav"
    with open_video(data, ext, meta, decoder) as video:
        whole, done, times = _decode_ahead(video, short_side, on_group)
    n = len(times)
    missing: dict[int, str] = {}
    for i in range(done, n):
        in_a_row = len(missing) and all(k in missing for k in range(i - GIVE_UP_AFTER, i))
        if in_a_row:
            missing.update(dict.fromkeys(range(i, n), missing[i - 1]))
            break
        on_group()
        try:
            # Opened anew, since a decoder that failed once may go on failing.
            with open_video(data, ext, meta, decoder) as video:
                frame = torch.from_numpy(downscale(video.get([i]), short_side))[0]
        except DecodeError as e:
            missing[i] = e.reason
            continue
        whole = whole if len(whole) else frame.new_empty(n, *frame.shape)
        whole[i] = frame
    if n and len(missing) == n:
        raise DecodeError(missing[0])
    whole[list(missing)] = 0
    return DecodedVideo(whole, times, missing)


def _decode_ahead(
    video: Video, short_side: int | None, on_group: Callable[[], None], strict: bool = False
) -> tuple[Tensor, int, np.ndarray]:
    """Returns (frames u8 [n, H, W, 3], k, times f64 [n]). The first k frames are decoded, the next one does
    not decode; if k is 0 there are no frames. strict: raises its DecodeError instead.

    Groups are written into one tensor: to join them at the end would take the memory twice.
    """
    whole = torch.empty(0, 0, 0, 3, dtype=torch.uint8)
    done = 0
    frames = video.iter_frames(np.arange(len(video)))
    while True:
        group: list[np.ndarray] = []
        try:
            for frame in islice(frames, GROUP_FRAMES):
                group.append(frame)
        except DecodeError:
            if strict:
                raise
        if group:
            scaled = torch.from_numpy(downscale(np.stack(group), short_side))
            whole = whole if done else scaled.new_empty(len(video), *scaled.shape[1:])
            whole[done : done + len(scaled)] = scaled
            done += len(scaled)
        if len(group) < GROUP_FRAMES:
            break
        on_group()
    return whole, done, video.times


class WholeVideos(Dataset[DecodedVideo | DecodeFailure]):
    """All frames of samples, decoded; an `AttemptDataset`, which may run in the sandbox."""

    def __init__(self, shards: Shards, places: list[Place], short_side: int | None, decoder: Decoder):
        self.shards = shards
        self.places = places
        self.short_side = short_side
        self.decoder: Decoder = decoder
        self.on_decode: Callable[[], None] = do_nothing

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> DecodedVideo | DecodeFailure:
        return self.try_position(number, 0)

    def nbytes(self, number: int) -> int:
        """Bytes of all frames of a video, by the index; 0 if it does not say."""
        return measure_size([self.shards.sample(*self.places[number])]).nbytes(self.short_side)

    def key(self, number: int, attempt: int) -> str:
        return self.shards.sample(*self.places[number]).key

    def try_position(self, number: int, attempt: int) -> Any:
        """Returns a DecodedVideo or a DecodeFailure; there is one attempt."""
        sample = self.shards.sample(*self.places[number])
        try:
            data = self.shards.read(sample)
            self.on_decode()
            return decode_video(
                data, sample.ext, sample.meta, self.decoder, self.short_side, lambda: self.on_decode()
            )
        except DecodeError as e:
            return DecodeFailure(sample.key, e.reason)


class IsolatedVideos(Dataset[DecodedVideo | DecodeFailure]):
    """`WholeVideos`, each decoded in a child process (isolation.py). memory_bytes: beside its frames."""

    def __init__(self, videos: WholeVideos, timeout_s: float, memory_bytes: int):
        self.isolated = IsolatedDataset(videos, timeout_s, memory_bytes)
        self.videos = videos

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, number: int) -> Any:
        # the frames are in the child twice while it hands them over
        return self.isolated.try_position(number, 0, extra_bytes=2 * self.videos.nbytes(number))

    def close(self) -> None:
        self.isolated.close()


def pass_on(item: Any) -> Any:
    """The collate_fn of a loader that yields single items."""
    return item


def decode_videos(
    shards: Shards, places: list[Place], data: DataConfig, workers: int, isolate: bool
) -> Iterator[tuple[Sample, DecodedVideo | DecodeFailure]]:
    """Yields each sample with its decoded video, in the order of `places`."""
    videos = WholeVideos(shards, places, data.short_side, data.decoder)
    isolated = IsolatedVideos(videos, data.decode_timeout_s, data.memory_mb << 20) if isolate else None
    try:
        loader = DataLoader(
            isolated or videos,
            batch_size=None,
            num_workers=workers,
            collate_fn=pass_on,
            prefetch_factor=4 if workers else None,
        )
        for place, video in zip(places, loader, strict=True):
            yield shards.sample(*place), video
    finally:
        if isolated:
            isolated.close()


# What it takes


class CacheSize:
    """What the index says of videos to be cached."""

    def __init__(self, sizes: np.ndarray):
        """sizes: i64 [n, 3]: frames, height and width as stored, zeros for a video that pack has not
        measured."""
        self.sizes = np.where(sizes.all(1, keepdims=True), sizes, 0)
        self.unknown = int((self.sizes[:, 0] == 0).sum())

    def frames(self) -> int:
        return int(self.sizes[:, 0].sum())

    def frame_bytes(self, short_side: int | None) -> np.ndarray:
        """i64 [n]: bytes of a frame, scaled down to `short_side`."""
        _, height, width = self.sizes.astype(np.float64).T
        scale = np.minimum(1, (short_side or np.inf) / np.minimum(height, width).clip(1))
        return (3 * np.rint(height * scale) * np.rint(width * scale)).astype(np.int64)

    def nbytes(self, short_side: int | None) -> int:
        """Bytes of all frames, scaled down to `short_side`."""
        return int((self.sizes[:, 0] * self.frame_bytes(short_side)).sum())

    def padding(self, short_side: int | None) -> int:
        """Bytes between videos in the order of `by_frame_size`, each at a multiple of its frame's bytes."""
        return int(np.unique(self.frame_bytes(short_side)).sum())

    def by_frame_size(self) -> list[int]:
        """The order in which videos of one frame size are neighbours."""
        return np.lexsort(self.sizes.T[1:]).tolist()


def measure_size(samples: Iterable[Sample]) -> CacheSize:
    rows = [[s.meta.get(name, 0) for name in ("frames", "height", "width")] for s in samples]
    return CacheSize(np.array(rows, np.int64).reshape(-1, 3))


def check_cache_fits(size: CacheSize, short_side: int | None, free: int, where: str, copies: int = 1) -> None:
    """Raises UserError, with the data.short_side that would do, if the videos take more than FREE_SHARE of
    `free` bytes. where: of the memory, for messages; copies: of all videos that it holds."""
    needed = copies * size.nbytes(short_side)
    limit = FREE_SHARE * free
    if needed <= limit:
        return
    largest = min(short_side or 4096, 4096)
    sides = range(largest - largest % 8, SMALLEST_SIDE - 1, -8)
    fitting = next((side for side in sides if copies * size.nbytes(side) <= limit), None)
    advice = f"data.short_side={fitting} would fit" if fitting else "data.cache=none reads from the disk"
    times = f"{copies} processes x " if copies > 1 else ""
    raise UserError(
        f"data.cache: {times}{size.nbytes(short_side) / 1e9:.3g} GB of frames are more than "
        f"{FREE_SHARE:.0%} of the {free / 1e9:.3g} GB that are free {where}: {advice}"
    )


def fill_cache(
    cache: VideoCache,
    shards: Shards,
    places: list[Place],
    data: DataConfig,
    workers: int,
    isolate: bool,
    limit_bytes: float,
    quiet: bool,
) -> None:
    """Decodes the samples at `places` into the cache. limit_bytes: of the frames; quiet: no progress."""
    start = time.monotonic()
    reasons = Counter[str]()
    partly = 0
    with Progress("data.cache", len(places), "videos decoded", quiet=quiet) as progress:
        for done, (sample, video) in enumerate(decode_videos(shards, places, data, workers, isolate), 1):
            if isinstance(video, DecodeFailure):
                reasons[video.reason] += 1
                cache.add(sample, video.reason)
            else:
                partly += bool(video.missing)
                cache.add(sample, video)
                if cache.nbytes > limit_bytes:
                    raise UserError(
                        f"data.cache: {limit_bytes / 1e9:.3g} GB are full after {done} of {len(places)} "
                        "videos: give a smaller data.short_side, or data.cache=none"
                    )
            progress.update()
    line = f"data.cache: {len(places)} videos, {cache.nbytes / 1e9:.3g} GB"
    line += f", decoded in {time.monotonic() - start:.0f} s"
    if reasons or partly:
        line += f"; {reasons.total()} do not decode {dict(reasons)}, {partly} only in part: "
        line += "other samples take their places, as from the disk"
    logger.info(line)


def places_of(clips: TrainClips) -> list[Place]:
    """Returns every sample that a stream may show."""
    places = getattr(clips.order, "places", None)
    return places or [(s, i) for s, n in enumerate(clips.shards.counts.tolist()) for i in range(n)]


def cache_videos(
    streams: list[TrainClips],
    workers: int,
    isolate: bool,
    quiet: bool,
    device: torch.device | None = None,
) -> None:
    """Decodes the videos of all streams into memory, if data.cache says so; the streams then read them there.

    quiet: no progress; device: of data.cache=device. Raises UserError if the memory that is free does not
    hold the videos.
    """
    data = streams[0].data
    if data.cache == "none":
        return
    caches: dict[tuple[str, ...], HostCache | DeviceCache] = {}
    for clips in streams:
        folders = tuple(clips.shards.folders)
        if folders not in caches:
            places = places_of(clips)
            size = measure_size(clips.shards.sample(*place) for place in places)
            limit = announce(size, data.short_side, device if data.cache == "device" else None)
            if data.cache == "device":
                places = [places[i] for i in size.by_frame_size()]
                expected = size.nbytes(data.short_side) + size.padding(data.short_side)
                caches[folders] = DeviceCache(device or torch.device("cpu"), expected)
            else:
                caches[folders] = HostCache()
            fill_cache(caches[folders], clips.shards, places, data, workers, isolate, limit, quiet)
        cache = caches[folders]
        if isinstance(cache, HostCache):
            clips.clip_reader.cache = cache
        else:
            clips.index = cache.index


def announce(size: CacheSize, short_side: int | None, device: torch.device | None) -> float:
    """Logs what will be cached on a device or (None) on the host. Returns the bytes that it may take. Raises
    UserError if it does not fit."""
    on_gpu = device is not None and device.type == "cuda"
    # Processes have a GPU each, but share the host.
    copies = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory()
    where = f"on {device}" if on_gpu else "on this host"
    known = len(size.sizes) - size.unknown
    line = f"data.cache: {len(size.sizes)} videos"
    if known:
        line += f", {size.frames()} frames, {size.nbytes(short_side) / 1e9:.3g} GB"
    if size.unknown:
        line += f" and {size.unknown} videos of unknown size" if known else " of unknown size"
    line += f" in each of {copies} processes" if copies > 1 else ""
    logger.info(line + (f"; {free / 1e9:.3g} GB are free {where}" if free is not None else ""))
    if free is None:
        return np.inf
    check_cache_fits(size, short_side, free, where, copies)
    return FREE_SHARE * free / copies
