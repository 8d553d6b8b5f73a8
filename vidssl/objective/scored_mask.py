"""The mask that is made from a score of each token."""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from vidssl.config import Fraction, NonNegativeInt
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.core.schedules import linear
from vidssl.model.grid import Grid, Mask
from vidssl.objective.selection import indices_of, lowest_ids


@dataclass(frozen=True)
class Scored:
    """One rule of selection for all scores (method.score).

    rule "hide": the tokens with the highest scores are hidden (HPM); "show": they are the context (MGMAE,
    ColorMAE); "sample": the context is drawn without replacement in proportion to the scores (AdaMAE). Equal
    scores are ordered at random.
    """

    ratio: Fraction = 0.75  # fraction of the tokens hidden from the encoder
    rule: Literal["hide", "show", "sample"] = "hide"
    # part of the hidden tokens (hide) or of the context (show) that the scores decide, at the first step and
    # from share_steps on; the rest is random (HPM: 0 to 0.5)
    share: tuple[Fraction, Fraction] = (1.0, 1.0)
    share_steps: NonNegativeInt = 0  # steps in which the share rises or falls; 0: it has its last value
    # fraction with the lowest scores that is neither seen nor predicted (EVEREST: 0.7); part of the ratio
    neither: Fraction = 0.0
    per_slice: bool = False  # the same numbers in every time slice (MGMAE)

    counts_vary = False

    def __post_init__(self) -> None:
        if self.rule == "sample" and self.share != (1.0, 1.0):
            raise UserError(
                f"method.mask.share {list(self.share)}: goes with the rules hide and show, not sample"
            )

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        raise UserError("method.mask.kind=scored is made from scores: name one with method.score.kind")

    def from_scores(self, scores: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        """scores f32 [B, N]; for the rule "sample" not negative."""
        slices = grid.t if self.per_slice else 1

        def by_slice(x: Tensor) -> Tensor:
            return rearrange(x, "b (t n) -> (b t) n", t=slices)

        noise = by_slice(rng.rand(grid.n)), by_slice(rng.rand(grid.n))
        ids = self.select(by_slice(scores.detach().float()), *noise, rng.step)
        start = torch.arange(slices, device=scores.device)[:, None] * (grid.n // slices)
        context, target = (
            rearrange(rearrange(i, "(b t) k -> b t k", t=slices) + start, "b t k -> b (t k)") for i in ids
        )
        return [Mask(context, target[:, None])]

    def counts(self, n: int) -> tuple[int, int]:
        """Numbers of context and target tokens of n."""
        # The small number undoes the rounding of products such as 10 * (1 - 0.9).
        context = int(n * (1 - self.ratio) + 1e-9)
        target = int(n * (1 - self.neither) + 1e-9) - context
        if context < 1 or target < 1:
            raise UserError(
                f"method.mask: ratio {self.ratio} and neither {self.neither} of {n} tokens leave {context} "
                f"to see and {target} to predict; at least one of each must be left"
            )
        return context, target

    def select(self, scores: Tensor, ties: Tensor, noise: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Returns the ids of context and targets i64 [B, Nc], [B, Nt], ascending; scores, and uniform
        numbers for the order of equal ones and for random choices, f32 [B, n]."""
        n = scores.shape[1]
        num_context, num_targets = self.counts(n)
        rank = ranks(scores, ties)
        progress = 1.0 if step >= self.share_steps else step / self.share_steps
        share = linear(*self.share, progress)
        if self.rule == "hide":
            order = noise + (rank >= n - int(share * num_targets))
        elif self.rule == "show":
            order = noise - 1.0 * (rank >= n - int(share * num_context))
        else:
            # The first of exponential clocks whose rates are the scores: drawn in proportion to them.
            clock = torch.log(-torch.log1p(-noise))
            order = clock - scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        apart = rank < n - num_context - num_targets
        context = lowest_ids(order.masked_fill(apart, torch.inf), num_context)
        return context, indices_of(~apart.scatter(1, context, True), num_targets)


def ranks(scores: Tensor, ties: Tensor) -> Tensor:
    """i64 [B, n]: 0 for the lowest score of a row, n - 1 for the highest; equal ones by `ties` [B, n]."""
    order = ties.argsort(1)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, stable=True))
    return order.argsort(1)
