"""V-JEPA's published training step, on the modules of an Objective, for bench_step.py to compare with.

Each mask embeds all patches of the clip by a convolution and then gathers the visible ones; the momentum
encoder sees the clip once; the predictor takes all tokens through all its blocks; the optimizer is torch's
default AdamW, and the EMA update runs parameter by parameter. Attention is torch's fused kernel in both.
Source: V-JEPA, app/vjepa/train.py, src/models/{vision_transformer, predictor}.py,
src/models/utils/multimask.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import gather_tokens
from vidssl.model.vit import Encoder
from vidssl.objective.objective import Objective


def encode(encoder: Encoder, video: Tensor, ids: Tensor | None) -> Tensor:
    """Returns features f32 [B, Nc, D] of a video f32 [B, 3, T, H, W] at ids i64 [B, Nc]; of all patches
    without."""
    grid = encoder.grid_of(video)
    x = encoder.patch_embed.proj(video).flatten(2).transpose(1, 2)
    everywhere = torch.arange(grid.n, device=video.device).expand(len(video), -1)
    x = x + encoder.positions.embedding(grid, everywhere)
    x = x if ids is None else gather_tokens(x, ids)
    for block in encoder.blocks:
        x = block(x)
    return encoder.norm(x)


class PlainLoop(nn.Module):
    """Trains the weights of an objective by the published loop."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective

    def forward(self, video: Tensor, rng: KeyedRNG) -> Tensor:
        o: Any = self.objective
        grid = o.encoder.grid_of(video)
        masks = [mask.to(video.device) for mask in o.mask(video, grid, rng)]
        with torch.no_grad():
            features = encode(o.target.encoder, video, None)
            targets = [
                gather_tokens(F.layer_norm(features, features.shape[-1:]), m.target)[:, 0] for m in masks
            ]
        contexts = [encode(o.encoder, video, m.context) for m in masks]
        losses = []
        for i, (context, target, m) in enumerate(zip(contexts, targets, masks, strict=True)):
            tokens = o.predictor.forward_tokens(context, m, o.query.of_mask(i), grid, include_context=True)[
                :, 0
            ]
            prediction = o.predictor.proj(tokens[:, m.context.shape[1] :])
            losses.append(torch.mean(torch.abs(prediction - target)))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Updates the EMA encoder parameter by parameter."""
        o: Any = self.objective
        for ema, online in zip(o.target.encoder.parameters(), o.encoder.parameters(), strict=True):
            ema.data.mul_(momentum).add_((1.0 - momentum) * online.detach().data)
