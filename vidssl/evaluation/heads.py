"""Heads on frozen features: a grid trained on a part of train, the best by the held-out part, trained again on all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vidssl.config import Amount, Count, Positive, Size
from vidssl.errors import UserError
from vidssl.evaluation.features import Control
from vidssl.model.attentive import AttentiveHead
from vidssl.optim import cosine


@dataclass(frozen=True)
class Attentive:
    """The `probe` section of the attentive protocol (V-JEPA, evals/video_classification_frozen). Features are computed
    once for a video, without augmentation; the published protocol augments and encodes anew in every epoch."""

    segments: Count = 1  # clips of a video; the head attends over the tokens of all
    heads: Count = 12  # attention heads of the pooler
    epochs: Count = 20
    batch: Count = 64  # videos
    lr: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1e-3,)  # the grid is lr x weight_decay
    weight_decay: Annotated[tuple[Amount, ...], Field(min_length=1)] = (0.01,)
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2  # fraction of train on which the grid is compared
    controls: Annotated[tuple[Control, ...], Field(min_length=1)] = ("none",)
    standardise: bool = False  # tokens: mean of train at each token off, deviation of train in each channel to 1
    seed: Size = 0
    allow_unreadable: bool = False  # a test video that cannot be read: an error, or counted wrong and listed
    memory_gb: Positive = 8.0  # that the features may take, copies included
    encode_batch: Count = 16  # videos
    workers: Size = 2  # processes that decode

    def head(self, dim: int, classes: int) -> AttentiveHead:
        return AttentiveHead(dim, self.heads, classes)


class Labelled(NamedTuple):
    tokens: Tensor  # f32 [n, N, D]
    label: Tensor  # i64 [n]


def standardiser(train: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of tokens [n, N, D] that gives the train tokens mean 0 at each token and deviation 1 in each channel.

    After the encoder's LayerNorm, what is common to all clips (positions above all) can be much larger than what tells
    them apart, and differently so from encoder to encoder; a head at one learning rate then measures that ratio rather
    than the information. Statistics come from train alone.
    """
    mean = train.mean(0, keepdim=True)
    deviation = (train - mean).square().mean((0, 1), keepdim=True).sqrt().clamp_min(1e-6)
    return lambda tokens: (tokens - mean) / deviation


def hold_out(labels: Tensor, groups: list[str], fraction: float, seed: int) -> Tensor:
    """bool [n]: which samples are held out. Whole groups (clips of one source video are one group), class by class:
    of each class the groups, in random order, until `fraction` of its samples are out; never all of a class."""
    rng = np.random.default_rng((seed, 4))
    rank = {g: r for r, g in enumerate(rng.permutation(sorted(set(groups))).tolist())}
    out: set[str] = set()
    for c in labels.unique().tolist():
        members = [g for g, y in zip(groups, labels.tolist(), strict=True) if y == c]
        names = sorted(set(members), key=rank.__getitem__)
        for name in names[:-1]:
            if sum(g in out for g in members) >= fraction * len(members):
                break
            out.add(name)
    return torch.tensor([g in out for g in groups])


def train_head(protocol: Attentive, data: Labelled, classes: int, lr: float, weight_decay: float) -> torch.nn.Module:
    """AdamW, cosine to zero; a function of (data, protocol, lr, weight decay)."""
    torch.manual_seed(protocol.seed)
    device = data.tokens.device
    head = protocol.head(data.tokens.shape[-1], classes).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    steps, done = protocol.epochs * -(-len(data.label) // protocol.batch), 0
    for _ in range(protocol.epochs):
        for ids in torch.randperm(len(data.label)).split(protocol.batch):
            for group in optimizer.param_groups:
                group["lr"] = cosine(lr, 0.0, done / steps)
            loss = F.cross_entropy(head(data.tokens[ids]), data.label[ids])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            done += 1
    return head.eval()


@torch.no_grad()
def predict(head: torch.nn.Module, tokens: Tensor, batch: int) -> Tensor:
    """[n, N, D] -> logits [n, classes]."""
    return torch.cat([head(part) for part in tokens.split(batch)])


def fit(protocol: Attentive, data: Labelled, groups: list[str], classes: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """-> (the head, what was chosen and why). The test set plays no part."""
    grid = [(lr, decay) for lr in protocol.lr for decay in protocol.weight_decay]
    scores: list[float] = []
    out = hold_out(data.label, groups, protocol.held_out, protocol.seed)
    if len(grid) > 1:
        if not out.any():
            raise UserError("no group of train can be held out to choose the head on; give one lr and one weight_decay")
        fitting, choosing = Labelled(data.tokens[~out], data.label[~out]), Labelled(data.tokens[out], data.label[out])
        for lr, decay in grid:
            head = train_head(protocol, fitting, classes, lr, decay)
            hits = predict(head, choosing.tokens, protocol.batch).argmax(1) == choosing.label
            scores.append(round(100 * hits.float().mean().item(), 2))
    lr, decay = grid[int(np.argmax(scores)) if scores else 0]
    tried = [{"lr": a, "weight_decay": b, "held_out_accuracy": s} for (a, b), s in zip(grid, scores, strict=False)]
    chosen = {"lr": lr, "weight_decay": decay, "tried": tried, "n_held_out": int(out.sum()) if scores else 0}
    return train_head(protocol, data, classes, lr, decay), chosen


PROTOCOLS = {"attentive": Attentive}
