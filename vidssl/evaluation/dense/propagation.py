"""Labels of the first frame propagated through a sequence by the similarity of frozen tokens: masks (DAVIS)
and key points. Nothing is trained; settings are compared on sequences of train."""

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor

from vidssl.config import NonNegativeInt, PositiveFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.progress import track
from vidssl.evaluation.dense.datasets import DenseSample, KeypointLabels, LabelKind
from vidssl.evaluation.dense.frames import DenseProtocol, FrameEncoder
from vidssl.evaluation.metrics import bootstrap_ci, bootstrap_metric_ci

BOUNDARY_TOLERANCE = 0.008  # of an image's diagonal
KEYPOINT_SIGMA = 0.5  # tokens; of a key point's Gaussian in the first frame
PCK_THRESHOLDS = (0.1, 0.2)  # fractions of the labels' scale


class PropagationSettings(NamedTuple):
    """How labels are propagated. Published for DAVIS: 5, 0.1, 12, 7 (arXiv 2104.14294); 10, 0.05, 12, 20
    (2006.14613)."""

    topk: int  # context tokens whose labels are averaged
    temperature: float  # of the softmax of cosines over them
    radius: int  # tokens: maximum distance in rows and columns
    context_frames: int  # previous frames, beside the first


def propagate(tokens: Tensor, first: Tensor, settings: PropagationSettings) -> Tensor:
    """tokens f32 [T, h, w, D], labels of the first frame f32 [C, h, w] -> labels of every frame f32 [T, C, h,
    w].

    The label of a token is the mean of those of its `topk` most similar tokens, among the first and the last
    `context_frames` frames and within `radius` rows and columns, weighted by the softmax of cosine /
    temperature. Source: DINO (arXiv 2104.14294, eval_video_segmentation.py), after Jabri et al. (2006.14613).
    """
    frames, height, width, _ = tokens.shape
    x = F.normalize(rearrange(tokens, "t h w d -> t (h w) d"), dim=-1)
    labels = [rearrange(first, "c h w -> c (h w)")]
    grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = (axis.flatten() for axis in grid)
    distance = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    too_far = (distance > settings.radius).to(x.device)
    for t in range(1, frames):
        context = [0, *range(max(1, t - settings.context_frames), t)]
        cosines = [(x[t] @ x[s].T).masked_fill(too_far, -math.inf) for s in context]
        cosine = torch.cat(cosines, 1)  # [N, S * N]
        best, indices = cosine.topk(min(settings.topk, cosine.shape[1]))
        weight = (best / settings.temperature).softmax(-1)
        known = torch.cat([labels[s] for s in context], 1)  # [C, S * N]
        labels.append((known[:, indices] * weight).sum(-1))
    return rearrange(torch.stack(labels), "t c (h w) -> t c h w", h=height)


def jaccard(pred: Tensor, target: Tensor) -> Tensor:
    """J: intersection over union of masks bool [..., H, W] -> f64 [...]; 1 where both are empty."""
    intersection = (pred & target).sum((-2, -1)).double()
    union = (pred | target).sum((-2, -1)).double()
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def boundary(mask: Tensor) -> Tensor:
    """bool [..., H, W]: pixels that differ from their right, lower or lower right neighbour (in the last row
    and column from those that exist)."""
    x = F.pad(mask.float(), (0, 1, 0, 1), mode="replicate").bool()
    here = x[..., :-1, :-1]
    return (here ^ x[..., :-1, 1:]) | (here ^ x[..., 1:, :-1]) | (here ^ x[..., 1:, 1:])


def boundary_f(pred: Tensor, target: Tensor) -> Tensor:
    """F: harmonic mean of the precision and recall of the boundaries of masks bool [n, H, W] -> f64 [n].

    A boundary pixel is matched within a disc of ceil(0.008 * diagonal) pixels. Source: Perazzi et al. (CVPR
    2016), section 5; empty boundaries count as in davis2017-evaluation, metrics.py."""
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*target.shape[-2:]))
    offsets = torch.arange(-radius, radius + 1, device=target.device)
    disc = (offsets[:, None] ** 2 + offsets**2 <= radius**2).float()[None, None]

    def dilate(edges: Tensor) -> Tensor:
        return F.conv2d(edges.float()[:, None], disc, padding=radius)[:, 0] > 0.5

    def matched_fraction(edges: Tensor, others: Tensor) -> Tensor:
        count = edges.sum((-2, -1)).double()
        fraction = (edges & dilate(others)).sum((-2, -1)) / count.clamp(min=1)
        return torch.where(count == 0, 1.0, fraction)

    pred_edges = boundary(pred)
    target_edges = boundary(target)
    precision = matched_fraction(pred_edges, target_edges)
    recall = matched_fraction(target_edges, pred_edges)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


