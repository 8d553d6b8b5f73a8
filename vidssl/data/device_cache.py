"""Decoded videos on a device (`data.cache: device`): frames are chosen, cropped and augmented there.

The host makes the draws of a clip and finds its frames, in loader workers if there are any; nothing but these
numbers goes to the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vidssl.core.errors import DecodeError
from vidssl.data.cache import DecodedVideo, cache_key, present_frames
from vidssl.data.dataset import SelectFrames
from vidssl.data.decoding.planes import RGB, Box
from vidssl.data.device_augment import ClipLayout, augment_padded, layout_clip, padded_length, window_numbers
from vidssl.data.shards import Sample

CHUNK_BYTES = 1 << 30  # of frames that are allocated at once, beyond those that the index promised


# Of this process, by number: a batch from a loader worker names the one that makes its video. They live as
# long as their streams.
DEVICE_CACHES: "WeakValueDictionary[int, DeviceCache]" = WeakValueDictionary()
_numbers = count()


class CachedClip(NamedTuple):
    """A clip of a cached video: where its frames are, and what makes the clip of them."""

    cache: int  # number of the DeviceCache
    chunk: int
    rows: np.ndarray  # i64 [T], of the chunk as a table with a frame of this size in each row
    layout: ClipLayout

    @property
    def table(self) -> tuple[int, int, int]:
        """(chunk, height, width) of the table that holds the frames."""
        return self.chunk, *self.layout.size


@dataclass(frozen=True)
class CachedClips:
    """A batch of `CachedClip`s, which becomes a video by `to`; those of one table are neighbours."""

    cache: int  # number of the DeviceCache
    tables: list[tuple[tuple[int, int, int], int]]  # (chunk, height, width) and its number of clips
    # i64 [B, T + 1]: rows of the frames; in the last column the clip in this list that is number 0, 1, ... of
    # the batch
    rows: Tensor
    numbers: Tensor  # f32 [B * windows, NUMBERS]: see device_augment.py
    layouts: list[ClipLayout]

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        """Makes the clips u8 [B, 3, T, S, S]. Does not wait for the device if the numbers here are in pinned
        memory; device: that of the cache."""
        return DEVICE_CACHES[self.cache].make_clips(self)

    def pin_memory(self) -> "CachedClips":
        """For the loader's thread that pins batches."""
        return replace(self, rows=self.rows.pin_memory(), numbers=self.numbers.pin_memory())


def collate_cached(clips: list[CachedClip]) -> CachedClips:
    order = sorted(range(len(clips)), key=lambda i: clips[i].table)
    ordered = [clips[i] for i in order]
    rows = np.stack([clip.rows for clip in ordered])
    rows = np.concatenate([rows, np.argsort(order)[:, None]], 1)
    numbers = window_numbers([clip.layout for clip in ordered])
    tables = [(table, len(list(group))) for table, group in groupby(clip.table for clip in ordered)]
    layouts = [clip.layout for clip in ordered]
    return CachedClips(clips[0].cache, tables, torch.from_numpy(rows), torch.from_numpy(numbers), layouts)


class VideoPlace(NamedTuple):
    """Where the frames of a video are, and what a clip of it needs to know."""

    chunk: int
    first_row: int
    height: int  # pixels
    width: int
    times: np.ndarray  # f64 [n], seconds
    missing: dict[int, str]


class VideoIndex:
    """The places of all cached videos: what loader workers know of a DeviceCache."""

    def __init__(self, cache: "DeviceCache"):
        self.cache: DeviceCache | None = cache
        self.number = cache.number
        self.videos: dict[tuple[int, int], VideoPlace | str] = {}

    def __getstate__(self) -> dict[str, Any]:  # a worker that is no fork does not get the frames
        return {**self.__dict__, "cache": None}

    def find_clips(
        self, sample: Sample, select: SelectFrames, augment: Any, rngs: Sequence[np.random.Generator]
    ) -> list[CachedClip]:
        """Returns clips of a video with the draws of their augmentation. Raises DecodeError as decoding them
        would.

        select: chooses the frames of all clips, i64 [clips, T]; augment: of augment.AUGMENTS; rngs: one for
        each clip.
        """
        video = self.videos[cache_key(sample)]
        if isinstance(video, str):
            raise DecodeError(video)
        chosen = present_frames(video.times, video.missing, select)
        size = video.height, video.width
        clips = []
        for indices, rng in zip(chosen, rngs, strict=True):
            draws = augment.draw(*size, rng)
            shown = np.broadcast_to(indices, max(len(indices), len(draws.windows)))
            layout = layout_clip(draws, augment, len(shown), size, size, Box(0, 0, *size), RGB)
            clips.append(CachedClip(self.number, video.chunk, video.first_row + shown, layout))
        return clips


