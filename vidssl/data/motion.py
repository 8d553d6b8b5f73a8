"""Motion vectors of a clip (`data.motion_vectors`): the field of its frames, cropped, scaled and flipped as
the clip is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidssl.data.augment import Window, scaled_size
from vidssl.data.decoding.base import Video
from vidssl.data.decoding.motion_vectors import CELL, MotionField
from vidssl.data.device_augment import triangle_weights


def clip_motion(
    field: MotionField, windows: Sequence[Window], size: tuple[int, int], short_side: int | None, side: int
) -> Tensor:
    """Returns f16 [2, T, h, w]: (x, y) in pixels of the clip, h and w one for CELL of them.

    windows: of the clip, one for all frames or one for each. size: (height, width) of the frames as decoded.
    side: pixels of the clip's height and width.
    """
    scaled = scaled_size(*size, short_side)
    if len(windows) == 1:
        return _show_motion(field.vectors, field.origin, windows[0], size, scaled, side)
    last = len(field.vectors) - 1
    frames = [field.vectors[min(i, last)][None] for i in range(len(windows))]
    shown = [
        _show_motion(f, field.origin, w, size, scaled, side) for f, w in zip(frames, windows, strict=True)
    ]
    return torch.cat(shown, 1)


def _show_motion(
    vectors: np.ndarray,
    origin: tuple[float, float],
    window: Window,
    size: tuple[int, int],
    scaled: tuple[int, int],
    side: int,
) -> Tensor:
    down, right = size[0] / scaled[0], size[1] / scaled[1]  # pixels of the frame for one that is scaled
    height, width = down * window.height, right * window.width
    rows = _cell_weights(origin[0] + down * window.top, height, side, vectors.shape[2])
    columns = _cell_weights(origin[1] + right * window.left, width, side, vectors.shape[3])
    shown = torch.einsum("yh,tchw,xw->ctyx", rows, torch.from_numpy(vectors), columns)
    shown *= torch.tensor([side / width, side / height])[:, None, None, None]
    if window.flip:
        shown = shown.flip(-1) * torch.tensor([-1.0, 1.0])[:, None, None, None]
    return shown.half().contiguous()


def _cell_weights(start: float, extent: float, side: int, cells: int) -> Tensor:
    """f32 [n, cells]: weights of a field's rows or columns for those of the clip. start, extent: of what is
    shown, in pixels."""
    first, length = (torch.full((1, 1, 1), pixels / CELL) for pixels in (start, extent))
    outputs = max(1, side // CELL)
    place = torch.arange(outputs, dtype=torch.float32)[:, None]
    cell = torch.arange(cells, dtype=torch.float32)
    return triangle_weights(first, length, torch.full((1, 1, 1), float(outputs)), place, cell)[0]


def read_motion(
    video: Video,
    chosen: Sequence[np.ndarray],
    augment: Any,
    rngs: Sequence[np.random.Generator],
    short_side: int | None,
) -> list[Tensor]:
    """Returns the motion f16 [2, T, h, w] of clips of an open video that were decoded.

    chosen: their frames i64 [T]; augment: of augment.AUGMENTS; rngs: the generator of each clip's
    augmentation, before it draws.
    """
    scaled = scaled_size(*video.size, short_side)
    fields = [video.motion(indices) for indices in chosen]
    windows = [augment.draw(*scaled, rng).windows for rng in rngs]
    return [
        clip_motion(field, shown, video.size, short_side, augment.size)
        for field, shown in zip(fields, windows, strict=True)
    ]
