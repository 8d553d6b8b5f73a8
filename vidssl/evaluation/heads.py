"""Heads trained on frozen tokens: attentive and linear. The heads of all settings share each batch."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from pydantic import Field
from torch import Tensor, nn

from vidssl.config import NonNegativeFloat, PositiveFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.progress import track
from vidssl.core.schedules import cosine
from vidssl.evaluation.features import TokenSource
from vidssl.evaluation.head_memory import HeadSize, attention_heads
from vidssl.evaluation.protocol import (
    HyperparameterSettings,
    ProbeProtocol,
    TrainingSet,
    check_mean_pool,
    chunks,
    mean_pool,
)
from vidssl.evaluation.solvers import minimise, ridge_regression
from vidssl.evaluation.tasks import Task
from vidssl.evaluation.transfers import downloads
from vidssl.model.heads import HEAD_EPS, AttentiveHead, LinearHead


def only_cross_attend(heads: Sequence[nn.Module]) -> bool:
    """Whether all heads are attentive heads without self-attention blocks."""
    return all(isinstance(head, AttentiveHead) and not len(head.blocks) for head in heads)


def cross_attend_jointly(heads: Sequence[AttentiveHead], tokens: Tensor) -> Iterator[Tensor]:
    """Yields the logits [B, C] of each head of depth 1 for tokens f32 [B, N, D], equal to those of each head
    alone.

    The tokens are normalised once: the norm's scale and shift are applied after the products (a shift of the
    keys adds the same to all scores of a query, which the softmax removes). The queries of all heads form one
    matrix product."""
    x = F.layer_norm(tokens, tokens.shape[-1:], eps=HEAD_EPS)
    queries = []
    for head in heads:
        split = {"h": head.xattn.heads}
        q = rearrange(head.xattn.q(head.query_tokens[0, 0]), "(h e) -> h e", **split)
        key = rearrange(head.xattn.kv.weight.chunk(2)[0], "(h e) d -> h e d", **split)
        queries.append(torch.einsum("he,hed->hd", q, key) * head.norm1.weight / q.shape[-1] ** 0.5)
    scores = torch.cat(queries).expand(len(x), -1, -1) @ x.transpose(1, 2)  # [B, heads * H, N]
    attended = (scores.softmax(-1) @ x).chunk(len(heads), 1)
    for head, mean in zip(heads, attended, strict=True):
        value = rearrange(head.xattn.kv.weight.chunk(2)[1], "(h e) d -> h e d", h=head.xattn.heads)
        bias = head.xattn.kv.bias.chunk(2)[1]
        mean = mean * head.norm1.weight + head.norm1.bias  # [B, H, D]
        query = head.query_tokens[0] + torch.einsum("bhd,hed->bhe", mean, value).flatten(1) + bias
        yield head.linear(query + head.mlp(head.norm2(query)))


def all_logits(heads: Sequence[nn.Module], tokens: Tensor) -> Iterator[Tensor]:
    """Yields the logits [B, C] of each head."""
    if only_cross_attend(heads):
        return cross_attend_jointly(heads, tokens)  # type: ignore[arg-type]
    return (head(tokens) for head in heads)


class BatchPart(NamedTuple):
    """Examples of a batch that heads see at once."""

    rows: Tensor  # i64 [b], of the training set
    examples: list[int]
    weight: float  # fraction of the batch of all processes


@dataclass(frozen=True, kw_only=True)
class TrainedHeadProtocol(ProbeProtocol):
    """Heads trained by AdamW with a cosine schedule from `lr` to zero."""

    epochs: PositiveInt = 20
    batch: PositiveInt = 64  # videos
    # all pairs of lr and weight_decay are compared
    lr: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1e-3,)
    weight_decay: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (0.01,)
    clip_grad: PositiveFloat | None = 1.0  # maximum norm of a head's gradient (V-JEPA 2: null)
    # device memory of the activations of heads in training: a batch is divided into parts that fit, and where
    # no example does, self-attention blocks are computed again in the backward pass
    head_memory_gb: PositiveFloat = 16.0

    def hyperparameters(self) -> HyperparameterSettings:
        return [{"lr": lr, "weight_decay": decay} for lr in self.lr for decay in self.weight_decay]

    @property
    def uses_all_processes(self) -> bool:
        return True

    def make_head(self, source: TokenSource, outputs: int) -> nn.Module:
        """A head for the features of `source`."""
        raise NotImplementedError

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """The precision of the heads' products; weights, gradients and moments are f32."""
        return contextlib.nullcontext()

    def examples_at_once(self, width: int, tokens: int) -> int:
        """Examples of a batch that heads see at once. width, tokens: of an example."""
        return self.batch

    def train(self, task: Task, data: TrainingSet, settings: HyperparameterSettings) -> list[nn.Module]:
        """One head per setting, all with the same initial weights and batches, in one pass. An epoch sees one
        example of each sample, drawn at random. Each process takes its part of every batch."""
        torch.manual_seed(self.seed)
        initial = self.make_head(data.source, task.num_outputs)
        heads = [deepcopy(initial).to(data.label_tensor.device) for _ in settings]
        self.fit(heads, task, data, settings)
        return [head.eval() for head in heads]

    def fit(
        self, heads: list[nn.Module], task: Task, data: TrainingSet, settings: HyperparameterSettings
    ) -> None:
        """Trains heads that are on the device of the labels, in place."""
        device = data.label_tensor.device
        groups = [
            {"params": list(head.parameters()), **setting}
            for head, setting in zip(heads, settings, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, fused=True)
        epochs = [torch.randperm(len(data.indices)).split(self.batch) for _ in range(self.epochs)]
        steps = self._plan_steps(data, [batch for batches in epochs for batch in batches])
        source = data.source.batches(
            self.clips_per_example(data.source), [part.examples for step in steps for part in step]
        )
        # Deep heads are run one by one: their activations are large.
        groups_at_once = [heads] if only_cross_attend(heads) else [[head] for head in heads]
        for number, step in enumerate(track(steps, f"{task.label}: {len(heads)} heads", "steps")):
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group["lr"] = cosine(setting["lr"], 0.0, number / len(steps))
            optimizer.zero_grad()
            for part in step:
                tokens = next(source)
                labels = data.label_tensor[part.rows.to(device, non_blocking=True)]
                for some in groups_at_once:
                    with self.autocast(device):
                        losses = [task.loss(logits, labels) for logits in all_logits(some, tokens)]
                    (torch.stack(losses).sum() * part.weight).backward()
            data.source.processes.sum_gradients(heads)
            if self.clip_grad is not None:
                for head in heads:
                    torch.nn.utils.clip_grad_norm_(head.parameters(), self.clip_grad)
            optimizer.step()

    def _plan_steps(self, data: TrainingSet, batches: list[Tensor]) -> list[list["BatchPart"]]:
        """This process's part of each batch (rows i64 [b] of `data`), divided into what heads see at once."""
        at_once = self._examples_at_once(data.source)
        examples = self._draw_examples(data.indices, batches)
        steps = []
        for rows, numbers in zip(batches, examples, strict=True):
            own = data.source.positions([data.indices[row] for row in rows.tolist()])
            steps.append(
                [
                    BatchPart(rows[part], [numbers[i] for i in part], len(part) / len(rows))
                    for part in chunks(own, at_once)
                ]
            )
        return steps

    def _examples_at_once(self, source: TokenSource) -> int:
        return self.examples_at_once(source.shape.width, source.shape.tokens * self.clips_per_example(source))

    def _draw_examples(self, indices: list[int], rows: list[Tensor]) -> list[list[int]]:
        """Returns one random example of each sample, for each batch of rows of `indices`."""
        n = self.examples_per_sample
        rng = np.random.default_rng((self.seed, 6))
        return [[indices[row] * n + int(rng.integers(n)) for row in batch.tolist()] for batch in rows]

    @torch.no_grad()
    def predict(self, models: list[nn.Module], source: TokenSource, indices: list[int], task: Task) -> Tensor:
        positions = source.positions(indices)
        examples = self.examples_of([indices[position] for position in positions])
        batches = chunks(examples, self._examples_at_once(source))
        device = next(models[0].parameters()).device

        def probabilities() -> Iterator[tuple[None, Tensor]]:
            for tokens in source.batches(self.clips_per_example(source), batches):
                with self.autocast(device):
                    logits = list(all_logits(models, tokens))
                yield None, torch.stack([task.probabilities(output.float()) for output in logits])

        outputs = [torch.empty(len(models), 0, task.num_outputs)]
        outputs += [copy.on_host() for copy in downloads(probabilities(), device)]
        part = reduce(torch.cat(outputs, 1), "g (n e) c -> g n c", "mean", e=self.examples_per_sample)
        return source.processes.assemble(part, positions, len(indices))


@dataclass(frozen=True, kw_only=True)
class Attentive(TrainedHeadProtocol):
    """V-JEPA's probe (evals/video_classification_frozen), and with depth 4 V-JEPA 2's. Features are computed
    once per video, without augmentation; the published protocols augment and encode in every epoch."""

    depth: PositiveInt = 1  # depth - 1 self-attention blocks over all tokens, then the cross-attention
    heads: PositiveInt | None = None  # attention heads of the pooler; None: as many as the encoder has

    def fitted_to(self, width: int, tokens: int, encoder_heads: int | None) -> Self:
        heads = self.heads or attention_heads(width, encoder_heads)
        if width % heads:
            raise UserError(
                f"probe.heads: {heads} heads do not divide features of width {width}; leave it out, or give "
                f"{', '.join(str(n) for n in range(1, 65) if width % n == 0)}"
            )
        fitted = replace(self, heads=heads)
        per_example = self.clips_of_example * tokens
        if not fitted.examples_at_once(width, per_example):
            needed = fitted.head_size(width, per_example).example_bytes / 1e9
            raise UserError(
                f"probe.head_memory_gb is {self.head_memory_gb:g}: one example of {per_example} tokens takes "
                f"{needed:.3g} GB in training; raise it, or lower probe.segments or probe.depth"
            )
        return fitted

    def head_size(self, width: int, tokens: int) -> HeadSize:
        """Of the heads in training. width, tokens: of an example."""
        heads = self.heads or attention_heads(width, None)
        settings = len(self.hyperparameters())
        size = HeadSize(width, tokens, heads, self.depth, settings, self.product_precision)
        fits = size.examples_at_once(self.batch, 1e9 * self.head_memory_gb)
        return size if fits or self.depth == 1 else size._replace(recompute=True)

    def examples_at_once(self, width: int, tokens: int) -> int:
        return self.head_size(width, tokens).examples_at_once(self.batch, 1e9 * self.head_memory_gb)

    def make_head(self, source: TokenSource, outputs: int) -> nn.Module:
        width = source.shape.width
        size = self.head_size(width, source.shape.tokens * self.clips_of_example)
        head = AttentiveHead(width, size.heads, outputs, self.depth)
        head.blocks.activation_checkpointing = size.recompute
        return head

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """As V-JEPA trains its probes."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.product_precision == "bf16")


@dataclass(frozen=True, kw_only=True)
class Linear(TrainedHeadProtocol):
    """Logistic regression for classes, ridge regression for numeric labels, on the mean token.

    solver "lbfgs": the minimum of mean loss + l2 / 2 * |W|^2 for each l2; "adamw": as the attentive heads."""

    solver: Literal["lbfgs", "adamw"] = "lbfgs"
    l2: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    temporal_bins: PositiveInt = 1  # equal parts of a clip in time; their mean tokens are concatenated
    standardise: bool = True

    @property
    def uses_all_processes(self) -> bool:
        return self.solver == "adamw"

    def hyperparameters(self) -> HyperparameterSettings:
        return [{"l2": l2} for l2 in self.l2] if self.solver == "lbfgs" else super().hyperparameters()

    def fitted_to(self, width: int, tokens: int, encoder_heads: int | None) -> Self:
        check_mean_pool(self, self.temporal_bins, tokens)
        return self

    def prepare(self, source: TokenSource, indices: list[int], device: torch.device) -> TokenSource:
        return mean_pool(source, indices, self, self.temporal_bins, device)

    def make_head(self, source: TokenSource, outputs: int) -> nn.Module:
        return LinearHead(source.shape.width, outputs)

    def train(self, task: Task, data: TrainingSet, settings: HyperparameterSettings) -> list[nn.Module]:
        if self.solver == "adamw":
            return super().train(task, data, settings)
        (tokens,) = data.source.batches(1, [self.examples_of(data.indices)])
        labels = data.label_tensor.repeat_interleave(self.examples_per_sample, 0)
        return [fit_linear(tokens, labels, task, setting["l2"]) for setting in settings]


def fit_linear(tokens: Tensor, label_tensor: Tensor, task: Task, l2: float) -> LinearHead:
    """The head at the minimum of the task's mean loss + l2 / 2 * |W|^2. tokens f32 [n, 1, D], label_tensor
    [n] or [n, C]."""
    head = LinearHead(tokens.shape[-1], task.num_outputs).to(tokens.device)
    if task.kind == "number":
        weight, bias = ridge_regression(tokens[:, 0], label_tensor, l2 / 2)
        head.linear.weight.data.copy_(weight.T)
        head.linear.bias.data.copy_(bias)
    else:
        weight = head.linear.weight
        minimise(head, lambda: task.loss(head(tokens), label_tensor) + l2 / 2 * weight.square().sum())
    return head.eval()
