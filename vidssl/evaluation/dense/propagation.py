"""Labels of the first frame carried through a sequence by the likeness of frozen tokens: masks (DAVIS) and key points.

Nothing is trained; what is tried is compared on sequences of train.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from vidssl.config import Count, Positive, Size
from vidssl.core.errors import UserError
from vidssl.evaluation.dense.datasets import DenseSample, KeypointLabels
from vidssl.evaluation.dense.frames import DenseProtocol, FrameEncoder
from vidssl.evaluation.metrics import bootstrap_ci, bootstrap_metric_ci

BOUND = 0.008  # of a picture's diagonal: how far boundaries may lie apart
SIGMA = 0.5  # tokens; of a key point's first map


class PropagationSettings(NamedTuple):
    """How labels are carried. Published for DAVIS: 5, 0.1, 12, 7 (arXiv 2104.14294); 10, 0.05, 12, 20 (2006.14613)."""

    topk: int  # tokens of the context whose labels are mixed
    temperature: float  # of the softmax of cosines over them
    radius: int  # tokens: rows and columns that a token may lie off
    context: int  # frames before this one, beside the first


def propagate(tokens: Tensor, first: Tensor, setting: PropagationSettings) -> Tensor:
    """tokens f32 [T, h, w, D], labels of the first frame f32 [C, h, w] -> of every frame f32 [T, C, h, w].

    A token's label is the mean of those of its `topk` most alike tokens, among the first and the last `context` frames
    and within `radius` rows and columns, weighted by the softmax of cosine / temperature. Source: DINO (arXiv
    2104.14294, eval_video_segmentation.py), after Jabri et al. (2006.14613).
    """
    t, h, w, _ = tokens.shape
    x, labels = F.normalize(tokens.flatten(1, 2), dim=-1), [first.flatten(1)]
    row, column = (m.flatten() for m in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    apart = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    far = (apart > setting.radius).to(x.device)
    for i in range(1, t):
        sources = [0, *range(max(1, i - setting.context), i)]
        cosine = torch.stack([(x[i] @ x[s].T).masked_fill(far, -math.inf) for s in sources], 1).flatten(
            1
        )  # [N, S * N]
        best, at = cosine.topk(min(setting.topk, cosine.shape[1]))
        weight = (best / setting.temperature).softmax(-1)
        known = torch.cat([labels[s] for s in sources], 1)  # [C, S * N]
        labels.append((known[:, at] * weight).sum(-1))
    return torch.stack(labels).unflatten(-1, (h, w))


def jaccard(guess: Tensor, truth: Tensor) -> Tensor:
    """J: intersection over union of masks bool [..., H, W] -> f64 [...]; 1 where both are empty."""
    both, any_ = (guess & truth).sum((-2, -1)).double(), (guess | truth).sum((-2, -1)).double()
    return torch.where(any_ > 0, both / any_.clamp(min=1), 1.0)


def boundary(mask: Tensor) -> Tensor:
    """bool [..., H, W]: pixels that differ from their right, lower or lower right neighbour (in the last row and column
    from the one that there is)."""
    x = F.pad(mask.float(), (0, 1, 0, 1), mode="replicate").bool()
    here = x[..., :-1, :-1]
    return (here ^ x[..., :-1, 1:]) | (here ^ x[..., 1:, :-1]) | (here ^ x[..., 1:, 1:])


def boundary_f(guess: Tensor, truth: Tensor) -> Tensor:
    """F: harmonic mean of the precision and recall of the boundaries of masks bool [n, H, W] -> f64 [n].

    A boundary pixel counts as found within a disc of ceil(0.008 * diagonal) pixels. Source: Perazzi et al. (CVPR 2016),
    section 5; what is empty counts as in davis2017-evaluation, metrics.py.
    """
    radius = math.ceil(BOUND * math.hypot(*truth.shape[-2:]))
    y, x = torch.meshgrid(*[torch.arange(-radius, radius + 1, device=truth.device)] * 2, indexing="ij")
    disc = (x**2 + y**2 <= radius**2).float()[None, None]
    edges = [boundary(m) for m in (guess, truth)]
    near = [F.conv2d(e.float()[:, None], disc, padding=radius)[:, 0] > 0.5 for e in edges]
    n_guess, n_truth = (e.sum((-2, -1)).double() for e in edges)
    precision = (edges[0] & near[1]).sum((-2, -1)) / n_guess.clamp(min=1)
    recall = (edges[1] & near[0]).sum((-2, -1)) / n_truth.clamp(min=1)
    precision[n_guess == 0], recall[n_truth == 0] = 1.0, 1.0
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


@dataclass(frozen=True, kw_only=True)
class Propagation(DenseProtocol):
    """Settings to try; the best on train is used."""

    topk: Annotated[tuple[Count, ...], Field(min_length=1)] = (5,)
    temperature: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.1,)
    radius: Annotated[tuple[Size, ...], Field(min_length=1)] = (12,)
    context: Annotated[tuple[Size, ...], Field(min_length=1)] = (7,)

    def fit(self, look: FrameEncoder, train: list[DenseSample]) -> tuple[PropagationSettings, dict[str, Any]]:
        """-> (the setting, what was tried)."""
        settings = [
            PropagationSettings(*s)
            for s in itertools.product(self.topk, self.temperature, self.radius, self.context)
        ]
        if len(settings) == 1:
            return settings[0], {**settings[0]._asdict(), "tried": []}
        measured: list[list[np.ndarray]] = [[] for _ in settings]
        for item in tqdm(train, desc="choose", unit="sequence"):
            frames, truth = item.load()
            tokens = look(frames)
            for setting, rows in zip(settings, measured, strict=True):
                rows.append(self.follow(tokens, truth, frames.shape[1:3], setting))
        scores = [self.score(rows) for rows in measured]
        tried = [{**s._asdict(), "train": round(score, 2)} for s, score in zip(settings, scores, strict=True)]
        best = settings[int(np.argmax(scores))]
        return best, {**best._asdict(), "tried": tried}

    def measure(self, look: FrameEncoder, model: PropagationSettings, item: DenseSample) -> np.ndarray:
        """Figures of a sequence; see `columns`."""
        frames, truth = item.load()
        return self.follow(look(frames), truth, frames.shape[1:3], model)

    def follow(
        self, tokens: Tensor, truth: Any, size: tuple[int, int], setting: PropagationSettings
    ) -> np.ndarray:
        raise NotImplementedError

    def score(self, rows: list[np.ndarray]) -> float:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Masks(Propagation):
    """J and F of the objects of the first frame (DAVIS 2017, semi-supervised): the mean over the frames between the
    first and the last, then over all objects."""

    truth = "masks"
    columns = ("J", "F")  # a row for each object

    def follow(
        self, tokens: Tensor, truth: np.ndarray, size: tuple[int, int], setting: PropagationSettings
    ) -> np.ndarray:
        """Labels start as the nearest pixel of each token, and end as DINO reads them: upsampled bilinearly, each
        object's stretched to 0 .. 1, the largest taken."""
        h, w = tokens.shape[1:3]
        ids = torch.tensor(sorted({0, *np.unique(truth[0]).tolist()}), device=tokens.device)
        if len(ids) == 1:  # the first frame shows no object
            return np.zeros((0, 2))
        real = (
            torch.from_numpy(truth[:, None].astype(np.int64)).to(tokens.device) == ids[:, None, None]
        )  # [T, C, H, W]
        labels = propagate(tokens, F.interpolate(real[:1].float(), (h, w), mode="nearest-exact")[0], setting)
        rows = []
        for t in range(1, len(truth) - 1):
            soft = F.interpolate(labels[t : t + 1], size, mode="bilinear")[0]
            low, high = soft.amin((1, 2), keepdim=True), soft.amax((1, 2), keepdim=True)
            number = ((soft - low) / (high - low).clamp(min=1e-12)).argmax(0)
            guess, right = number == torch.arange(1, len(ids)).to(tokens.device)[:, None, None], real[t, 1:]
            rows.append(torch.stack([jaccard(guess, right), boundary_f(guess, right)], 1))
        return torch.stack(rows).mean(0).cpu().numpy()

    def score(self, rows: list[np.ndarray]) -> float:
        both = np.concatenate(rows)
        if not len(both):
            raise UserError("no first frame shows an object")
        return 100 * float(both.mean())

    def figures(self, rows: list[np.ndarray], groups: list[str]) -> dict[str, Any]:
        value, both = round(self.score(rows), 4), np.concatenate(rows)
        of = [g for g, row in zip(groups, rows, strict=True) for _ in row]
        told = {"metric": "J&F", "value": value, "ci95": bootstrap_ci(both.mean(1), of, self.seed)}
        j, f = (round(100 * float(v), 4) for v in both.mean(0))
        return {**told, "J": j, "F": f, "objects": len(both)}


