"""Embeds the videos of a folder and prints the two that are nearest to each.

python examples/embed_and_search.py FOLDER ENCODER     ENCODER: a run folder or an encoder of vidssl

With VIDSSL_TOY=1 it renders six small videos and takes an untrained encoder. For many videos use
`vidssl embed` and `vidssl search`: they resume, take windows of long videos and share the work.
"""

import os
import sys
from pathlib import Path

from torch.nn.functional import normalize

import vidssl


def toy() -> tuple[Path, Path]:
    """A folder of videos and an encoder, made here."""
    from data_prep.synthetic import make_corpus

    make_corpus(Path("corpus"), train=6, test=0, workers=1)
    files = ("configs/method/videomae_tiny.yaml", "configs/model/vit_micro.yaml")
    vidssl.make_objective(*files, "data.frames=8", "data.stride=2", "augment.size=32").save_encoder(
        "untrained"
    )
    return Path("corpus/videos"), Path("untrained")


def main() -> None:
    folder, encoder_name = toy() if os.environ.get("VIDSSL_TOY") else sys.argv[1:3]
    paths = sorted(
        path for path in Path(folder).rglob("*") if path.suffix in (".mp4", ".avi", ".webm", ".mkv")
    )
    encoder = vidssl.load_encoder(encoder_name)
    features = encoder.embed(paths)  # f32 [n, D]
    # What all videos share says nothing: without it the cosines spread
    directions = normalize(features - features.mean(0), dim=1)
    similarity = directions @ directions.T
    similarity.fill_diagonal_(-1)
    for path, row in zip(paths, similarity, strict=True):
        nearest = row.topk(2)
        found = ", ".join(f"{paths[i].name} ({s:.2f})" for s, i in zip(*nearest, strict=True))
        print(f"{path.name}: {found}")


if __name__ == "__main__":
    main()
