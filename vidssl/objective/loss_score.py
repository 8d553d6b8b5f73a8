"""Scores of a network that predicts the error of each token."""

from typing import Literal

import torch
from torch import Tensor

from vidssl.config import Fraction, NonNegativeFloat, PositiveInt
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask
from vidssl.model.positions import PositionKind
from vidssl.model.prediction import Predicted
from vidssl.model.predictor import JointPredictor, MaskToken
from vidssl.model.vit import Encoder, Init
from vidssl.objective.averages import average_of, update_averages
from vidssl.objective.score_base import Score


class PredictedLoss(Score):
    """The error of each token as a second decoder predicts it, in the EMA of encoder and decoder, which sees
    the whole clip. For mask.rule=hide.

    The decoder learns to rank the errors of the tokens that a clip hides (rank_loss). Source: HPM (arXiv
    2304.05919), section 3, and models_mae_learn_loss.py. There the two decoders share a mask token and the
    layer from the encoder; here each has its own. The last norm and layer have no bias.
    """

    def __init__(
        self,
        encoder: Encoder,
        width: PositiveInt = 512,
        depth: PositiveInt = 8,
        heads: PositiveInt = 16,
        positions: PositionKind = "sincos_uniform",
        class_token: Literal["none", "own", "encoder"] = "none",
        init: Init = "trunc_normal",
        momentum: tuple[Fraction, Fraction] = (0.999, 0.9999),
        weight: NonNegativeFloat = 1.0,
    ):
        """width, depth, heads, positions, class_token, init: of the decoder. momentum: of the EMA, at the
        first and at the last step; weight: of the ranking loss."""
        super().__init__()
        self.momentum = momentum
        self.weight = weight
        self.query = MaskToken(width)
        self.predictor = JointPredictor(
            encoder, 1, width, depth, heads, positions=positions, class_token=class_token, init=init
        )
        for layer in (self.predictor.norm, self.predictor.proj):
            # It would add a constant to all predictions, which their differences cancel.
            layer.register_parameter("bias", None)
        self.average_encoder = average_of(encoder)
        self.average_predictor = average_of(self.predictor)

    @torch.no_grad()
    def forward(self, video: Tensor, grid: Grid, rng: KeyedRNG, encoder: Encoder) -> Tensor:
        z = self.average_encoder(video, return_levels=True)
        ids = torch.arange(grid.n, device=video.device).expand(len(video), -1)
        nothing = ids[:, None, :0]
        tokens = self.average_predictor.forward_tokens(
            z, Mask(ids, nothing), self.query.of_mask(0), grid, include_context=True
        )
        return self.average_predictor.proj(tokens)[:, 0, :, 0].float()

    def aux(self, predicted: Predicted) -> dict[str, Tensor]:
        encoded = predicted.encoded
        query = self.query(encoded, self.predictor)
        found = self.predictor(encoded.z, encoded.mask, query, encoded.grid).target[..., 0]
        loss = rank_loss(found.float().flatten(1), predicted.error.detach().flatten(1))
        return {"aux_rank": self.weight * loss}

    @torch.no_grad()
    def start_from(self, encoder: Encoder) -> None:
        """Starts the EMA from loaded weights of the encoder."""
        torch._foreach_copy_(list(self.average_encoder.parameters()), list(encoder.parameters()))

    def update(self, encoder: Encoder, momentum: float) -> None:
        averages = [self.average_encoder, self.average_predictor]
        update_averages(averages, [encoder, self.predictor], momentum)


def rank_loss(predicted: Tensor, error: Tensor) -> Tensor:
    """Mean over clips of the mean of -log(sigmoid(p_i - p_j) + 1e-6) over the pairs of tokens with error_i >
    error_j; predicted p and error [B, n]."""
    order = (error[:, :, None] - error[:, None]).sign()
    # Each pair occurs twice, with both signs of order and of the difference.
    difference = order * (predicted[:, :, None] - predicted[:, None])
    losses = -torch.log(torch.sigmoid(difference) + 1e-6) * order.abs()
    return (losses.sum((1, 2)) / order.abs().sum((1, 2)).clamp_min(1)).mean()
