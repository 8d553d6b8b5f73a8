"""Base class of probe protocols: views of a sample, and hyperparameter selection on held-out train."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from einops import rearrange, reduce
from pydantic import Field
from torch import Tensor

from vidssl.config import NonNegativeInt, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.log import logger
from vidssl.core.precision import resolve_precision
from vidssl.core.spectrum import MAX_TOKENS, alpha_req, rankme, singular_values
from vidssl.core.splits import split_by_group
from vidssl.evaluation.cluster_scores import cluster_scores
from vidssl.evaluation.controls import Control
from vidssl.evaluation.features import (
    FeatureStorage,
    StandardisedFeatures,
    StoredFeatures,
    TokenSource,
    token_statistics,
)
from vidssl.evaluation.processes import ONE_PROCESS
from vidssl.evaluation.splits import strata_of
from vidssl.evaluation.tasks import Task
from vidssl.evaluation.transfers import downloads

HyperparameterSettings = list[dict[str, Any]]  # candidates, one of which is selected
POOL_BATCH = 64  # examples
Tokens = Literal["patches", "class", "both"]  # of a clip


class TrainingSet(NamedTuple):
    """Samples that heads are trained on."""

    source: TokenSource
    indices: list[int]  # of the samples in `source`
    labels: list[Any]
    label_tensor: Tensor  # the labels on the device, [n] or [n, C]; see Task.label_tensor


class FittedModels(NamedTuple):
    """Models, and the statistics of the samples that they were trained on and of no others."""

    models: list[Any]
    apply_standardisation: Callable[[TokenSource], TokenSource]  # to any source
    task: Task  # with the statistics of the labels


class TrainedProbe(NamedTuple):
    """A head trained with the hyperparameters selected on held-out train."""

    model: Any
    apply_standardisation: Callable[[TokenSource], TokenSource]  # to any source, with train's statistics
    selection: dict[str, Any]  # the selected setting, and the scores of all
    task: Task  # with the statistics of train's labels


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol(FeatureStorage):
    """Base of the protocols, which define `hyperparameters`, `train` and `predict`."""

    segments: PositiveInt = 1  # clips of a video, evenly spread
    crops: PositiveInt = 1  # squares of each clip, evenly spread along the longer side (published: 3)
    # heads see the tokens of all segments, or of each alone
    aggregate: Literal["segments", "none"] = "segments"
    controls: Annotated[tuple[Control, ...], Field(min_length=1)] = ("none",)
    # those of the patches, the class token alone, or it and then the patches' (attentive heads)
    tokens: Tokens = "patches"
    standardise: bool = False  # subtract train's mean at each token, divide by its deviation in each channel
    # of encoder and attentive heads; auto: bf16 where every GPU computes it in hardware, else fp32
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of train; settings are compared on it
    seed: NonNegativeInt = 0

    def resolved(self) -> Self:
        """This protocol with the precision that `auto` means on this machine."""
        in_bf16 = resolve_precision(self.precision) == "bf16"
        return replace(self, precision="bf16" if in_bf16 else "fp32")

    @property
    def product_precision(self) -> Literal["fp32", "bf16"]:
        """Of matrix products; fp32 until `auto` is resolved."""
        return "bf16" if self.precision == "bf16" else "fp32"

    @property
    def uses_all_processes(self) -> bool:
        """Whether the processes share the training of heads; else the first one trains them alone."""
        return False

    @property
    def examples_per_sample(self) -> int:
        """Number of examples of a sample; their predictions are averaged."""
        return self.crops * (1 if self.aggregate == "segments" else self.segments)

    @property
    def clips_of_example(self) -> int:
        return self.segments * self.crops // self.examples_per_sample

    def clips_per_example(self, source: TokenSource) -> int:
        return source.shape.clips // self.examples_per_sample

    def examples_of(self, indices: list[int]) -> list[int]:
        """Numbers of all examples of these samples."""
        n = self.examples_per_sample
        return [index * n + example for index in indices for example in range(n)]

    def fitted_to(self, width: int, tokens: int, encoder_heads: int | None) -> Self:
        """This protocol for features of this size. Raises UserError if they do not suit it, before any are
        computed.

        tokens: of a clip; encoder_heads: attention heads of the encoder, if known."""
        return self

    def prepare(self, source: TokenSource, indices: list[int], device: torch.device) -> TokenSource:
        """The features of these samples as heads see them."""
        return source

    def hyperparameters(self) -> HyperparameterSettings:
        raise NotImplementedError

    def train(self, task: Task, data: TrainingSet, settings: HyperparameterSettings) -> list[Any]:
        """One model per setting."""
        raise NotImplementedError

    def predict(self, models: list[Any], source: TokenSource, indices: list[int], task: Task) -> Tensor:
        """f32 [models, n, C] on the CPU, averaged over the examples of a sample."""
        raise NotImplementedError

    def extra_metrics(
        self, model: Any, source: TokenSource, indices: list[int], task: Task, labels: list[Any]
    ) -> dict[str, float]:
        """Metrics that only this protocol has, in percent of these samples."""
        return {}


def chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def check_mean_pool(protocol: ProbeProtocol, temporal_bins: int, tokens: int) -> None:
    """Raises UserError if the mean over a clip's `tokens` in each of so many bins is not meant."""
    if protocol.tokens == "both":
        raise UserError(
            "probe.tokens=both is for attentive heads, a mean over all would hide the class token: "
            "give class or patches"
        )
    if protocol.tokens == "class" and temporal_bins > 1:
        raise UserError(
            f"probe.temporal_bins={temporal_bins}: a clip has one class token; "
            "give probe.temporal_bins=1, or probe.tokens=patches"
        )
    check_temporal_bins(temporal_bins, tokens)


