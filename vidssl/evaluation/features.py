"""Frozen features: every video's segments through the encoder, once."""

import hashlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vidssl.data.augment import CenterCrop
from vidssl.data.clips import choose, segment_starts
from vidssl.data.decoders import open_video
from vidssl.data.shards import Sample, Shards
from vidssl.errors import DecodeError, UserError

Control = Literal["none", "shuffled"]


COPIES = 4  # of the features at the most: found one by one, stacked, selected by label, standardised


class View(NamedTuple):
    """Which frames of a video the encoder sees."""

    frames: int  # in a clip
    stride: int | None  # frames
    fps: float | None  # frames a second
    segments: int  # clips, evenly spread over the video
    size: int  # pixels; short side resized to it, middle square cut
    control: Control = "none"  # shuffled: the frames of each clip in an order drawn from the sample's key


class Features(NamedTuple):
    """tokens f32 [n, segments * N, D] of the samples that could be read, and which those are."""

    tokens: Tensor
    read: list[int]  # numbers of the samples
    unreadable: dict[int, str]  # number -> reason


class EvalClips(Dataset):
    """Number -> (number, u8 [segments, 3, T, S, S]) or (number, reason)."""

    def __init__(self, shards: Shards, samples: list[Sample], view: View):
        self.shards, self.samples, self.view = shards, samples, view
        self.crop = CenterCrop(view.size)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        sample, v = self.samples[number], self.view
        try:
            video = open_video(self.shards.read(sample), sample.ext, sample.meta)
            picks = [choose(video.times, v.frames, v.stride, v.fps, s) for s in segment_starts(v.segments)]
            frames = video.get(np.concatenate(picks))
        except DecodeError as e:
            return number, e.reason
        clips = np.split(frames, v.segments)
        if v.control == "shuffled":
            seed = int.from_bytes(hashlib.sha256(sample.key.encode()).digest()[:8], "big")
            rng = np.random.default_rng(seed)
            clips = [clip[rng.permutation(v.frames)] for clip in clips]
        return number, torch.stack([self.crop(clip) for clip in clips])


@torch.no_grad()
def extract(
    encoder: Callable[[Tensor], Tensor],
    shards: Shards,
    samples: list[Sample],
    view: View,
    accelerator: Accelerator,
    batch: int,
    workers: int,
    limit_gb: float,
) -> Features:
    """encoder: video u8 [B, 3, T, H, W] -> [B, N, D]. Each process encodes its share; all get the whole."""
    mine = list(range(accelerator.process_index, len(samples), accelerator.num_processes))
    loader = DataLoader(EvalClips(shards, samples, view), batch, sampler=mine, num_workers=workers, collate_fn=list)
    found: list[tuple[int, Tensor | str]] = []
    bar = tqdm(loader, desc=f"features ({view.control})", disable=not accelerator.is_main_process, mininterval=5)
    for items in bar:
        good = [(n, clips) for n, clips in items if isinstance(clips, Tensor)]
        if good:
            video = torch.stack([clips for _, clips in good]).to(accelerator.device)
            tokens = encoder(video.flatten(0, 1)).float().cpu()
            tokens = tokens.unflatten(0, (len(good), -1)).flatten(1, 2)  # [b, segments * N, D]
            if not found:
                check_memory(COPIES * tokens[0].numel() * 4 * len(samples) / 2**30, limit_gb)
            found += [(n, t) for (n, _), t in zip(good, tokens, strict=True)]
        found += [(n, reason) for n, reason in items if isinstance(reason, str)]
    found = sorted(gather_object(found), key=lambda item: item[0])
    kept = [(n, t) for n, t in found if isinstance(t, Tensor)]
    if not kept:
        raise UserError(f"none of the {len(samples)} samples can be decoded ({found[0][1]}): run data_prep.verify")
    bad = {n: reason for n, reason in found if isinstance(reason, str)}
    return Features(torch.stack([t for _, t in kept]), [n for n, _ in kept], bad)


def check_memory(need_gb: float, limit_gb: float) -> None:
    if need_gb > limit_gb:
        raise UserError(
            f"the features need {need_gb:.1f} GB of memory, probe.memory_gb is {limit_gb:g}: raise it, or use fewer "
            f"segments or samples"
        )
