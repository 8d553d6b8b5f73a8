"""--dry-run checks and plans, and leaves every file and folder as it was."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidssl import dense, finetune, train
from vidssl.core.errors import UserError
from vidssl.model.vit import Encoder
from vidssl.pretrained.files import save_native
from vidssl.pretrained.infer_config import Checkpoint

MODEL = {"frames": 4, "height": 32, "width": 32, "dim": 24, "depth": 1, "heads": 2, "patch": 8, "tubelet": 2}


def tree_below(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.fixture
def encoder(tmp_path):
    out = tmp_path / "encoder"
    out.mkdir()
    stored = {"data": {"stride": 2, "fps": None, "rule": "exact"}}
    save_native(out, Checkpoint("vidssl", MODEL, Encoder(**MODEL).state_dict()), stored)
    return out


@pytest.fixture
def dry_run(tmp_path, capsys, monkeypatch):
    def run(program, *arguments):
        before = tree_below(tmp_path)
        program.main([*arguments, "--dry-run"])
        assert tree_below(tmp_path) == before
        out, err = capsys.readouterr()
        assert out == "" and "dry run: nothing was written; the run would write" in err
        return err

    return run


TRAIN = ["configs/method/vjepa_tiny.yaml", "configs/model/vit_micro.yaml", "configs/data/quickstart.yaml"]
TRAIN += ["configs/run/smoke.yaml", "model.depth=1", "efficiency.threads=1"]


def test_of_pretraining(dry_run, synthetic_shards, tmp_path):
    out = tmp_path / "run"
    err = dry_run(train, *TRAIN, f"data.train={synthetic_shards / 'train'}", f"run.out={out}")
    assert "run: steps 1 to 20" in err and "model: encoder of " in err
    assert f"2 checkpoints (the last 2 stay) and encoder.safetensors into {out}" in err


def test_of_pretraining_finds_what_a_run_would_find(synthetic_shards, tmp_path):
    wrong = [
        f"data.train={synthetic_shards / 'train'}",
        f"run.out={tmp_path / 'run'}",
        "run.init=" + str(tmp_path),
    ]
    with pytest.raises(UserError):
        train.main([*TRAIN, *wrong, "--dry-run"])
    assert not list(tmp_path.iterdir())


def test_of_finetuning(dry_run, synthetic_shards, encoder, tmp_path):
    shards = [f"data.{split}={synthetic_shards / split}" for split in ("train", "test")]
    more = ["data.label=appearance", "data.stride=2", "tune.batch=8", "efficiency.workers=0"]
    err = dry_run(
        finetune,
        "configs/finetune/folder.yaml",
        f"encoder={encoder}",
        *shards,
        f"out={tmp_path / 'out'}",
        *more,
    )
    assert "classes of 'appearance'" in err and "the classifier and probe.json" in err


def test_of_a_dense_evaluation(dry_run, encoder, tmp_path):
    davis = tmp_path / "davis"
    for name, split in (("bear", "train"), ("dog", "train"), ("cow", "val")):
        for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
            folder = davis / kind / "480p" / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.eye(48, dtype=np.uint8)).save(folder / f"{i:05d}.{suffix}")
        lists = davis / "ImageSets" / "2017"
        lists.mkdir(parents=True, exist_ok=True)
        with open(lists / f"{split}.txt", "a") as file:
            file.write(f"{name}\n")
    err = dry_run(
        dense,
        "configs/dense/propagation.yaml",
        f"encoder={encoder}",
        f"data.test={davis}",
        f"out={tmp_path / 'o'}",
    )
    assert "2 sequences of train, 1 sequences of test" in err and "dense.json" in err
