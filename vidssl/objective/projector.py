"""The small networks that follow the encoder where views are compared."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidssl.core.precision import without_autocast
from vidssl.model.vit import init_weights
from vidssl.objective.global_batch import GlobalBatchNorm
from vidssl.objective.view_schema import HeadConfig

HeadNorm = Literal["batch", "layer", "none"]


class Projector(nn.Sequential):
    """A multi-layer perceptron [V, B, width] -> [V, B, widths[-1]], with a norm and an activation between its
    layers.

    last_norm: the norm follows the last layer, too, without weights (MoCo v3, SimSiam). Batch norm takes the
    statistics of the clips of all processes, of each view apart (the default) or of all views together (as
    in DINO, SwAV and LeVJEPA, which join them); a layer before it has no bias, which it would cancel.
    """

    def __init__(
        self,
        width: int,
        widths: Sequence[int],
        norm: HeadNorm = "batch",
        activation: Literal["relu", "gelu"] = "relu",
        last_norm: bool = False,
        last_bias: bool = True,
        join_views: bool = False,
    ):
        super().__init__()
        self.join_views = join_views
        self.width = widths[-1] if widths else width
        self.couples_clips = norm == "batch" and (last_norm or len(widths) > 1)
        for i, out in enumerate(widths):
            is_last = i == len(widths) - 1
            has_norm = norm != "none" and (last_norm or not is_last)
            has_bias = not (has_norm and norm == "batch") and (last_bias or not is_last)
            self.append(nn.Linear(width, out, bias=has_bias))
            if has_norm:
                make = GlobalBatchNorm if norm == "batch" else layer_norm
                self.append(make(out, not is_last))
            if not is_last:
                self.append(nn.ReLU() if activation == "relu" else nn.GELU())
            width = out
        init_weights(self, "trunc_normal")

    def forward(self, x: Tensor) -> Tensor:
        if self.join_views or not self.couples_clips:
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return torch.stack([super(Projector, self).forward(view) for view in x])


def build_projector(config: HeadConfig, width: int) -> Projector:
    return Projector(width, **vars(config))


def layer_norm(width: int, affine: bool) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=affine)


class Prototypes(nn.Linear):
    """Cosines of x [..., K] with `count` learned vectors, [..., count].

    In f32 under autocast, too: divided by a temperature, roundings of bf16 are as large as differences.
    Source: DINO's weight-normed last layer with its norms kept at 1 (vision_transformer.py, DINOHead), SwAV's
    and MSN's normalised prototypes. Weight decay moves no cosine.
    """

    def __init__(self, width: int, count: int):
        super().__init__(width, count, bias=False)
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.is_frozen = False  # their gradients are zero

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach() + 0 * self.weight if self.is_frozen else self.weight
        with without_autocast(x.device):
            return F.linear(F.normalize(x.float(), dim=-1), F.normalize(weight.float(), dim=-1))
