"""Pictures of a report: clips with masks, predictions, features and neighbours, from the files of a run."""

import io
import json
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image

from vidssl import config
from vidssl.config import load_config
from vidssl.data.shards import Shards
from vidssl.evaluation.report import weights_hash
from vidssl.model.heads import AttentiveHead
from vidssl.pictures.decode_run import CLIPS_FILE, clip_items
from vidssl.pictures.panels import PanelRow, VideoPanel
from vidssl.pictures.run_clips import HeldOutClip
from vidssl.pictures.strips import group
from vidssl.pretrained.content import content_hash
from vidssl.pretrained.files import save_weights
from vidssl.pretrained.load import load_encoder
from vidssl.report.pictures import CLIPS, NEIGHBOURS, QUERIES, Pictures
from vidssl.report.probe_pictures import add_attention, add_decoded
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
    kind = "features" if method == "videomae_tiny" else "target"
    names = ["clip", "untrained", f"{kind} like the marked token, untrained"]
    assert [row["label"] for row in features["items"][0]["rows"]] == names
    assert len(alike["items"]) == QUERIES
    assert all(len(found["rows"]) == 1 + NEIGHBOURS for found in alike["items"])


def add_probe(run, train):
    """An attentive head of untrained weights, beside an encoder that the run has not trained."""
    cfg = load_config([str(run.folder / "config.yaml")], TrainConfig)
    encoder = cfg.build_objective().eval_encoder
    header = {"model": cfg.encoder_arguments(), "config": {"data": {"stride": 1, "fps": None}}}
    pixels = {"mean": [0.5] * 3, "std": [0.25] * 3}
    save_weights(run.folder / "encoder.safetensors", encoder.state_dict(), {**header, "pixels": pixels})
    names = Shards([str(train)]).classes["motion"]
    size = {"dim": encoder.dim, "heads": 2, "classes": len(names), "depth": 1}
    weights = {f"head.{name}": value for name, value in AttentiveHead(**size).state_dict().items()}
    (run.folder / "probe" / "heads").mkdir(parents=True)
    about = {"head": size, "label": "motion", "kind": "class", "names": names}
    save_weights(run.folder / "probe" / "heads" / "motion.safetensors", weights, about)
    head = {"file": "heads/motion.safetensors", "sha256": content_hash(weights)}
    settings = {"encoder": f"elsewhere/{run.folder.name}", "data": {}, "probe": {}}
    sha256 = weights_hash(load_encoder(str(run.folder)).encoder)
    report = {
        "results": [{"label": "motion", "head": head}],
        "config": settings,
        "encoder": {"sha256": sha256},
    }
    (run.folder / "probe" / "probe.json").write_text(json.dumps(report))
    return names


def test_attention_of_a_probe_beside_what_it_says(tmp_path, synthetic_shards):
    train = synthetic_shards / "train"
    run = make_configured_run(tmp_path / "a", "vjepa_tiny", train)
    names = add_probe(run, train)
    looks = group("attention", "", "")
    add_attention(run, looks)
    assert looks["missing"] == [] and looks["items"]
    clip, attention = looks["items"][0]["rows"]
    assert clip["label"].startswith("true: ") and any(name in clip["label"] for name in names)
    said = attention["label"].removeprefix("says: ")
    assert any(said.startswith(name) for name in names) and said.endswith("%")
    assert attention["frames"] == FRAMES
    # A probe of another encoder is not drawn
    path = run.folder / "probe" / "probe.json"
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    other = group("attention", "", "")
    add_attention(run, other)
    assert other["items"] == [] and "is not the" in other["missing"][0]


def test_decoded_predictions_are_shown_with_their_verdict(tmp_path):
    run = read_run(tmp_path, "a")
    gain = {"nothing": {"mean": 1.5, "ci95": [1.0, 2.0]}}
    report = {"psnr_gain_of_prediction_over_db": gain, "decoder": {"steps": 150}}
    (tmp_path / "decoded").mkdir()
    (tmp_path / "decoded" / "decoded.json").write_text(json.dumps(report))
    found = group("decoded", "", "")
    add_decoded(run, found)
    assert found["items"] == [] and "vidssl decode" in found["missing"][0]
    clips = [HeldOutClip("videos/jump.mp4", "g", torch.zeros(3, 2, 8, 8), 12.0)]
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    rows = [PanelRow("", [VideoPanel("truth", frames), VideoPanel("mean of\nsamples", frames)])]
    drawn = {"items": clip_items(rows, clips, 6.0)}
    (tmp_path / "decoded" / CLIPS_FILE).write_text(json.dumps(drawn))
    found = group("decoded", "", "")
    add_decoded(run, found)
    (item,) = found["items"]
    assert item["title"] == "a: jump" and "+1.50 dB [+1.00, +2.00]: better than" in item["about"]
    assert [row["label"] for row in item["rows"]] == ["truth", "mean of samples"] and item["fps"] == 6.0


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
