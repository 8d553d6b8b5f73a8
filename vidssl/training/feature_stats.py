"""Statistics of the features during training: variance, rank, and distance to the EMA encoder.

Computed without gradients on a few clips of the main process's batches (with sharded weights every process
takes part); tools/bench_feature_stats.py measures the cost. What is measured is the patch tokens, or the
class token where an objective trains no other output: its deviations over tokens and time are 0 then.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vidssl.core.pixels import normalise
from vidssl.core.spectrum import alpha_req, rankme, singular_values
from vidssl.model.vit import Encoder
from vidssl.objective.objective import Objective
from vidssl.training.collapse import CollapseDetector
from vidssl.training.distributed import full_tensor, unsharded

MIN_CLIPS, MAX_CLIPS = 8, 32  # clips that one measurement uses
Autocast = Callable[[], AbstractContextManager[None]]
TARGET_CLIP_STRIDE = 4  # one clip in four also goes through the target and the online encoder


@torch.no_grad()
def feature_statistics(features: Tensor, time_slices: int) -> dict[str, float]:
    """Statistics of features [B, N, D] (N = time_slices * places, time first); in a collapse they fall to 0,
    ranks to 1.

    Deviations are divided by the root mean square of the features:
    std_clips: over clips at a token, mean over tokens; std_clips_min: at the token with the smallest one.
    std_channel_min: over clips and tokens, of the channel with the smallest one.
    std_tokens: over the tokens of a clip.
    std_time: over time within a clip, after subtraction of the mean over clips (the part due to position).
    rank: RankMe (Garrido et al. 2023, arXiv 2210.02885) of the tokens, the exponential of the entropy of the
    singular values; rank_slice: mean RankMe of the first and the middle time slice.
    alpha: alpha-ReQ (Agrawal et al. 2022, arXiv 2202.05808), the exponent of the power law of the
    covariance's eigenvalues, fitted from the tenth to the middle one; large in a collapse.
    participation: participation ratio of the tokens, the squared sum of the covariance's eigenvalues over the
    sum of their squares: the number of directions that hold most of the variance.
    channel_evenness: deviation over clips of the median channel over their root mean square; 0 where few
    channels vary.
    cosine: cosine similarity of the mean tokens of two clips, averaged over pairs; 1 in a collapse.
    cosine_time: the same of two time slices of a clip.
    """
    x = rearrange(features.float(), "b (t n) d -> b t n d", t=time_slices)
    rms = x.square().mean().sqrt().clamp_min(1e-12)
    centred = x - x.mean(0)
    std_at_token = centred.square().mean((0, 3)).sqrt() / rms
    values = singular_values(centred)
    slices = sorted({0, time_slices // 2})
    values_per_slice = [singular_values(centred[:, t]) for t in slices]
    channel_std = centred.square().mean((0, 1, 2)).sqrt()
    power = values.square()
    rows = x.flatten(0, 2)
    return {
        "std_clips": float(centred.square().mean().sqrt() / rms),
        "std_clips_min": float(std_at_token.min()),
        "std_channel_min": float(rows.std(0).min() / rms) if len(rows) > 1 else 0.0,
        "std_tokens": float((x - x.mean((1, 2), keepdim=True)).square().mean().sqrt() / rms),
        "std_time": float(centred.std(1).square().mean().sqrt() / rms) if time_slices > 1 else 0.0,
        "rank": rankme(values),
        "rank_slice": sum(map(rankme, values_per_slice)) / len(slices),
        "alpha": alpha_req(values),
        "participation": float(power.sum().square() / power.square().sum().clamp_min(1e-30)),
        "channel_evenness": float(channel_std.median() / channel_std.square().mean().sqrt().clamp_min(1e-12)),
        "cosine": mean_cosine(x.mean((1, 2))),
        "cosine_time": mean_cosine(x.mean(2)),
    }


def trained_tokens(objective: Objective, encoder: Encoder, video: Tensor) -> Tensor:
    """Features [B, N, D] of the patches of video [B, 3, T, H, W], or [B, 1, D] of the class token where the
    objective trains no other output. encoder: the trained or the evaluated one."""
    if objective.trains_class_only:
        return encoder(video, with_class=True)[:, :1]
    return encoder(video)


def mean_cosine(vectors: Tensor) -> float:
    """Cosine similarity of vectors [..., n, D], averaged over the pairs of two of n; 0 for a single one."""
    n = vectors.shape[-2]
    total = F.normalize(vectors, dim=-1).sum(-2).square().sum(-1)
    return float(((total - n) / max(1, n * (n - 1))).mean())


@torch.no_grad()
def ema_drift(
    objective: Objective,
    ema_encoder: Encoder,
    video: Tensor,
    features: Tensor,
    autocast: Autocast = contextlib.nullcontext,
) -> dict[str, float]:
    """Distance of the online encoder from the EMA encoder: relative L2 distance of the weights, and 1 -
    cosine similarity of the features. video f32 [b, 3, T, H, W]; features [b, N, D]: `trained_tokens` of
    these clips by the evaluated encoder, which is one of the two."""
    online = list(objective.encoder.parameters())
    ema = list(ema_encoder.parameters())
    distance = global_norm([a - b for a, b in zip(online, ema, strict=True)])
    other = objective.encoder if objective.eval_encoder is ema_encoder else ema_encoder
    with unsharded(objective), autocast():
        other_features = trained_tokens(objective, other, video)
        similarity = F.cosine_similarity(other_features.float(), features.float(), dim=-1)
    return {
        "drift_weights": float(distance / global_norm(ema)),
        "drift_features": float(1 - similarity.mean()),
    }


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all tensors together, f32 []."""
    return full_tensor(torch.stack([t.square().sum() for t in tensors]).sum()).sqrt()


