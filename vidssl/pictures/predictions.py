"""A clip behind a mask: what is seen, what is to be predicted, and what a method predicts there."""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.targets import Pixels
from vidssl.pictures.features import heat_over
from vidssl.pictures.masks import to_pixels
from vidssl.pictures.panels import HIDDEN_GREY
from vidssl.pictures.reconstruction import paste_patches, predicted_pixels, to_unit_range
from vidssl.pictures.runs import predict_mask


def mask_videos(frames: np.ndarray, mask: Mask, grid: Grid, number: int = 0) -> dict[str, np.ndarray]:
    """What is seen, and what is predicted, of a video u8 [T, S, S, 3]. number: of the clip in the mask."""
    target = mask.target[number]
    target = target if mask.weight is None else target[mask.weight[number] > 0]
    found = {}
    for text, ids in (("seen", mask.context[number]), ("to predict", target.flatten())):
        visible = torch.zeros(grid.n, dtype=torch.bool)
        visible[ids.cpu()] = True
        found[text] = np.where(to_pixels(visible, frames, grid)[..., None], frames, HIDDEN_GREY)
    return found


@torch.no_grad()
def predicted_videos(
    part: MaskedPrediction, clips: Tensor, mask: Mask, rng: KeyedRNG, frames: list[np.ndarray]
) -> tuple[str, list[np.ndarray]]:
    """A name, and for each clip u8 [B, 3, T, S, S] a video u8 [T, S, S, 3]: pixels that are predicted, pasted
    behind the mask, or of features the cosine of prediction and target, 0 dark and 1 bright."""
    found = predict_mask(part, clips, mask, rng)
    if isinstance(part.target, Pixels):
        pixels = predicted_pixels(part.target, found.values, found.video, found.ids, found.grid)
        pasted = paste_patches(to_unit_range(found.video), pixels, found.ids, found.grid)
        return "predicted", [byte_frames(video) for video in pasted]
    target = part.target_features(found.video)
    if target is None:
        return "no target without a mask", [np.zeros_like(video) for video in frames]
    true = gather_tokens(target, found.ids).float()
    # About the mean of the clip's targets, which alone would make all alike
    mean = target.float().mean(1, keepdim=True)
    cosine = F.cosine_similarity(found.values - mean, true - mean, dim=-1)
    values = torch.zeros(len(clips), found.grid.n, device=cosine.device)
    values = values.scatter(1, found.ids, cosine.clamp_min(0)).cpu()
    heat = [heat_over(video, values[i].reshape(found.grid), 1.0) for i, video in enumerate(frames)]
    return f"cosine to target {float(cosine.mean()):.2f}", heat


def byte_frames(video: Tensor) -> np.ndarray:
    """f32 [3, T, S, S] in 0..1 -> u8 [T, S, S, 3]"""
    frames = 255 * rearrange(video, "c t h w -> t h w c").clamp(0, 1)
    return frames.round().cpu().numpy().astype(np.uint8)
