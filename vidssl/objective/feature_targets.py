"""Targets made of features: clusters of an EMA encoder's tokens, and an error that clusters both sides."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidssl.config import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from vidssl.core.precision import without_autocast
from vidssl.model.grid import gather_tokens
from vidssl.model.prediction import Encoded
from vidssl.model.vit import Encoder
from vidssl.objective.averages import average_of, update_averages
from vidssl.objective.ema_target import Ema, without_class_token
from vidssl.objective.global_batch import sinkhorn
from vidssl.objective.pair_losses import ClusterCrossEntropy


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
        wd_scale: NonNegativeFloat = 0.1,
        momentum: tuple[Fraction, Fraction] = (0.999, 1.0),
    ):
        """clusters: for batches of 10^4 images, fewer for smaller ones; target_temperature: of the
        assignments; temperature: of the layer's own loss; iterations: of Sinkhorn's algorithm; positionwise:
        the tokens of each position are assigned by themselves, which needs several clips for each cluster,
        otherwise all tokens together; lr_scale, wd_scale: factors on the
        layer's learning rate and weight decay."""
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
        self.clusters.wd_scale = wd_scale  # type: ignore[assignment]

    def logits(self, video: Tensor) -> Tensor:
        """[B, N, K], with gradients of the clusters only."""
        with torch.no_grad():
            tokens = F.normalize(self.encoder(video).float(), dim=-1, eps=1e-7)
        # Divided by a small temperature, the roundings of bf16 would be as large as the differences.
        with without_autocast(video.device):
            return self.clusters(tokens)

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


class SelfAssigned(Ema):
    """The probabilities that the EMA of encoder and head gives to K prototypes, centred and sharpened.

    The head is the predictor's. Source: the patch loss of iBOT (arXiv 2111.07832, section 3.2; main_ibot.py);
    its arithmetic is that of DINO (arXiv 2104.14294).
    """

    couples_clips = True
    head: nn.Module

    def __init__(
        self,
        encoder: Encoder,
        prototypes: PositiveInt = 8192,
        temperature: PositiveFloat = 0.04,
        final_temperature: PositiveFloat = 0.07,
        temperature_warmup: NonNegativeInt = 0,
        centre_momentum: Fraction = 0.9,
        momentum: tuple[Fraction, Fraction] = (0.996, 1.0),
    ):
        """final_temperature: reached linearly after `temperature_warmup` steps; centre_momentum: of the
        running mean of the cosines."""
        super().__init__(encoder, momentum)
        self.width = prototypes
        self.per_mask = True
        self.assign = ClusterCrossEntropy(
            prototypes,
            target_temperature=temperature,
            final_target_temperature=final_temperature,
            temperature_warmup=temperature_warmup,
            centre_momentum=centre_momentum,
        )

    def bind(self, predictor: nn.Module) -> None:
        head = predictor.proj
        assert isinstance(head, nn.Module)
        self._student = [head]  # in a list, so that it is not registered a second time
        self.head = average_of(head)

    @torch.no_grad()
    def cosines(self, video: Tensor) -> Tensor:
        """[B, N, K]"""
        # what the student's head gets: all levels, after the encoder's own head
        features = without_class_token(self.encoder, self.encoder(video, return_levels=True))
        return self.head(features).float()

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """Probabilities [B, N, K], for measurements: the centre stays."""
        return ((self.cosines(video) - self.assign.centre) / self.assign.temperature_at(0)).softmax(-1)

    def prepare(self, video: Tensor) -> Tensor:
        return self.cosines(video)

    def for_mask(self, encoded: Encoded) -> Tensor:
        assert encoded.prepared is not None
        assigned = self.assign.assignments(encoded.prepared, encoded.rng.step)
        return gather_tokens(assigned, encoded.mask.target)

    def update(self, encoder: Encoder, momentum: float) -> None:
        update_averages([self.encoder, self.head], [encoder, *self._student], momentum)
        self.assign.update(encoder, momentum)


class SwappedClusters(nn.Module):
    """An error: each side of prediction and target must tell the other's cluster.

    The clusters are learned; Sinkhorn's algorithm assigns all hidden tokens of the step to them evenly, and
    the best is taken. Predictions do not move the clusters. Source: SIGMA (arXiv 2407.15447, section 3;
    engine_for_pretraining.py, modeling_pretrain.py), which norms the prototypes in place.
    """

    couples_clips = True

    def __init__(
        self,
        width: int,
        clusters: PositiveInt = 3000,
        temperature: PositiveFloat = 0.1,
        target_temperature: PositiveFloat = 0.05,
        iterations: PositiveInt = 10,
    ):
        """temperature: of the cross-entropies; target_temperature: of the assignments; iterations: of
        Sinkhorn's algorithm."""
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(clusters, width))
        self.temperature = temperature
        self.target_temperature = target_temperature
        self.iterations = iterations

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """[B, M, Nt, K] each. Returns [B, M, Nt]."""
        prototypes = F.normalize(self.prototypes.float(), dim=-1)
        with without_autocast(pred.device):
            of_target = F.normalize(target.float(), dim=-1) @ prototypes.T
            of_pred = F.normalize(pred.float(), dim=-1) @ prototypes.detach().T
        return self._error(of_target, of_pred) + self._error(of_pred, of_target)

    def _error(self, cosines: Tensor, other: Tensor) -> Tensor:
        """Cross-entropy of cosines [B, M, Nt, clusters] with the clusters of the other side."""
        rows = other.detach().flatten(0, 2) / self.target_temperature
        best = sinkhorn(rows, self.iterations).argmax(-1).reshape(cosines.shape[:-1])
        log_p = (cosines / self.temperature).log_softmax(-1)
        return -log_p.gather(-1, best[..., None]).squeeze(-1)
