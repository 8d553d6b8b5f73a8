"""The held-out error of a run (data.val), and the rule that ends a run by it."""

import json
import math
from pathlib import Path

import pytest
from programs import run_here, run_world

from vidssl import train
from vidssl.adaptation.table import held_out_lines
from vidssl.config import load_config
from vidssl.data.schema import DataConfig, ExtraStream
from vidssl.data.shards import Shards
from vidssl.pretrained.files import load_weights
from vidssl.pretrained.load import load_encoder
from vidssl.training import validation
from vidssl.training.schema import TrainConfig
from vidssl.training.validation import HeldOutRule, Validation

FILES = ["configs/model/vit_micro.yaml", "configs/data/quickstart.yaml", "configs/run/smoke.yaml"]
ROOT = Path(__file__).parents[2]
NO_CHANGE = "optim.lr=1e-30"  # the weights stay what they are


def arguments(shards: Path, out: Path, *more: str, method: str = "vjepa_tiny") -> list[str]:
    data = [f"data.train={shards / 'train'}", f"data.val={shards / 'test'}", f"run.out={out}"]
    small = ["model.depth=1", "run.steps=4", "run.save_every=2", "run.validate_clips=8", "optim.warmup=0"]
    small += ["augment.size=16", "efficiency.decode_in_subprocess=false"]
    return [f"configs/method/{method}.yaml", *FILES, *data, *small, *more]


def run(shards: Path, out: Path, *more: str, method: str = "vjepa_tiny") -> int:
    return run_here(train.main, *arguments(shards, out, *more, method=method))


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


@pytest.mark.parametrize("changed", ["data.val", "run.validate_clips"])
def test_errors_on_other_clips_are_not_compared(changed, synthetic_shards, tmp_path, capfd):
    """A run that patience has ended goes on with other held-out clips, and with the same ones it does not."""
    more = [NO_CHANGE, "run.patience=2", "run.steps=40"]
    other = {
        "data.val": f"data.val={synthetic_shards / 'train'}",
        "run.validate_clips": "run.validate_clips=9",
    }

    def steps(*changes: str) -> int:
        assert run(synthetic_shards, tmp_path / "run", *more, *changes, method="videomae_tiny") == 0
        return len(rows(tmp_path / "run"))

    assert steps() == 7
    capfd.readouterr()
    # the best after step 8, then 10 and 12 without a lower one
    assert [steps(other[changed]) for _ in range(2)] == [13, 13]
    line = f"{changed}: the held-out clips are others than in the checkpoint, so the lowest error"
    assert capfd.readouterr().err.count(line) == 1
    assert load_weights(tmp_path / "run" / "encoder_best.safetensors")[1]["step"] == 8


def test_the_rule_starts_anew_on_other_clips_alone():
    one, two = ({"data": data, "number": 8} for data in "ab")
    rule = HeldOutRule(patience=2, clips=one)
    rule.add(1, {"val_loss": 0.5})
    state = rule.state()
    old = {name: value for name, value in state.items() if name != "clips"}
    for clips, loaded, best in (
        (one, state, 0.5),
        (two, state, None),
        ({**one, "number": 9}, state, None),
        (None, state, 0.5),  # data.val is left out for a while
        (two, old, 0.5),  # a state of before clips were named
        (one, {}, None),  # a checkpoint without a rule
    ):
        again = HeldOutRule(patience=2, clips=clips)
        again.load(loaded)
        assert again.best == best and again.clips == (clips or one)


def test_a_loss_of_poorer_features_is_no_lower_error():
    rule = HeldOutRule(patience=2)
    rule.add(0, {"val_loss": 9.0, "val_ratio": 0.1})
    for step, (loss, ratio) in enumerate([(0.5, 0.9), (0.4, 0.95), (0.3, 0.99)], 1):
        rule.add(step, {"val_loss": loss, "val_ratio": ratio})
    assert rule.is_over and rule.best_step == 1
    rule = HeldOutRule(patience=2)
    for step, ratio in enumerate([math.nan, 0.9, math.nan, 0.8], 1):
        rule.add(step, {"val_loss": 0.5, "val_ratio": ratio})
    assert rule.best == 0.8 and rule.without_gain == 0


def test_the_rule_goes_on_where_it_was():
    rule = HeldOutRule(patience=2)
    for step, ratio in enumerate([0.9, 0.95, 0.99], 1):
        rule.add(step, {"val_loss": 0.5, "val_ratio": ratio})
    again = HeldOutRule(patience=4)
    again.load(rule.state())
    assert again.best == 0.9 and not again.is_over


