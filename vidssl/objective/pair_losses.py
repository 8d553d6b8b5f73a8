"""How much two views of a clip differ: the losses of pairs in the second formula (agreement.py).

A loss maps predictions [V, B, K], one of each view of the trained branch, targets [G, B, K] of the other
branch, pairs (view, target) and the step to a scalar: the mean over the pairs. With prototypes, K is their
number and the values are cosines. `update` is called after each optimizer step.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidssl.config import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from vidssl.core.schedules import linear
from vidssl.model.vit import Encoder
from vidssl.objective.global_batch import gather_clips, mean_over_processes, own_clips, sinkhorn

Pairs = Sequence[tuple[int, int]]


class PairLoss(nn.Module):
    """Base: the mean over pairs of `pair`."""

    couples_clips = False
    prototypes = 0  # with which the embeddings are compared first; 0: none
    shares_prototypes = False  # whether an averaged branch has those of the trained one
    freeze = 0  # steps in which the prototypes stay as drawn
    all_are_targets = False  # whether every view must be a target

    def __init__(self) -> None:
        super().__init__()

    def pair(self, pred: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of the predictions of one view and its targets, [B, K] each."""
        raise NotImplementedError

    def forward(self, pred: Tensor, target: Tensor, pairs: Pairs, step: int = 0) -> Tensor:
        return torch.stack([self.pair(pred[view], target[other]) for view, other in pairs]).mean()

    def update(self, encoder: Encoder, momentum: float) -> None:
        """Called after every optimizer step."""


class SquaredDistance(PairLoss):
    """Mean squared difference, as in VICReg and LeJEPA."""

    def pair(self, pred: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(pred, target)


class CosineDistance(PairLoss):
    """1 - cosine: BYOL (arXiv 2006.07733, eq. 2) has twice that, SimSiam (arXiv 2011.10566, eq. 1) has it
    without the 1."""

    def pair(self, pred: Tensor, target: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(pred, target, dim=-1).mean()


class NCE(PairLoss):
    """InfoNCE: which clip of the global batch is the target's, by softmax of cosine / temperature.

    own_view: the other clips as the view itself shows them are wrong answers, too, as in SimCLR's NT-Xent
    (arXiv 2002.05709, eq. 1); then every view must be a target. MoCo v3 (arXiv 2104.02057) has those of the
    target's view only. A process returns the mean over its own clips.
    """

    couples_clips = True

    def __init__(self, temperature: PositiveFloat = 0.1, own_view: bool = False):
        super().__init__()
        self.temperature = temperature
        self.own_view = self.all_are_targets = own_view

    def forward(self, pred: Tensor, target: Tensor, pairs: Pairs, step: int = 0) -> Tensor:
        query = F.normalize(pred, dim=-1) / self.temperature
        keys = gather_clips(F.normalize(target, dim=-1), dim=1)
        own = own_clips(query.shape[1], query.device)
        losses = []
        for view, other in pairs:
            logits = query[view] @ keys[other].T  # [B, B * W]
            if self.own_view:
                wrong = (query[view] @ keys[view].T).scatter(1, own[:, None], -torch.inf)
                logits = torch.cat([logits, wrong], 1)
            losses.append(F.cross_entropy(logits, own))
        return torch.stack(losses).mean()


class ClusterCrossEntropy(PairLoss):
    """Cross-entropy of softmax(cosine / temperature) over prototypes with assignments made of the target's
    cosines, without gradients.

    assign: how the assignments are made of x = cosine / target_temperature. softmax: of x, which sharpens it.
    centred: softmax((cosine - centre) / target_temperature), with the running mean of the cosines as centre
    (DINO, arXiv 2104.14294, section 3.1). sinkhorn: exp(x) spread evenly over the prototypes, each view by
    itself (SwAV, arXiv 2006.09882). softmax_sinkhorn: the same with softmax(x) in the place of exp(x) (MSN,
    arXiv 2204.07141; its sharpening of temperature tau by T is the temperature tau * T).
    """

    centre: Tensor

    def __init__(
        self,
        prototypes: PositiveInt,
        temperature: PositiveFloat = 0.1,
        target_temperature: PositiveFloat = 0.04,
        final_target_temperature: PositiveFloat | None = None,
        temperature_warmup: NonNegativeInt = 0,
        assign: Literal["softmax", "centred", "sinkhorn", "softmax_sinkhorn"] = "centred",
        centre_momentum: Fraction = 0.9,
        iterations: PositiveInt = 3,
        shared_prototypes: bool = False,
        freeze_prototypes: NonNegativeInt = 0,
    ):
        """final_target_temperature: reached linearly after `temperature_warmup` steps; null: it stays;
        centre_momentum: of the running mean (centred); iterations: of Sinkhorn's algorithm;
        shared_prototypes: an averaged branch has the prototypes of the trained one (MSN), not their average
        (DINO); freeze_prototypes: first steps in which they stay as drawn."""
        super().__init__()
        self.prototypes = prototypes
        self.shares_prototypes = shared_prototypes
        self.freeze = freeze_prototypes
        self.temperature = temperature
        self.target_temperature = (target_temperature, final_target_temperature or target_temperature)
        self.warmup = temperature_warmup
        self.assign = assign
        self.centre_momentum = centre_momentum
        self.iterations = iterations
        self.couples_clips = assign != "softmax"
        self.register_buffer("centre", torch.zeros(prototypes))
        # of the forward passes of `seen_step`, one of each stream: sum of the cosines, and their number
        self.sums: Tensor | None = None
        self.rows = 0
        self.seen_step = 0

    def temperature_at(self, step: int) -> float:
        """Of the targets."""
        return linear(*self.target_temperature, min(1.0, step / max(1, self.warmup)))

    @torch.no_grad()
    def assignments(self, target: Tensor, step: int = 0) -> Tensor:
        """[..., B, K] cosines to probabilities of the same shape."""
        x = target.float() / self.temperature_at(step)
        if self.assign == "centred":
            self._add_to_centre(target.float().flatten(0, -2), step)
            return (x - self.centre / self.temperature_at(step)).softmax(-1)
        if self.assign == "softmax":
            return x.softmax(-1)
        return sinkhorn(x if self.assign == "sinkhorn" else x.log_softmax(-1), self.iterations)

    def _add_to_centre(self, rows: Tensor, step: int) -> None:
        if step != self.seen_step:  # that of a skipped step is not used
            self.sums = None
            self.rows = 0
            self.seen_step = step
        total = len(rows) * mean_over_processes(rows.mean(0))
        self.sums = total if self.sums is None else self.sums + total
        self.rows += len(rows)

    def forward(self, pred: Tensor, target: Tensor, pairs: Pairs, step: int = 0) -> Tensor:
        log_p = (pred.float() / self.temperature).log_softmax(-1)
        q = self.assignments(target, step)
        return -torch.stack([(q[other] * log_p[view]).sum(-1).mean() for view, other in pairs]).mean()

    @torch.no_grad()
    def update(self, encoder: Encoder, momentum: float) -> None:
        """centre = centre_momentum * centre + (1 - centre_momentum) * mean cosines of the step."""
        if self.sums is not None:
            self.centre.lerp_(self.sums / self.rows, 1 - self.centre_momentum)
            self.sums = None
            self.rows = 0


PAIR_LOSSES = {
    "mse": SquaredDistance,
    "cosine": CosineDistance,
    "nce": NCE,
    "cross_entropy": ClusterCrossEntropy,
}
