"""Choice of a fixed number of tokens in each sample.

Masks are drawn on the host while the device computes. NumPy finds the tokens there without sorting: in
time linear in their number, a tenth of what torch's sort takes.
"""

import numpy as np
import torch
from torch import Tensor


def has_array(tensor: Tensor) -> bool:
    """Whether NumPy can read it: not on a GPU, nor where a plan's tensors have no values."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor


def lowest_ids(score: Tensor, count: int) -> Tensor:
    """i64 [B, count]: ascending ids of the `count` lowest entries in each row of score f32 [B, N]; of equal
    ones, the first."""
    if not has_array(score):
        return score.argsort(dim=1, stable=True)[:, :count].sort(1)[0]
    rows, n = score.shape
    # Integers in the order of the scores (without a negative zero), made different by the ids.
    bits = (score.float() + 0.0).numpy().view(np.int32).astype(np.int64)
    order = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits) * n + np.arange(n)
    if 0 < count < n:
        limit = np.partition(order, count - 1, axis=1)[:, count - 1 : count]
        return _ids_of(order <= limit, count)
    return torch.arange(count).expand(rows, -1)


def indices_of(chosen: Tensor, count: int) -> Tensor:
    """i64 [..., count]: ascending ids of the True entries of chosen bool [..., N], `count` in each row."""
    if not has_array(chosen):
        return (~chosen).int().argsort(dim=-1, stable=True)[..., :count]
    mask = chosen.numpy()
    assert (np.count_nonzero(mask, axis=-1) == count).all(), f"not {count} tokens in each row"
    return _ids_of(mask, count)


def _ids_of(chosen: np.ndarray, count: int) -> Tensor:
    """As indices_of; chosen bool [..., N]."""
    ids = np.flatnonzero(chosen) % chosen.shape[-1]
    return torch.from_numpy(ids.reshape(*chosen.shape[:-1], count))


def other_ids(ids: Tensor, n: int) -> Tensor:
    """i64 [B, n - count]: ascending, the ids below n that are not in ids i64 [B, count]."""
    others = torch.ones(len(ids), n, dtype=torch.bool, device=ids.device).scatter(1, ids, False)
    return indices_of(others, n - ids.shape[1])