@dataclass(frozen=True, kw_only=True)
class Propagation(DenseProtocol):
    """The settings to try; the best on train is used."""

    topk: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (5,)
    temperature: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.1,)
    radius: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (12,)
    context_frames: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (7,)

    def select_model(
        self, encoder: FrameEncoder, train: list[DenseSample]
    ) -> tuple[PropagationSettings, dict[str, Any]]:
        """Returns the selected settings, and the scores of all."""
        product = itertools.product(self.topk, self.temperature, self.radius, self.context_frames)
        grid = [PropagationSettings(*values) for values in product]
        if len(grid) == 1:
            return grid[0], {**grid[0]._asdict(), "tried": []}
        rows: list[list[np.ndarray]] = [[] for _ in grid]
        for sample in track(train, "select", "sequences"):
            frames, labels = sample.load()
            tokens = encoder(frames)
            for settings, sequences in zip(grid, rows, strict=True):
                sequences.append(self.evaluate_sequence(tokens, labels, frames.shape[1:3], settings))
        scores = [self.score(sequences) for sequences in rows]
        tried = [{**s._asdict(), "train": round(score, 2)} for s, score in zip(grid, scores, strict=True)]
        best = grid[int(np.argmax(scores))]
        return best, {**best._asdict(), "tried": tried}

    def evaluate(self, encoder: FrameEncoder, model: PropagationSettings, sample: DenseSample) -> np.ndarray:
        """The rows of a sequence; see `columns`."""
        frames, labels = sample.load()
        return self.evaluate_sequence(encoder(frames), labels, frames.shape[1:3], model)

    def evaluate_sequence(
        self, tokens: Tensor, labels: Any, size: tuple[int, int], settings: PropagationSettings
    ) -> np.ndarray:
        """tokens f32 [T, h, w, D]; size: height and width of the images in pixels."""
        raise NotImplementedError

    def score(self, rows: list[np.ndarray]) -> float:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Masks(Propagation):
    """J and F of the objects of the first frame (DAVIS 2017, semi-supervised): the mean over the frames
    between the first and the last, then over all objects."""

    label: ClassVar[LabelKind] = "masks"
    columns = ("J", "F")  # one row per object

    def evaluate_sequence(
        self, tokens: Tensor, labels: np.ndarray, size: tuple[int, int], settings: PropagationSettings
    ) -> np.ndarray:
        """The masks of the first frame are sampled at the nearest pixel of each token. Propagated labels are
        read as in DINO: upsampled bilinearly, scaled to 0 .. 1 for each object, and the largest is taken."""
        grid = tokens.shape[1:3]
        ids = torch.tensor(sorted({0, *np.unique(labels[0]).tolist()}), device=tokens.device)
        if len(ids) == 1:  # the first frame shows no object
            return np.zeros((0, 2))
        frames = torch.from_numpy(labels[:, None].astype(np.int64)).to(tokens.device)
        masks = frames == ids[:, None, None]  # [T, C, H, W]
        first = F.interpolate(masks[:1].float(), grid, mode="nearest-exact")[0]
        propagated = propagate(tokens, first, settings)
        numbers = torch.arange(1, len(ids), device=tokens.device)[:, None, None]
        rows = []
        for t in range(1, len(labels) - 1):
            soft = F.interpolate(propagated[t : t + 1], size, mode="bilinear")[0]
            low = soft.amin((1, 2), keepdim=True)
            high = soft.amax((1, 2), keepdim=True)
            pred = ((soft - low) / (high - low).clamp(min=1e-12)).argmax(0) == numbers
            target = masks[t, 1:]
            rows.append(torch.stack([jaccard(pred, target), boundary_f(pred, target)], 1))
        return torch.stack(rows).mean(0).cpu().numpy()

    def score(self, rows: list[np.ndarray]) -> float:
        objects = np.concatenate(rows)
        if not len(objects):
            raise UserError("no first frame shows an object")
        return 100 * float(objects.mean())

    def summarise(self, rows: list[np.ndarray], groups: list[str]) -> dict[str, Any]:
        objects = np.concatenate(rows)
        object_groups = [group for group, row in zip(groups, rows, strict=True) for _ in row]
        value = round(self.score(rows), 4)
        j, f = (round(100 * float(mean), 4) for mean in objects.mean(0))
        return {
            "metric": "J&F",
            "value": value,
            "ci95": bootstrap_ci(objects.mean(1), object_groups, self.seed),
            "J": j,
            "F": f,
            "objects": len(objects),
        }


