"""Corruptions: what the encoder sees in place of the clean video."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vidssl.config import NonNegativeFloat, PositiveFloat, PositiveInt
from vidssl.core.constants import constant
from vidssl.core.errors import UserError
from vidssl.core.pixels import channel_statistics
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask, gather_tokens, patchify
from vidssl.model.prediction import Encoded
from vidssl.model.queries import NoiseSchedule, signal_shares
from vidssl.model.vit import Encoder


class Corrupted(NamedTuple):
    """What the encoder sees."""

    video: Tensor  # f32 [B, 3, T, H, W]
    replaced: tuple[Tensor, Tensor] | None = None  # bool [B, N] and [D]: see Encoder.forward
    level: Tensor | None = None  # f32 [B], steps of diffusion, of which the encoder is told; None: it is not
    noise: Tensor | None = None  # f32 [B, 3, T, H, W], that was mixed in


class Corruption(nn.Module):
    """Base of all corruptions."""

    sees_all = True  # the encoder sees all tokens, hidden ones corrupted; False: it sees the context alone

    def forward(self, video: Tensor, mask: Mask, grid: Grid, rng: KeyedRNG, index: int = 0) -> Corrupted:
        """video f32 [B, 3, T, H, W], clean; index: number of the mask within the step."""
        raise NotImplementedError

    def context_target(self, features: Tensor, encoded: Encoded) -> Tensor | None:
        """What is predicted at the context tokens, [B, Nc, K], where the predictor has a context head; None:
        nothing, with this mask. features: [B, N, K], the target of every token."""
        return gather_tokens(features, encoded.mask.context)


Where = Literal["hidden", "all"]
Sees = Literal["all", "context"]


def hidden_tokens(mask: Mask, grid: Grid) -> Tensor:
    """bool [B, N]: the tokens that are not context."""
    every = torch.ones(len(mask.context), grid.n, dtype=torch.bool, device=mask.context.device)
    return every.scatter(1, mask.context, False)


class Token(Corruption):
    """A learned vector stands for the patch embedding of a hidden token; its position is added to it.

    Source: BEiT (arXiv 2106.08254), MaskFeat (2112.09133), iBOT (2111.07832).
    """

    def __init__(self, encoder: Encoder, std: NonNegativeFloat = 0.02):
        """std: standard deviation at initialisation."""
        super().__init__()
        self.token = nn.Parameter(torch.zeros(encoder.dim))
        if std > 0:
            nn.init.trunc_normal_(self.token, std=std)

    def forward(self, video: Tensor, mask: Mask, grid: Grid, rng: KeyedRNG, index: int = 0) -> Corrupted:
        return Corrupted(video, (hidden_tokens(mask, grid), self.token))


class PixelCorruption(Corruption):
    """Base of those that change pixels: `corrupted` of the whole clip, kept where the option says."""

    def __init__(self, where: Where = "all", sees: Sees = "all"):
        """where: pixels that are changed, those of hidden tokens or all; sees: tokens that the encoder gets,
        all or the context alone."""
        super().__init__()
        if (where, sees) == ("hidden", "context"):
            raise UserError(
                "method.corrupt: with where=hidden and sees=context the encoder sees nothing that is "
                "changed: give where=all or sees=all"
            )
        self.where = where
        self.sees_all = sees == "all"

    def corrupted(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> Tensor:
        """video f32 [B, 3, T, H, W]; returns all of it corrupted."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, video: Tensor, mask: Mask, grid: Grid, rng: KeyedRNG, index: int = 0) -> Corrupted:
        changed = self.corrupted(video, grid, rng)
        if self.where == "all":
            return Corrupted(changed)
        sizes = {f"{axis}size": side // n for axis, side, n in zip("thw", video.shape[2:], grid, strict=True)}
        hidden = repeat(
            hidden_tokens(mask, grid),
            "b (t h w) -> b 1 (t tsize) (h hsize) (w wsize)",
            t=grid.t,
            h=grid.h,
            **sizes,
        )
        return Corrupted(torch.where(hidden, changed, video))


def noise_like(video: Tensor, rng: KeyedRNG) -> Tensor:
    """Normally distributed f32 [B, 3, T, H, W], drawn frame by frame: the integers that are hashed take
    several times the memory of the pixels."""
    channels, frames, *size = video.shape[1:]
    return torch.stack([rng.normal(channels, *size) for _ in range(frames)], 2)


class Gaussian(PixelCorruption):
    """Gaussian noise: of a fixed deviation added to the normalised pixels (denoising autoencoder, Vincent et
    al., JMLR 11, 2010), or a level of diffusion drawn for each clip.

    With levels the input is sqrt(a) x + sqrt(1 - a) noise, a = cos(pi t / 2)^2 with t uniform in [0, 1), the
    cosine schedule without its offset. The encoder is not told t (kind diffused tells it).
    """

    def __init__(
        self,
        sigma: PositiveFloat = 0.5,
        levels: bool = False,
        where: Where = "all",
        sees: Sees = "all",
    ):
        """sigma: deviation of the noise, in deviations of the pixels; levels: draw it for each clip."""
        super().__init__(where, sees)
        self.sigma = sigma
        self.levels = levels

    def corrupted(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> Tensor:
        noise = noise_like(video, rng)
        if not self.levels:
            return video + self.sigma * noise
        angle = math.pi / 2 * rng.rand(1, 1, 1, 1)
        return angle.cos() * video + angle.sin() * noise


class Diffused(Corruption):
    """The visible patches after t steps of diffusion, of which the encoder is told: even masks of a clip are
    of the clean clip (t = 0), odd ones of a noised one, t drawn from 1..steps for each clip.

    x_t = sqrt(a_t) x + sqrt(1 - a_t) noise, of pixels in [-1, 1]. With a context head the noise is predicted
    at the visible tokens of noised clips. Source: UMD (arXiv 2406.17688; train_ae.py, gaussian_diffusion.py).
    """

    sees_all = False
    shares: Tensor

    def __init__(self, encoder: Encoder, steps: PositiveInt = 1000, schedule: NoiseSchedule = "cosine"):
        super().__init__()
        if encoder.noise_level is None:
            raise UserError(
                "method.corrupt.kind: diffused needs model.conditioned=true, which tells the encoder the "
                "level; kind gaussian with levels=true does without"
            )
        self.tubelet = encoder.tubelet
        self.patch = encoder.patch
        self.steps = steps
        self.register_buffer("shares", signal_shares(schedule, steps), persistent=False)

    @torch.no_grad()
    def forward(self, video: Tensor, mask: Mask, grid: Grid, rng: KeyedRNG, index: int = 0) -> Corrupted:
        if index % 2 == 0:
            return Corrupted(video)
        t = 1 + (rng.rand() * self.steps).long()
        share = self.shares[t][:, None, None, None, None]
        noise = noise_like(video, rng)
        mean, std = channel_statistics(video)
        pixels = 2 * (video.float() * std + mean) - 1
        noised = share.sqrt() * pixels + (1 - share).sqrt() * noise
        return Corrupted(((noised + 1) / 2 - mean) / std, None, t.float(), noise)

    def context_target(self, features: Tensor, encoded: Encoded) -> Tensor | None:
        if encoded.noise is None:
            return None
        patches = patchify(encoded.noise, self.tubelet, self.patch)
        return gather_tokens(rearrange(patches, "b n c u p q -> b n (u p q c)"), encoded.mask.context)


class Blur(PixelCorruption):
    """Gaussian blur of every frame. Source: deblurring MAE (arXiv 2306.08249)."""

    def __init__(self, sigma: PositiveFloat = 1.1, where: Where = "all", sees: Sees = "context"):
        """sigma: deviation of the kernel, in pixels; it is cut at three of them."""
        super().__init__(where, sees)
        radius = math.ceil(3 * sigma)
        weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
        self.weights = [weight / sum(weights) for weight in weights]

    def corrupted(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> Tensor:
        radius = len(self.weights) // 2
        for axis in (3, 4):
            side = video.shape[axis]
            pad = (0, 0, radius, radius, 0, 0) if axis == 3 else (radius, radius, 0, 0, 0, 0)
            padded = F.pad(video, pad, mode="replicate")
            # sums of slices, as a convolution would be rounded to bf16 under autocast
            video = torch.zeros_like(video)
            for offset, weight in enumerate(self.weights):
                video.add_(padded.narrow(axis, offset, side), alpha=weight)
        return video


class Mix(PixelCorruption):
    """Hidden patches are replaced by others of the same clip: those of a place and time that are a random
    shift away, the same shift for all of a clip's tokens, so that a hidden block shows a connected piece.

    GMML (arXiv 2205.14986) takes them from another sample of the batch. Here a sample's loss depends on no
    other, however the batch is divided.
    """

    def __init__(self, where: Where = "hidden"):
        super().__init__(where)

    def corrupted(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> Tensor:
        # by a quarter to three quarters of each axis, cyclically
        shift = 0.25 + 0.5 * rng.rand(3)
        for i, (axis, n) in enumerate(zip((2, 3, 4), grid, strict=True)):
            side = video.shape[axis]
            pixels = torch.arange(side, device=video.device)
            source = (pixels + (shift[:, i, None] * n).round().long() * (side // n)) % side
            shape = [len(video), 1, 1, 1, 1]
            shape[axis] = side
            video = video.gather(axis, source.view(shape).expand_as(video))
        return video


class Grey(PixelCorruption):
    """All three channels show the luminance (ITU-R BT.601): colourisation (arXiv 1603.08511)."""

    def corrupted(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> Tensor:
        mean, std = channel_statistics(video)
        luma = constant((0.299, 0.587, 0.114), video.device).view(3, 1, 1, 1)
        grey = ((video * std + mean) * luma).sum(1, keepdim=True)
        return (grey - mean) / std


CORRUPTIONS: dict[str, Callable[..., Corruption]] = {
    "token": Token,
    "gaussian": Gaussian,
    "blur": Blur,
    "mix": Mix,
    "grey": Grey,
    "diffused": Diffused,
}