def test_a_measurement_that_is_not_finite_is_not_the_lowest(tmp_path):
    measured = [{"val_loss": None, "val_ratio": None}, {"val_loss": 0.5, "val_ratio": None}]
    measured += [{"val_loss": 0.5, "val_ratio": 0.9}]
    before = {"val_loss_start": 0.7, "val_ratio_start": None}
    log = [{"step": step, **(before if step == 1 else {}), **row} for step, row in enumerate(measured, 1)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    line = held_out_lines(tmp_path / "log.jsonl", 3)[0]
    assert line.startswith(
        "held-out error: 0.7000 before, 0.5000 (ratio 0.900) after step 3, the lowest of 3"
    )


@pytest.mark.parametrize("compared", [10**6, 0], ids=["all samples", "those in common shards"])
def test_held_out_videos_that_are_trained_on_are_named(compared, synthetic_shards, monkeypatch, caplog):
    monkeypatch.setattr(validation, "MAX_COMPARED", compared)
    train, test = (str(synthetic_shards / part) for part in ("train", "test"))
    stream = ExtraStream([test], frames=8, clips=8, stride=2)
    val = Shards([test])
    for data, shared in (
        (DataConfig([train], 8, stride=2), 0),
        (DataConfig([test], 8, stride=2), val.n),
        (DataConfig([train, test], 8, stride=2), val.n),
        (DataConfig([train], 8, stride=2, extra_streams=(stream,)), val.n),
    ):
        caplog.clear()
        validation.warn_of_training_samples(data, val, val.list_samples())
        line = f"data.val: {shared} of its {val.n} samples are in data.train, too"
        assert [line in record.message for record in caplog.records] == [True] * bool(shared)


@pytest.mark.parametrize(
    "method, more",
    [
        ("videomae_tiny", []),
        ("vjepa_tiny", []),
        ("vjepa", ["method.mask.truncate_over=null"]),
        ("vjepa", ["method.mask.truncate_over=4"]),
        ("everest", []),
    ],
    ids=["pixels", "features", "cut blocks", "blocks cut by fours", "masks from pixels"],
)
def test_the_held_out_error_does_not_depend_on_how_a_step_is_divided(
    method, more, synthetic_shards, monkeypatch
):
    """20 clips are two steps of 8 and a part of a third one."""
    monkeypatch.chdir(ROOT)
    more += ["method.predictor.width=24", "method.predictor.depth=1", "method.predictor.heads=2"]
    found = []
    for world, micro_batches in ((1, 1), (1, 2), (2, 4)):
        divided = ["run.batch=8", "run.validate_clips=20", f"efficiency.micro_batches={micro_batches}"]
        argv = arguments(synthetic_shards, Path("x"), *more, *divided, method=method)
        cfg = load_config(argv, TrainConfig)
        objective = cfg.build_objective()
        measured = Validation(cfg, objective, world=world)
        found.append(measured.measure(objective))
        assert len(measured.clips) == 20
    assert len(found[0]) == 2
    assert found == [pytest.approx(found[0], rel=1e-4)] * len(found)


def test_processes_and_micro_batches_measure_the_same(synthetic_shards, tmp_path):
    more = ["run.steps=2", "run.batch=8", "run.lanes=2"]
    assert run(synthetic_shards, tmp_path / "1", *more, "efficiency.micro_batches=4") == 0
    done = run_world(2, "vidssl.train", *arguments(synthetic_shards, tmp_path / "2", *more))
    assert done.returncode == 0, done.stderr
    of_one, of_two = (
        [{k: v for k, v in row.items() if k.startswith("val_")} for row in rows(tmp_path / str(world))]
        for world in (1, 2)
    )
    assert [sorted(row) for row in of_one] == [
        ["val_loss_start", "val_ratio_start"],
        ["val_loss", "val_ratio"],
    ]
    assert of_two == [pytest.approx(row, rel=1e-3) for row in of_one]


def test_too_few_clips_for_a_ratio_are_named(synthetic_shards, tmp_path, caplog):
    assert run(synthetic_shards, tmp_path / "run", "run.validate_clips=7", "run.steps=2") == 0
    assert "val_loss" in rows(tmp_path / "run")[-1] and "val_ratio" not in rows(tmp_path / "run")[-1]
    assert "data.val: 7 clips are too few for val_ratio (8 or more)" in caplog.text


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
