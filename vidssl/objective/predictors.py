"""Queries and predictors: what stands at a hidden place, and the network that turns it into a prediction."""

import torch
from torch import Tensor, nn

from vidssl.config import Amount, Count, Positive
from vidssl.model.grid import POSITIONS, Mask, take
from vidssl.model.vit import EPS, Block, Encoder, Init, Positions, check_heads, init_weights


class Token(nn.Module):
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


class Joint(nn.Module):
    """Context and queries attend to one another in a narrow ViT (VideoMAE's decoder, V-JEPA's predictor)."""

    pos_embed: Tensor

    def __init__(
        self,
        encoder: Encoder,
        out: int,
        width: Count = 384,
        depth: Count = 4,
        heads: Count = 6,
        embed_bias: bool = True,
        positions: Positions = "sincos_uniform",
        init: Init = "trunc_normal",
        init_std: Positive = 0.02,
    ):
        """out: width K of the target; embed_bias: of the layer from encoder to predictor (VideoMAE has none)."""
        super().__init__()
        check_heads(width, heads)
        self.width = width
        self.embed = nn.Linear(encoder.dim, width, bias=embed_bias)
        self.register_buffer("pos_embed", POSITIONS[positions](encoder.grid, width)[None], persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.proj = nn.Linear(width, out)
        init_weights(self, init, init_std)

    def forward(self, z: Tensor, mask: Mask, query: Tensor) -> Tensor:
        """z [B, Nc, D], query [width] or [B, M, Nt, width] -> [B, M, Nt, K]; each target group is predicted alone."""
        groups = mask.target.shape[1]
        pos = self.pos_embed.expand(len(z), -1, -1)
        context = (self.embed(z) + take(pos, mask.context)).repeat_interleave(groups, 0)  # [B*M, Nc, width]
        queries = (query + take(pos, mask.target)).flatten(0, 1)  # [B*M, Nt, width]
        x = torch.cat([context, queries.to(context.dtype)], 1)
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x[:, context.shape[1] :])).unflatten(0, (-1, groups))


QUERIES = {"token": Token}
PREDICTORS = {"joint": Joint}
