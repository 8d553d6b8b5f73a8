"""Draws the figure of the README: from videos to an accuracy.

python tools/draw_overview.py docs/pictures/overview.png
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from data_prep.synthetic import render
from vidssl.core.errors import run_cli
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid
from vidssl.objective.masks import MASKS

SLICES, PATCHES = 4, 8  # of the drawn clip: time slices, patches a side
FRAME = 0.82  # side of a drawn frame, in inches, as all lengths below
GAP = 0.06
INK, FAINT = "#1f2937", "#6b7280"
PALE = {"data": "#e5e7eb", "network": "#dbeafe", "frozen": "#dcfce7", "loss": "#fee2e2"}


def make_frames() -> np.ndarray:
    """u8 [SLICES, S, S, 3]: an object that moves, one frame of each slice."""
    frames, _ = render("right", "yellow", np.random.default_rng(117))
    return frames[::4][:SLICES]


def hidden_tokens(seed: int = 4) -> np.ndarray:
    """bool [SLICES, side, side] of the tokens that the eight boxes of V-JEPA hide."""
    grid = Grid(SLICES, PATCHES, PATCHES)
    rng = KeyedRNG(seed, 0, torch.tensor([0]))
    clip = torch.zeros(1, 3, 2 * SLICES, 64, 64)
    mask = MASKS["multiblock_3d"]()(clip, grid, rng)[0]
    visible = torch.zeros(grid.n, dtype=torch.bool).scatter(0, mask.context[0], True)
    return ~rearrange(visible, "(t h w) -> t h w", t=SLICES, h=PATCHES).numpy()


class Canvas:
    """Boxes, arrows and frames on a figure whose axes are inches from the top left."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 10, **style: Any) -> None:
        self.axes.text(
            x, y, text, **{"ha": "center", "va": "center", "fontsize": size, "color": INK, **style}
        )

    def box(self, x: float, y: float, width: float, text: str, kind: str, small: str = "") -> None:
        """A rounded box 0.8 high, centred on y."""
        shape = FancyBboxPatch(
            (x, y - 0.4), width, 0.8, "round,pad=0,rounding_size=0.1", fc=PALE[kind], ec=INK
        )
        shape.set_linewidth(1.0)
        self.axes.add_patch(shape)
        self.text(x + width / 2, y - (0.14 if small else 0), text, weight="bold")
        if small:
            self.text(x + width / 2, y + 0.17, small, 7.5, color=FAINT)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": INK, "lw": 1.1}
        self.axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))

    def frames(self, x: float, y: float, frames: np.ndarray) -> None:
        """frames u8 [T, H, W, 3] side by side, centred on y."""
        for i, frame in enumerate(frames):
            left = x + i * (FRAME + GAP)
            extent = (left, left + FRAME, y + FRAME / 2, y - FRAME / 2)
            self.axes.imshow(frame, extent=extent, interpolation="bicubic")
            outline = Rectangle((left, y - FRAME / 2), FRAME, FRAME, fill=False, ec=FAINT, lw=0.8)
            self.axes.add_patch(outline)


def draw() -> Figure:
    canvas = Canvas(11.05, 3.8)
    clip, hidden = make_frames(), hidden_tokens()
    size = clip.shape[1] // PATCHES
    hidden = repeat(hidden, "t h w -> t (h a) (w b) 1", a=size, b=size)
    width = SLICES * (FRAME + GAP)
    top, middle, bottom = 0.75, 2.0, 3.3
    start = 2.0
    canvas.box(0.15, middle, 1.35, "videos", "data", "pack: tar shards")
    canvas.arrow((1.5, middle - 0.1), (start - 0.05, top + 0.1), -0.15)
    canvas.arrow((1.5, middle + 0.1), (start - 0.05, middle), 0.0)
    canvas.frames(start, top, clip)
    canvas.text(start + width / 2, top - 0.55, "the whole clip", 8.5, color=FAINT)
    canvas.frames(start, middle, np.where(hidden, 235, clip))
    canvas.text(start + width / 2, middle + 0.55, "context: what the mask leaves visible", 8.5, color=FAINT)
    x = start + width + 0.35
    canvas.arrow((x - 0.35, top), (x + 1.85, top))
    canvas.box(x + 1.85, top, 1.5, "target", "data", "pixels | features | ...")
    canvas.arrow((x - 0.35, middle), (x, middle))
    canvas.box(x, middle, 1.3, "encoder", "network", "3-D patch ViT")
    canvas.arrow((x + 1.3, middle), (x + 1.85, middle))
    canvas.box(x + 1.85, middle, 1.5, "predictor", "network", "query at hidden tokens")
    canvas.arrow((x + 3.35, top), (x + 3.95, 1.2), -0.15)
    canvas.arrow((x + 3.35, middle), (x + 3.95, 1.55), 0.15)
    canvas.box(x + 3.95, (top + middle) / 2, 1.1, "error", "loss", "at hidden tokens")
    canvas.arrow((0.82, middle + 0.4), (0.82, bottom - 0.4))
    canvas.box(0.15, bottom, 1.35, "labels", "data", "few, by group")
    canvas.arrow((1.5, bottom), (x, bottom))
    canvas.arrow((x + 0.65, middle + 0.4), (x + 0.65, bottom - 0.4))
    canvas.box(x, bottom, 1.3, "frozen", "frozen", "the same encoder")
    canvas.arrow((x + 1.3, bottom), (x + 1.85, bottom))
    canvas.box(x + 1.85, bottom, 1.5, "probe", "frozen", "attentive, linear, k-NN")
    canvas.arrow((x + 3.35, bottom), (x + 3.95, bottom))
    canvas.box(x + 3.95, bottom, 1.1, "accuracy", "frozen", "beside untrained")
    return canvas.figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="draw_overview", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    draw().savefig(out, dpi=130)


if __name__ == "__main__":
    run_cli(main)