def check_temporal_bins(bins: int, tokens: int) -> None:
    """tokens: of a clip."""
    if tokens % bins:
        fitting = [n for n in range(1, tokens + 1) if tokens % n == 0][:8]
        raise UserError(
            f"probe.temporal_bins: {bins} does not divide a clip's {tokens} tokens; "
            f"{', '.join(map(str, fitting))} do"
        )


def mean_pool(
    source: TokenSource, indices: list[int], protocol: ProbeProtocol, temporal_bins: int, device: torch.device
) -> StoredFeatures:
    """Mean over the tokens of an example, or over each of `temporal_bins` equal parts of its clips in time,
    concatenated: features [n, examples per sample, 1, temporal_bins * D] on every process, which must all
    call it; zeros for samples not in `indices`."""
    shape = source.shape
    clips = protocol.clips_per_example(source)
    check_temporal_bins(temporal_bins, shape.tokens)
    per_sample = protocol.examples_per_sample
    pooled = torch.zeros(shape.samples * per_sample, 1, temporal_bins * shape.width)
    own = [indices[position] for position in source.positions(indices)]
    batches = chunks(protocol.examples_of(own), POOL_BATCH)

    def pooled_batches() -> Iterator[tuple[list[int], Tensor]]:
        pattern = "e (clips bins n) d -> e 1 (bins d)"
        for examples, tokens in zip(batches, source.batches(clips, batches), strict=True):
            yield examples, reduce(tokens, pattern, "mean", clips=clips, bins=temporal_bins)

    for copy in downloads(pooled_batches(), source.processes.device):
        pooled[copy.label] = copy.on_host()
    pooled = source.processes.sum(pooled)
    processes = source.processes if protocol.uses_all_processes else ONE_PROCESS
    return StoredFeatures(rearrange(pooled, "(n e) 1 d -> n e 1 d", e=per_sample), device, processes)


