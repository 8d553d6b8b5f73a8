"""The held-out error of a run (data.val), and the rule that ends a run by it."""

import json
from pathlib import Path

import pytest
from programs import run_here

from vidssl import train
from vidssl.pretrained.files import load_weights
from vidssl.pretrained.load import load_encoder
from vidssl.training.validation import HeldOutRule

FILES = ["configs/model/vit_micro.yaml", "configs/data/quickstart.yaml", "configs/run/smoke.yaml"]
NO_CHANGE = "optim.lr=1e-30"  # the weights stay what they are


def run(shards: Path, out: Path, *more: str, method: str = "vjepa_tiny") -> int:
    data = [f"data.train={shards / 'train'}", f"data.val={shards / 'test'}", f"run.out={out}"]
    small = ["model.depth=1", "run.steps=4", "run.save_every=2", "run.validate_clips=8", "optim.warmup=0"]
    small += ["augment.size=16", "efficiency.decode_in_subprocess=false"]
    return run_here(train.main, f"configs/method/{method}.yaml", *FILES, *data, *small, *more)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_held_out_error_changes_nothing_and_names_the_best_step(synthetic_shards, tmp_path):
    assert run(synthetic_shards, tmp_path / "plain", "data.val=null") == 0
    assert run(synthetic_shards, tmp_path / "run") == 0
    measured = rows(tmp_path / "run")
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("plain", "run")]
    assert losses[0] == losses[1]
    assert [row["step"] for row in measured if "val_loss" in row] == [2, 4]
    assert {"val_loss_start", "val_ratio_start"} <= measured[0].keys()
    best = min((row for row in measured if "val_ratio" in row), key=lambda row: row["val_ratio"])
    header = load_weights(tmp_path / "run" / "encoder_best.safetensors")[1]
    assert header["step"] == best["step"]
    assert load_encoder(tmp_path / "run" / "encoder_best.safetensors").encoder.dim == 128


def test_without_a_lower_error_the_run_ends_complete(synthetic_shards, tmp_path, capfd):
    arguments = (synthetic_shards, tmp_path / "run", NO_CHANGE, "run.patience=2", "run.steps=20")
    assert run(*arguments, method="videomae_tiny") == 0
    # measured after steps 2 (the lowest), 4 and 6; the next step is the last one
    assert [row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row] == pytest.approx(
        [rows(tmp_path / "run")[0]["val_loss_start"]] * 3
    )
    assert len(rows(tmp_path / "run")) == 7
    line = "has not fallen for 2 measurements; it was lowest"
    assert line in capfd.readouterr().err
    # the same command finds it complete
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert run(*arguments, method="videomae_tiny") == 0
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_a_loss_of_poorer_features_is_no_lower_error():
    rule = HeldOutRule(patience=2)
    rule.add(0, {"val_loss": 9.0, "val_ratio": 0.1})
    for step, (loss, ratio) in enumerate([(0.5, 0.9), (0.4, 0.95), (0.3, 0.99)], 1):
        rule.add(step, {"val_loss": loss, "val_ratio": ratio})
    assert rule.is_over and rule.best_step == 1
    again = HeldOutRule(patience=4)
    again.load(rule.state())
    assert again.best == 0.9 and not again.is_over


@pytest.mark.parametrize(
    "more, named",
    [
        (["run.validate_every=3"], "run.validate_every 3 is not a multiple of run.save_every 2"),
        (["data.val=null", "run.patience=2"], "run.patience: is counted in measurements on data.val"),
        (["data.val=/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_mistakes_are_named(more, named, synthetic_shards, tmp_path, capfd):
    assert run(synthetic_shards, tmp_path / "run", *more) == 2
    assert named in capfd.readouterr().err and not (tmp_path / "run").exists()
