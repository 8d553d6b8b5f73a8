"""Clips of which the host only decodes: `data.augment_on: device`."""

import dataclasses
from collections.abc import Sequence
from math import ceil, floor
from typing import Any

import numpy as np
import torch

from vidssl.core.log import logger
from vidssl.data.augment import TrainingCrop, covering_box, scaled_size
from vidssl.data.decoding.base import Video
from vidssl.data.decoding.planes import Box
from vidssl.data.device_augment import ClipPlanes, layout_clip
from vidssl.data.schema import DataConfig


def place_augmentation(data: DataConfig, augment: Any, is_gpu: bool) -> DataConfig:
    """Returns `data` with augment_on resolved to host or device. Says why, where the host does it although
    the device was asked for."""
    place = data.augment_on
    if place == "auto":
        place = "device" if is_gpu else "host"
    if place == "device":
        obstacles = {
            "RandAugment runs on the host alone": getattr(augment, "randaugment", None),
            "the frames of data.cache are there": data.cache == "host",
        }
        if reason := next((reason for reason, holds in obstacles.items() if holds), ""):
            logger.info(f"data.augment_on: clips are augmented on the host: {reason}")
            place = "host"
    return dataclasses.replace(data, augment_on=place)


def needed_span(start: int, extent: int, full: int, scaled: int) -> tuple[int, int]:
    """First pixel and number of the pixels that a box needs along one axis; the first one is even.

    start, extent: of the box, in a frame that was scaled from `full` to `scaled` pixels.
    """
    first = start
    stop = start + extent
    if scaled != full:
        ratio = full / scaled
        first = max(0, floor((start - 1) * ratio))
        stop = ceil((stop + 1) * ratio)
    first -= first % 2
    return first, min(full, stop + stop % 2) - first


def cut_clips(
    video: Video,
    indices: Sequence[np.ndarray],
    augment: TrainingCrop,
    rngs: Sequence[np.random.Generator],
    short_side: int | None,
) -> list[ClipPlanes]:
    """Draws the crops of clips of an open video and decodes what they need.

    indices: i64 [T] of each clip; rngs: its generator.
    """
    size = video.size
    scaled = scaled_size(*size, short_side)
    draws = [augment.draw(*scaled, rng) for rng in rngs]
    regions = []
    for box in (covering_box(drawn.windows) for drawn in draws):
        top, height = needed_span(box.top, box.height, size[0], scaled[0])
        left, width = needed_span(box.left, box.width, size[1], scaled[1])
        regions.append(Box(top, left, height, width))
    format, pixels = video.get_planes(indices, regions)
    clips = []
    for flat, chosen, drawn, region in zip(pixels, indices, draws, regions, strict=True):
        layout = layout_clip(drawn, augment, len(chosen), size, scaled, region, format)
        clips.append(ClipPlanes(torch.from_numpy(flat), layout))
    return clips
