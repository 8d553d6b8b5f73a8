"""Features of single frames from an encoder of clips.

A sequence is cut into windows of as many frames as the encoder's clip has, side by side, every frame in turn whatever
the stride of training; the last window is filled by repeating the last frame, so a picture is a still clip. A frame has
the tokens of the tubelet it lies in: the frames of a tubelet share them, and a window sees its later frames, too.
Encoders of images see each frame alone; those with an embedding of their own for images get a single picture as one
frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vidssl.config import Count, Size
from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.evaluation.report import weights_hash
from vidssl.evaluation.views import EncoderControl, PatchMeans
from vidssl.model.vit import Encoder
from vidssl.pretrained.load import LoadedEncoder


@dataclass(frozen=True, kw_only=True)
class DenseProtocol:
    """What dense tasks share: how frames are seen."""

    size: Count | None = (
        None  # pixels of the shorter side, a multiple of the patch; None: the encoder's own height
    )
    frames: Count | None = None  # of a clip; None: the encoder's own (of image models of other libraries: 1)
    levels: tuple[
        Size, ...
    ] = ()  # blocks, from 0, whose normed outputs stand side by side; (): the encoder's output
    windows: Count = 4  # clips in one call of the encoder
    controls: Annotated[tuple[EncoderControl, ...], Field(min_length=1)] = ("none", "random_init", "pixels")
    seed: Size = 0


class FrameEncoder(NamedTuple):
    """Pictures u8 [T, H, W, 3] -> tokens of each frame f32 [T, h, w, D]; the pictures are stretched to multiples of the
    patch, the shorter side to `size` (models of other libraries: both)."""

    see: Callable[[Tensor], Tensor]  # u8 [B, 3, T, H, W] -> f32 [B, N, D]
    clip: int  # frames
    tubelet: int  # frames
    patch: int  # pixels
    size: int  # pixels
    batch: int  # clips
    stills: bool  # a single picture is one frame, not a clip
    square: bool
    device: torch.device

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Height and width as the encoder sees them."""
        if self.square:
            return self.size, self.size
        short, unit = min(height, width), self.patch
        return self.size * height // short // unit * unit, self.size * width // short // unit * unit

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> Tensor:
        count, (height, width) = len(frames), self.scaled(*frames.shape[1:3])
        x = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (height, width), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
        clip, tubelet = (1, 1) if self.stills and count == 1 else (self.clip, self.tubelet)
        order = torch.arange(-(-count // clip) * clip).clamp(max=count - 1)
        windows = x[order].unflatten(0, (-1, clip)).transpose(1, 2)
        tokens = torch.cat([self.see(part.to(self.device)) for part in windows.split(self.batch)])
        grid = tokens.unflatten(1, (clip // tubelet, height // self.patch, width // self.patch))
        return grid.repeat_interleave(tubelet, 1).flatten(0, 1)[:count]


def tokens_of(encoder: Encoder, video: Tensor, levels: tuple[int, ...]) -> Tensor:
    """f32 [B, 3, T, H, W] -> [B, N, D], or [B, N, levels * D]: outputs of blocks, each through the encoder's last norm
    (as DINOv2's dense evaluations take them, arXiv 2304.07193, section 7.4)."""
    if not levels:
        return encoder(video)
    kept: list[Tensor] = []
    hooks = [encoder.blocks[i].register_forward_hook(lambda _, __, out: kept.append(out)) for i in levels]
    try:
        encoder(video)
    finally:
        for hook in hooks:
            hook.remove()
    first = int(encoder.class_token is not None)
    return torch.cat([encoder.norm(x)[:, first:] for x in kept], -1)


def make_frame_encoder(
    anew: Callable[[int], LoadedEncoder],
    loaded: LoadedEncoder,
    control: EncoderControl,
    asked: DenseProtocol,
    device: torch.device,
) -> tuple[FrameEncoder, str]:
    """-> (the encoder's look, or that of what a control puts in its place, and a hash or name of it). anew: opens the
    encoder untrained, with a seed."""
    model, statistics = (
        loaded.metadata["model"],
        (loaded.metadata["pixels"]["mean"], loaded.metadata["pixels"]["std"]),
    )
    size, clip, levels = asked.size or model["height"], asked.frames or model["frames"], asked.levels
    ours = isinstance(loaded.encoder, Encoder)
    depth = len(loaded.encoder.blocks) if ours else 0
    for name, value, unit in (("size", size, model["patch"]), ("frames", clip, model["tubelet"])):
        if value % unit:
            raise UserError(f"task.{name}: {value} is not a multiple of the encoder's patch of {unit}")
    if list(levels) != sorted(set(levels)) or (levels and levels[-1] >= depth):
        raise UserError(
            f"task.levels {list(levels)}: give blocks of an encoder of ours, rising, from 0 and below {depth}"
        )
    see: Callable[[Tensor], Tensor]
    if control == "pixels":
        see, eye = PatchMeans(model["tubelet"], model["patch"]), "patch means"
    else:
        encoder = (loaded if control == "none" else anew(asked.seed)).encoder.to(device)
        see, eye = (lambda video: tokens_of(encoder, video, levels).float()), weights_hash(encoder)
    stills = bool(model.get("image_tokenizer")) and control != "pixels"
    what = (clip, model["tubelet"], model["patch"], size, asked.windows, stills, not ours, device)
    return FrameEncoder(lambda video: see(normalise(video, statistics)), *what), eye
