"""Pictures of masks on clips, with scores and corrupted inputs."""

import re
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from data_prep.synthetic import render
from vidssl.config import SHIPPED, load_config
from vidssl.core.errors import UserError
from vidssl.core.pixels import channel_statistics, normalise
from vidssl.core.rng import KeyedRNG
from vidssl.data.augment import CenterCrop
from vidssl.data.dataset import TrainClips
from vidssl.data.order import Order
from vidssl.data.shards import Shards
from vidssl.model.grid import Grid, Mask
from vidssl.objective.build import supply
from vidssl.objective.errors import ERRORS
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.masks import MASKS
from vidssl.objective.target_base import Target
from vidssl.pictures.clips import read_clip
from vidssl.pictures.formats import is_animated
from vidssl.pictures.panels import HIDDEN_GREY, PanelRow, VideoPanel, film_strip, write_panels
from vidssl.training.schema import TrainConfig

TOKEN_COLOR = (150, 120, 200)  # of tokens that the encoder sees replaced by a vector
PLAYED_FPS = 3.0  # time slices a second
MASKS_DRAWN = 4  # of the masks of a clip
GIVEN = {  # part -> settings that its method leaves to the user
    "teacher": ["method.target.path=x"],
    "teachers": ["method.target.paths=[x, y]"],
    "given_tokens": ["method.target.path=x", "method.target.vocabulary=2"],
    "warp": ["method.score.flow=blocks"],
}
Rows = list[tuple[str, np.ndarray]]  # (name, picture u8 [H, W, 3])


def paint(video: np.ndarray, mask: Mask, grid: Grid) -> list[np.ndarray]:
    """Two rows, context and targets with loss, of a mask of one sample on a video u8 [T, H, W, 3]."""
    rows = []
    target = mask.target[0] if mask.weight is None else mask.target[0][mask.weight[0] > 0]
    for ids in (mask.context[0], target.flatten()):
        visible = torch.zeros(grid.n, dtype=torch.bool)
        visible[ids] = True
        pixels = to_pixels(visible, video, grid)[..., None]
        rows.append(film_strip(np.where(pixels, video, HIDDEN_GREY)))
    return rows


def to_pixels(tokens: Tensor, video: np.ndarray, grid: Grid) -> np.ndarray:
    """Numbers of the tokens [N] at each pixel of a video u8 [T, H, W, 3]: [T, H, W]."""
    frames, height, width = video.shape[:3]
    return repeat(
        tokens.reshape(grid).numpy(),
        "t h w -> (t u) (h p) (w q)",
        u=frames // grid.t,
        p=height // grid.h,
        q=width // grid.w,
    )


def heat_map(scores: Tensor, video: np.ndarray, grid: Grid) -> np.ndarray:
    """A row with the scores f32 [N] as colours, dark for the lowest of the clip."""
    low, high = scores.aminmax()
    pixels = to_pixels((scores - low) / (high - low).clamp_min(1e-12), video, grid)
    return film_strip(255 * colormaps["inferno"](pixels)[..., :3])


