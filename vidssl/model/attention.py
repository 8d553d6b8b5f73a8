"""Which tokens of a clip attend to which."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vidssl.model.grid import Grid

AttentionPattern = Literal["full", "frame", "causal"]


def attention_pattern(
    kind: AttentionPattern, grid: Grid, ids: Tensor | None, tokens: int, device: torch.device
) -> Tensor | None:
    """bool [B or 1, 1, tokens, tokens], True where a query (row) attends to a key; None: everywhere.

    ids i64 [B, n]; None: all. "frame": within a time slice (SiamMAE); "causal": to this and earlier ones
    (LeVJEPA). A token before the n ones, the class token, attends to all, and only it attends to itself.
    """
    if kind == "full":
        return None
    slices = (torch.arange(grid.n, device=device)[None] if ids is None else ids) // (grid.h * grid.w)
    query = slices[:, :, None]
    key = slices[:, None]
    attends = query == key if kind == "frame" else query >= key
    extra = tokens - slices.shape[1]
    attends = F.pad(F.pad(attends, (extra, 0), value=False), (0, 0, extra, 0), value=True)
    return attends[:, None]
