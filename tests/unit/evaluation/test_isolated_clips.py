"""A file that hangs, crashes or overgrows the decoder costs an evaluation that file, and is named."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from vidssl.core.errors import UserError
from vidssl.data.shards import Shards
from vidssl.evaluation.evaluate import check_readable
from vidssl.evaluation.feature_cache import FeatureStore
from vidssl.evaluation.features import FeatureLoader, FeatureStorage, compute_features
from vidssl.evaluation.views import PatchMeans, View

SAMPLES = 6
VIEW = View(frames=2, stride=1, fps=None, segments=1, crops=1, size=16)


class FaultyMeta(dict):
    """Metadata of a sample whose decoder fails."""

    def __contains__(self, key: object) -> bool:
        if self["fault"] == "hang":
            time.sleep(1000)
        if self["fault"] == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        kept = []
        while self["fault"] == "memory":
            kept.append(b"x" * (20 << 20))
        return super().__contains__(key)


@pytest.fixture(scope="module")
def shards(synthetic_shards) -> Shards:
    return Shards([str(synthetic_shards / "train")])


def make_loader(
    shards: Shards, faults: dict[int, str], workers: int, deadline_s: int = 3, **storage: Any
) -> FeatureLoader:
    samples = shards.list_samples()[:SAMPLES]
    for number, fault in faults.items():
        meta = FaultyMeta(samples[number].meta, fault=fault)
        samples[number] = samples[number]._replace(meta=meta)
    means = PatchMeans(2, 8)
    limits = {"decode_timeout_s": deadline_s, "decode_memory_mb": 300}
    options = FeatureStorage(workers=workers, encode_batch=2, **limits, **storage)
    encode = lambda video: means(video.float() / 255)  # noqa: E731
    return FeatureLoader(encode, shards, samples, VIEW, Accelerator(cpu=True), options, "features")


@pytest.mark.slow
@pytest.mark.parametrize(("where", "workers"), [("memory", 1), ("disk", 0), ("recompute", 0)])
# On a busy machine memory fills slowly, so that a short deadline would come first.
@pytest.mark.parametrize(("faults", "deadline_s"), [({1: "crash", 4: "memory"}, 60), ({2: "hang"}, 3)])
def test_failures_of_the_decoder_are_counted_and_the_rest_is_right(
    shards, where, workers, faults, deadline_s, tmp_path
):
    expected = compute_features(*arguments(make_loader(shards, {}, 0, 60), "memory", tmp_path)).source.tokens
    loader = make_loader(shards, faults, workers, deadline_s)
    found = compute_features(*arguments(loader, where, tmp_path))
    assert found.unreadable == faults
    rows = [n for n in range(SAMPLES) if n not in faults]
    tokens = torch.cat(list(found.source.batches(1, [rows])))
    torch.testing.assert_close(tokens, expected[rows, 0], atol=1e-6, rtol=1e-5)


def arguments(loader: FeatureLoader, where: str, folder: Path) -> tuple:
    shape = loader.shape()
    return loader, shape, where, FeatureStore(folder, {}, shape, torch.float32)


def test_the_error_names_the_files(shards):
    loader = make_loader(shards, {0: "crash", 3: "hang"}, 0)
    unreadable = loader.unreadable()
    with pytest.raises(UserError) as caught:
        check_readable(unreadable, loader.samples, False, "test")
    for number, reason in ((0, "crash"), (3, "hang")):
        assert f"{loader.samples[number].key} ({reason})" in str(caught.value)
    check_readable(unreadable, loader.samples, True, "test")


def test_a_crash_is_tried_again_and_a_damaged_file_is_not(shards, tmp_path):
    """The cache keeps what is known of a file, not of a machine."""
    loader = make_loader(shards, {1: "crash"}, 0)
    damaged = list(loader.samples)
    damaged[0] = damaged[0]._replace(size=100)
    found = compute_features(*arguments(loader._replace(samples=damaged), "disk", tmp_path))
    assert found.unreadable.keys() == {0, 1}
    recovered = make_loader(shards, {}, 0)
    samples = [damaged[0], *recovered.samples[1:]]
    found = compute_features(*arguments(recovered._replace(samples=samples), "disk", tmp_path))
    assert found.unreadable.keys() == {0}

    def count(video: torch.Tensor) -> torch.Tensor:
        calls.append(len(video))
        return loader.encode(video)

    calls: list[int] = []
    again = recovered._replace(samples=samples, encode=count)
    assert compute_features(*arguments(again, "disk", tmp_path)).unreadable.keys() == {0}
    assert calls == [1]  # one for the shape
