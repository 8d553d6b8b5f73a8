"""The clips of a video that an encoder sees in evaluation: segments x crops, and controls on their frames."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import Dataset

from vidssl.core.errors import DecodeError
from vidssl.data.augment import CenterCrop
from vidssl.data.dataset import do_nothing
from vidssl.data.decoding import open_video
from vidssl.data.decoding.base import Video
from vidssl.data.decoding.in_memory import VideoSpan
from vidssl.data.sampling import sample_indices, segment_starts
from vidssl.data.shards import Sample
from vidssl.evaluation.controls import FrameOrder


class View(NamedTuple):
    """Which frames and pixels of a video the encoder sees: segments * crops clips.

    order: "shuffled" permutes a clip's frames by a permutation drawn from the sample's key, "reversed" runs
    them backwards, "still" repeats the middle frame. All frames of an image are the same."""

    frames: int  # per clip
    stride: int | None  # frames
    fps: float | None  # frames per second
    segments: int  # clips, evenly spread over the video
    crops: int  # squares, evenly spread along the longer side; 1: the centre
    size: int  # pixels; the short side is resized to it
    order: FrameOrder = "none"
    first_frames: int | None = None  # number of leading frames to keep after reordering; None: all

    @property
    def clips(self) -> int:
        return self.segments * self.crops


def reorder_frames(clip: np.ndarray, order: FrameOrder, permutation: np.ndarray) -> np.ndarray:
    """u8 [T, H, W, 3], permutation i64 [T] (of "shuffled") -> u8 [T, H, W, 3]."""
    t = np.arange(len(clip))
    indices = {"none": t, "shuffled": permutation, "reversed": t[::-1], "still": np.full_like(t, len(t) // 2)}
    return clip[indices[order]]


def square_crop(clip: np.ndarray, crop: int, crops: int) -> np.ndarray:
    """u8 [T, H, W, 3] -> crop number `crop` of `crops` squares u8 [T, S, S, 3] along the longer side, from
    its start to its end; the centre one if crops is 1."""
    height, width = clip.shape[1:3]
    side = min(height, width)
    margin = abs(height - width)
    start = margin // 2 if crops == 1 else round(crop * margin / (crops - 1))
    return clip[:, start : start + side] if height > width else clip[:, :, start : start + side]


class MediaSource(Protocol):
    """What has the bytes of samples: shards, or files."""

    def read(self, sample: Sample) -> bytes:
        """Raises DecodeError if they cannot be had."""
        ...


def cut_segments(video: Video, view: View, segments: Sequence[int], key: str = "") -> dict[int, np.ndarray]:
    """Number of a segment -> its frames u8 [T, H, W, 3] of an open video. key: of the sample, for the
    permutations of order="shuffled"."""
    starts = segment_starts(view.segments)
    indices = [sample_indices(video.times, view.frames, view.stride, view.fps, starts[s]) for s in segments]
    frames = video.get(np.concatenate(indices))
    seed = int.from_bytes(hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    permutations = [rng.permutation(view.frames) for _ in range(view.segments)]
    return {
        s: reorder_frames(clip, view.order, permutations[s])[: view.first_frames]
        for s, clip in zip(segments, np.split(frames, len(segments)), strict=True)
    }


def stack_clips(segments: dict[int, np.ndarray], view: View, clips: Sequence[int]) -> Tensor:
    """Clips u8 [len(clips), 3, T, S, S] of a sample by their numbers, see EvalClips."""
    resize = CenterCrop(view.size)
    numbers = [divmod(clip, view.segments) for clip in clips]
    return torch.stack([resize(square_crop(segments[s], crop, view.crops)) for crop, s in numbers])


def clips_of_video(video: Video, view: View) -> Tensor:
    """All clips u8 [clips, 3, T, S, S] of an open video."""
    return stack_clips(cut_segments(video, view, range(view.segments)), view, range(view.clips))


class EvalClips(Dataset):
    """Item e is (e, clips u8 [clips_per_example, 3, T, S, S] of example e), or (e, reason why it cannot be
    decoded).

    The clips of sample n are numbered n * C to (n + 1) * C - 1: crop by crop, the segments of a crop in
    order. Example e holds clips e * clips_per_example to (e + 1) * clips_per_example - 1."""

    def __init__(
        self,
        shards: MediaSource,
        samples: list[Sample],
        view: View,
        clips_per_example: int,
        spans: Sequence[tuple[float, float]] | None = None,
    ):
        """spans: seconds from and to which each sample is seen, as if it were cut there; None: all of it."""
        self.shards = shards
        self.samples = samples
        self.view = view
        self.clips_per_example = clips_per_example
        self.spans = spans
        self.on_decode: Callable[[], None] = do_nothing  # called when a sample's bytes have been read

    def __getitem__(self, example: int) -> tuple[int, Tensor | str]:
        view = self.view
        number, first = divmod(example * self.clips_per_example, view.clips)
        clips = range(first, first + self.clips_per_example)
        try:
            segments = self._decode(number, sorted({clip % view.segments for clip in clips}))
        except DecodeError as e:
            return example, e.reason
        return example, stack_clips(segments, view, clips)

    def _decode(self, number: int, segments: list[int]) -> dict[int, np.ndarray]:
        """Segment number -> its frames u8 [T, H, W, 3]."""
        sample = self.samples[number]
        data = self.shards.read(sample)
        self.on_decode()
        with open_video(data, sample.ext, sample.meta) as video:
            part = video if self.spans is None else VideoSpan(video, *self.spans[number])
            return cut_segments(part, self.view, segments, sample.key)


class PatchMeans(nn.Module):
    """Mean colours of patches as features, a baseline: accuracy reachable without any encoder.

    Video f32 [B, 3, T, H, W] -> [B, N, tubelet * 48]: for each patch the mean colours of its 4 x 4 parts in
    each of its frames."""

    def __init__(self, tubelet: int, patch: int):
        super().__init__()
        self.tubelet = tubelet
        self.patch = patch

    def forward(self, video: Tensor) -> Tensor:
        frames, height, width = video.shape[2:]
        parts = (frames, 4 * (height // self.patch), 4 * (width // self.patch))
        means = F.adaptive_avg_pool3d(video, parts)
        pattern = "b c (t dt) (h dh) (w dw) -> b (t h w) (dt c dh dw)"
        return rearrange(means, pattern, dt=self.tubelet, dh=4, dw=4)
