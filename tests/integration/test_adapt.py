"""vidssl adapt at toy size: from the proposal to the table, cut off and continued, and wrongly called."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_jobs import start_forked
from programs import run_here

import vidssl.zoo.jobs
from vidssl import train
from vidssl.commands import adapt
from vidssl.config import load_config
from vidssl.data.parts import list_folder, write_part
from vidssl.pretrained.files import load_weights
from vidssl.training.schema import TrainConfig

FILES = ["configs/model/vit_micro.yaml", "configs/data/quickstart.yaml", "configs/run/smoke.yaml"]
SMALL = ["run.steps=4", "run.batch=8", "run.save_every=2", "run.validate_every=2", "run.validate_clips=4"]
SMALL += ["efficiency.threads=1", "efficiency.decode_in_subprocess=false", "online_probe.samples=4"]


@pytest.fixture(autouse=True)
def forked_programs(monkeypatch):
    monkeypatch.setattr(vidssl.zoo.jobs, "start", start_forked)
    monkeypatch.setattr(vidssl.zoo.jobs, "POLL_S", 0.02)


@pytest.fixture(scope="module")
def checkpoint(synthetic_shards, tmp_path_factory) -> Path:
    """A run of two steps."""
    out = tmp_path_factory.mktemp("source") / "run"
    small = ["model.depth=1", "run.steps=2", "augment.size=16", f"run.out={out}", "run.save_every=2"]
    data = f"data.train={synthetic_shards / 'train'}"
    assert run_here(train.main, "configs/method/vjepa_tiny.yaml", *FILES, data, *small) == 0
    return out


@pytest.fixture(scope="module")
def few(synthetic_shards, tmp_path_factory) -> Path:
    """30 videos to train on, 12 to test."""
    out = tmp_path_factory.mktemp("few")
    for part, count in (("train", 30), ("test", 12)):
        folder = str(synthetic_shards / part)
        keep = np.arange(len(list_folder(folder))) < count
        write_part(folder, keep, out / part)
    return out


def call(checkpoint: Path, videos: Path, out: Path, *more: str) -> int:
    arguments = ["--from", checkpoint, "--videos", videos, "--out", out, *more]
    return run_here(adapt.main, *map(str, arguments), *SMALL)


def test_before_after_scratch_and_untrained_are_compared(checkpoint, few, tmp_path, capfd):
    out = tmp_path / "run"
    control = ("--labels", "motion", "--control", str(few))
    done = []

    def cut_off(job, at_once):
        """The second program ends as if the machine had gone down."""
        done.append(job.name)
        if len(done) == 2:
            raise KeyboardInterrupt
        return start_forked(job, at_once)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vidssl.zoo.jobs, "start", cut_off)
        assert call(checkpoint, few, out, *control) == 130
    first = out / "logs" / "adapted.done"
    made_at = first.stat().st_mtime_ns
    capfd.readouterr()
    assert call(checkpoint, few, out, *control) == 0
    assert first.stat().st_mtime_ns == made_at and done == ["adapted", "scratch"]
    text = (out / "table.md").read_text()
    assert text in capfd.readouterr().out
    own, forgotten = text.split("## your videos: motion")[1].split("## control set", 1)
    assert [own.count(f"| {name} |") for name in ("after", "before", "from scratch", "untrained")] == [1] * 4
    assert "from scratch" not in forgotten and forgotten.count("| before |") == 2
    assert "held-out error: " in text and "spread of the features" in text
    rows = json.loads((out / "results.json").read_text())
    (before,) = (row for row in rows["own"] if row["name"] == "before")
    assert before["difference_low"] <= before["difference"] <= before["difference_high"]
    # the configuration is an ordinary one, of the checkpoint's own method
    cfg = load_config([str(out / "adapt.yaml")], TrainConfig)
    assert cfg.method.target.kind == "ema" and cfg.run.init == str(out / "start") and cfg.run.patience == 5
    assert "# optim.lr " in (out / "adapt.yaml").read_text()
    header = load_weights(out / "adapted" / "encoder_best.safetensors")[1]
    assert header["step"] in (2, 4)
    # nothing is left to do
    assert call(checkpoint, few, out, *control) == 0
    # another adaptation does not go on in the folder
    assert call(checkpoint, few, out, *control, "optim.lr=1e-4") == 2
    assert "holds another adaptation: key=value was" in capfd.readouterr().err


def test_a_folder_without_labels_is_packed_and_honestly_compared(checkpoint, synthetic_corpus, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for i, file in enumerate(sorted(synthetic_corpus.rglob("*.mp4"))[:24]):
        os.link(file, videos / f"{i}.mp4")
    assert call(checkpoint, videos, tmp_path / "run", "--minutes", "60") == 0
    text = (tmp_path / "run" / "table.md").read_text()
    assert "whether adapting helped cannot be said" in text and "| after |" not in text
    assert not (tmp_path / "run" / "scratch").exists() and (tmp_path / "run" / "trial").exists()


def test_a_dry_run_proposes_and_writes_no_run(checkpoint, few, tmp_path, capfd):
    assert call(checkpoint, few, tmp_path / "run", "--dry-run") == 0
    found = capfd.readouterr().out
    for text in ("corpus: 30 videos", "motion (10 classes)", "  optim.lr ", "given: run.steps=4"):
        assert text in found
    assert not (tmp_path / "run" / "adapt.yaml").exists()


def test_what_a_later_program_refuses_is_said_before_the_first(checkpoint, few, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(vidssl.zoo.jobs, "start", lambda *_: pytest.fail("started"))
    wrong = ["configs/probe/linear.yaml", "data.frames=0"]
    monkeypatch.setattr("vidssl.adaptation.programs.probe_settings", lambda *_: wrong)
    assert call(checkpoint, few, tmp_path / "run") == 2
    assert "error: probe own before: 'data.frames=0'" in capfd.readouterr().err
    assert not (tmp_path / "run" / "adapt.yaml").exists()


def test_an_image_encoder_becomes_one_of_videos(few, tmp_path, capfd):
    """A ViT with other pixel statistics, as timm has them; its start computes the same on a still clip."""
    import timm
    from safetensors.torch import save_file

    from vidssl.core.pixels import MEAN, STD
    from vidssl.pretrained.load import load_encoder

    size = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", **size).eval()
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    half = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}, "architecture": "vit"}
    (tmp_path / "config.json").write_text(json.dumps(half))
    facts = ("heads=2", "--labels", "appearance", "--probe", "linear", "data.frames=4")
    assert call(tmp_path, few, tmp_path / "run", *facts) == 0
    assert "videomae for a plain ViT" in capfd.readouterr().out
    encoder = load_encoder(tmp_path / "run" / "start").encoder
    picture = torch.rand(1, 3, 16, 16)
    ours = (picture - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        features = encoder(ours[:, :, None].expand(-1, -1, 2, -1, -1))
        expected = vit.forward_features((picture - 0.5) / 0.5)[:, 1:]
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"source": "/nowhere"}, "--from: /nowhere: no such file or folder"),
        ({"videos": "/nowhere"}, "--videos: /nowhere: no such folder"),
        ({"more": ["--labels", "verbs"]}, "--labels verbs: no such label in"),
        ({"more": ["--minutes", "0"]}, "--minutes 0: give a number above 0"),
        ({"more": ["--control", "/nowhere"]}, "--control /nowhere: no packed train in it"),
        ({"more": ["run.stepz=3"]}, "run.stepz"),
        ({"more": ["run.out=x"]}, "run.out: is decided by --out"),
        ({"more": ["steps"]}, "'steps' is not key=value"),
    ],
)
def test_mistakes_are_one_line(change, text, checkpoint, few, tmp_path, capfd):
    arguments = (change.get("source", checkpoint), change.get("videos", few), tmp_path / "run")
    assert call(*arguments, *change.get("more", [])) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and text in error
    assert not (tmp_path / "run" / "adapt.yaml").exists()


def test_a_file_that_is_no_checkpoint(few, tmp_path, capfd):
    torch.save({"weights": {"a": torch.zeros(2)}}, tmp_path / "other.pt")
    assert call(tmp_path / "other.pt", few, tmp_path / "run") == 2
    assert "other.pt: no known format" in capfd.readouterr().err