def label_free_scores(source: TokenSource, indices: list[int], protocol: ProbeProtocol) -> dict[str, float]:
    """Scores that need no labels, of the samples' mean tokens: RankMe and alpha-ReQ of centered ones
    (core/spectrum.py), cluster learnability and intrinsic dimension (cluster_scores.py), of at most
    MAX_TOKENS samples, evenly spaced. Comparable only at equal `samples`. Every process must call it; the
    first one gets the scores, the others none."""
    indices = indices[:: -(-len(indices) // MAX_TOKENS)]
    pooled = mean_pool(source, indices, protocol, 1, torch.device("cpu"))
    if not source.processes.is_main:
        return {}
    means = pooled.tokens[indices].mean((1, 2))
    values = singular_values(means - means.mean(0))
    scores = {"rankme": rankme(values), "alpha": alpha_req(values)} if len(values) > 3 else {}
    if len(means) > 3 and means.isfinite().all():
        scores |= cluster_scores(means)
    finite = {name: round(score, 4) for name, score in scores.items() if np.isfinite(score)}
    return {**finite, "samples": len(indices)}


def select_and_train(
    protocol: ProbeProtocol, task: Task, data: TrainingSet, groups: list[str]
) -> TrainedProbe:
    """Selects a setting by training all of them on a part of train and comparing them on the rest, and trains
    it again on all of train. The test set plays no part. groups: the group of each sample, held out as a
    whole."""
    settings = protocol.hyperparameters()
    strata = strata_of(task, data.labels)
    split = split_by_group(groups, strata, protocol.val_fraction, protocol.seed)
    scores: list[float] = []
    if len(settings) > 1:
        if not split.held_out.any():
            raise UserError(
                "no group of train can be held out to select hyperparameters; give a single setting"
            )
        if split.note:
            _warn_once(f"probe.val_fraction: of '{task.label}', held out of train: {split.note}")
        fitted = fit_models(protocol, task, subset(data, ~split.held_out), settings)
        validation = subset(data, split.held_out)
        source = fitted.apply_standardisation(data.source)
        outputs = protocol.predict(fitted.models, source, validation.indices, fitted.task).double().numpy()
        # in full: R2 is no percentage
        scores = [fitted.task.score(output, validation.labels) for output in outputs]
    best = settings[int(np.argmax(scores))] if scores else settings[0]
    metric = f"held_out_{'accuracy' if task.kind == 'class' else task.metric}"
    tried = [{**setting, metric: score} for setting, score in zip(settings, scores, strict=False)]
    selection = {**best, "tried": tried, "n_held_out": int(split.held_out.sum()) if scores else 0}
    fitted = fit_models(protocol, task, data, [best])
    return TrainedProbe(fitted.models[0], fitted.apply_standardisation, selection, fitted.task)


def fit_models(
    protocol: ProbeProtocol, task: Task, data: TrainingSet, settings: HyperparameterSettings
) -> FittedModels:
    """Trains a model per setting. Features and numbers are standardised with the statistics of `data`."""
    task = task.fitted(data.labels)
    apply_standardisation = _make_standardisation(protocol, data)
    label_tensor = task.label_tensor(data.labels, data.label_tensor.device)
    data = data._replace(source=apply_standardisation(data.source), label_tensor=label_tensor)
    return FittedModels(protocol.train(task, data, settings), apply_standardisation, task)


@functools.cache
def _warn_once(line: str) -> None:
    """The heads of every control are selected on the same samples."""
    logger.warning(line)


@dataclass(frozen=True)
class Standardisation:
    """Standardises any source with train's statistics."""

    mean: Tensor  # f32 [clips_per_example * N, D]
    std: Tensor  # f32 [D]

    def __call__(self, source: TokenSource) -> TokenSource:
        return StandardisedFeatures(source, self.mean, self.std)


def _make_standardisation(protocol: ProbeProtocol, data: TrainingSet) -> Callable[[TokenSource], TokenSource]:
    if not protocol.standardise:
        return lambda source: source
    own = [data.indices[position] for position in data.source.positions(data.indices)]
    batches = chunks(protocol.examples_of(own), POOL_BATCH)
    return Standardisation(*token_statistics(data.source, protocol.clips_per_example(data.source), batches))


def subset(data: TrainingSet, mask: np.ndarray) -> TrainingSet:
    """The samples where mask bool [n] is true."""
    rows = np.flatnonzero(mask).tolist()
    return TrainingSet(
        data.source,
        [data.indices[row] for row in rows],
        [data.labels[row] for row in rows],
        data.label_tensor[rows],
    )
