"""Targets made of features: clusters of an EMA encoder's tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidssl.config import Fraction, PositiveFloat, PositiveInt
from vidssl.model.vit import Encoder
from vidssl.objective.ema_target import Ema
from vidssl.objective.global_batch import sinkhorn


class Clusters(Ema):
    """The clusters of an EMA encoder's tokens, learned beside the encoder; K = their number.

    Logits are linear in the L2-normalised tokens. Sinkhorn's algorithm assigns tokens to clusters evenly,
    over the clips of all processes; the assignments are the target, and what the linear layer learns by a
    cross-entropy of its own (`clustering` in the log). Source: CAPI (arXiv 2502.08769; model.py,
    OnlineClustering).
    """

    couples_clips = True

    def __init__(
        self,
        encoder: Encoder,
        clusters: PositiveInt = 16384,
        target_temperature: PositiveFloat = 0.06,
        temperature: PositiveFloat = 0.12,
        iterations: PositiveInt = 3,
        positionwise: bool = True,
        lr_scale: PositiveFloat = 0.5,
        momentum: tuple[Fraction, Fraction] = (0.999, 1.0),
    ):
        """clusters: for batches of 10^4 images, fewer for smaller ones; target_temperature: of the
        assignments; temperature: of the layer's own loss; iterations: of Sinkhorn's algorithm; positionwise:
        the tokens of each position are assigned by themselves, which needs several clips for each cluster,
        otherwise all tokens together; lr_scale: factor on the layer's learning rate."""
        super().__init__(encoder, momentum)
        self.width = clusters
        self.target_temperature = target_temperature
        self.temperature = temperature
        self.iterations = iterations
        self.positionwise = positionwise
        self.clusters = nn.Linear(encoder.dim, clusters)
        nn.init.normal_(self.clusters.weight, std=1.0)
        nn.init.zeros_(self.clusters.bias)
        self.clusters.lr_scale = lr_scale  # type: ignore[assignment]

    def logits(self, video: Tensor) -> Tensor:
        """[B, N, K], with gradients of the clusters only."""
        with torch.no_grad():
            tokens = F.normalize(self.encoder(video).float(), dim=-1, eps=1e-7)
        return self.clusters(tokens).float()

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """Probabilities [B, N, K] of the clips alone, for measurements: not made even, without other
        processes."""
        return (self.logits(video) / self.temperature).softmax(-1)

    def with_aux(self, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.logits(video)
        scores = logits.detach() / self.target_temperature
        if self.positionwise:
            assigned = sinkhorn(scores.transpose(0, 1), self.iterations).transpose(0, 1)
        else:
            assigned = sinkhorn(scores.flatten(0, 1), self.iterations).unflatten(0, scores.shape[:2])
        own = -(assigned * (logits / self.temperature).log_softmax(-1)).sum(-1)
        return assigned, {"clustering": own.mean()}
