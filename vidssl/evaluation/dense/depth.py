"""Depth from frozen tokens by a linear head: DINOv2's linear protocol (arXiv 2304.07193, section 7.4;
eval/depth)."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vidssl.config import NonNegativeFloat, PositiveFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.progress import track
from vidssl.core.schedules import cosine
from vidssl.core.splits import split_by_group
from vidssl.evaluation.dense.datasets import DenseSample, LabelKind
from vidssl.evaluation.dense.frames import DenseProtocol, FrameEncoder
from vidssl.evaluation.metrics import bootstrap_metric_ci
from vidssl.model.heads import MIN_DEPTH, DepthHead


def resize_map(depth: Tensor, like: Tensor) -> Tensor:
    """[B, h, w], [..., H, W] -> [B, H, W]."""
    return F.interpolate(depth[:, None], like.shape[-2:], mode="bilinear")[:, 0]


def log_loss(pred: Tensor, target: Tensor, max_depth: float) -> Tensor:
    """Scale-invariant log loss (arXiv 1406.2283, 2011.14141) over the pixels of a batch whose depth is known,
    [B, H, W] each: sqrt(var + 0.15 mean^2) of log ratios. Source: DINOv2, sigloss.py."""
    known = (target > 0) & (target <= max_depth)
    ratio = torch.log(pred[known] + MIN_DEPTH) - torch.log(target[known] + MIN_DEPTH)
    return (ratio.var() + 0.15 * ratio.mean() ** 2 + 1e-12).sqrt()


def depth_errors(pred: Tensor, target: Tensor, max_depth: float) -> np.ndarray:
    """[T, H, W] each -> f64 [T, 3]: RMSE, mean of |error| / depth, fraction of pixels whose ratio is below
    1.25, of each frame over the pixels whose depth is known; NaN where none is."""
    rows = []
    for frame_pred, frame_target in zip(pred.double(), target.double(), strict=True):
        known = (frame_target > 0) & (frame_target <= max_depth)
        p = frame_pred[known]
        t = frame_target[known]
        rmse = (p - t).square().mean().sqrt()
        abs_rel = ((p - t).abs() / t).mean()
        close = (torch.maximum(p / t, t / p) < 1.25).double().mean()
        rows.append([float(rmse), float(abs_rel), float(close)])
    return np.array(rows)


@dataclass(frozen=True, kw_only=True)
class Depth(DenseProtocol):
    """A head per learning rate; the one with the lowest RMSE on held-out groups of train is trained again on
    all of train (AdamW, cosine to 0)."""

    lr: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1e-3, 3e-4)
    weight_decay: NonNegativeFloat = 0.01
    epochs: PositiveInt = 20
    batch: PositiveInt = 16  # frames
    bins: Annotated[int, Field(ge=2)] = 256
    max_depth: PositiveFloat = 10.0  # metres; deeper pixels do not count
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of the sequences of train

    label: ClassVar[LabelKind] = "depth"
    columns = ("rmse", "abs_rel", "delta_1.25")  # one row per frame with a known depth

    def check_train(self, groups: list[str]) -> None:
        if len(self.lr) > 1 and not self._held_out(groups).any():
            raise UserError("no group of train can be held out to select task.lr; give one value")

    def _held_out(self, groups: list[str]) -> np.ndarray:
        """bool [n]: which train sequences are held out to select the learning rate."""
        return split_by_group(groups, [()] * len(groups), self.val_fraction, self.seed).held_out

    def select_model(
        self, encoder: FrameEncoder, train: list[DenseSample]
    ) -> tuple[DepthHead, dict[str, Any]]:
        """Returns the head, and the scores of all learning rates."""
        tokens, depth, sequence = self._encode(encoder, train)
        lr = self.lr[0]
        tried = []
        if len(self.lr) > 1:
            held_out = self._held_out([sample.group for sample in train])[sequence]
            rows, held_out_rows = (torch.from_numpy(np.flatnonzero(mask)) for mask in (~held_out, held_out))
            heads = self.train_heads(encoder, tokens, depth, rows, self.lr)
            errors = [
                self.head_errors(encoder, head, tokens[held_out_rows], depth[held_out_rows])[:, 0]
                for head in heads
            ]
            scores = [float(np.nanmean(e)) if np.isfinite(e).any() else math.inf for e in errors]
            if min(scores) == math.inf:
                raise UserError(
                    f"depth: no head has a finite error on held-out train: task.max_depth {self.max_depth:g} "
                    "leaves no pixel, or every task.lr is too large"
                )
            for rate, score in zip(self.lr, scores, strict=True):
                tried.append({"lr": rate, "held_out_rmse": round(score, 4) if score < math.inf else None})
            lr = self.lr[int(np.argmin(scores))]
        (head,) = self.train_heads(encoder, tokens, depth, torch.arange(len(tokens)), (lr,))
        return head, {"lr": lr, "tried": tried}

    def _encode(self, encoder: FrameEncoder, train: list[DenseSample]) -> tuple[Tensor, Tensor, list[int]]:
        """Tokens f16 [n, h, w, D] and depths f32 [n, H, W] at the encoder's resolution of all n frames, in
        memory, and the sequence of each frame."""
        tokens, depths, sequence = [], [], []
        for number, sample in enumerate(track(train, "features", "sequences")):
            frames, depth = sample.load()
            tokens.append(encoder(frames).half().cpu())
            size = encoder.resized(*depth.shape[1:])
            depths.append(F.interpolate(torch.from_numpy(depth)[:, None], size, mode="nearest-exact")[:, 0])
            sequence += [number] * len(frames)
        if len({depth.shape[1:] for depth in depths}) > 1:
            raise UserError("depth: the images of train differ in size; they must have one size")
        return torch.cat(tokens), torch.cat(depths), sequence

    def train_heads(
        self, encoder: FrameEncoder, tokens: Tensor, depth: Tensor, rows: Tensor, rates: tuple[float, ...]
    ) -> list[DepthHead]:
        """A head per learning rate, all with the same initial weights and batches of the frames `rows`."""
        torch.manual_seed(self.seed)
        initial = DepthHead(tokens.shape[-1], self.bins, self.max_depth)
        heads = [DepthHead(tokens.shape[-1], self.bins, self.max_depth).to(encoder.device) for _ in rates]
        for head in heads:
            head.load_state_dict(initial.state_dict())
        groups = [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads, rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        rng = torch.Generator().manual_seed(self.seed)
        steps = self.epochs * -(-len(rows) // self.batch)
        epochs = (rows[torch.randperm(len(rows), generator=rng)] for _ in range(self.epochs))
        batches = (batch for epoch in epochs for batch in epoch.split(self.batch))
        for step, batch in enumerate(track(batches, "head", "steps", steps)):
            x = tokens[batch].to(encoder.device).float()
            target = depth[batch].to(encoder.device)
            if not ((target > 0) & (target <= self.max_depth)).any():
                continue
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = cosine(rate, 0.0, step / steps)
            optimizer.zero_grad()
            losses = [log_loss(resize_map(head(x), target), target, self.max_depth) for head in heads]
            torch.stack(losses).sum().backward()
            optimizer.step()
        return heads

    @torch.no_grad()
    def head_errors(
        self, encoder: FrameEncoder, head: DepthHead, tokens: Tensor, depth: Tensor
    ) -> np.ndarray:
        """f64 [n, 3] of n frames; see depth_errors."""
        rows = []
        for x, target in zip(tokens.split(self.batch), depth.split(self.batch), strict=True):
            pred = resize_map(head(x.to(encoder.device).float()), target).cpu()
            rows.append(depth_errors(pred, target, self.max_depth))
        return np.concatenate(rows)

    def evaluate(self, encoder: FrameEncoder, model: DepthHead, sample: DenseSample) -> np.ndarray:
        """f64 [n, 3] of the n frames of a sequence with a known depth; see `columns`."""
        frames, depth = sample.load()
        rows = self.head_errors(encoder, model, encoder(frames), torch.from_numpy(depth))
        is_known = ~np.isnan(rows).any(1)
        if not is_known.any():
            raise UserError(
                f"{sample.name}: no pixel has a known depth of at most task.max_depth {self.max_depth:g}"
            )
        return rows[is_known]

    def summarise(self, rows: list[np.ndarray], groups: list[str]) -> dict[str, Any]:
        """Means over all frames, whatever the lengths of the sequences."""
        errors = np.concatenate(rows)
        frame_groups = [group for part, group in zip(rows, groups, strict=True) for _ in part]
        rmse, abs_rel, close = errors.mean(0)
        return {
            "metric": "rmse",
            "value": round(float(rmse), 4),
            "ci95": bootstrap_metric_ci(lambda i: float(errors[i, 0].mean()), frame_groups, self.seed),
            "abs_rel": round(float(abs_rel), 4),
            "delta_1.25": round(100 * float(close), 4),
        }
