"""V-JEPA's training step as its published loop takes it, on the modules of an Objective: what bench_step.py compares.

Each mask embeds all patches of the clip by a convolution and then gathers the visible ones; the momentum encoder sees
the clip once; the predictor takes all tokens through all its blocks; the optimiser is AdamW as torch gives it by
default, and the momentum update goes parameter by parameter. Attention is torch's fused one in both. Source: V-JEPA,
app/vjepa/train.py, src/models/{vision_transformer, predictor}.py, src/models/utils/multimask.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import gather_tokens
from vidssl.model.vit import Encoder
from vidssl.objective.objective import Objective


def encode(net: Encoder, video: Tensor, ids: Tensor | None) -> Tensor:
    """video f32 [B, 3, T, H, W], ids i64 [B, Nc] of the visible patches, or all -> f32 [B, Nc, D]."""
    grid = net.grid_of(video)
    x = net.patch_embed.proj(video).flatten(2).transpose(1, 2)
    everywhere = torch.arange(grid.n, device=video.device).expand(len(video), -1)
    x = x + net.positions.embedding(grid, everywhere)
    x = x if ids is None else gather_tokens(x, ids)
    for block in net.blocks:
        x = block(x)
    return net.norm(x)


class PlainLoop(nn.Module):
    """`objective`'s weights, trained by the plain loop."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective

    def forward(self, video: Tensor, draws: KeyedRNG) -> Tensor:
        o: Any = self.objective
        grid = o.encoder.grid_of(video)
        masks = o.mask(video, grid, draws)
        with torch.no_grad():
            features = encode(o.target.encoder, video, None)
            h = [gather_tokens(F.layer_norm(features, features.shape[-1:]), m.target)[:, 0] for m in masks]
        seen = [encode(o.encoder, video, m.context) for m in masks]
        z = []
        for i, (x, m) in enumerate(zip(seen, masks, strict=True)):
            said = o.predictor.forward_tokens(x, m, o.query(i), grid, include_context=True)[:, 0]
            z.append(o.predictor.proj(said[:, m.context.shape[1] :]))
        return torch.stack([torch.mean(torch.abs(a - b)) for a, b in zip(z, h, strict=True)]).mean()

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """The momentum encoder, parameter by parameter."""
        o: Any = self.objective
        for slow, fast in zip(o.target.encoder.parameters(), o.encoder.parameters(), strict=True):
            slow.data.mul_(momentum).add_((1.0 - momentum) * fast.detach().data)
