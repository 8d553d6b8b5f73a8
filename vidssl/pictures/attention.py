"""Attention of an attentive probe: where the query of its head looks in a clip."""

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

from vidssl.evaluation.saved_heads import SavedHead
from vidssl.pictures.features import heat_over


@torch.no_grad()
def query_attention(saved: SavedHead, features: Tensor) -> Tensor:
    """Attention f32 [n, heads, t, h, w] of the probe's query to the tokens of clips, f32 [n, t, h, w, D]; it
    sums to 1 over the tokens of a clip."""
    _, t, h, _, _ = features.shape
    tokens = saved.standardise(rearrange(features, "n t h w d -> n (t h w) d"))
    weights = saved.head.attention(tokens)
    return rearrange(weights, "n k (t h w) -> n k t h w", t=t, h=h)


def attention_video(video: np.ndarray, weights: Tensor) -> np.ndarray:
    """A video u8 [T, S, S, 3] with the attention f32 [heads, t, h, w] of a clip, the mean over heads, as
    colours."""
    return heat_over(video, reduce(weights, "k t h w -> t h w", "mean"))


@torch.no_grad()
def predicted_class(saved: SavedHead, features: Tensor) -> str:
    """What the head predicts for clips f32 [n, t, h, w, D] of one video: a class and its probability."""
    tokens = saved.standardise(rearrange(features, "n t h w d -> n (t h w) d"))
    logits = saved.head(tokens)
    if saved.kind != "class":
        return ""
    probabilities = logits.softmax(-1).mean(0)
    best = int(probabilities.argmax())
    return f"{saved.names[best]} {100 * float(probabilities[best]):.0f} %"