def strip_frames(strip: np.ndarray) -> np.ndarray:
    """The square frames u8 [T, S, S, 3] of a film strip u8 [S, T * (S + gap), 3]."""
    side = len(strip)
    frames = rearrange(strip, "h (t w) c -> t h w c", w=side - (-side // 40))
    return frames[:, :, :side]


def show_runs(runs: list[Path], out: Path, clips: int = 1) -> None:
    """The first clips of the first run's data; for each a row of context and a row of targets for each mask
    of every run."""
    opened = [open_training_clips(run) for run in runs]
    rows: Rows = []
    for i in range(clips):
        for k, (run, (cfg, data)) in enumerate(zip(runs, opened, strict=True)):
            item = data[i]
            assert isinstance(item.video, Tensor)
            found = method_rows(cfg, item.video, f"{run.name}\n", i)
            rows += found[1 if k else 0 :]
    draw_mask_rows(rows, out)


def open_training_clips(run: Path) -> tuple[TrainConfig, TrainClips]:
    """The configuration of a run's folder, and the clips that it trains on, in order."""
    cfg = load_config([str(run / "config.yaml")], TrainConfig)
    shards = Shards(cfg.data.train)
    order = Order(shards.counts, cfg.run.seed, cfg.run.lanes)
    return cfg, TrainClips(shards, order, cfg.data, cfg.augment.build())


def show_method(method: Path, clip: Path | None, out: Path) -> None:
    """The masks of a file of configs/method on a video, or on a made one; scores and corrupted input beside
    them."""
    cfg = small_config(method)
    draw_mask_rows(method_rows(cfg, make_clip(cfg) if clip is None else read_clip(clip, cfg)), out)


def small_config(method: Path, *more: str) -> TrainConfig:
    """The method with the data and the patches that its header names, and a tiny encoder; more: further
    settings."""
    header = method.read_text().split("method:\n")[0]
    named = re.findall(r"\b(?:model|data)/\w+\.yaml", header)
    if not any(name.startswith("data/") for name in named):
        named = ["model/vit_micro.yaml", "data/quickstart.yaml"]
    tiny = ["kind=vit", "dim=48", "depth=1", "heads=3", "levels=[]"]
    settings = [*(f"model.{key}" for key in tiny), "run.out=x", "run.steps=1", "run.batch=8", "data.train=x"]
    # What a user must give: no part of a mask is a target, whose files are not read.
    for kind, given in GIVEN.items():
        if re.search(rf"kind: {kind}\b", method.read_text()):
            settings += given
    return load_config([str(method), *(str(SHIPPED / name) for name in named), *settings, *more], TrainConfig)


def make_clip(cfg: TrainConfig) -> Tensor:
    """u8 [3, T, S, S]: a rendered object that moves to the right."""
    frames, _ = render("right", "red", np.random.default_rng(0))
    chosen = np.linspace(0, len(frames) - 1, cfg.data.frames * cfg.data.windows).astype(int)
    return CenterCrop(cfg.augment.arguments["size"])(frames[chosen])


def method_rows(cfg: TrainConfig, clip: Tensor, name: str = "", number: int = 0) -> Rows:
    """The clip u8 [3, T, S, S]; for each mask context, targets and corrupted input; scores.

    Networks have their initial weights. name: before those of the rows; number: of the clip among those of
    the data, which its mask depends on.
    """
    objective = maskable(cfg)
    video = normalise(clip[None])
    grid = objective.encoder.grid_of(video)
    step = len(clip[0]) // grid.t  # one frame of each time slice
    shown = rearrange(clip, "c t h w -> t h w c").numpy()[::step]
    rng = KeyedRNG(cfg.run.seed, 0, torch.tensor([number]))
    rows: Rows = [("clip", film_strip(shown))]
    with torch.no_grad():
        masks, scores = objective.make_masks(video, rng)
        if scores is not None:
            of_weights = (
                bool([*objective.score.parameters()]) or getattr(objective.score, "of", "") == "embedding"
            )
            weights = "\n(initial weights)" if of_weights else ""
            rows.append((f"{name}score{weights}", heat_map(scores[0], shown, grid)))
        for i, mask in enumerate(masks[:MASKS_DRAWN]):
            context, target = paint(shown, mask, grid)
            if objective.corruption is not None:
                seen = seen_row(objective, video, mask, grid, rng, step, i)
                rows.append((f"{name}mask {i + 1}\nseen", seen))
            else:
                rows.append((f"{name}mask {i + 1}\ncontext", context))
            rows.append((f"{name}mask {i + 1}\ntarget", target))
    return rows


def maskable(cfg: TrainConfig) -> MaskedPrediction:
    """The parts of a method that choose and corrupt tokens, with a small encoder."""
    method = cfg.method
    if not method.predicts:
        raise UserError("the method predicts nothing behind a mask, so there is none to draw")
    size = cfg.augment.arguments["size"]
    encoder = cfg.model.build(frames=cfg.data.frames, height=size, width=size)
    return MaskedPrediction(
        encoder,
        method.mask.build(),
        Target(1),
        None,
        nn.Identity(),
        ERRORS["l2"](),
        corruption=supply(method.corrupt, encoder=encoder),
        score=method.score.build(encoder=encoder),
        target_fraction=method.target_fraction,
        masks_per_clip=method.masks_per_clip,
    )


def seen_row(
    objective: MaskedPrediction,
    video: Tensor,
    mask: Mask,
    grid: Grid,
    rng: KeyedRNG,
    step: int,
    index: int,
) -> np.ndarray:
    """What the encoder sees of a video f32 [1, 3, T, H, W] with mask `index`, every `step`-th frame."""
    assert objective.corruption is not None
    seen = objective.corruption(video, mask, grid, rng, index)
    mean, std = channel_statistics(video)
    pixels = rearrange((seen.video * std + mean)[0], "c t h w -> t h w c").clamp(0, 1)[::step]
    frames = (255 * pixels).round().numpy().astype(np.uint8)
    visible = torch.ones(grid.n, dtype=torch.bool)
    if not objective.corruption.sees_all:
        visible = torch.zeros_like(visible).scatter(0, mask.context[0], True)
    frames = np.where(to_pixels(visible, frames, grid)[..., None], frames, HIDDEN_GREY)
    if seen.replaced is not None:
        frames = np.where(to_pixels(seen.replaced[0][0], frames, grid)[..., None], TOKEN_COLOR, frames)
    return film_strip(frames)


def show_kinds(out: Path, grid: Grid = Grid(4, 8, 8), pixels: int = 8) -> None:
    """Every kind with its defaults on a random clip of two frames per time slice, drawn in grey."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(1, 3, 2 * grid.t, grid.h * pixels, grid.w * pixels, generator=generator)
    video = np.full((grid.t, grid.h * pixels, grid.w * pixels, 3), 60, np.uint8)
    rows = []
    for kind, masker in MASKS.items():
        rng = KeyedRNG(0, 0, torch.tensor([0]))
        if kind == "scored":
            masks = masker().from_scores(rng.rand(grid.n), grid, rng)
        else:
            masks = masker()(clip, grid, rng)
        for mask in masks:
            context, target = paint(video, mask, grid)
            rows += [(f"{kind}\ncontext", context), ("target", target)]
    draw_mask_rows(rows, out)


def draw_mask_rows(rows: Rows, out: Path) -> None:
    """Named pictures, one below the other; in an animation they play side by side."""
    if is_animated(out):
        panels = [VideoPanel(name, strip_frames(picture)) for name, picture in rows]
        write_panels(out, [PanelRow("", panels[i : i + 6]) for i in range(0, len(panels), 6)], PLAYED_FPS)
        return
    figure = Figure(figsize=(10, 1.35 * len(rows)))
    axes = figure.subplots(len(rows), 1)
    for axis, (name, picture) in zip(np.atleast_1d(axes), rows, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(out, dpi=110, bbox_inches="tight")
