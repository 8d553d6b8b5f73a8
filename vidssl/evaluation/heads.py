"""Heads that are trained on frozen tokens: attentive and linear. All heads of a grid see each batch together."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vidssl.config import Amount, Count, Positive
from vidssl.core.schedules import cosine
from vidssl.evaluation.features import TokenSource
from vidssl.evaluation.protocol import HyperparameterGrid, ProbeProtocol, TrainingSet, chunks, pooled
from vidssl.evaluation.solvers import minimise, ridge_regression
from vidssl.evaluation.tasks import Task
from vidssl.model.heads import HEAD_EPS, AttentiveHead, LinearHead


def is_joint(heads: Sequence[nn.Module]) -> bool:
    """Whether the heads are attentive ones that only cross-attend."""
    return all(isinstance(head, AttentiveHead) and not len(head.blocks) for head in heads)


def attend(heads: Sequence[AttentiveHead], tokens: Tensor) -> Iterator[Tensor]:
    """tokens f32 [B, N, D] -> logits [B, C] of each head of depth 1; the same as each head alone.

    The tokens are normed once, the norm's scale and shift being moved behind the products (a shift of the keys adds the
    same to all scores of a query, which the softmax takes away); the queries of all heads are then one matrix product.
    """
    x = F.layer_norm(tokens, tokens.shape[-1:], eps=HEAD_EPS)
    reaches = []
    for head in heads:
        q = head.xattn.q(head.query_tokens[0, 0]).unflatten(0, (head.xattn.heads, -1))  # [H, D/H]
        key = head.xattn.kv.weight.chunk(2)[0].unflatten(0, (head.xattn.heads, -1))  # [H, D/H, D]
        reaches.append(torch.einsum("he,hed->hd", q, key) * head.norm1.weight / q.shape[-1] ** 0.5)
    score = torch.cat(reaches).expand(len(x), -1, -1) @ x.transpose(1, 2)  # [B, G * H, N]
    for head, pooled_tokens in zip(heads, (score.softmax(-1) @ x).chunk(len(heads), 1), strict=True):
        value, bias = head.xattn.kv.weight.chunk(2)[1], head.xattn.kv.bias.chunk(2)[1]
        value = value.unflatten(0, (head.xattn.heads, -1))
        mixed = pooled_tokens * head.norm1.weight + head.norm1.bias  # [B, H, D]
        query = head.query_tokens[0] + torch.einsum("bhd,hed->bhe", mixed, value).flatten(1) + bias
        yield head.linear(query + head.mlp(head.norm2(query)))


def logits_of(heads: Sequence[nn.Module], tokens: Tensor) -> Iterator[Tensor]:
    """[B, C] of each head."""
    return attend(heads, tokens) if is_joint(heads) else (head(tokens) for head in heads)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class GradientHead(ProbeProtocol):
    """Heads that AdamW trains, the rate falling to zero along a cosine."""

    epochs: Count = 20
    batch: Count = 64  # videos
    lr: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1e-3,)  # the grid is lr x weight_decay
    weight_decay: Annotated[tuple[Amount, ...], Field(min_length=1)] = (0.01,)
    clip: Positive | None = 1.0  # norm of a head's gradient (V-JEPA 2: null)

    def grid(self) -> HyperparameterGrid:
        return [{"lr": lr, "weight_decay": decay} for lr in self.lr for decay in self.weight_decay]

    def head(self, dim: int, outputs: int) -> nn.Module:
        raise NotImplementedError

    def train(self, task: Task, data: TrainingSet, grid: HyperparameterGrid) -> list[nn.Module]:
        """A head for each setting, from the same start, with the same batches in one pass. Of a sample with several
        views an epoch sees one, drawn at random."""
        torch.manual_seed(self.seed)
        first, device = self.head(data.source.shape.width, task.outputs), data.target.device
        heads = [deepcopy(first).to(device) for _ in grid]
        rates = [
            {"params": list(head.parameters()), **setting} for head, setting in zip(heads, grid, strict=True)
        ]
        optimizer = torch.optim.AdamW(rates, fused=True)
        orders = [
            order for _ in range(self.epochs) for order in torch.randperm(len(data.numbers)).split(self.batch)
        ]
        views = np.random.default_rng((self.seed, 6))
        lists = [
            [data.numbers[i] * self.views + int(views.integers(self.views)) for i in o.tolist()]
            for o in orders
        ]
        parts = (
            [heads] if is_joint(heads) else [[head] for head in heads]
        )  # deep ones one by one: they keep much
        for step, tokens in enumerate(data.source.batches(self.per(data.source), lists)):
            target = data.target[orders[step].to(device)]
            for group, setting in zip(optimizer.param_groups, grid, strict=True):
                group["lr"] = cosine(setting["lr"], 0.0, step / len(lists))
            optimizer.zero_grad()
            for some in parts:
                torch.stack(
                    [task.loss(logits, target) for logits in logits_of(some, tokens)]
                ).sum().backward()
            for head in heads if self.clip is not None else ():
                torch.nn.utils.clip_grad_norm_(head.parameters(), self.clip)  # type: ignore[arg-type]
            optimizer.step()
        return [head.eval() for head in heads]

    @torch.no_grad()
    def predict(self, models: list[nn.Module], source: TokenSource, numbers: list[int], task: Task) -> Tensor:
        found = []
        for tokens in source.batches(self.per(source), chunks(self.examples(numbers), self.batch)):
            found.append(
                torch.stack([task.probabilities(logits).cpu() for logits in logits_of(models, tokens)])
            )
        return torch.cat(found, 1).unflatten(1, (len(numbers), self.views)).mean(2)


@dataclass(frozen=True, kw_only=True)
class Attentive(GradientHead):
    """V-JEPA's probe (evals/video_classification_frozen), and with depth 4 V-JEPA 2's. Features are computed once for a
    video, without augmentation; the published protocols augment and encode anew in every epoch."""

    depth: Count = 1  # depth - 1 self-attention blocks over all tokens, then the cross-attention
    heads: Count = 12  # attention heads of the pooler

    def head(self, dim: int, outputs: int) -> nn.Module:
        return AttentiveHead(dim, self.heads, outputs, self.depth)


@dataclass(frozen=True, kw_only=True)
class Linear(GradientHead):
    """Logistic (of numbers: ridge) regression on the mean token. solver "lbfgs": to the minimum of
    mean loss + l2 / 2 * |W|^2, where the grid is l2; "adamw": as the attentive heads."""

    solver: Literal["lbfgs", "adamw"] = "lbfgs"
    l2: Annotated[tuple[Amount, ...], Field(min_length=1)] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    temporal_bins: Count = 1  # parts of a clip's tokens, time first, whose means stand end to end
    standardise: bool = True

    def grid(self) -> HyperparameterGrid:
        return [{"l2": l2} for l2 in self.l2] if self.solver == "lbfgs" else super().grid()

    def look(self, source: TokenSource, numbers: list[int], device: torch.device) -> TokenSource:
        return pooled(source, numbers, self, self.temporal_bins, device)

    def head(self, dim: int, outputs: int) -> nn.Module:
        return LinearHead(dim, outputs)

    def train(self, task: Task, data: TrainingSet, grid: HyperparameterGrid) -> list[nn.Module]:
        if self.solver == "adamw":
            return super().train(task, data, grid)
        (tokens,) = data.source.batches(1, [self.examples(data.numbers)])
        tokens, target = tokens[:, 0], data.target.repeat_interleave(self.views, 0)
        return [fit_linear(tokens, target, task, setting["l2"]) for setting in grid]


def fit_linear(features: Tensor, target: Tensor, task: Task, l2: float) -> LinearHead:
    """The head at the minimum of the task's mean loss + l2 / 2 * |W|^2. features f32 [n, D]."""
    head = LinearHead(features.shape[-1], task.outputs).to(features.device)
    if task.kind == "number":
        weight, bias = ridge_regression(features, target, l2 / 2)
        with torch.no_grad():
            head.linear.weight.copy_(weight.T)
            head.linear.bias.copy_(bias)
        return head.eval()
    minimise(
        head,
        lambda: task.loss(head(features[:, None]), target) + l2 / 2 * head.linear.weight.square().sum(),
    )
    return head.eval()
