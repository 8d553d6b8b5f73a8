"""What all protocols share: how a sample is seen, and the choice among a grid of heads on a held-out part of train."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vidssl.config import Count, Size
from vidssl.core.errors import UserError
from vidssl.core.spectrum import MAX_TOKENS, alpha_req, rankme, singular_values
from vidssl.evaluation.features import (
    FeatureStorage,
    StandardisedFeatures,
    StoredFeatures,
    TokenSource,
    statistics,
)
from vidssl.evaluation.splits import split_by_group
from vidssl.evaluation.tasks import Task
from vidssl.evaluation.views import Control

HyperparameterGrid = list[dict[str, Any]]  # settings, of which one is chosen


class TrainingSet(NamedTuple):
    """What heads learn from: samples of a source, their truths, and those as targets on the device."""

    source: TokenSource
    numbers: list[int]
    truths: list[Any]
    target: Tensor  # [n] or [n, C], see Task


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol(FeatureStorage):
    """A protocol has, beside these options, `grid()`, `train(task, data, grid)` -> a model for each setting, and
    `predict(models, source, numbers, task)` -> f32 [G, n, C], averaged over a sample's views."""

    segments: Count = 1  # clips of a video, evenly spread
    crops: Count = 1  # squares of each, evenly spread along the longer side (published: 3)
    aggregate: Literal["segments", "none"] = (
        "segments"  # a head sees all segments' tokens; none: outputs are averaged
    )
    controls: Annotated[tuple[Control, ...], Field(min_length=1)] = ("none",)
    standardise: bool = (
        False  # tokens: mean of train at each token off, deviation of train in each channel to 1
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # fraction of train on which the grid is compared
    seed: Size = 0

    @property
    def views(self) -> int:
        """Examples of a sample; what a head says of them is averaged."""
        return self.crops * (1 if self.aggregate == "segments" else self.segments)

    def per(self, source: TokenSource) -> int:
        """Clips of an example."""
        return source.shape.clips // self.views

    def examples(self, numbers: list[int]) -> list[int]:
        """All views of these samples."""
        return [n * self.views + v for n in numbers for v in range(self.views)]

    def look(self, source: TokenSource, numbers: list[int], device: torch.device) -> TokenSource:
        """What the head sees of features, of these samples."""
        return source

    def grid(self) -> HyperparameterGrid:
        raise NotImplementedError

    def train(self, task: Task, data: TrainingSet, grid: HyperparameterGrid) -> list[Any]:
        raise NotImplementedError

    def predict(self, models: list[Any], source: TokenSource, numbers: list[int], task: Task) -> Tensor:
        raise NotImplementedError

    def more(
        self, model: Any, source: TokenSource, numbers: list[int], task: Task, truths: list[Any]
    ) -> dict[str, Any]:
        """Figures that only this protocol has, in percent of the samples that were read."""
        return {}


def chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def pooled(
    source: TokenSource, numbers: list[int], protocol: ProbeProtocol, slices: int, device: torch.device
) -> StoredFeatures:
    """Each example's mean over all tokens, or over each of `temporal_bins` equal runs of a clip's tokens (time first), end to
    end: features [n, views, 1, slices * D]; zeros for samples that are not asked for."""
    s, per = source.shape, protocol.per(source)
    if s.tokens % slices:
        raise UserError(
            f"probe.temporal_bins: a clip's {s.tokens} tokens cannot be cut into {slices} equal parts"
        )
    found = torch.zeros(s.samples * protocol.views, 1, slices * s.width)
    lists = chunks(protocol.examples(numbers), 64)
    for examples, tokens in zip(lists, source.batches(per, lists), strict=True):
        found[examples] = tokens.unflatten(1, (per, slices, -1)).mean((1, 3)).flatten(1)[:, None].cpu()
    return StoredFeatures(found.unflatten(0, (s.samples, protocol.views)), device)


def label_free(source: TokenSource, numbers: list[int], protocol: ProbeProtocol) -> dict[str, float]:
    """Scores of the samples' mean tokens for which no label is needed (core/spectrum.py): RankMe and alpha-ReQ, of at
    most TOKENS samples, evenly taken, with their mean taken off. Comparable at equal `samples` only."""
    numbers = numbers[:: -(-len(numbers) // MAX_TOKENS)]
    means = pooled(source, numbers, protocol, 1, torch.device("cpu")).tokens[numbers].mean((1, 2))
    values = singular_values(means - means.mean(0))
    found = {"rankme": rankme(values), "alpha": alpha_req(values)} if len(values) > 3 else {}
    return {**{k: round(v, 4) for k, v in found.items() if np.isfinite(v)}, "samples": len(numbers)}


def select_and_train(
    protocol: ProbeProtocol, task: Task, data: TrainingSet, groups: list[str]
) -> tuple[Any, Callable, dict[str, Any]]:
    """-> (the model, how it sees another source, what was chosen and why). The test set plays no part.

    The grid is trained on a part of train and compared on the rest; the chosen setting is trained again on all.
    """
    dress: Callable[[TokenSource], TokenSource] = lambda source: source  # noqa: E731
    if protocol.standardise:
        moments = statistics(data.source, protocol.per(data.source), protocol.examples(data.numbers), 64)
        dress = lambda source: StandardisedFeatures(source, *moments)  # noqa: E731
    data, grid = data._replace(source=dress(data.source)), protocol.grid()
    scores: list[float] = []
    out = split_by_group(
        data.truths if task.kind == "class" else [0] * len(groups),
        groups,
        protocol.val_fraction,
        protocol.seed,
    )
    if len(grid) > 1:
        if not out.any():
            raise UserError(
                "no group of train can be held out to choose the head on; leave one setting of the grid"
            )
        fitting, choosing = subset(data, ~out), subset(data, out)
        models = protocol.train(task, fitting, grid)
        found = protocol.predict(models, data.source, choosing.numbers, task).double().numpy()
        scores = [round(task.score(output, choosing.truths), 2) for output in found]
    best = int(np.argmax(scores)) if scores else 0
    said = f"held_out_{'accuracy' if task.kind == 'class' else task.metric}"
    tried = [{**setting, said: score} for setting, score in zip(grid, scores, strict=False)]
    chosen = {**grid[best], "tried": tried, "n_held_out": int(out.sum()) if scores else 0}
    return protocol.train(task, data, [grid[best]])[0], dress, chosen


def subset(data: TrainingSet, which: np.ndarray) -> TrainingSet:
    """The samples that are marked, bool [n]."""
    rows = np.flatnonzero(which).tolist()
    return TrainingSet(
        data.source, [data.numbers[i] for i in rows], [data.truths[i] for i in rows], data.target[rows]
    )
