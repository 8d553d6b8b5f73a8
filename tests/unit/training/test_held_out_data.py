"""What figures on held-out data are of is said: groups that train has, clips that are left out, chance."""

import pytest
import torch
from shards_by_hand import write_shards

from vidssl.core.errors import UserError
from vidssl.data.schema import DataConfig, ExtraStream
from vidssl.data.shards import Shards
from vidssl.training.finetune_loop import EpochSelection
from vidssl.training.finetune_schema import FinetuneDataConfig, TuneConfig
from vidssl.training.finetuning import open_splits
from vidssl.training.online_probe import OnlineProbe
from vidssl.training.schema import OnlineProbeConfig
from vidssl.training.validation import warn_of_training_samples

NAMES = ["run", "walk", "jump", "fall", "sit"]


def labelled(folder, groups: list[str | None]) -> str:
    """A data set of one sample for each group, of the first two of five classes; none can be decoded."""
    files = {
        f"{folder.name}-{i}": (b"x", {"labels": {"label": i % 2}, "group": group})
        for i, group in enumerate(groups)
    }
    return str(write_shards(folder, files, {"label": NAMES}))


@pytest.fixture
def parts(tmp_path) -> dict[str, str]:
    """Of the four samples of test two are of groups that train has."""
    train = labelled(tmp_path / "train", ["a", "a", "b", "c", None])
    return {"train": train, "test": labelled(tmp_path / "test", ["b", "d", None, "a"])}


def test_groups_that_are_trained_on_are_counted_in_held_out_data(parts, caplog):
    line = "data.val: 2 of its 4 samples are of groups (recordings, persons) that data.train has, too"
    val = Shards([parts["test"]])
    streams = (ExtraStream([parts["train"]], frames=8, clips=8, stride=2),)
    for data in (
        DataConfig([parts["train"]], 8, stride=2),
        DataConfig([parts["test"]], 8, stride=2, extra_streams=streams),
    ):
        caplog.clear()
        warn_of_training_samples(data, val, val.list_samples())
        # those that are trained on themselves are named as such alone
        expected = line if data.train == [parts["train"]] else "4 of its 4 samples are in data.train"
        assert len(caplog.records) == 1 and expected in caplog.text


@pytest.mark.parametrize("loads_clips", [True, False])
def test_groups_and_missing_clips_of_an_online_probe_are_said_once(loads_clips, parts, caplog):
    config = OnlineProbeConfig(train=[parts["train"]], test=[parts["test"]])
    data = DataConfig([parts["train"]], 2, stride=1)
    if loads_clips:
        with pytest.raises(UserError, match="no labelled sample can be decoded"):
            OnlineProbe(config, data, 8)
        assert "online_probe.test: 2 of its 4 samples are of groups" in caplog.text
        assert "online_probe.train: 5 of 5 clips cannot be decoded (not_a_video 5)" in caplog.text
    else:
        OnlineProbe(config, data, 8, loads_clips=False)
        assert not caplog.records


@pytest.mark.parametrize("val_fraction", [0.0, 0.4])
def test_the_chance_of_a_fine_tuning_is_that_of_the_classes_of_train(val_fraction, parts):
    """As that of a probe: a vocabulary may be longer than what a data set has of it."""
    data = FinetuneDataConfig([parts["train"]], [parts["test"]])
    splits = open_splits(data, TuneConfig(epochs=1, batch=1, val_fraction=val_fraction))
    assert splits.task.names == NAMES and splits.task.classes == 2 and splits.shared_groups == 2


def test_samples_that_cannot_be_decoded_are_not_counted_as_held_out():
    selection = EpochSelection(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    for epoch, accuracy, unreadable in ((1, 50.0, 0), (2, 90.0, 3)):
        selection.end_epoch(epoch, 2 * epoch, accuracy, unreadable)
    assert selection.select(12)["n_held_out"] == 9
