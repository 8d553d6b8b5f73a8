"""Protocols without training: k nearest neighbours, and retrieval of train samples by test samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from pydantic import Field
from torch import Tensor

from vidssl.config import PositiveFloat, PositiveInt
from vidssl.evaluation.features import TokenSource
from vidssl.evaluation.metrics import average_precision
from vidssl.evaluation.protocol import (
    HyperparameterSettings,
    ProbeProtocol,
    TrainingSet,
    check_mean_pool,
    mean_pool,
)
from vidssl.evaluation.tasks import Task

QUERIES_PER_BATCH = 256
KNN_TEMPERATURE = 0.07  # as DINO's k-NN (arXiv 2104.14294)


def knn_predict(
    train_features: Tensor,
    train_targets: Tensor,
    test_features: Tensor,
    k: Sequence[int],
    temperature: float = KNN_TEMPERATURE,
) -> Tensor:
    """Weighted k nearest neighbours by cosine: for each value of k the mean target of the k nearest train
    samples, weighted by exp(cosine / temperature) (Wu et al. 2018, arXiv 1805.01978).

    train_features f32 [n, D], train_targets f32 [n, C] (one-hot classes, tags, or numbers), test_features f32
    [m, D] -> f32 [len(k), m, C]. A k larger than n is n."""
    train_features = F.normalize(train_features, dim=-1)
    sizes = [min(size, len(train_features)) for size in k]
    predictions = []
    for queries in F.normalize(test_features, dim=-1).split(QUERIES_PER_BATCH):
        cosine, nearest = (queries @ train_features.T).topk(max(sizes))
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        means = (weight[..., None] * train_targets[nearest]).cumsum(1) / weight.cumsum(1)[..., None]
        predictions.append(torch.stack([means[:, size - 1] for size in sizes]))
    return torch.cat(predictions, 1)


class Gallery(NamedTuple):
    """Train samples to search: features f32 [n, D], soft targets f32 [n, C]."""

    features: Tensor
    targets: Tensor
    setting: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class NeighbourProtocol(ProbeProtocol):
    """Compares mean tokens, averaged over the examples of a sample, by cosine."""

    temporal_bins: PositiveInt = 1  # equal parts of a clip in time; their mean tokens are concatenated

    def fitted_to(self, width: int, tokens: int, encoder_heads: int | None) -> Self:
        check_mean_pool(self, self.temporal_bins, tokens)
        return self

    def prepare(self, source: TokenSource, indices: list[int], device: torch.device) -> TokenSource:
        return mean_pool(source, indices, self, self.temporal_bins, device)

    def mean_features(self, source: TokenSource, indices: list[int]) -> Tensor:
        """f32 [n, D]."""
        (tokens,) = source.batches(1, [self.examples_of(indices)])
        return reduce(tokens, "(n e) 1 d -> n d", "mean", e=self.examples_per_sample)

    def train(self, task: Task, data: TrainingSet, settings: HyperparameterSettings) -> list[Gallery]:
        features = self.mean_features(data.source, data.indices)
        return [Gallery(features, task.soft_targets(data.label_tensor), setting) for setting in settings]


@dataclass(frozen=True, kw_only=True)
class Knn(NeighbourProtocol):
    """Weighted k nearest neighbours on mean tokens, by their cosine."""

    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (
        1,
        5,
        10,
        20,
        50,
        100,
        200,
    )  # compared on held-out train
    temperature: PositiveFloat = KNN_TEMPERATURE

    def hyperparameters(self) -> HyperparameterSettings:
        return [{"k": k} for k in self.k]

    def predict(self, models: list[Gallery], source: TokenSource, indices: list[int], task: Task) -> Tensor:
        features, targets, _ = models[0]
        k = [model.setting["k"] for model in models]
        return knn_predict(features, targets, self.mean_features(source, indices), k, self.temperature).cpu()


@dataclass(frozen=True, kw_only=True)
class Retrieval(NeighbourProtocol):
    """Retrieval of train samples by test samples; relevant is a train sample of the same class, or with a tag
    in common. The accuracy is the recall at 1."""

    def hyperparameters(self) -> HyperparameterSettings:
        return [{}]

    def predict(self, models: list[Gallery], source: TokenSource, indices: list[int], task: Task) -> Tensor:
        """The target of the nearest train sample."""
        nearest = [cosine.argmax(1) for cosine in self.cosines(models[0], source, indices)]
        return models[0].targets[torch.cat(nearest)].cpu()[None]

    def cosines(self, model: Gallery, source: TokenSource, indices: list[int]) -> Iterator[Tensor]:
        """f32 [b, n] of each batch of queries with all train samples."""
        train = F.normalize(model.features, dim=-1)
        for queries in F.normalize(self.mean_features(source, indices), dim=-1).split(QUERIES_PER_BATCH):
            yield queries @ train.T

    def extra_metrics(
        self, model: Gallery, source: TokenSource, indices: list[int], task: Task, labels: list[Any]
    ) -> dict[str, float]:
        """recall_at_5 and retrieval_mAP in percent; a query without a relevant train sample counts as
        missed."""
        if task.kind == "number":
            return {}
        at_5, precisions = [], []
        targets = task.soft_targets(task.label_tensor(labels, model.targets.device)).split(QUERIES_PER_BATCH)
        for cosine, wanted in zip(self.cosines(model, source, indices), targets, strict=True):
            relevant = (wanted @ model.targets.T > 0).cpu().numpy()
            for row, hits in zip(cosine.cpu().numpy(), relevant, strict=True):
                at_5.append(hits[np.argsort(-row, kind="stable")[:5]].any())
                precisions.append(average_precision(row, hits) if hits.any() else 0.0)
        metrics = {"recall_at_5": np.mean(at_5), "retrieval_mAP": np.mean(precisions)}
        return {name: round(100 * float(value), 4) for name, value in metrics.items()}
