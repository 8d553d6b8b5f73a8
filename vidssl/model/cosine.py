"""A linear layer of the direction of its input: the heads of DINO, iBOT and CAPI."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidssl.core.precision import without_autocast


class WeightNormedCosine(nn.Linear):
    """Cosines of x [..., width] with learned vectors, each times a learned factor that starts at 1:
    [..., out], in f32 under autocast, too.

    Source: DINO (vision_transformer.py, DINOHead) with norm_last_layer off; CAPI (model.py, L2NormLinear).
    """

    def __init__(self, width: int, out: int):
        super().__init__(width, out, bias=False)
        self.factors = nn.Parameter(torch.ones(out))

    def forward(self, x: Tensor) -> Tensor:
        directions = F.normalize(self.weight.float(), dim=-1)
        with without_autocast(x.device):
            return F.linear(F.normalize(x.float(), dim=-1), directions * self.factors.float()[:, None])