@dataclass(frozen=True, kw_only=True)
class Keypoints(Propagation):
    """PCK: the share of key points within 0.1 and 0.2 of the truth's scale, a mean over joints of the share over all
    frames but the first. Asked for are the points that the first frame shows, wherever a frame shows them."""

    truth = "points"
    columns = ("within_0.1", "within_0.2", "asked")  # a row for each joint: numbers of frames

    def follow(
        self, tokens: Tensor, truth: KeypointLabels, size: tuple[int, int], setting: PropagationSettings
    ) -> np.ndarray:
        """A point starts as a Gaussian of 0.5 tokens (arXiv 2006.14613, data/jhmdb.py of videowalk) and is read at
        the highest place, as the weighted mean of it and its neighbours. Published: the mean of the three highest
        places, be they far apart, and a point whose map is empty is left out; here it counts."""
        h, w = tokens.shape[1:3]
        pixels = np.array([size[1] / w, size[0] / h])  # of a token, x and y
        start = torch.from_numpy((truth.xy[0] + 0.5) / pixels - 0.5).to(tokens)  # [J, 2]
        y, x = (m.flatten() for m in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
        place = torch.stack([x, y], -1).to(tokens)  # [N, 2]
        heat = torch.exp(-(place - start[:, None]).square().sum(-1) / (2 * SIGMA**2))
        maps = propagate(tokens, heat.unflatten(1, (h, w)), setting).flatten(2)  # [T, J, N]
        near = (place - place[maps.argmax(-1)][:, :, None]).abs().amax(-1) <= 1  # [T, J, N]
        found = (maps * near) @ place / (maps * near).sum(-1, keepdim=True).clamp(min=1e-30)  # [T, J, 2]
        xy = (found.double().cpu().numpy() + 0.5) * pixels - 0.5
        asked = truth.seen & truth.seen[0]
        asked[0] = False
        error = np.linalg.norm(xy - truth.xy, axis=-1)
        within = [(asked & (error <= share * truth.scale)).sum(0) for share in (0.1, 0.2)]
        return np.stack([*within, asked.sum(0)], 1)

    def score(self, rows: list[np.ndarray]) -> float:
        return pck(np.stack(rows), 0)

    def figures(self, rows: list[np.ndarray], groups: list[str]) -> dict[str, Any]:
        counts = np.stack(rows)
        if not counts[..., 2].any():
            raise UserError("no key point of a first frame is seen again")
        told = {"metric": "PCK@0.1", "value": round(pck(counts, 0), 4)}
        ci95 = bootstrap_metric_ci(lambda i: pck(counts[i], 0), groups, self.seed)
        return {
            **told,
            "ci95": ci95,
            "PCK@0.2": round(pck(counts, 1), 4),
            "points": int(counts[..., 2].sum()),
        }


def pck(counts: np.ndarray, which: int) -> float:
    """[V, J, 3] -> percent: the mean over the joints that are asked for."""
    total = counts.sum(0)
    some = total[:, 2] > 0
    return 100 * float((total[some, which] / total[some, 2]).mean()) if some.any() else 0.0