class FeatureStats:
    """Buffers the latest clips of this process, and measures and judges their features."""

    def __init__(self) -> None:
        # u8 [b, 3, T, H, W] of the latest steps, at least MIN_CLIPS if there are
        self.clips: deque[Tensor] = deque()
        self.detector = CollapseDetector()

    def add_clips(self, video: Tensor) -> None:
        """Buffer the clips u8 [b, 3, T, H, W] of a step; clips of another shape are dropped."""
        if self.clips and self.clips[0].shape[1:] != video.shape[1:]:
            self.clips.clear()
        # a copy, since a view would hold the whole batch on the device
        self.clips.append(video if len(video) <= MAX_CLIPS else video[:MAX_CLIPS].clone())
        while sum(map(len, self.clips)) - len(self.clips[0]) >= MIN_CLIPS:
            self.clips.popleft()

    @torch.no_grad()
    def measure(self, objective: Objective, autocast: Autocast = contextlib.nullcontext) -> dict[str, float]:
        """Statistics ("feature_...") of the encoder that will be evaluated, on the latest `feature_clips`
        clips. With sharded weights (FSDP2) every process must call this. autocast: context of the forward
        passes."""
        encoder = objective.eval_encoder
        clips = torch.cat(list(self.clips))[-MAX_CLIPS:]
        video = normalise(clips.to(next(encoder.parameters()).device))
        target_video = video[::TARGET_CLIP_STRIDE]
        was_training = objective.training
        objective.eval()
        with unsharded(objective), autocast():
            features = trained_tokens(objective, encoder, video)
            target = objective.target_features(target_video)
        slices = 1 if objective.trains_class_only else encoder.grid_of(video).t
        stats = feature_statistics(features, slices)
        if target is not None:
            stats["target_var"] = float(target.float().flatten(0, 1).var(0).mean())
        if (ema := objective.ema_encoder) is not None:
            stats |= ema_drift(objective, ema, target_video, features[::TARGET_CLIP_STRIDE], autocast)
        objective.train(was_training)
        if len(clips) >= MIN_CLIPS:
            self.detector.add(stats)
        return {"feature_clips": len(clips), **{f"feature_{k}": v for k, v in stats.items()}}

    @property
    def collapsed(self) -> bool:
        """Whether the latest measurements look collapsed."""
        return self.detector.collapsed

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as plain data."""
        return self.detector.state()

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.detector.load(state)
