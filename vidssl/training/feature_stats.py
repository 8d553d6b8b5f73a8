"""How the representation is doing: its spread over clips, places and time, its rank, and whether it collapses.

Measured on a few clips of the main process's batch, without gradients (with shards all processes take part);
tools/bench_health.py says what it costs.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidssl.core.pixels import normalise
from vidssl.core.spectrum import alpha_req, rankme, singular_values
from vidssl.objective.objective import Objective
from vidssl.objective.targets import Ema
from vidssl.training.distributed import full_tensor, unsharded

MIN_MAX_CLIPS = (8, 32)  # at least and at most, of which the figures are
EMA_EVERY = 4  # every so many of them also go through the target and the online encoder
COLLAPSE_FRACTION = 0.05  # of the start's deviation, under which the features count as collapsed


@torch.no_grad()
def feature_statistics(features: Tensor, slices: int) -> dict[str, float]:
    """features [B, N, D] (N = slices * places, time first) -> figures that go to 0 (ranks: to 1) in a collapse.

    All deviations are relative to the features' root mean square. std_clips: over clips at a token, mean over tokens;
    std_clips_min: at the token where it is least; std_channel_min: over clips and tokens, of the channel where it is
    least; std_tokens: over the tokens of a clip; std_time: over time within a clip after the mean over clips (the
    positions' share) is taken off. rank: RankMe (Garrido et al. 2023, arXiv 2210.02885), exp of the entropy of the
    singular values, of the tokens; rank_slice: the same of each time slice alone, their mean. alpha: alpha-ReQ (Agrawal
    et al. 2022, arXiv 2202.05808), the power with which the eigenvalues of the covariance fall, fitted from the tenth
    to the middle one; large in a collapse. cosine: of the mean tokens of two clips, mean over pairs; 1 in a collapse.
    """
    x = features.float().unflatten(1, (slices, -1))
    rms = x.square().mean().sqrt().clamp_min(1e-12)
    free = x - x.mean(0)
    at_token = free.square().mean((0, 3)).sqrt() / rms
    values = singular_values(free)
    each = [singular_values(free[:, t]) for t in range(slices)]
    pooled = F.normalize(x.mean((1, 2)), dim=-1)
    n = len(pooled)
    return {
        "std_clips": float(free.square().mean().sqrt() / rms),
        "std_clips_min": float(at_token.min()),
        "std_channel_min": float(x.flatten(0, 2).std(0).min() / rms),
        "std_tokens": float((x - x.mean((1, 2), keepdim=True)).square().mean().sqrt() / rms),
        "std_time": float(free.std(1).square().mean().sqrt() / rms) if slices > 1 else 0.0,
        "rank": rankme(values),
        "rank_slice": sum(map(rankme, each)) / slices,
        "alpha": alpha_req(values),
        "cosine": float((pooled.sum(0).square().sum() - n) / max(1, n * (n - 1))),
    }


@torch.no_grad()
def ema_drift(objective: Objective, video: Tensor, slow: Tensor) -> dict[str, float]:
    """Of a momentum encoder, how far the online one is from it: relative L2 distance of the weights, and 1 - cosine of
    the features. video f32 [b, 3, T, H, W]; slow [b, N, D]: its features by the momentum encoder."""
    online, momentum = list(objective.encoder.parameters()), list(objective.eval_encoder.parameters())
    apart, size = global_norm([a - b for a, b in zip(online, momentum, strict=True)]), global_norm(momentum)
    with unsharded(objective):
        near = F.cosine_similarity(objective.encoder(video).float(), slow.float(), dim=-1).mean()
    return {"drift_weights": float(apart / size), "drift_features": float(1 - near)}


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all together, f32."""
    return full_tensor(torch.stack([t.square().sum() for t in tensors]).sum()).sqrt()


class FeatureStats:
    """Keeps the last clips of this process and what the features were like at the start."""

    def __init__(self) -> None:
        self.clips: deque[Tensor] = deque()  # u8 [b, 3, T, H, W] of the last steps, as many as CLIPS[0] takes
        self.start: dict[str, float] = {}  # the first figures of the run
        self.low = 0  # measurements in a row that look like a collapse

    def see(self, video: Tensor) -> None:
        """The clips u8 [b, 3, T, H, W] of a step."""
        if self.clips and self.clips[0].shape[1:] != video.shape[1:]:
            self.clips.clear()
        self.clips.append(video[: MIN_MAX_CLIPS[1]])
        while sum(map(len, self.clips)) - len(self.clips[0]) >= MIN_MAX_CLIPS[0]:
            self.clips.popleft()

    @torch.no_grad()
    def measure(self, objective: Objective) -> dict[str, float]:
        """The figures of the encoder that will be evaluated, "feature_...", on feature_clips of the last clips. With
        shards (FSDP2) all processes must measure."""
        encoder = objective.eval_encoder
        u8 = torch.cat(list(self.clips))[-MIN_MAX_CLIPS[1] :]
        video = normalise(u8.to(next(encoder.parameters()).device))
        was = objective.training
        objective.eval()
        few = video[::EMA_EVERY]
        with unsharded(objective):
            features, target = encoder(video), objective.target(few)
        found = feature_statistics(features, encoder.grid_of(video).t)
        found["target_var"] = float(target.float().flatten(0, 1).var(0).mean())
        if isinstance(objective.target, Ema):
            found |= ema_drift(objective, few, features[::EMA_EVERY])
        objective.train(was)
        self.start = self.start or found
        self.low = self.low + 1 if self.looks_collapsed(found) else 0
        return {"feature_clips": len(u8), **{f"feature_{k}": v for k, v in found.items()}}

    def looks_collapsed(self, now: dict[str, float]) -> bool:
        """The rule of a collapse: the deviation over clips or over tokens is under SHARE of what it was after the first
        step, or the rank is under 2.

        In our healthy runs the first stayed over 0.12 (of pixels, whose features tell places more than clips), from 0.5
        to 0.9 at the start; in a run made to collapse it was 0.04 of the start's after 100 steps. RankMe is no part of
        the rule beyond that: it is of what the features differ in, however little that is, and did not fall there.
        """
        return now["rank"] < 2 or any(
            now[k] < COLLAPSE_FRACTION * self.start[k] for k in ("std_clips", "std_tokens")
        )

    @property
    def collapsed(self) -> bool:
        """Two measurements in a row looked bad, and nothing better has come since."""
        return self.low >= 2

    def collapse(self, row: dict[str, Any]) -> str | None:
        """The line to be said when a second measurement in a row looks bad."""
        if self.low != 2:
            return None
        told = (
            f"{k} {row[f'feature_{k}']:.3g} (at the start {self.start[k]:.3g})"
            for k in ("std_clips", "std_tokens", "rank", "cosine")
        )
        return f"step {row['step']}: the features have collapsed: {', '.join(told)}"

    def state(self) -> dict[str, Any]:
        """Plain data, for the checkpoint."""
        return {"start": self.start, "low": self.low}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.start, self.low = state["start"], state["low"]
