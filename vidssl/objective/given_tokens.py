"""The tokens of a given tokenizer as a target (BEiT)."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vidssl.config import PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.pixels import channel_statistics
from vidssl.model.grid import gather_tokens
from vidssl.model.vit import Encoder
from vidssl.objective.given_network import GivenNetwork
from vidssl.objective.target_base import Target

if TYPE_CHECKING:
    from vidssl.model.prediction import Encoded


class GivenTokens(Target):
    """One-hot [B, M, Nt, K]: the class that a frozen tokenizer gives to the first frame of a hidden token;
    K = `vocabulary`, for method.error.kind cross_entropy.

    Source: BEiT (arXiv 2106.08254), section 2.3. Its tokenizer is DALL-E's, 8,192 classes, of a frame of 112
    pixels that has 14 x 14 tokens; any other works.
    """

    per_mask = True  # one-hot vectors of all tokens would not fit into memory

    def __init__(self, encoder: Encoder, path: str, vocabulary: PositiveInt, size: PositiveInt | None = None):
        """path: file (torch.export .pt2, or TorchScript) of a network that maps frames f32 [n, 3, size, size]
        in [0, 1] to classes i64 [n, h, w], one for each patch of the encoder; vocabulary: number of classes;
        size: side in pixels to which frames are resized for it; None: that of the clip."""
        super().__init__(vocabulary)
        self._tokenizer = GivenNetwork(path, "method.target.path")
        self._path = path
        self.tubelet = encoder.tubelet
        self.patch = encoder.patch
        self.size = size

    def check_clip(self, frames: int, size: int) -> None:
        found = self._tokenizer(self._input(torch.zeros(1, 3, 1, size, size)))
        side = size // self.patch
        if found.dtype != torch.int64 or found.numel() != side**2:
            raise UserError(
                f"method.target.path: {self._path} maps a frame of {self.size or size} pixels to "
                f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}; "
                f"it must give int64 [1, {side}, {side}], a class for each patch of model.patch {self.patch}"
            )
        if (largest := int(found.max())) >= self.width:
            raise UserError(f"method.target.vocabulary: {self.width}, but {self._path} gives class {largest}")

    def _input(self, video: Tensor) -> Tensor:
        """The first frames of the tokens of video [B, 3, T, H, W], [B * t, 3, size, size] in [0, 1]."""
        frames = rearrange(video[:, :, :: self.tubelet].float(), "b c t h w -> (b t) c h w")
        mean, std = (value[..., 0] for value in channel_statistics(video))
        frames = frames * std + mean
        if self.size is not None:
            frames = F.interpolate(frames, self.size, mode="bilinear", antialias=True)
        return frames.clamp(0, 1)

    @torch.no_grad()
    def prepare(self, video: Tensor) -> Tensor:
        """The classes i64 [B, N] of all tokens."""
        return self._tokenizer(self._input(video)).reshape(len(video), -1)

    @torch.no_grad()
    def for_mask(self, encoded: "Encoded") -> Tensor:
        assert encoded.prepared is not None
        hidden = gather_tokens(encoded.prepared, encoded.mask.target)[..., None]
        one_hot = torch.zeros(*hidden.shape[:-1], self.width, device=hidden.device)
        return one_hot.scatter(-1, hidden, 1.0)
