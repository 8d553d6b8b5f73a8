"""Shards of other tools may repeat keys: a probe tells samples of one key apart in what it lists."""

from types import SimpleNamespace

import numpy as np
import torch

from vidssl.config import load_config
from vidssl.data.format import Sample
from vidssl.data.parts import distinct_keys
from vidssl.evaluation.evaluate import LabelledFeatures, score_predictions
from vidssl.evaluation.extractor import FeatureExtractor, cache_provenance
from vidssl.evaluation.features import StoredFeatures
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.probe_data import LabelSet
from vidssl.evaluation.probing import low_shot_lists, probe_runs
from vidssl.evaluation.tasks import Task
from vidssl.evaluation.views import View

# Ten shards with ten samples each, numbered from 0 in each of them
SAMPLES = [Sample(str(key), "mp4", shard, 512 * key, 9, {}) for shard in range(10) for key in range(10)]


def test_keys_that_do_not_repeat_stay():
    assert distinct_keys(SAMPLES[:10]) == [str(key) for key in range(10)]
    assert distinct_keys(SAMPLES)[10:13] == ["0 (2)", "1 (2)", "2 (2)"]
    assert len(set(distinct_keys(SAMPLES))) == 100


def test_a_low_shot_list_does_not_take_one_key_from_all_shards():
    arguments = ["configs/probe/linear.yaml", "encoder=x", "data.train=y", "data.test=z", "out=o"]
    cfg = load_config([*arguments, "data.train_fractions=[0.1]", "data.seeds=[0,1]"], ProbeConfig)
    label_set = LabelSet(Task("x", "class", ["a"]), {"train": [0] * 100})
    splits = SimpleNamespace(splits={"train": SimpleNamespace(samples=SAMPLES)}, label_sets={"x": label_set})
    for run in probe_runs(cfg, splits, ["none"]):
        assert len({SAMPLES[i].key for i in run.subset.indices}) > 3
        assert len(set(run.subset.text.splitlines())) == 10
    # keys that differ give the list that they gave before
    (first, _) = low_shot_lists(cfg, label_set, [f"k{i}" for i in range(100)])
    assert first.indices[:4] == [8, 15, 16, 19]


def test_every_unreadable_sample_is_listed():
    source = StoredFeatures(torch.zeros(100, 1, 1, 2), torch.device("cpu"))
    test = LabelledFeatures(source, SAMPLES, [0] * 100, {3: "hang", 13: "crash", 23: "hang"})
    outputs = np.full((100, 2), 0.5)
    outputs[[3, 13, 23]] = np.nan
    row, _ = score_predictions(Task("x", "class", ["a", "b"]), test, outputs, 0)
    assert row["unreadable"] == {"3": "hang", "3 (2)": "crash", "3 (3)": "hang"} and row["value"] == 97


def test_cached_features_are_of_the_samples_that_have_the_labels():
    """Label sets of different shards select samples of the same keys."""
    extractor = FeatureExtractor(lambda video: video, {})
    view = View(2, 1, None, 1, 1, 16)
    found = [cache_provenance(extractor, view, "h", SAMPLES[10 * i : 10 * i + 10]) for i in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
