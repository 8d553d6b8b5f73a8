"""The loss of hidden patches beside that of whole views (agreement.py): iBOT.

It has the projector, the prototypes and the averages of the loss of views, so that a class token and a patch
are told apart by the same vectors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.model.vit import Encoder
from vidssl.objective.corruptions import Token, hidden_tokens
from vidssl.objective.pair_losses import ClusterCrossEntropy, PairLoss
from vidssl.objective.projector import Projector
from vidssl.objective.view_schema import PatchConfig, ViewGroup

Replaced = tuple[Tensor, Tensor]  # of Encoder.forward


class PatchAgreement(nn.Module):
    """Hidden patches of a view, in whose place the trained encoder sees a learned vector, name the prototypes
    that the averaged branch gives the same patches of the whole view, centred and sharpened.

    Source: iBOT (arXiv 2111.07832, section 3.2; main_ibot.py, iBOTLoss), whose centre of patches is another
    than that of class tokens.
    """

    couples_clips = True

    def __init__(self, encoder: Encoder, config: PatchConfig, prototypes: int):
        super().__init__()
        options = vars(config).copy()
        self.weight = options.pop("weight")
        self.hidden = Token(encoder)
        self.clusters = ClusterCrossEntropy(prototypes, **options)

    def replaced(self, mask: Mask, grid: Grid) -> Replaced:
        """What stands in for the hidden patches of a view."""
        return hidden_tokens(mask, grid), self.hidden.token

    def forward(
        self, cosines: Sequence[Tensor], targets: Sequence[Tensor], masks: Sequence[Mask], step: int
    ) -> Tensor:
        """Returns the mean over the views. For each view, cosines [B, Nt, K] of its hidden patches and
        targets [B, N, K] of all patches with the prototypes."""
        losses = []
        for own, target, mask in zip(cosines, targets, masks, strict=True):
            assigned = gather_tokens(self.clusters.assignments(target, step), mask.target.flatten(1))
            log_p = (own.float() / self.clusters.temperature).log_softmax(-1)
            losses.append(-(assigned * log_p).sum(-1).mean())
        return torch.stack(losses).mean()

    def update(self, encoder: Encoder, momentum: float) -> None:
        self.clusters.update(encoder, momentum)


def build_patch_agreement(
    config: PatchConfig,
    encoder: Encoder,
    views: Sequence[ViewGroup],
    loss: PairLoss,
    projectors: Sequence[Projector],
    branch: str,
    has_mask: bool,
) -> PatchAgreement:
    """Raises UserError unless the views, their loss and their projectors suit a loss of patches."""
    fits = (
        (has_mask, "needs method.agree.mask, which hides them"),
        (branch == "ema" and bool(loss.prototypes), "needs branch: ema and agreement.kind: cross_entropy"),
        (
            any(view.masked for view in views) and all(view.role == "both" for view in views if view.masked),
            "compares the two branches: masked views must have the role both, give others masked: false",
        ),
        (
            not any(projector.couples_clips for projector in projectors),
            "needs projector and predictor with norm: none or layer, as patches are no clips",
        ),
    )
    for is_so, text in fits:
        if not is_so:
            raise UserError(f"method.agree.patches: {text}")
    return PatchAgreement(encoder, config, loss.prototypes)
