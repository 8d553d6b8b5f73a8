"""A predictor of convolutions over the token grid: data2vec 2.0's decoder."""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vidssl.config import PositiveInt
from vidssl.core.errors import UserError
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.model.prediction import Prediction
from vidssl.model.vit import Encoder


class ConvPredictor(nn.Module):
    """Grouped convolutions over the grid of context tokens and queries, each with a norm, GELU and residual,
    then a linear layer.

    As wide as the encoder, without positions, without the class token. Places that are neither context nor
    target are zero. Source: data2vec 2.0 (arXiv 2212.07525; fairseq,
    examples/data2vec/models/modalities/modules.py, Decoder2d), in two dimensions there.
    """

    def __init__(
        self,
        encoder: Encoder,
        out: int,
        depth: PositiveInt = 6,
        kernel: PositiveInt = 3,
        time_kernel: PositiveInt = 3,
        conv_groups: PositiveInt = 16,
    ):
        """kernel, time_kernel: sides of the convolutions in tokens, odd; of images time_kernel is 1.
        conv_groups: of channels."""
        super().__init__()
        width = encoder.dim
        for name, size in (("kernel", kernel), ("time_kernel", time_kernel)):
            if size % 2 == 0:
                raise UserError(f"method.predictor.{name}: {size} is even; give an odd number")
        if width % conv_groups or encoder.feature_width != width:
            raise UserError(
                f"method.predictor.conv_groups: {conv_groups} must divide the encoder's width {width}, and "
                "model.levels be empty"
            )
        self.width = width
        sides = (time_kernel, kernel, kernel)
        padding = (time_kernel // 2, kernel // 2, kernel // 2)
        self.layers = nn.ModuleList(
            nn.Conv3d(width, width, sides, padding=padding, groups=conv_groups) for _ in range(depth)
        )
        self.proj = nn.Linear(width, out)

    def forward(self, z: Tensor, mask: Mask, query: Tensor, grid: Grid) -> Prediction:
        """z [B, (1 +) Nc, D], query [D] or [B, M, Nt, D]. Each target group has a grid of its own."""
        groups = mask.target.shape[1]
        z = z[:, -mask.context.shape[1] :].float()
        queries = query.expand(*mask.target.shape, -1).flatten(0, 1).to(z.dtype)
        ids = torch.cat([repeat(mask.context, "b n -> (b m) n", m=groups), mask.target.flatten(0, 1)], 1)
        tokens = torch.cat([repeat(z, "b n d -> (b m) n d", m=groups), queries], 1)
        x = tokens.new_zeros(len(ids), grid.n, self.width)
        x = x.scatter(1, ids[:, :, None].expand(-1, -1, self.width), tokens)
        x = rearrange(x, "b (t h w) d -> b d t h w", t=grid.t, h=grid.h)
        for layer in self.layers:
            y = F.layer_norm(layer(x).movedim(1, -1), (self.width,)).movedim(-1, 1)
            x = x + F.gelu(y)
        x = rearrange(x, "(b m) d t h w -> (b m) (t h w) d", m=groups)
        x = gather_tokens(x, mask.target.flatten(0, 1))
        return Prediction(self.proj(x).unflatten(0, (-1, groups)))
