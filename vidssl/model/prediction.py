"""What a masked prediction has computed so far: given to queries, targets, scores and auxiliary losses."""

from typing import NamedTuple

from torch import Tensor

from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask


class Encoded(NamedTuple):
    """One mask of a batch after the encoder."""

    video: Tensor  # f32 [B, 3, T, H, W], normalised
    seen: Tensor  # what the encoder saw: the corrupted video, or the video itself
    grid: Grid
    mask_index: int  # number of the mask within the step
    mask: Mask  # where the encoder saw all tokens, its context is all of them
    rng: KeyedRNG
    z: Tensor  # [B, (1 +) Nc, levels * D], the class token first if there is one
    scores: Tensor | None  # f32 [B, N], from which the mask was made; None: from no scores
    prepared: Tensor | None = None  # what the target made of the clips once for all masks
    noise: Tensor | None = None  # f32 [B, 3, T, H, W], that the corruption mixed into the video


class Prediction(NamedTuple):
    """Output of a predictor."""

    target: Tensor  # [B, M, Nt, K]
    context: Tensor | None = None  # [B, M, Nc, K], from predictors with a context head


class Predicted(NamedTuple):
    """One mask of a batch after the predictor."""

    encoded: Encoded
    features: Tensor | None  # [B, N, K], the target of every token; None: the target was made for the mask
    target: Tensor  # [B, M, Nt, K]
    prediction: Prediction
    error: Tensor  # f32 [B, M, Nt]
