"""Networks that are told the noise level of their input: adaptive layer norm (AdaLN)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Change = tuple[Tensor, Tensor, Tensor]  # shift, factor and gate, [B, 1, width] each


class NoiseLevel(nn.Module):
    """Maps the steps of diffusion f32 [B] of each clip, 0 where it is clean, to a condition [B, width].

    Source: DiT (arXiv 2212.09748), UMD (arXiv 2406.17688; embeddings.py, ae.py).
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, level: Tensor) -> Tensor:
        half = self.width // 2
        place = torch.arange(half, device=level.device, dtype=torch.float32)
        angle = level[:, None] * (-math.log(10000) / max(1, half - 1) * place).exp()
        waves = F.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, self.width % 2))
        return F.silu(self.second(F.silu(self.first(waves))))


class Modulation(nn.Linear):
    """Maps a condition [B, C] to `parts` vectors [B, 1, width], 0 at the start (DiT's adaLN-Zero)."""

    def __init__(self, condition: int, width: int, parts: int):
        super().__init__(condition, parts * width)
        self.parts = parts
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(condition)[:, None].chunk(self.parts, -1)


def block_changes(modulation: Modulation | None, condition: Tensor | None) -> tuple[Change | None, ...]:
    """Of attention and MLP of a block; None for a block without a condition."""
    if modulation is None:
        return None, None
    assert condition is not None
    parts = modulation(condition)
    return parts[:3], parts[3:]  # type: ignore[return-value]


def shifted(x: Tensor, change: Change | None) -> Tensor:
    """Normed x [B, n, width] after shift and factor."""
    return x if change is None else x * (1 + change[1]) + change[0]


def gated(x: Tensor, change: Change | None) -> Tensor:
    return x if change is None else x * change[2]
