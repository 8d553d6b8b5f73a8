"""Probes a published checkpoint and the same network untrained on labelled videos, and compares the two.

python examples/probe_public_checkpoint.py VIDEOS hf:MCG-NJU/videomae-base data.stride=4

VIDEOS: FOLDER/<class>/<file>, or a folder with labels.csv. Further arguments are those of `vidssl probe`.
With VIDSSL_TOY=1 it renders a small corpus and takes a network of timm with random weights, so nothing is
downloaded.
"""

import json
import os
import sys
from pathlib import Path

from vidssl.cli import main as vidssl

HEAD = ["configs/probe/linear.yaml"]


def toy() -> list[str]:
    from data_prep.synthetic import make_corpus

    make_corpus(Path("videos"), train=20, test=10, workers=1)
    small = ["data.frames=1", "data.size=32", "data.labels=[motion]", "probe.segments=1", "probe.l2=[1e-2]"]
    return ["videos", "timm:test_vit", *small, "probe.workers=0", "random_init=true"]


def split_options(videos: Path) -> list[str]:
    """Holds out a fifth, unless labels.csv says which videos are for the test."""
    table = videos / "labels.csv"
    has_splits = table.exists() and "split" in table.read_text().splitlines()[0].split(",")
    return [] if has_splits else ["--test-fraction", "0.2"]


def main() -> None:
    videos, encoder, *more = toy() if os.environ.get("VIDSSL_TOY") else sys.argv[1:]
    if not Path("shards/train/index.json").exists():
        vidssl(["pack", videos, "shards", *split_options(Path(videos))])
    data = ["data.train=shards/train", "data.test=shards/test"]
    for name, extra in (("trained", []), ("untrained", ["random_init=true"])):
        if not Path(name, "probe.json").exists():
            chosen = [item for item in more if item not in extra]
            vidssl(["probe", *HEAD, f"encoder={encoder}", *data, *chosen, *extra, f"out={name}"])
    for name in ("trained", "untrained"):
        for row in json.loads(Path(name, "probe.json").read_text())["results"]:
            low, high = row["ci95"]
            print(f"{name:9s} {row['label']:12s} {row['metric']} {row['value']:.1f} [{low:.1f}, {high:.1f}]")


if __name__ == "__main__":
    main()
