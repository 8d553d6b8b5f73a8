"""Queries and predictors: what stands at a hidden place, and the network that turns it into a prediction."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vidssl.config import Amount, Count, Positive
from vidssl.core.errors import UserError
from vidssl.model.grid import Grid, Mask
from vidssl.model.positions import PositionEncoding, PositionKind
from vidssl.model.vit import (
    LAYER_NORM_EPS,
    Block,
    Encoder,
    Feedforward,
    Init,
    TransformerStack,
    check_heads,
    init_weights,
)


class MaskToken(nn.Module):
    """A learned vector at every hidden place; `groups` of them, one a mask kind (V-JEPA 2, VideoMAE 1)."""

    def __init__(self, width: int, groups: Count = 1, std: Amount = 0.02):
        """std: deviation of the start values (VideoMAE 0.02; V-JEPA starts at zero)."""
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(groups, width))
        if std > 0:
            nn.init.trunc_normal_(self.tokens, std=std)

    def forward(self, index: int) -> Tensor:
        """Number of the mask kind -> [width]."""
        return self.tokens[index % len(self.tokens)]


class Prediction(NamedTuple):
    """What a predictor says."""

    target: Tensor  # [B, M, Nt, K]
    context: (
        Tensor | None
    )  # [B, M, Nc, K], of predictors with a head for the tokens that the encoder was given


class JointPredictor(nn.Module):
    """Context and queries attend to one another in a narrow ViT (VideoMAE's decoder, V-JEPA's predictor)."""

    def __init__(
        self,
        encoder: Encoder,
        out: int,
        width: Count = 384,
        depth: Count = 4,
        heads: Count = 6,
        mlp_ratio: Positive = 4.0,
        mlp: Feedforward = "gelu",
        embed_bias: bool = True,
        positions: PositionKind = "sincos_uniform",
        rope_grid: Count | None = None,
        class_token: Literal["none", "own", "encoder"] = "none",
        modality: bool = False,
        context_head: bool = False,
        eps: Positive = LAYER_NORM_EPS,
        init: Init = "trunc_normal",
        init_std: Positive = 0.02,
        depth_rescale: bool = False,
    ):
        """out: width K of the target; embed_bias: of the layer from encoder to predictor (VideoMAE has none).

        class_token: one of its own (MAE-ST), or the encoder's, embedded (MAE). modality: an added vector tells images
        from videos; context_head: the encoder's tokens are predicted too, by a second head (both V-JEPA 2.1). Of an
        encoder with several levels the embedding is an MLP (V-JEPA 2.1).
        """
        super().__init__()
        check_heads(width, heads)
        if class_token == "encoder" and encoder.class_token is None:
            raise UserError("method.predictor.class_token: encoder needs model.class_token: true")
        self.width = width
        self.skip = int(encoder.class_token is not None and class_token != "encoder")
        self.embed: nn.Module = nn.Linear(encoder.dim, width, bias=embed_bias)
        if encoder.width > encoder.dim:
            self.embed = nn.Sequential(nn.Linear(encoder.width, encoder.dim), nn.GELU(), self.embed)
        self.positions = PositionEncoding(positions, encoder.grid, width, heads, rope_grid)
        if class_token != "none" and positions.startswith("rope"):
            raise UserError(
                "method.predictor.class_token has no place, so it does not go with rotary positions"
            )
        self.class_token = nn.Parameter(0.02 * torch.randn(width)) if class_token == "own" else None
        self.modality = (
            nn.Parameter(1e-6 * torch.randn(2, width)) if modality else None
        )  # of videos, of images
        self.blocks = TransformerStack(Block(width, heads, mlp_ratio, mlp, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Linear(width, out)
        self.proj_context = nn.Linear(width, out) if context_head else None
        init_weights(self, init, init_std)
        if depth_rescale:
            self.blocks.rescale()

    def forward(self, z: Tensor, mask: Mask, query: Tensor, grid: Grid) -> Prediction:
        """z [B, (1 +) Nc, D], query [width] or [B, M, Nt, width]; each target group is predicted alone."""
        if self.proj_context is None:
            return Prediction(self.proj(self.tokens(z, mask, query, grid)), None)
        x, count = self.tokens(z, mask, query, grid, everywhere=True), mask.context.shape[1]
        return Prediction(self.proj(x[:, :, count:]), self.proj_context(x[:, :, :count]))

    def tokens(self, z: Tensor, mask: Mask, query: Tensor, grid: Grid, everywhere: bool = False) -> Tensor:
        """-> normed tokens [B, M, Nt, width]; everywhere: [B, M, Nc + Nt, width], context first. What is not asked for
        is only attended to in the last block."""
        groups, count = mask.target.shape[1], mask.context.shape[1]
        z = self.embed(z[:, self.skip :])
        special, z = z[:, :-count], z[:, -count:]
        if self.class_token is not None:
            special = self.class_token.expand(len(z), 1, -1).to(z.dtype)
        queries = query + self.positions.added(grid, mask.target)
        queries = queries.expand(*mask.target.shape, -1).to(z.dtype).flatten(0, 1)  # [B*M, Nt, width]
        context = torch.cat([special, z + self.positions.added(grid, mask.context)], 1).repeat_interleave(
            groups, 0
        )
        x = torch.cat([context, queries], 1)
        if self.modality is not None:
            x = x + self.modality[int(grid.t == 1)]
        ids = torch.cat([mask.context.repeat_interleave(groups, 0), mask.target.flatten(0, 1)], 1)
        asked = queries.shape[1] + (count if everywhere else 0)
        (x,) = self.blocks(x, self.positions.turn(grid, ids, x.device), [len(self.blocks) - 1], asked)
        return self.norm(x).unflatten(0, (-1, groups))


QUERIES = {"token": MaskToken}
PREDICTORS = {"joint": JointPredictor}
