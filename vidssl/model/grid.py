"""The token grid of a clip, the mask over it, and the two operations between them: patchify and
gather_tokens."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from vidssl.core.constants import upload


class Grid(NamedTuple):
    """Number of tokens along time, height and width; flat token ids run in (t, h, w) order, w fastest."""

    t: int
    h: int
    w: int

    @property
    def n(self) -> int:
        return self.t * self.h * self.w

    @property
    def image(self) -> bool:
        """Whether the clip is a single frame. A grid of one time slice may also be a video of one tubelet."""
        return False


class ImageGrid(Grid):
    """The grid of a single frame. Encoder.grid_of decides it for all parts of a model."""

    @property
    def image(self) -> bool:
        return True


class Mask(NamedTuple):
    """Token ids of the encoder's input and of the prediction targets. M target groups share one context."""

    context: Tensor  # i64 [B, Nc]
    target: Tensor  # i64 [B, M, Nt]
    weight: Tensor | None = None  # f32 [B, M, Nt], weight of each error in the loss; None: all 1

    def to(self, device: torch.device) -> "Mask":
        """This mask on a device, without waiting for it."""
        return Mask(*(None if t is None else upload(t, device) for t in self))  # type: ignore[arg-type]


def patchify(video: Tensor, tubelet: int, patch: int) -> Tensor:
    """[B, C, T, H, W] to patches [B, N, C, tubelet, patch, patch]."""
    return rearrange(video, "b c (t u) (h p) (w q) -> b (t h w) c u p q", u=tubelet, p=patch, q=patch)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, N, ...], ids i64 [B, *shape]. Returns the tokens `ids` of each sample, [B, *shape, ...]."""
    flat = ids.flatten(1)
    features = x.shape[2:]
    index = flat.reshape(*flat.shape, *[1] * len(features)).expand(-1, -1, *features)
    return x.gather(1, index).reshape(*ids.shape, *features)
