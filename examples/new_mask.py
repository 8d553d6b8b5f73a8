"""A mask of one's own in a training loop of one's own: every second place is hidden, like a chessboard.

python examples/new_mask.py SHARDS [STEPS]      SHARDS: a folder made by vidssl pack

With VIDSSL_TOY=1 it renders and packs a small corpus and takes three steps. docs/adding_a_method.md says what
a mask must keep to, and how it becomes a kind for every YAML file.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import repeat
from torch import Tensor

import vidssl
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask
from vidssl.objective.masks import MASKS, mask_from_scores


@dataclass(frozen=True)
class Chessboard:
    """Hides the black or the white places of every time slice, either with probability 1/2."""

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        rows, columns = torch.arange(grid.h)[:, None], torch.arange(grid.w)
        black = ((rows + columns) % 2).flatten().to(rng.keys.device)  # i64 [h * w]
        is_black = (rng.rand(1) < 0.5).long()  # [B, 1]
        hidden = (black + is_black) % 2
        scores = repeat(hidden.float(), "b n -> b (t n)", t=grid.t)
        # With an odd number of places one colour has one more; all clips keep as many tokens
        return [mask_from_scores(scores, grid.t * (grid.h * grid.w // 2))]


def toy() -> tuple[str, int]:
    from data_prep.synthetic import make_corpus
    from vidssl.cli import main as command

    make_corpus(Path("corpus"), train=8, test=0, workers=1)
    command(["pack", "corpus/videos", "shards"])
    return "shards", 3


def main() -> None:
    shards, steps = toy() if os.environ.get("VIDSSL_TOY") else (sys.argv[1], int((*sys.argv, 1000)[2]))
    MASKS["chessboard"] = Chessboard
    objective = vidssl.make_objective(
        *(
            "configs/method/videomae_tiny.yaml",
            "configs/model/vit_micro.yaml",
            "method.mask={kind: chessboard}",
        ),
        *("data.frames=8", "data.stride=2", "augment.size=32"),
    )
    dataset = vidssl.open_dataset(shards, batch=8, frames=8, stride=2, size=32, steps=steps, workers=0)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    for batch in dataset:
        losses = objective(batch.video, batch.position)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        objective.update(dataset.step / steps)
        print(f"step {dataset.step}: loss {losses['loss']:.4f}")
    objective.save_encoder("chessboard_encoder")


if __name__ == "__main__":
    main()
