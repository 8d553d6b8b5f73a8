"""training/schema.py: keys that do not fit together are named before work, with values that do."""

from pathlib import Path

import pytest

from vidssl.config import load_config
from vidssl.core.errors import UserError
from vidssl.core.suggestions import divisors_near, multiples_near
from vidssl.evaluation.dense.schema import DenseConfig
from vidssl.training.finetune_schema import FinetuneConfig
from vidssl.training.schema import TrainConfig

ROOT = Path(__file__).parents[3]
FILES = ("method/vjepa_tiny", "model/vit_micro", "data/quickstart", "run/smoke")
TRAIN = [*(str(ROOT / f"configs/{name}.yaml") for name in FILES), "data.train=/", "run.out=x"]
DENSE = [str(ROOT / "configs/dense/propagation.yaml"), "encoder=x", "out=x", "data.test=/"]
TUNE = [str(ROOT / "configs/finetune/folder.yaml"), *("encoder=x", "out=x", "data.train=/", "data.test=/")]


@pytest.mark.parametrize(
    "settings, words",
    [
        (["data.frames=7"], "data.frames 7 is not a multiple of model.tubelet 2: give 6 or 8"),
        (
            ["data.extra_streams=[{train: x, frames: 3, clips: 8, stride: 1}]"],
            "data.extra_streams[0].frames 3",
        ),
        (["augment.size=30"], "augment.size 30 is not a multiple of model.patch 8: give 24 or 32"),
        (["model.heads=5"], "model.heads 5 does not divide model.dim 128: give 4 or 8"),
        (["method.predictor.heads=5"], "method.predictor.heads 5 does not divide method.predictor.width"),
        (["run.batch=12"], "run.batch 12 is not a multiple of run.lanes 8: give 8 or 16"),
        (["efficiency.micro_batches=3"], "give 2 or 4"),
        (["run.init=x"], "run.init: give another folder"),
        (
            ["data.cache=device", "augment.randaugment=rand-m7-n4"],
            "augment.randaugment runs on the host",
        ),
        (
            ["data.cache=device", "data.augment_on=host"],
            "data.augment_on=host: the clips of data.cache",
        ),
        (["augment.kind=crop_pair"], "augment.kind crop_pair makes clips of 2 frames, not 8"),
        (
            ["augment.kind=crop_pair", "data.frames=2", "data.windows=2"],
            "not 4: give data.frames=2 data.windows=1",
        ),
        (["method.context.warmup=[3, 2]"], "method.context.warmup"),
        (
            ["online_probe.train=/", "online_probe.test=/", "online_probe.fps=2", "online_probe.stride=2"],
            "not both",
        ),
        (["data.train=/no/such/folder"], "data.train: /no/such/folder: no such folder"),
        (
            ["data.extra_streams=[{train: [/no/such], frames: 2, clips: 1, stride: 1}]", "data.train=/"],
            "data.extra_streams[0].train: /no/such: no such folder",
        ),
        (["run.trackers=trackio"], "run.trackers: trackio is not installed"),
        (["run.steps=true"], "expected int >= 1"),
        (["optim.lr=true"], "optim.lr"),
        (["optim.lr=.nan"], "no finite number"),
        (["optim.betas=0.9"], "expected [float >= 0 < 1, float >= 0 < 1]"),
    ],
)
def test_keys_that_do_not_fit_are_named_with_values_that_do(settings, words):
    with pytest.raises(UserError) as e:
        load_config([*TRAIN, *settings], TrainConfig).check_before_work()
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "settings, words",
    [
        (["optim.warmup=50"], "optim.warmup 50 is longer than run.steps 20"),
        (["optim.final_lr=1"], "optim.final_lr is above"),
        (["optim.clip_grad=null", "optim.clip_start=3"], "do nothing without optim.clip_grad"),
        (["run.keep_every=15"], "run.keep_every 15 is no multiple of run.save_every 10"),
        (["run.stop_on_collapse=true", "run.feature_stats_every=30"], "a collapse is not seen"),
        (["online_probe.train=/", "online_probe.test=/", "online_probe.every=30"], "no online probe"),
    ],
)
def test_keys_without_the_effect_that_they_seem_to_have_give_a_line(settings, words):
    quiet = ["optim.warmup=5", "run.steps=20"]
    assert load_config([*TRAIN, *quiet], TrainConfig).notes() == []
    (note,) = load_config(
        [*TRAIN, *settings, *[q for q in quiet if q.split("=")[0] not in str(settings)]], TrainConfig
    ).notes()
    assert words in note


def test_a_warm_up_beyond_the_epochs_gives_a_line():
    assert load_config([*TUNE, "tune.epochs=10", "tune.warmup=5"], FinetuneConfig).notes() == []
    assert (
        "tune.warmup 5" in load_config([*TUNE, "tune.epochs=3", "tune.warmup=5"], FinetuneConfig).notes()[0]
    )


def test_fine_tuning_takes_no_pairs_of_crops():
    with pytest.raises(
        UserError, match=r"^augment\.kind crop_pair makes pairs for pre-training: give random_crop"
    ):
        load_config([*TUNE, "augment.kind=crop_pair"], FinetuneConfig)


@pytest.mark.parametrize(
    "argv, schema", [(TUNE, FinetuneConfig), (DENSE, DenseConfig)], ids=["tune", "dense"]
)
def test_an_output_that_cannot_be_written_is_named_before_any_work(argv, schema, tmp_path):
    load_config([*argv, "encoder=/", f"out={tmp_path}"], schema).check_before_work()
    (tmp_path / "index.json").touch()
    with pytest.raises(UserError, match=f"out {tmp_path}: is a folder of shards"):
        load_config([*argv, "encoder=/", f"out={tmp_path}"], schema).check_before_work()
    with pytest.raises(UserError, match=r"index\.json is not a folder"):
        load_config([*argv, "encoder=/", f"out={tmp_path}/index.json/run"], schema).check_before_work()


def test_values_nearby():
    assert multiples_near(7, 2) == "6 or 8" and multiples_near(3, 8) == "8"
    assert divisors_near(96, 5) == "4 or 6" and divisors_near(7, 9) == "7"
