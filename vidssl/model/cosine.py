"""A linear layer of the direction of its input: the heads of DINO, iBOT and CAPI."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormedCosine(nn.Module):
    """Cosines of x [..., width] with learned vectors, each times a learned factor that starts at 1:
    [..., out].

    Source: DINO (vision_transformer.py, DINOHead) with norm_last_layer off; CAPI (model.py, L2NormLinear).
    """

    def __init__(self, width: int, out: int):
        super().__init__()
        self.directions = nn.Parameter(nn.init.trunc_normal_(torch.empty(out, width), std=0.02))
        self.factors = nn.Parameter(torch.ones(out))

    def forward(self, x: Tensor) -> Tensor:
        directions = F.normalize(self.directions.float(), dim=-1)
        return F.linear(F.normalize(x.float(), dim=-1), directions * self.factors[:, None])
