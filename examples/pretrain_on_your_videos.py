"""Packs a folder of videos, pre-trains an encoder on them, and embeds them with it.

python examples/pretrain_on_your_videos.py VIDEOS [key=value ...]

Each step is a command that one would type; called again, what is finished is not done again and what was cut
off goes on. Further arguments are those of `vidssl train`: method, size and length are yours to choose
(`vidssl train --help`). With VIDSSL_TOY=1 it renders a small corpus and trains two steps.
"""

import os
import sys
from pathlib import Path

from vidssl.cli import main as vidssl

METHOD = [
    "configs/method/vjepa_tiny.yaml",
    "configs/model/vit_micro.yaml",
    *("data.frames=16", "data.stride=4", "augment.kind=random_crop", "augment.size=112"),
    *("run.steps=2000", "run.batch=32", "run.save_every=200"),
]


def toy() -> list[str]:
    from data_prep.synthetic import make_corpus

    make_corpus(Path("videos"), train=8, test=0, workers=1)
    sizes = ["data.frames=8", "data.stride=2", "augment.size=32", "model.depth=1", "run.batch=8"]
    return ["videos/videos", *sizes, "run.steps=2", "run.save_every=2", "efficiency.workers=0"]


def main() -> None:
    videos, *more = toy() if os.environ.get("VIDSSL_TOY") else sys.argv[1:]
    vidssl(["pack", videos, "shards"])
    # Arguments that come later win
    given = {item.partition("=")[0] for item in more}
    method = [item for item in METHOD if item.partition("=")[0] not in given]
    vidssl(["train", *method, "data.train=shards", "run.out=run", *more])
    vidssl(["embed", "shards", "--encoder", "run", "--out", "features"])
    print("encoder: run/encoder.safetensors; next: vidssl search features KEY --montage hits.png")


if __name__ == "__main__":
    main()