@dataclass(frozen=True, kw_only=True)
class Keypoints(Propagation):
    """PCK: the fraction of key points within 0.1 and 0.2 of the labels' scale, averaged over joints, each
    over all frames but the first. Points that the first frame shows are evaluated wherever a frame shows
    them."""

    label: ClassVar[LabelKind] = "keypoints"
    columns = ("within_0.1", "within_0.2", "evaluated")  # one row per joint: numbers of frames

    def evaluate_sequence(
        self, tokens: Tensor, labels: KeypointLabels, size: tuple[int, int], settings: PropagationSettings
    ) -> np.ndarray:
        """A point starts as a Gaussian of 0.5 tokens (arXiv 2006.14613, data/jhmdb.py of videowalk) and is
        read at the maximum, as the weighted mean of it and its neighbours. Published: the mean of the three
        largest places, however far apart, and a point whose map is empty is left out; here it counts."""
        h, w = tokens.shape[1:3]
        token_pixels = np.array([size[1] / w, size[0] / h])  # x and y
        start = torch.from_numpy((labels.xy[0] + 0.5) / token_pixels - 0.5).to(tokens)  # [J, 2]
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        places = rearrange([x, y], "xy h w -> (h w) xy").to(tokens)  # [N, 2]
        heat = torch.exp(-(places - start[:, None]).square().sum(-1) / (2 * KEYPOINT_SIGMA**2))
        heat = rearrange(heat, "j (h w) -> j h w", h=h)
        maps = rearrange(propagate(tokens, heat, settings), "t j h w -> t j (h w)")
        maximum = places[maps.argmax(-1)][:, :, None]
        maps = maps * ((places - maximum).abs().amax(-1) <= 1)  # its neighbourhood
        mean = maps @ places / maps.sum(-1, keepdim=True).clamp(min=1e-30)  # [T, J, 2]
        xy = (mean.double().cpu().numpy() + 0.5) * token_pixels - 0.5
        evaluated = labels.visible & labels.visible[0]
        evaluated[0] = False
        error = np.linalg.norm(xy - labels.xy, axis=-1)
        within = [(evaluated & (error <= share * labels.scale)).sum(0) for share in PCK_THRESHOLDS]
        return np.stack([*within, evaluated.sum(0)], 1)

    def score(self, rows: list[np.ndarray]) -> float:
        return pck(np.stack(rows), 0)

    def summarise(self, rows: list[np.ndarray], groups: list[str]) -> dict[str, Any]:
        counts = np.stack(rows)
        if not counts[..., 2].any():
            raise UserError("no key point of a first frame is visible again")
        return {
            "metric": "PCK@0.1",
            "value": round(pck(counts, 0), 4),
            "ci95": bootstrap_metric_ci(lambda i: pck(counts[i], 0), groups, self.seed),
            "PCK@0.2": round(pck(counts, 1), 4),
            "points": int(counts[..., 2].sum()),
        }


def pck(counts: np.ndarray, threshold: int) -> float:
    """Counts [V, J, 3] (see Keypoints.columns) -> percent: the mean over the joints that are evaluated.
    threshold: index in PCK_THRESHOLDS."""
    total = counts.sum(0)
    joints = total[:, 2] > 0
    return 100 * float((total[joints, threshold] / total[joints, 2]).mean()) if joints.any() else 0.0
