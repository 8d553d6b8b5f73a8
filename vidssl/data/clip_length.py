"""How the videos of a data set compare with the clips that are to be cut from them, by their index."""

from typing import NamedTuple

import numpy as np

from vidssl.data.addresses import is_url
from vidssl.data.extensions import IMAGE_EXTENSIONS
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Shards

MAX_SHARDS = 16  # of which records are read before a run starts
MAX_SAMPLES = 256  # of each of them


class Corpus(NamedTuple):
    """What the records of some samples say."""

    samples: int
    images: int
    short: int  # videos that end before a clip does
    is_whole: bool  # these are all samples

    @property
    def videos(self) -> int:
        return self.samples - self.images


def look_at(shards: Shards, clip: DataConfig) -> Corpus:
    """Reads the records of at most MAX_SHARDS x MAX_SAMPLES samples, evenly spaced. Remote shards are left
    out, since they would have to be fetched."""
    samples = images = short = 0
    for shard in _evenly_spaced(len(shards.counts), MAX_SHARDS):
        if is_url(shards.path(shard)):
            continue
        for number in _evenly_spaced(int(shards.counts[shard]), MAX_SAMPLES):
            sample = shards.sample(shard, number)
            samples += 1
            images += sample.ext in IMAGE_EXTENSIONS
            short += is_short(sample.meta, clip)
    return Corpus(samples, images, short, samples == shards.n)


def _evenly_spaced(n: int, limit: int) -> list[int]:
    return np.unique(np.linspace(0, n - 1, min(n, limit)).astype(int)).tolist()


def is_short(meta: dict, clip: DataConfig) -> bool:
    """Whether a video that pack has measured ends before the shortest clip does."""
    frames = meta.get("frames", 0)
    if frames < 2:  # an image, or not measured
        return False
    if clip.stride is not None:
        return frames <= (clip.frames - 1) * (
            clip.stride[0] if isinstance(clip.stride, tuple) else clip.stride
        )
    assert clip.fps is not None
    return meta["duration"] < (clip.frames - 1) / (clip.fps[1] if isinstance(clip.fps, tuple) else clip.fps)


def short_line(key: str, clip: DataConfig, corpus: Corpus) -> str:
    """Says how many videos are shorter than a clip; "" if none is. key: of the stream, such as "data"."""
    if not corpus.short:
        return ""
    stride, fps = clip.stride, clip.fps
    effect = "it repeats their last frame"
    if isinstance(stride, tuple) or isinstance(fps, tuple):
        effect = "its frames are closer together"
    if stride is not None:
        length = f"data.stride {stride[0] if isinstance(stride, tuple) else stride} x {clip.frames} frames"
    else:
        length = f"{clip.frames} frames at {fps[1] if isinstance(fps, tuple) else fps:g} a second"
    of_all = f"all {corpus.videos}" if corpus.short == corpus.videos else f"{corpus.short} of {corpus.videos}"
    seen = "" if corpus.is_whole else " that were looked at"
    return f"{key}: {of_all} videos{seen} are shorter than a clip ({length}): {effect}"


def length_text(clip: DataConfig) -> str:
    """Frames of a clip as it is loaded, for messages."""
    return f"{clip.windows} x {clip.frames} frames" if clip.windows > 1 else f"{clip.frames} frames"
