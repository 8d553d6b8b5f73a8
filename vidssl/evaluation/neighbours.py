"""Protocols without training: k nearest neighbours, and retrieval of train samples by test samples."""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vidssl.config import Count, Positive
from vidssl.evaluation.features import TokenSource
from vidssl.evaluation.metrics import average_precision
from vidssl.evaluation.protocol import HyperparameterGrid, Protocol, TrainingSet, chunks, pooled
from vidssl.evaluation.tasks import Task

QUERIES = 256  # at once


class Gallery(NamedTuple):
    """keys f32 [n, D] of length 1; shares f32 [n, C]: the targets of the samples."""

    keys: Tensor
    shares: Tensor
    setting: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Neighbours(Protocol):
    """By the cosine of mean tokens, averaged over views."""

    temporal_bins: Count = 1  # parts of a clip's tokens, time first, whose means stand end to end

    def look(self, source: TokenSource, numbers: list[int], device: torch.device) -> TokenSource:
        return pooled(source, numbers, self, self.temporal_bins, device)

    def keys(self, source: TokenSource, numbers: list[int]) -> Tensor:
        """f32 [n, D] of length 1."""
        (tokens,) = source.batches(1, [self.examples(numbers)])
        return F.normalize(tokens[:, 0].unflatten(0, (len(numbers), self.views)).mean(1), dim=-1)

    def train(self, task: Task, data: TrainingSet, grid: HyperparameterGrid) -> list[Gallery]:
        return [
            Gallery(self.keys(data.source, data.numbers), task.shares(data.target), setting)
            for setting in grid
        ]


@dataclass(frozen=True, kw_only=True)
class Knn(Neighbours):
    """The k nearest train samples vote with weights exp(cosine / temperature) (Wu et al. 2018, arXiv 1805.01978)."""

    k: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 5, 10, 20, 50, 100, 200)  # the grid
    temperature: Positive = 0.07

    def grid(self) -> HyperparameterGrid:
        return [{"k": k} for k in self.k]

    def predict(self, models: list[Gallery], source: TokenSource, numbers: list[int], task: Task) -> Tensor:
        """Shares of the votes; of a number the weighted mean."""
        keys, shares, _ = models[0]
        found = []
        for part in chunks(numbers, QUERIES):
            cosine, near = (self.keys(source, part) @ keys.T).topk(
                min(max(m.setting["k"] for m in models), len(keys))
            )
            weight = ((cosine - cosine[:, :1]) / self.temperature).exp()
            sums = (weight[..., None] * shares[near]).cumsum(1) / weight.cumsum(1)[..., None]
            found.append(torch.stack([sums[:, min(m.setting["k"], len(keys)) - 1] for m in models]).cpu())
        return torch.cat(found, 1)


@dataclass(frozen=True, kw_only=True)
class Retrieval(Neighbours):
    """Test samples ask, train samples answer; relevant is what has the same class, or a tag in common. The accuracy is
    the recall at 1 (the nearest is relevant)."""

    def grid(self) -> HyperparameterGrid:
        return [{}]

    def predict(self, models: list[Gallery], source: TokenSource, numbers: list[int], task: Task) -> Tensor:
        """The target of the nearest."""
        parts = [(self.keys(source, part) @ models[0].keys.T).argmax(1) for part in chunks(numbers, QUERIES)]
        return models[0].shares[torch.cat(parts)].cpu()[None]

    def more(
        self, model: Gallery, source: TokenSource, numbers: list[int], task: Task, truths: list[Any]
    ) -> dict[str, Any]:
        """recall_at_5 and retrieval_mAP in percent; what has nothing relevant in train counts as missed."""
        if task.kind == "number":
            return {}
        at_5, precision = [], []
        for part, true in zip(chunks(numbers, QUERIES), chunks(truths, QUERIES), strict=True):
            cosine = (self.keys(source, part) @ model.keys.T).cpu().numpy()
            wanted = task.shares(task.target(true, model.shares.device))
            relevant = (wanted @ model.shares.T > 0).cpu().numpy()
            for row, hits in zip(cosine, relevant, strict=True):
                at_5.append(hits[np.argsort(-row, kind="stable")[:5]].any())
                precision.append(average_precision(row, hits) if hits.any() else 0.0)
        found = {"recall_at_5": np.mean(at_5), "retrieval_mAP": np.mean(precision)}
        return {name: round(100 * float(value), 4) for name, value in found.items()}
