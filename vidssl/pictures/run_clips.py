"""The clips of a run's training data: drawn as in training, or the middle of a held-out video."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vidssl.core.errors import DecodeError, UserError
from vidssl.core.log import logger
from vidssl.data.augment import CenterCrop, downscale
from vidssl.data.dataset import ClipReader
from vidssl.data.extensions import IMAGE_EXTENSIONS
from vidssl.data.parts import group_of, groups_of
from vidssl.data.shards import Sample, Shards
from vidssl.data.timing import Timing, choose_frames, draw_timing
from vidssl.pictures.clips import playing_rate
from vidssl.training.schema import TrainConfig

MAX_DRAWS = 20  # of a sample that decodes
MAX_HELD_OUT = 0.25  # fraction of the samples


class HeldOutClip(NamedTuple):
    """The middle clip of a video that a decoder was not trained on."""

    name: str
    group: str  # the video, or the recording, from which it is
    clip: Tensor  # u8 [3, T, S, S]
    fps: float


class RunClips:
    """The clips of the first stream of a run."""

    def __init__(self, cfg: TrainConfig, folders: Sequence[str] | None = None):
        """folders: shards in place of data.train."""
        if cfg.data.reader == "stream" and folders is None:
            raise UserError(
                "the run's data.reader is stream: its shards have no index; make one with "
                "vidssl scan, and give --train"
            )
        self.data = replace(cfg.data, windows=1, repeat=1, extra_streams=(), motion_vectors=False)
        self.augment = cfg.augment.build()
        self.size: int = cfg.augment.arguments["size"]
        self.seed = cfg.run.seed
        self.shards = Shards(list(folders or cfg.data.train), cfg.data.cache_dir, cfg.data.cache_gb)
        self.samples = self.shards.list_samples()
        self.reader = ClipReader(self.shards, self.data.clip_decoder)
        self.train: list[Sample] = self.samples

    def hold_out(self, count: int) -> list[Sample]:
        """Takes whole groups with about `count` samples (at most a quarter of all) out of `train`, and
        returns that many of them."""
        wanted = min(count, max(1, int(MAX_HELD_OUT * len(self.samples))))
        group_names = groups_of(self.samples)
        groups = sorted(set(group_names))
        order = np.random.default_rng((self.seed, 11)).permutation(len(groups))
        by_group: dict[str, list[Sample]] = {}
        for sample, group in zip(self.samples, group_names, strict=True):
            by_group.setdefault(group, []).append(sample)
        held: list[Sample] = []
        names: set[str] = set()
        for number in order:
            if len(held) >= wanted or len(names) == len(groups) - 1:
                break
            names.add(groups[number])
            held += by_group[groups[number]]
        pairs = zip(self.samples, group_names, strict=True)
        self.train = [sample for sample, group in pairs if group not in names]
        return held[:wanted]

    def spread(self, count: int) -> list[Sample]:
        """All samples, in an order whose first `count` are evenly spaced."""
        step = max(1, len(self.samples) // count)
        first = self.samples[::step]
        rest = [sample for i, sample in enumerate(self.samples) if i % step]
        return first + rest

    def batch(self, step: int, clips: int) -> Tensor:
        """Clips u8 [B, 3, T, S, S] of training step `step`, drawn with replacement and augmented."""
        return torch.stack(
            [self._draw(np.random.default_rng((self.seed, 12, step, i))) for i in range(clips)]
        )

    def _draw(self, rng: np.random.Generator) -> Tensor:
        reasons = []
        for _ in range(MAX_DRAWS):
            sample = self.train[int(rng.integers(len(self.train)))]
            augment = self.augment.for_clip(self.data.frames, sample.ext in IMAGE_EXTENSIONS)
            timing = draw_timing(self.data, rng)
            try:
                frames, _ = self._read(sample, timing, augment.one_frame)
            except DecodeError as e:
                reasons.append(f"{sample.key}: {e.reason}")
                continue
            return augment(frames, rng)
        raise UserError(f"{MAX_DRAWS} samples in a row could not be decoded; the last: {reasons[-1]}")

    def _read(self, sample: Sample, timing: Timing, one_frame: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Frames u8 [T, H, W, 3] and their times."""

        def use(video):  # type: ignore[no-untyped-def]
            indices = choose_frames(video.times, self.data, timing, one_frame)
            return downscale(video.get(indices), self.data.short_side), video.times[indices]

        return self.reader.read(sample, use)

    def middles(self, samples: Sequence[Sample], count: int) -> list[HeldOutClip]:
        """The middle clips of the first `count` samples that decode."""
        found: list[HeldOutClip] = []
        for sample in samples:
            if len(found) == count:
                break
            try:
                frames, times = self._read(sample, Timing((0.5,), 0.5))
            except DecodeError as e:
                logger.warning(f"{sample.key}: cannot be decoded ({e.reason}): left out")
                continue
            clip = CenterCrop(self.size)(frames)
            found.append(HeldOutClip(sample.key, group_of(sample), clip, playing_rate(times)))
        if not found:
            raise UserError("no clip to show: none of the samples can be decoded")
        return found
