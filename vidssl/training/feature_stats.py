"""Statistics of the features during training: variance, rank, and distance to the EMA encoder.

Computed without gradients on a few clips of the global batch, of which each process encodes its share;
tools/bench_feature_stats.py measures the cost. What is measured is the patch tokens, or the
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
from vidssl.core.spectrum import alpha_req, rankme
from vidssl.model.vit import Encoder
from vidssl.objective.objective import Objective
from vidssl.training.clip_share import ClipShare
from vidssl.training.collapse import CollapseDetector
from vidssl.training.distributed import full_tensor, unsharded

MIN_CLIPS, MAX_CLIPS = 8, 32  # clips that one measurement uses
Autocast = Callable[[], AbstractContextManager[None]]
TARGET_CLIP_STRIDE = 4  # one clip of a process in four also goes through the target and the online encoder


@torch.no_grad()
def feature_statistics(
    features: Tensor, time_slices: int, share: ClipShare = ClipShare()
) -> dict[str, float]:
    """Statistics of features [B, N, D] (N = time_slices * places, time first), of the clips of all processes;
    in a collapse they fall to 0, ranks to 1. features: of this process's clips.

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
    clips = share.count(len(x))
    rms = share.mean(x.square().mean((1, 2, 3))).sqrt().clamp_min(1e-12)
    mean = share.mean(x)
    centred = x - mean
    # [T, n, D], over clips
    variance = share.mean(centred.square())
    values = share.singular_values(centred)
    slices = sorted({0, time_slices // 2})
    values_per_slice = [share.singular_values(centred[:, t]) for t in slices]
    channel_std = variance.mean((0, 1)).sqrt()
    power = values.square()
    return {
        "std_clips": float(variance.mean().sqrt() / rms),
        "std_clips_min": float(variance.mean(-1).sqrt().min() / rms),
        "std_channel_min": float(std_of_rows(mean, variance, clips).min() / rms),
        "std_tokens": float(share.mean(of_clips(x - x.mean((1, 2), keepdim=True))).sqrt() / rms),
        "std_time": float(share.mean(of_clips(centred.std(1))).sqrt() / rms) if time_slices > 1 else 0.0,
        "rank": rankme(values),
        "rank_slice": sum(map(rankme, values_per_slice)) / len(slices),
        "alpha": alpha_req(values),
        "participation": float(power.sum().square() / power.square().sum().clamp_min(1e-30)),
        "channel_evenness": float(channel_std.median() / channel_std.square().mean().sqrt().clamp_min(1e-12)),
        "cosine": float(mean_cosine(clips * share.mean(F.normalize(x.mean((1, 2)), dim=-1)), clips)),
        "cosine_time": float(share.mean(mean_cosine(F.normalize(x.mean(2), dim=-1).sum(1), time_slices))),
    }


def of_clips(x: Tensor) -> Tensor:
    """Mean squares [B] of x [B, ...]."""
    return x.square().flatten(1).mean(1)


def std_of_rows(mean: Tensor, variance: Tensor, clips: int) -> Tensor:
    """Deviations [D] over clips and tokens, by mean and variance [T, n, D] at each token over the clips."""
    rows = clips * mean[..., 0].numel()
    spread = (variance + (mean - mean.mean((0, 1))).square()).mean((0, 1))
    return (spread * rows / max(1, rows - 1)).sqrt()


def trained_tokens(objective: Objective, encoder: Encoder, video: Tensor) -> Tensor:
    """Features [B, N, D] of the patches of video [B, 3, T, H, W], or [B, 1, D] of the class token where the
    objective trains no other output. encoder: the trained or the evaluated one."""
    if objective.trains_class_only:
        return encoder(video, with_class=True)[:, :1]
    return encoder(video)


def mean_cosine(total: Tensor, n: int) -> Tensor:
    """Cosine similarity [...] averaged over the pairs of two of n unit vectors, by their sum [..., D]; 0 for
    a single one."""
    return (total.square().sum(-1) - n) / max(1, n * (n - 1))


@torch.no_grad()
def ema_drift(
    objective: Objective,
    ema_encoder: Encoder,
    video: Tensor,
    features: Tensor,
    autocast: Autocast = contextlib.nullcontext,
    share: ClipShare = ClipShare(),
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
        "drift_features": float(1 - share.mean(similarity.mean(-1))),
    }


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all tensors together, f32 []."""
    return full_tensor(torch.stack([t.square().sum() for t in tensors]).sum()).sqrt()


def target_variance(target: Tensor, share: ClipShare) -> float:
    """Variance over the tokens [B, N, K] of all processes, mean over channels."""
    mean = share.mean(target)
    variance = share.mean((target - mean).square())
    clips = share.count(len(target))
    return float(std_of_rows(mean[None], variance[None], clips).square().mean())


class FeatureStats:
    """Buffers the latest clips of this process, and measures and judges the features of those of all."""

    def __init__(self, share: ClipShare = ClipShare()) -> None:
        self.share = share
        # u8 [b, 3, T, H, W] of the latest steps, at least MIN_CLIPS in all processes if there are
        self.clips: deque[Tensor] = deque()
        self.detector = CollapseDetector()

    def add_clips(self, video: Tensor) -> None:
        """Buffer the clips u8 [b, 3, T, H, W] of a step; clips of another shape are dropped."""
        if self.clips and self.clips[0].shape[1:] != video.shape[1:]:
            self.clips.clear()
        # a copy, since a view would hold the whole batch on the device
        most = self.share.of(MAX_CLIPS)
        self.clips.append(video if len(video) <= most else video[:most].clone())
        while sum(map(len, self.clips)) - len(self.clips[0]) >= self.share.of(MIN_CLIPS):
            self.clips.popleft()

    @torch.no_grad()
    def measure(self, objective: Objective, autocast: Autocast = contextlib.nullcontext) -> dict[str, float]:
        """Statistics ("feature_...") of the encoder that will be evaluated, on the latest `feature_clips`
        clips. Every process must call this. autocast: context of the forward passes."""
        encoder = objective.eval_encoder
        share = self.share
        clips = torch.cat(list(self.clips))[-share.of(MAX_CLIPS) :]
        video = normalise(clips.to(next(encoder.parameters()).device))
        target_video = video[::TARGET_CLIP_STRIDE]
        was_training = objective.training
        objective.eval()
        with unsharded(objective), autocast():
            features = trained_tokens(objective, encoder, video)
            target = objective.target_features(target_video)
        slices = 1 if objective.trains_class_only else encoder.grid_of(video).t
        stats = feature_statistics(features, slices, share)
        if target is not None:
            stats["target_var"] = target_variance(target.float(), share)
        if (ema := objective.ema_encoder) is not None:
            stats |= ema_drift(objective, ema, target_video, features[::TARGET_CLIP_STRIDE], autocast, share)
        objective.train(was_training)
        count = share.count(len(clips))
        if count >= MIN_CLIPS:
            self.detector.add(stats)
        return {"feature_clips": count, **{f"feature_{k}": v for k, v in stats.items()}}

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
