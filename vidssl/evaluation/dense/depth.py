"""Depth from frozen tokens by a linear head: DINOv2's linear protocol (arXiv 2304.07193, section 7.4; eval/depth)."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from vidssl.config import Amount, Count, Positive
from vidssl.core.errors import UserError
from vidssl.core.schedules import cosine
from vidssl.evaluation.dense.datasets import DenseSample
from vidssl.evaluation.dense.frames import DenseProtocol, FrameEncoder
from vidssl.evaluation.metrics import bootstrap_metric_ci
from vidssl.evaluation.splits import split_by_group
from vidssl.model.heads import MIN_DEPTH, DepthHead


def resize_map(depth: Tensor, like: Tensor) -> Tensor:
    """[B, h, w], [..., H, W] -> [B, H, W]."""
    return F.interpolate(depth[:, None], like.shape[-2:], mode="bilinear")[:, 0]


def log_loss(guess: Tensor, truth: Tensor, most: float) -> Tensor:
    """Scale-invariant log loss (arXiv 1406.2283, 2011.14141) over the pixels of a batch whose depth is known, [B, H, W]
    each: sqrt(var + 0.15 mean^2) of log ratios. Source: DINOv2, sigloss.py."""
    known = (truth > 0) & (truth <= most)
    ratio = torch.log(guess[known] + MIN_DEPTH) - torch.log(truth[known] + MIN_DEPTH)
    return (ratio.var() + 0.15 * ratio.mean() ** 2 + 1e-12).sqrt()


def depth_errors(guess: Tensor, truth: Tensor, most: float) -> np.ndarray:
    """[T, H, W] each -> f64 [T, 3]: RMSE, mean of |error| / depth, share of pixels whose ratio is under 1.25, of each
    frame over the pixels whose depth is known; NaN where none is."""
    rows = []
    for g, t in zip(guess.double(), truth.double(), strict=True):
        known = (t > 0) & (t <= most)
        g, t = g[known], t[known]
        off = g - t
        figures = (
            off.square().mean().sqrt(),
            (off.abs() / t).mean(),
            (torch.maximum(g / t, t / g) < 1.25).double().mean(),
        )
        rows.append([float(f) for f in figures])
    return np.array(rows)


@dataclass(frozen=True, kw_only=True)
class Depth(DenseProtocol):
    """A head for each learning rate, of which that with the least RMSE on held-out groups of train is trained again on
    all of it (AdamW, cosine to 0)."""

    lr: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1e-3, 3e-4)
    weight_decay: Amount = 0.01
    epochs: Count = 20
    batch: Count = 16  # frames
    bins: Annotated[int, Field(ge=2)] = 256
    max_depth: Positive = 10.0  # metres; deeper pixels do not count
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of the sequences of train

    truth = "depth"
    columns = ("rmse", "abs_rel", "delta_1.25")  # one row

    def fit(self, look: FrameEncoder, train: list[DenseSample]) -> tuple[DepthHead, dict[str, Any]]:
        """-> (the head, what was tried). Tokens of all frames of train are kept in memory, in half precision."""
        kept, truths, owner = [], [], []
        for number, item in enumerate(tqdm(train, desc="features", unit="sequence")):
            frames, depth = item.load()
            kept.append(look(frames).half().cpu())
            small = F.interpolate(
                torch.from_numpy(depth)[:, None], look.scaled(*depth.shape[1:]), mode="nearest-exact"
            )
            truths.append(small[:, 0])
            owner += [number] * len(frames)
        if len({t.shape[1:] for t in truths}) > 1:
            raise UserError("depth: the pictures of train differ in size; give them one")
        tokens, truth = torch.cat(kept), torch.cat(truths)
        del kept, truths  # else they would stay beside their copies
        lr, tried = self.lr[0], []
        if len(self.lr) > 1:
            out = split_by_group(
                [0] * len(train), [item.group for item in train], self.val_fraction, self.seed
            )[owner]
            if not out.any():
                raise UserError("no group of train can be held out to choose task.lr on; give one value")
            there, away = (torch.from_numpy(np.flatnonzero(part)) for part in (~out, out))
            heads = self.train(look, tokens, truth, there, self.lr)
            errors = [self.errors(look, h, tokens[away], truth[away])[:, 0] for h in heads]
            scores = [float(np.nanmean(e)) if np.isfinite(e).any() else math.inf for e in errors]
            if min(scores) == math.inf:
                raise UserError(
                    f"depth: no head has a finite error on held-out train: task.max_depth {self.max_depth:g} leaves no "
                    "pixel, or every task.lr is too large"
                )
            told = [round(s, 4) if s < math.inf else None for s in scores]
            tried = [{"lr": lr, "held_out_rmse": s} for lr, s in zip(self.lr, told, strict=True)]
            lr = self.lr[int(np.argmin(scores))]
        (head,) = self.train(look, tokens, truth, torch.arange(len(tokens)), (lr,))
        return head, {"lr": lr, "tried": tried}

    def train(
        self, look: FrameEncoder, tokens: Tensor, truth: Tensor, rows: Tensor, rates: tuple[float, ...]
    ) -> list[DepthHead]:
        """A head for each rate, all on the same batches of the frames `rows`."""
        torch.manual_seed(self.seed)
        first = DepthHead(tokens.shape[-1], self.bins, self.max_depth)
        heads = [DepthHead(tokens.shape[-1], self.bins, self.max_depth).to(look.device) for _ in rates]
        for head in heads:
            head.load_state_dict(first.state_dict())
        groups = [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads, rates, strict=True)]
        optimiser = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        rng, steps = torch.Generator().manual_seed(self.seed), self.epochs * -(-len(rows) // self.batch)
        batches = (
            b
            for _ in range(self.epochs)
            for b in rows[torch.randperm(len(rows), generator=rng)].split(self.batch)
        )
        for step, batch in enumerate(tqdm(batches, desc="head", total=steps)):
            x, y = tokens[batch].to(look.device).float(), truth[batch].to(look.device)
            if not ((y > 0) & (y <= self.max_depth)).any():
                continue
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = cosine(rate, 0.0, step / steps)
            optimiser.zero_grad()
            losses = [log_loss(resize_map(head(x), y), y, self.max_depth) for head in heads]
            torch.stack(losses).sum().backward()
            optimiser.step()
        return heads

    @torch.no_grad()
    def errors(self, look: FrameEncoder, head: DepthHead, tokens: Tensor, truth: Tensor) -> np.ndarray:
        """See depth_errors."""
        parts = zip(tokens.split(self.batch), truth.split(self.batch), strict=True)
        rows = [
            depth_errors(resize_map(head(x.to(look.device).float()), y).cpu(), y, self.max_depth)
            for x, y in parts
        ]
        return np.concatenate(rows)

    def measure(self, look: FrameEncoder, model: DepthHead, item: DenseSample) -> np.ndarray:
        """[1, 3]: means over the frames of a sequence; see `columns`."""
        frames, depth = item.load()
        rows = self.errors(look, model, look(frames), torch.from_numpy(depth))
        if np.isnan(rows).all():
            raise UserError(
                f"{item.name}: no pixel has a known depth of at most task.max_depth {self.max_depth:g}"
            )
        return np.nanmean(rows, 0, keepdims=True)

    def figures(self, rows: list[np.ndarray], groups: list[str]) -> dict[str, Any]:
        every = np.concatenate(rows)
        rmse, relative, close = every.mean(0)
        ci95 = bootstrap_metric_ci(lambda i: float(every[i, 0].mean()), groups, self.seed)
        told = {
            "metric": "rmse",
            "value": round(float(rmse), 4),
            "ci95": ci95,
            "abs_rel": round(float(relative), 4),
        }
        return {**told, "delta_1.25": round(100 * float(close), 4)}
