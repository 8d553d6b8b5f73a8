"""Pictures of a report: clips with masks, predictions, features and neighbours, from the files of a run."""

import io
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from vidssl import config
from vidssl.config import load_config
from vidssl.report.pictures import CLIPS, NEIGHBOURS, QUERIES, Pictures
from vidssl.report.run_files import read_run
from vidssl.training.schema import TrainConfig

FRAMES, SIZE = 8, 16


def make_configured_run(folder, method, train):
    """A run that has not saved yet."""
    files = [f"configs/method/{method}.yaml", "configs/model/vit_micro.yaml", "configs/data/quickstart.yaml"]
    settings = ["model.depth=1", "run.steps=4", "run.batch=2", f"run.out={folder}", f"data.train={train}"]
    settings += [f"data.frames={FRAMES}", f"augment.size={SIZE}", "optim.warmup=0"]
    folder.mkdir()
    tree = config.to_tree(load_config([*files, *settings], TrainConfig))
    config.save(tree, folder / "config.yaml")
    return read_run(folder, folder.name)


def frames_of(row):
    """f32 [T, H, W, 3] of a strip."""
    picture = np.asarray(Image.open(io.BytesIO(b64decode(row["src"].split(",")[1]))).convert("RGB"))
    return np.stack(np.split(picture.astype(float), picture.shape[1] // row["width"], axis=1))


@pytest.mark.parametrize(
    "method, words", [("videomae_tiny", "predicted"), ("vjepa_tiny", "cosine to target")]
)
def test_clips_masks_predictions_features_and_neighbours(tmp_path, synthetic_shards, method, words):
    run = make_configured_run(tmp_path / "a", method, synthetic_shards / "train")
    groups = Pictures()([run])
    assert [found["missing"] for found in groups] == [[], [], []]
    masks, features, alike = groups
    assert len(masks["items"]) == CLIPS
    item = masks["items"][0]
    assert item["frames"] == FRAMES and item["title"].startswith("a: ") and item["about"]
    clip, seen, target, predicted = item["rows"]
    assert predicted["label"].startswith(words) and predicted["label"].endswith("untrained")
    true = frames_of(clip)
    assert true.shape == (FRAMES, SIZE, SIZE, 3)
    # WebP loses a little, also across the edges of patches
    is_seen = np.abs(frames_of(seen) - true).mean((1, 2, 3)) < 8
    is_target = np.abs(frames_of(target) - true).mean((1, 2, 3)) < 8
    assert not (is_seen & is_target).any()
    if method == "videomae_tiny":
        same = np.abs(frames_of(predicted) - true).mean((1, 2, 3)) < 8
        # The slice that is predicted is replaced, the rest is the clip
        assert same.any() and not same.all()
    assert [row["label"] for row in features["items"][0]["rows"]] == ["clip", "untrained"]
    assert len(alike["items"]) == QUERIES
    assert all(len(found["rows"]) == 1 + NEIGHBOURS for found in alike["items"])


def test_what_is_missing_is_said(tmp_path, synthetic_shards):
    lost = make_configured_run(tmp_path / "lost", "videomae_tiny", tmp_path / "nowhere")
    other = read_run(tmp_path, "other")
    (group,) = Pictures()([lost, other])
    assert "no shards there" in group["missing"][0] and "nothing to draw" in group["missing"][1]


def test_pictures_are_drawn_again_when_a_run_has_saved(tmp_path):
    run = read_run(tmp_path, "a")
    pictures = Pictures()
    first = pictures([run])
    assert pictures([run]) is first
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert pictures([run]) is not first
