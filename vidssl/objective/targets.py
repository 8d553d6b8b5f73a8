"""Targets: what is predicted at a token. A target maps the whole clip to [B, N, K]; `width` is K."""

from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vidssl.config import PositiveInt
from vidssl.core.constants import constant
from vidssl.core.errors import UserError
from vidssl.core.pixels import channel_statistics
from vidssl.model.grid import patchify
from vidssl.model.vit import Encoder
from vidssl.objective.ema_target import Ema
from vidssl.objective.feature_targets import Clusters, SelfAssigned
from vidssl.objective.given_tokens import GivenTokens
from vidssl.objective.hog import Hog
from vidssl.objective.motion import FrameDifference, HogMotion, Motion
from vidssl.objective.target_base import Target
from vidssl.objective.teachers import Own, Teacher, Teachers


class Pixels(Target):
    """The pixels of a patch, in (frame, row, column, colour) order; K = frames * patch * patch * 3.

    norm "channel": every colour of a patch has mean 0 and (unbiased) deviation 1, as in VideoMAE
    (engine_for_pretraining.py; epsilon 1e-6 outside the root); "patch": all colours of a patch together, as
    in MAE and MAE-ST (models_mae.py; epsilon inside the root); "none". space: pixels in [0, 1] ("rgb",
    VideoMAE), in [-1, 1] ("signed", UMD) or normalised as the encoder's input ("normalised", MAE and
    MAE-ST). per_tubelet: number of frames of each tubelet to predict, spread evenly over the clip (MAE-ST: 1
    of 2); None: all.
    """

    def __init__(
        self,
        encoder: Encoder,
        norm: Literal["channel", "patch", "none"] = "channel",
        space: Literal["rgb", "signed", "normalised"] = "rgb",
        per_tubelet: PositiveInt | None = None,
    ):
        frames = per_tubelet or encoder.tubelet
        if frames > encoder.tubelet:
            raise UserError(f"method.target.per_tubelet: {frames} of {encoder.tubelet} frames")
        super().__init__(3 * frames * encoder.patch**2)
        self.tubelet = encoder.tubelet
        self.patch = encoder.patch
        self.frames = frames
        self.norm = norm
        self.space = space

    def check_clip(self, frames: int, size: int) -> None:
        if frames % self.tubelet:
            raise UserError(
                f"method.target.kind pixels: a token is {self.tubelet} frames, so it cannot be predicted of "
                f"a stream of {frames}; give its frames a multiple of {self.tubelet}, or the target kind ema"
            )

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        eps: float | Tensor = 1e-6
        if self.space == "rgb":
            mean, std = channel_statistics(video)
            if self.norm == "channel":  # cancels the scale of a channel, so only eps must be rescaled
                eps = eps / std.view(3, 1)
            else:
                video = video.float() * std + mean
        elif self.space == "signed":
            mean, std = channel_statistics(video)
            video = 2 * (video.float() * std + mean) - 1
        if self.frames < self.tubelet:
            count = video.shape[2] // self.tubelet * self.frames
            frames = spread_frames(video.shape[2], count)
            video = video.index_select(2, constant(frames, video.device, torch.int64))
        x = rearrange(patchify(video.float(), self.frames, self.patch), "b n c u p q -> b n c (u p q)")
        if self.norm != "none":
            x = self._normalise(x, eps)
        return rearrange(x, "b n c k -> b n (k c)")

    def _normalise(self, x: Tensor, eps: float | Tensor) -> Tensor:
        """x [B, N, 3, K / 3]: every channel, or every patch, with mean 0 and deviation 1."""
        dims = -1 if self.norm == "channel" else (2, 3)
        x = x - x.mean(dims, keepdim=True)
        # A vector norm is faster than var on CPUs.
        squares = torch.linalg.vector_norm(x, dim=dims, keepdim=True).square()
        variance = squares / (x[0, 0].numel() // squares[0, 0].numel() - 1)
        return x.div_(variance.sqrt() + eps if self.norm == "channel" else (variance + eps).sqrt())


def spread_frames(frames: int, count: int) -> tuple[int, ...]:
    """`count` of so many frames, evenly spread from the first to the last one, rounded as torch.linspace(0,
    frames - 1, count).long() is on a CPU; by NumPy, since a plan's tensors have no values."""
    ids = np.arange(count, dtype=np.float32)
    last = np.float32(frames - 1)
    step = last / np.float32(max(1, count - 1))
    spread = np.where(ids < max(1, count // 2), step * ids, last - step * (count - 1 - ids))
    return tuple(spread.astype(int).tolist())


TARGETS = {
    "pixels": Pixels,
    "ema": Ema,
    "teacher": Teacher,
    "teachers": Teachers,
    "own": Own,
    "clusters": Clusters,
    "self_assigned": SelfAssigned,
    "hog": Hog,
    "frame_difference": FrameDifference,
    "motion": Motion,
    "hog_motion": HogMotion,
    "given_tokens": GivenTokens,
}
