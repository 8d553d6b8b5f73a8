"""Pictures of masks on clips, for tools/show_masks.py and tools/quickstart.py."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib.figure import Figure

from vidssl.config import load_config
from vidssl.core.rng import KeyedRNG
from vidssl.data.dataset import TrainClips
from vidssl.data.order import Order
from vidssl.data.shards import Shards
from vidssl.model.grid import Grid, Mask
from vidssl.objective.masks import MASKS
from vidssl.training.schema import TrainConfig

HIDDEN_LEVEL = 225  # grey level of tokens that are not shown


def paint(video: np.ndarray, mask: Mask, grid: Grid) -> list[np.ndarray]:
    """Two rows, context and targets with loss, of a mask of one sample on a video u8 [T, H, W, 3]."""
    frames, height, width = video.shape[:3]
    rows = []
    target = mask.target[0] if mask.weight is None else mask.target[0][mask.weight[0] > 0]
    for ids in (mask.context[0], target.flatten()):
        visible = torch.zeros(grid.n, dtype=torch.bool)
        visible[ids] = True
        pixels = repeat(
            visible.reshape(grid).numpy(),
            "t h w -> (t u) (h p) (w q) 1",
            u=frames // grid.t,
            p=height // grid.h,
            q=width // grid.w,
        )
        rows.append(film_strip(np.where(pixels, video, HIDDEN_LEVEL)))
    return rows


def film_strip(video: np.ndarray) -> np.ndarray:
    """The frames of a video [T, H, W, 3] side by side, u8 [H, T*(W+1), 3], with a white line after each."""
    framed = np.pad(video, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=255)
    return rearrange(framed, "t h w c -> h (t w) c").astype(np.uint8)


def show_runs(runs: list[Path], out: Path) -> None:
    """One clip of the first run's data; a row of context and a row of targets for each mask of every run."""
    rows: list[tuple[str, np.ndarray]] = []
    for run in runs:
        cfg = load_config([str(run / "config.yaml")], TrainConfig)
        shards = Shards(cfg.data.train)
        order = Order(shards.counts, cfg.run.seed, cfg.run.lanes)
        item = TrainClips(shards, order, cfg.data, cfg.augment.build())[0]
        video = rearrange(item.video, "c t h w -> t h w c").numpy()
        unit = cfg.model.arguments["tubelet"], cfg.model.arguments["patch"]
        grid = Grid(video.shape[0] // unit[0], video.shape[1] // unit[1], video.shape[2] // unit[1])
        if not rows:
            rows.append(("clip", film_strip(video)))
        rng = KeyedRNG(cfg.run.seed, 0, torch.tensor([0]))
        for i, mask in enumerate(cfg.method.mask.build()(item.video[None], grid, rng)):
            context, target = paint(video, mask, grid)
            rows += [
                (f"{run.name}\nmask {i + 1}\ncontext", context),
                (f"{run.name}\nmask {i + 1}\ntarget", target),
            ]
    draw(rows, out)


def show_kinds(out: Path, grid: Grid = Grid(4, 8, 8), pixels: int = 8) -> None:
    """Every kind with its defaults on a random clip of two frames per time slice, drawn in grey."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(1, 3, 2 * grid.t, grid.h * pixels, grid.w * pixels, generator=generator)
    video = np.full((grid.t, grid.h * pixels, grid.w * pixels, 3), 60, np.uint8)
    rows = []
    for kind, masker in MASKS.items():
        for mask in masker()(clip, grid, KeyedRNG(0, 0, torch.tensor([0]))):
            context, target = paint(video, mask, grid)
            rows += [(f"{kind}\ncontext", context), ("target", target)]
    draw(rows, out)


def draw(rows: list[tuple[str, np.ndarray]], out: Path) -> None:
    """Named pictures, one below the other."""
    figure = Figure(figsize=(10, 1.35 * len(rows)))
    axes = figure.subplots(len(rows), 1)
    for axis, (name, picture) in zip(np.atleast_1d(axes), rows, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(out, dpi=110, bbox_inches="tight")