class DeviceCache:
    """The frames of all videos in a few flat u8 tensors on a device, plane by plane.

    A video begins at a multiple of its frame's bytes, so that a chunk is a table with a frame of that size in
    each row, whatever lies before it.
    """

    def __init__(self, device: torch.device, expected_bytes: int = 0):
        """expected_bytes: of all frames, allocated at once; videos beyond them get further chunks."""
        self.device = device
        self.number = next(_numbers)
        self.index = VideoIndex(self)
        DEVICE_CACHES[self.number] = self
        self.chunks: list[Tensor] = []
        self.nbytes = 0
        self._end = 0  # of the frames in the last chunk
        if expected_bytes:
            self._add_chunk(expected_bytes)

    def _add_chunk(self, nbytes: int) -> None:
        self.chunks.append(torch.empty(nbytes, dtype=torch.uint8, device=self.device))
        self._end = 0

    def add(self, sample: Sample, video: DecodedVideo | str) -> None:
        """video: the decoded video, or the reason why it does not decode."""
        if isinstance(video, str):
            self.index.videos[cache_key(sample)] = video
            return
        n, height, width, _ = video.frames.shape
        row = 3 * height * width
        first = -(-self._end // row)
        if not self.chunks or (first + n) * row > len(self.chunks[-1]):
            self._add_chunk(max(CHUNK_BYTES, n * row))
            first = 0
        self._end = (first + n) * row
        chunk = len(self.chunks) - 1
        frames = video.frames.to(self.device)
        self.table(chunk, height, width)[first : first + n] = rearrange(frames, "n h w c -> n (c h w)")
        self.index.videos[cache_key(sample)] = VideoPlace(
            chunk, first, height, width, video.times, video.missing
        )
        self.nbytes += n * row

    def table(self, chunk: int, height: int, width: int) -> Tensor:
        """u8 [rows, 3 * height * width]: a chunk as frames of this size."""
        flat = self.chunks[chunk]
        row = 3 * height * width
        return flat[: len(flat) // row * row].view(-1, row)

    def make_clips(self, clips: CachedClips) -> Tensor:
        """Makes the clips u8 [B, 3, T, S, S] on the device. Waits for nothing there."""
        rows = clips.rows.to(self.device, non_blocking=True)
        numbers = clips.numbers.to(self.device, non_blocking=True)
        video = augment_padded(self.gather(clips, rows[:, :-1]), clips.layouts, numbers)
        return video if len(clips.tables) == 1 else video[rows[:, -1]]

    def gather(self, clips: CachedClips, rows: Tensor) -> Tensor:
        """Returns the frames u8 [B, 3, T, H, W], zero beyond the size of a clip. rows: i64 [B, T], on
        the device."""
        frames = rows.shape[1]
        parts = []
        start = 0
        for (chunk, h, w), n in clips.tables:
            chosen = rows[start : start + n].flatten()
            found = self.table(chunk, h, w).index_select(0, chosen)
            parts.append(rearrange(found, "(b t) (c h w) -> b c t h w", t=frames, c=3, h=h))
            start += n
        height, width = (padded_length(part.shape[axis] for part in parts) for axis in (-2, -1))
        if len(parts) == 1 and parts[0].shape[-2:] == (height, width):
            return parts[0]
        video = rows.new_zeros((len(rows), 3, frames, height, width), dtype=torch.uint8)
        for part, rows_of_part in zip(parts, video.split([len(part) for part in parts]), strict=True):
            rows_of_part[..., : part.shape[-2], : part.shape[-1]] = part
        return video
