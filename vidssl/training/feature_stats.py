"""Statistics of the features during training: variance, rank, distance to the EMA encoder, and collapse
detection.

Computed without gradients on a few clips of the main process's batches (with sharded weights every process
takes part); tools/bench_feature_stats.py measures the cost.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vidssl.core.pixels import normalise
from vidssl.core.spectrum import alpha_req, rankme, singular_values
from vidssl.objective.objective import Objective
from vidssl.training.distributed import full_tensor, unsharded

MIN_CLIPS, MAX_CLIPS = 8, 32  # clips that one measurement uses
TARGET_CLIP_STRIDE = 4  # one clip in four also goes through the target and the online encoder
COLLAPSE_FRACTION = 0.05  # of the deviation after the first step; below it the features count as collapsed


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
    singular values; rank_slice: RankMe of each time slice, averaged.
    alpha: alpha-ReQ (Agrawal et al. 2022, arXiv 2202.05808), the exponent of the power law of the
    covariance's eigenvalues, fitted from the tenth to the middle one; large in a collapse.
    cosine: cosine similarity of the mean tokens of two clips, averaged over pairs; 1 in a collapse.
    """
    x = rearrange(features.float(), "b (t n) d -> b t n d", t=time_slices)
    rms = x.square().mean().sqrt().clamp_min(1e-12)
    centred = x - x.mean(0)
    std_at_token = centred.square().mean((0, 3)).sqrt() / rms
    values = singular_values(centred)
    values_per_slice = [singular_values(centred[:, t]) for t in range(time_slices)]
    clip_means = F.normalize(x.mean((1, 2)), dim=-1)
    n = len(clip_means)
    return {
        "std_clips": float(centred.square().mean().sqrt() / rms),
        "std_clips_min": float(std_at_token.min()),
        "std_channel_min": float(x.flatten(0, 2).std(0).min() / rms),
        "std_tokens": float((x - x.mean((1, 2), keepdim=True)).square().mean().sqrt() / rms),
        "std_time": float(centred.std(1).square().mean().sqrt() / rms) if time_slices > 1 else 0.0,
        "rank": rankme(values),
        "rank_slice": sum(map(rankme, values_per_slice)) / time_slices,
        "alpha": alpha_req(values),
        "cosine": float((clip_means.sum(0).square().sum() - n) / max(1, n * (n - 1))),
    }


@torch.no_grad()
def ema_drift(objective: Objective, video: Tensor, ema_features: Tensor) -> dict[str, float]:
    """Distance of the online encoder from the EMA encoder: relative L2 distance of the weights, and 1 -
    cosine similarity of the features. video f32 [b, 3, T, H, W]; ema_features [b, N, D]: the EMA encoder's of
    these clips."""
    online = list(objective.encoder.parameters())
    ema = list(objective.eval_encoder.parameters())
    distance = global_norm([a - b for a, b in zip(online, ema, strict=True)])
    with unsharded(objective):
        similarity = F.cosine_similarity(objective.encoder(video).float(), ema_features.float(), dim=-1)
    return {
        "drift_weights": float(distance / global_norm(ema)),
        "drift_features": float(1 - similarity.mean()),
    }


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all tensors together, f32 []."""
    return full_tensor(torch.stack([t.square().sum() for t in tensors]).sum()).sqrt()


class FeatureStats:
    """Buffers the latest clips of this process and compares the features with those after the first step."""

    def __init__(self) -> None:
        self.clips: deque[Tensor] = (
            deque()
        )  # u8 [b, 3, T, H, W] of the latest steps, at least MIN_CLIPS if there are
        self.baseline: dict[str, float] = {}  # the first measurement of the run
        self.low_in_a_row = 0  # consecutive measurements that look collapsed

    def add_clips(self, video: Tensor) -> None:
        """Buffer the clips u8 [b, 3, T, H, W] of a step; clips of another shape are dropped."""
        if self.clips and self.clips[0].shape[1:] != video.shape[1:]:
            self.clips.clear()
        self.clips.append(video[:MAX_CLIPS])
        while sum(map(len, self.clips)) - len(self.clips[0]) >= MIN_CLIPS:
            self.clips.popleft()

    @torch.no_grad()
    def measure(self, objective: Objective) -> dict[str, float]:
        """Statistics ("feature_...") of the encoder that will be evaluated, on the latest `feature_clips`
        clips. With sharded weights (FSDP2) every process must call this."""
        encoder = objective.eval_encoder
        clips = torch.cat(list(self.clips))[-MAX_CLIPS:]
        video = normalise(clips.to(next(encoder.parameters()).device))
        target_video = video[::TARGET_CLIP_STRIDE]
        was_training = objective.training
        objective.eval()
        with unsharded(objective):
            features = encoder(video)
            target = objective.target(target_video)
        stats = feature_statistics(features, encoder.grid_of(video).t)
        stats["target_var"] = float(target.float().flatten(0, 1).var(0).mean())
        if objective.target.encoder is not None:
            stats |= ema_drift(objective, target_video, features[::TARGET_CLIP_STRIDE])
        objective.train(was_training)
        self.baseline = self.baseline or stats
        self.low_in_a_row = self.low_in_a_row + 1 if self.looks_collapsed(stats) else 0
        return {"feature_clips": len(clips), **{f"feature_{k}": v for k, v in stats.items()}}

    def looks_collapsed(self, stats: dict[str, float]) -> bool:
        """Whether the deviation over clips or over tokens is below COLLAPSE_FRACTION of the baseline, or the
        rank below 2.

        In our healthy runs the deviation over clips stayed above 0.12 (of pixel targets, whose features
        encode position more than content), from 0.5 to 0.9 at the start; in a run made to collapse it was
        0.04 of the baseline after 100 steps. RankMe is scale-invariant and did not drop in that run, so it
        has no part in the rule beyond rank 2.
        """
        return stats["rank"] < 2 or any(
            stats[k] < COLLAPSE_FRACTION * self.baseline[k] for k in ("std_clips", "std_tokens")
        )

    @property
    def collapsed(self) -> bool:
        """Whether the latest two measurements, or more, look collapsed."""
        return self.low_in_a_row >= 2

    def collapse_warning(self, row: dict[str, Any]) -> str | None:
        """The warning to log after the second collapsed measurement in a row, else None. row: of
        log.jsonl."""
        if self.low_in_a_row != 2:
            return None
        changes = ", ".join(
            f"{k} {row[f'feature_{k}']:.3g} (at the start {self.baseline[k]:.3g})"
            for k in ("std_clips", "std_tokens", "rank", "cosine")
        )
        return f"step {row['step']}: the features have collapsed: {changes}"

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as plain data."""
        return {"baseline": self.baseline, "low_in_a_row": self.low_in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.baseline = state["baseline"]
        self.low_in_a_row = state["low_in_a_row"]
