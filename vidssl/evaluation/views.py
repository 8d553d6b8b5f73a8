"""What of a video an encoder sees in evaluation: segments x crops, and what a control does to the frames."""

import hashlib
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vidssl.core.errors import DecodeError
from vidssl.data.augment import CenterCrop
from vidssl.data.dataset import do_nothing
from vidssl.data.decoding import open_video
from vidssl.data.sampling import sample_indices, segment_starts
from vidssl.data.shards import Sample, Shards

FrameOrder = Literal["none", "shuffled", "reversed", "still"]  # what is done to the frames of each clip
EncoderControl = Literal[
    "none", "random_init", "pixels"
]  # untrained weights, or mean colours in place of features
Control = Literal[FrameOrder, "single", EncoderControl]  # "single": the middle frame alone, as an image
CONTROLS: tuple[Control, ...] = get_args(Control)


class View(NamedTuple):
    """Which frames and pixels of a video the encoder sees: segments * crops clips, the crops of a place together.

    order: "shuffled" draws one order of a clip's frames from the sample's key, "reversed" runs backwards, "still"
    repeats the middle frame. Of an image every frame is the same one.
    """

    frames: int  # in a clip
    stride: int | None  # frames
    fps: float | None  # frames a second
    segments: int  # clips, evenly spread over the video
    crops: int  # squares, evenly spread along the longer side; 1: the middle
    size: int  # pixels; the short side is resized to it
    order: FrameOrder = "none"
    seen: int | None = None  # frames of it, from its start after `order`; None: all

    @property
    def clips(self) -> int:
        return self.segments * self.crops


def reorder(clip: np.ndarray, order: FrameOrder, shuffle: np.ndarray) -> np.ndarray:
    """u8 [T, H, W, 3] -> the same; shuffle i64 [T]."""
    t = np.arange(len(clip))
    return clip[
        {"none": t, "shuffled": shuffle, "reversed": t[::-1], "still": np.full_like(t, len(t) // 2)}[order]
    ]


def square(clip: np.ndarray, crop: int, crops: int) -> np.ndarray:
    """u8 [T, H, W, 3] -> one of `crops` squares along the longer side, the first at its start, the last at its end."""
    side, room = min(clip.shape[1:3]), abs(clip.shape[1] - clip.shape[2])
    at = room // 2 if crops == 1 else round(crop * room / (crops - 1))
    return clip[:, at : at + side] if clip.shape[1] > clip.shape[2] else clip[:, :, at : at + side]


class EvalClips(Dataset):
    """Number of an example -> (the number, u8 [per, 3, T, S, S]), or (the number, why it cannot be read).

    The clips of sample n are numbers n * C to (n + 1) * C - 1, crop by crop, the segments of a crop in order; example
    e holds clips e * per to (e + 1) * per - 1.
    """

    def __init__(self, shards: Shards, samples: list[Sample], view: View, per: int):
        self.shards, self.samples, self.view, self.per = shards, samples, view, per
        self.resize = CenterCrop(view.size)
        self.on_decode: Callable[[], None] = do_nothing  # called when a sample's bytes have been read

    def __getitem__(self, example: int) -> tuple[int, Tensor | str]:
        v = self.view
        number, first = divmod(example * self.per, v.clips)
        wanted = [divmod(clip, v.segments) for clip in range(first, first + self.per)]  # (crop, segment)
        segments = sorted({segment for _, segment in wanted})
        starts, sample = segment_starts(v.segments), self.samples[number]
        try:
            data = self.shards.read(sample)
            self.on_decode()
            with open_video(data, sample.ext, sample.meta) as video:
                picks = [sample_indices(video.times, v.frames, v.stride, v.fps, starts[s]) for s in segments]
                frames = video.get(np.concatenate(picks))
        except DecodeError as e:
            return example, e.reason
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(sample.key.encode()).digest()[:8], "big"))
        shuffles = [rng.permutation(v.frames) for _ in range(v.segments)]
        parts = zip(segments, np.split(frames, len(segments)), strict=True)
        clips = {s: reorder(clip, v.order, shuffles[s])[: v.seen] for s, clip in parts}
        return example, torch.stack([self.resize(square(clips[s], crop, v.crops)) for crop, s in wanted])


class PatchMeans(nn.Module):
    """Raw pixels as if an encoder gave them: video f32 [B, 3, T, H, W] -> [B, N, tubelet * 48], for each patch the mean
    colours of its sixteenths in each of its frames. What a head makes of this is not the encoder's merit."""

    def __init__(self, tubelet: int, patch: int):
        super().__init__()
        self.tubelet, self.patch = tubelet, patch

    def forward(self, video: Tensor) -> Tensor:
        b, _, t, height, width = video.shape
        h, w = height // self.patch, width // self.patch
        means = F.adaptive_avg_pool3d(video, (t, 4 * h, 4 * w)).view(
            b, 3, t // self.tubelet, self.tubelet, h, 4, w, 4
        )
        return means.permute(0, 2, 4, 6, 3, 1, 5, 7).flatten(4).flatten(1, 3)
