"""Clips of video files for pictures: as an encoder sees them, or as a run's data section cuts them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vidssl.core.errors import DecodeError, UserError
from vidssl.data.augment import CenterCrop
from vidssl.data.decoding import open_video
from vidssl.data.decoding.base import Video
from vidssl.data.sampling import sample_indices
from vidssl.data.timing import choose_frames, draw_timing
from vidssl.evaluation.views import View
from vidssl.training.schema import TrainConfig

SLOWEST_FPS = 2.0
FASTEST_FPS = 25.0


class ShownClip(NamedTuple):
    """Frames of a video that follow each other, cut to squares."""

    name: str
    frames: np.ndarray  # u8 [windows * T, S, S, 3]
    times: np.ndarray  # f64 [windows * T], seconds since the first frame of the video
    windows: int = 1  # clips of an encoder, one after the other

    def tensor(self) -> Tensor:
        """u8 [windows, 3, T, S, S]."""
        clips = torch.from_numpy(self.frames).unflatten(0, (self.windows, -1))
        return clips.permute(0, 4, 1, 2, 3).contiguous()

    @property
    def fps(self) -> float:
        """Frames a second with which it plays as fast as the video, within limits."""
        return playing_rate(self.times)


def playing_rate(times: np.ndarray) -> float:
    """Frames a second of frames at these times (f64 [n], seconds), within limits."""
    steps = np.diff(times)
    steps = steps[steps > 0]
    if not len(steps):
        return SLOWEST_FPS
    return float(np.clip(1 / np.median(steps), SLOWEST_FPS, FASTEST_FPS))


def open_file(path: Path) -> Video:
    """Opens a video or picture. Raises UserError if it cannot be read."""
    try:
        return open_video(path.read_bytes(), path.suffix.lstrip(".").lower(), decoder="pyav")
    except DecodeError as e:
        raise UserError(f"{path}: cannot be decoded ({e})") from None


def read_frames(video: Video, indices: np.ndarray, path: Path) -> np.ndarray:
    """Frames u8 [n, H, W, 3]. Raises UserError if they do not decode."""
    try:
        return video.get(indices)
    except DecodeError as e:
        raise UserError(f"{path}: cannot be decoded ({e})") from None


def read_windows(path: Path, view: View, windows: int = 1) -> ShownClip:
    """The central squares of a video as an encoder sees them: up to `windows` clips, one after the other, as
    many as the video has; one clip is its middle."""
    with open_file(path) as video:
        last = len(video.times) - 1
        clip = sample_indices(video.times, view.frames, view.stride, view.fps)
        # frames of the video from the start of a clip to the start of the next
        hop = max(1, clip[-1] + (clip[1] if len(clip) > 1 else 1))
        count = min(windows, 1 + max(0, last - clip[-1]) // hop)
        start = max(0, last - clip[-1] - hop * (count - 1)) // 2
        indices = np.concatenate([start + hop * number + clip for number in range(count)]).clip(0, last)
        frames = read_frames(video, indices, path)
        times = video.times[indices]
    squares = CenterCrop(view.size)(frames).permute(1, 2, 3, 0).numpy()
    return ShownClip(path.stem, squares, times, count)


def read_clip(path: Path, cfg: TrainConfig) -> Tensor:
    """u8 [3, T, S, S]: a clip of a video as the data section cuts it in time, its central square."""
    return data_clip(path, cfg).tensor()[0]


def data_clip(path: Path, cfg: TrainConfig) -> ShownClip:
    """A clip of a video as the data section cuts it in time, its central square."""
    timing = draw_timing(cfg.data, np.random.default_rng(cfg.run.seed))
    with open_file(path) as video:
        indices = choose_frames(video.times, cfg.data, timing)
        frames = read_frames(video, indices, path)
        times = video.times[indices]
    squares = CenterCrop(cfg.augment.arguments["size"])(frames).permute(1, 2, 3, 0).numpy()
    return ShownClip(path.stem, squares, times)
