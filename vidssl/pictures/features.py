"""Features as pictures: the first principal components of tokens as colours, and the likeness of a token to
all others."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from matplotlib import colormaps
from torch import Tensor, nn

from vidssl.core.pixels import normalise
from vidssl.model.grid import Grid
from vidssl.pretrained.load import LoadedEncoder

ENCODED_AT_ONCE = 8  # clips
MIN_CLIPS_FOR_PLACES = 4  # of fewer clips the mean at a place is not that of all clips
SATURATED = 0.02  # fraction of tokens at each end of a colour channel
TOKEN_EDGE = (255, 255, 255)


class Basis(NamedTuple):
    """Maps features to colours, the same for all clips and times."""

    mean: Tensor  # f32 [t, h, w, D], or [D]
    directions: Tensor  # f32 [D, 3], orthogonal; the first principal components
    middle: Tensor  # f32 [3]; shown as grey
    spread: Tensor  # f32 [3]; as far from the middle a channel is saturated


def grid_of_clips(model: dict[str, int], frames: int, size: int) -> Grid:
    """The token grid of clips of `frames` frames of size x size pixels. model: of an encoder's metadata."""
    side = size // model["patch"]
    return Grid(frames // model["tubelet"], side, side)


def encode_on_grid(encoder: nn.Module, video: Tensor, grid: Grid) -> Tensor:
    """Features f32 [n, t, h, w, D] of a normalised video f32 [n, 3, T, S, S], some clips at a time."""
    features = torch.cat([encoder(some).float() for some in video.split(ENCODED_AT_ONCE)])
    return rearrange(features, "n (t h w) d -> n t h w d", t=grid.t, h=grid.h)


@torch.no_grad()
def token_features(loaded: LoadedEncoder, clips: Tensor) -> Tensor:
    """Features f32 [n, t, h, w, D] of clips u8 [n, 3, T, S, S]."""
    pixels = loaded.metadata["pixels"]
    grid = grid_of_clips(loaded.metadata["model"], clips.shape[2], clips.shape[3])
    return encode_on_grid(loaded.encoder, normalise(clips, (pixels["mean"], pixels["std"])), grid)


def shared_part(features: Tensor) -> Tensor:
    """What features f32 [n, t, h, w, D] have in common: of several clips the mean at each place, which is
    mostly its position, else the mean of all tokens."""
    return features.mean(0) if len(features) >= MIN_CLIPS_FOR_PLACES else features.flatten(0, 3).mean(0)


def fit_basis(features: Tensor) -> Basis:
    """The colours of features f32 [n, t, h, w, D].

    The median of a channel is grey, and a few tokens at its ends are saturated: what most tokens have in
    common, the background, stays dull, and what differs from it has colours.
    """
    mean = shared_part(features)
    tokens = (features - mean).flatten(0, 3)
    _, _, directions = torch.linalg.svd(tokens.T @ tokens)
    directions = directions[:3].T
    # The sign of a direction is arbitrary: the longer tail is bright.
    projected = tokens @ directions
    directions = directions * torch.where(projected.pow(3).mean(0) < 0, -1.0, 1.0)
    projected = tokens @ directions
    middle = projected.median(0).values
    spread = torch.quantile((projected - middle).abs(), 1 - 2 * SATURATED, 0)
    return Basis(mean, directions, middle, spread.clamp_min(1e-12))


def to_colours(features: Tensor, basis: Basis) -> Tensor:
    """Colours f32 [n, t, h, w, 3] in 0..1 of features f32 [n, t, h, w, D]."""
    projected = (features - basis.mean) @ basis.directions
    return (0.5 + 0.5 * (projected - basis.middle) / basis.spread).clamp(0, 1)


def upsample(values: Tensor, frames: int, height: int, width: int) -> np.ndarray:
    """Values f32 [t, h, w, C] at each pixel, linear between the centres of tokens: f32 [T, H, W, C]."""
    volume = rearrange(values, "t h w c -> 1 c t h w")
    volume = F.interpolate(volume, (frames, height, width), mode="trilinear")
    return rearrange(volume, "1 c t h w -> t h w c").numpy()


def colour_frames(colours: Tensor, frames: int, size: int) -> np.ndarray:
    """Colours f32 [t, h, w, 3] of a clip as a video u8 [T, S, S, 3]."""
    return (255 * upsample(colours, frames, size, size)).round().astype(np.uint8)


def pca_videos(features: Tensor, frames: int, size: int, basis: Basis | None = None) -> list[np.ndarray]:
    """A video u8 [T, S, S, 3] of each clip with features f32 [n, t, h, w, D]; all have one basis."""
    colours = to_colours(features, basis or fit_basis(features))
    return [colour_frames(clip, frames, size) for clip in colours]


def similarity(features: Tensor, token: tuple[int, int, int]) -> Tensor:
    """Cosine similarity f32 [t, h, w] of a token (t, h, w) to all tokens of a clip, f32 [t, h, w, D], about
    the mean of the clip's tokens, which would make all alike."""
    directions = F.normalize(features - features.mean((0, 1, 2)), dim=-1)
    return directions @ directions[token]


def liveliest_token(video: np.ndarray, grid: Grid) -> tuple[int, int, int]:
    """The token (t, h, w) of a video u8 [T, H, W, 3] near the middle of time whose place changes most."""
    change = np.abs(np.diff(video.astype(np.float32), axis=0)).mean((0, 3))
    places = reduce(change, "(h p) (w q) -> h w", "mean", h=grid.h, w=grid.w) if len(video) > 1 else None
    best = grid.h // 2 * grid.w + grid.w // 2 if places is None else int(places.argmax())
    return grid.t // 2, best // grid.w, best % grid.w


def similarity_video(video: np.ndarray, features: Tensor, token: tuple[int, int, int]) -> np.ndarray:
    """A video u8 [T, S, S, 3] with the similarities of a token, from dark (0 and below) to bright (1), and
    the token in a white square."""
    values = similarity(features, token).clamp_min(0)
    picture = heat_over(video, values, 1.0)
    return mark_token(picture, token, Grid(*values.shape))


def heat_over(video: np.ndarray, values: Tensor, highest: float | None = None) -> np.ndarray:
    """Values f32 [t, h, w] as colours over a darkened, grey video u8 [T, H, W, 3]. highest: the value of the
    brightest colour; None: the largest of the clip."""
    top = max(float(values.max()) if highest is None else highest, 1e-12)
    heat = upsample((values / top).clamp(0, 1)[..., None], *video.shape[:3])[..., 0]
    colours = 255 * colormaps["inferno"](heat)[..., :3]
    grey = video.mean(-1, keepdims=True)
    weight = 0.75
    return (weight * colours + (1 - weight) * grey).round().astype(np.uint8)


def mark_token(video: np.ndarray, token: tuple[int, int, int], grid: Grid) -> np.ndarray:
    """A video u8 [T, H, W, 3] with a white square around a token (t, h, w) while it lasts."""
    frames, height, width = video.shape[:3]
    marked = video.copy()
    tubelet, rows, columns = frames // grid.t, height // grid.h, width // grid.w
    times = slice(token[0] * tubelet, (token[0] + 1) * tubelet)
    top, left = token[1] * rows, token[2] * columns
    bottom, right = top + rows - 1, left + columns - 1
    marked[times, top : bottom + 1, [left, right]] = TOKEN_EDGE
    marked[times, [top, bottom], left : right + 1] = TOKEN_EDGE
    return marked
