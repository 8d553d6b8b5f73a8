"""Scores of the change between time slices."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, patchify
from vidssl.model.vit import Encoder
from vidssl.objective.score_base import Score


class Change(Score):
    """Distance of a token to that of the same place in the time slice before; the first slice has the
    scores of the second.

    of "embedding": between patch embeddings, without positions and without a gradient. Source: EVEREST (arXiv
    2211.10636), modeling_pretrain.py. "pixels": between the pixels; of a linear embedding it is the distance
    before training.
    """

    def __init__(self, encoder: Encoder, of: Literal["embedding", "pixels"] = "embedding"):
        super().__init__()
        self.of = of

    @torch.no_grad()
    def forward(self, video: Tensor, grid: Grid, rng: KeyedRNG, encoder: Encoder) -> Tensor:
        if grid.t < 2:
            raise UserError("method.score.kind=change needs clips of two or more time slices, not an image")
        tokens = patchify(video, encoder.tubelet, encoder.patch)
        tokens = encoder.patch_embed(tokens) if self.of == "embedding" else tokens.flatten(2)
        by_slice = rearrange(tokens.float(), "b (t n) d -> b t n d", t=grid.t)
        change = torch.linalg.vector_norm(by_slice.diff(dim=1), dim=-1)
        return torch.cat([change[:, :1], change], 1).flatten(1)
