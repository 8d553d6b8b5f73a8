"""Features on disk, in memory and on the fly are the same; a kill costs a block; damage is found; the bound holds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.data.augment import CenterCrop
from vidssl.data.decoding import open_video
from vidssl.data.shards import Shards
from vidssl.evaluation import feature_cache
from vidssl.evaluation.feature_cache import FeatureShape, FeatureStore, used_gb
from vidssl.evaluation.features import (
    FeatureLoader,
    Features,
    FeatureStorage,
    choose_storage,
    compute_features,
)
from vidssl.evaluation.heads import Attentive
from vidssl.evaluation.protocol import TrainingSet, select_and_train
from vidssl.evaluation.tasks import Task
from vidssl.evaluation.views import EvalClips, PatchMeans, View, reorder, square

VIEW = View(frames=4, stride=2, fps=None, segments=2, crops=3, size=16)


class Counting:
    """Patch means that count the clips they see, and break when they have seen too many."""

    def __init__(self, most: int = 10**9):
        self.means, self.clips, self.most = PatchMeans(2, 8), 0, most

    def __call__(self, video: Tensor) -> Tensor:
        self.clips += len(video)
        if self.clips > self.most:
            raise KeyboardInterrupt
        return self.means(video.float() / 255)


@pytest.fixture(scope="module")
def shards(synthetic_shards) -> Shards:
    return Shards([str(synthetic_shards / "train")])


def feed(shards: Shards, eye: Counting, view: View = VIEW, **reading) -> FeatureLoader:
    options = FeatureStorage(workers=0, encode_batch=4, **reading)
    return FeatureLoader(eye, shards, shards.all()[:30], view, Accelerator(cpu=True), options, "features")


def features(f: FeatureLoader, where: str) -> Features:
    return compute_features(f, f.shape(), where, {"view": list(f.view), "encoder": "x"})


def read(found: Features, per: int, lists: list[list[int]]) -> list[Tensor]:
    return list(found.source.batches(per, lists))


def test_disk_memory_and_streaming_give_the_same_examples(shards, tmp_path):
    wheres = {"disk": {"cache": str(tmp_path)}, "memory": {}, "stream": {}}
    found = {where: features(feed(shards, Counting(), **options), where) for where, options in wheres.items()}
    lists = [[0, 5, 89], [7], [20, 3, 60, 61]]
    for per in (2, 1, 6):
        some = [[e * 6 // per // 3 for e in part] for part in lists]
        for tokens in zip(*(read(f, per, some) for f in found.values()), strict=True):
            assert tokens[0].shape[1:] == (per * 8, 96)
            torch.testing.assert_close(tokens[0], tokens[1], atol=0, rtol=0)
            torch.testing.assert_close(tokens[0], tokens[2], atol=1e-6, rtol=1e-5)


def test_a_grid_trained_in_one_pass_over_decoded_batches_is_the_grid_of_kept_features(shards):
    labels = [s.meta["labels"]["appearance"] for s in shards.all()[:30]]
    task = Task("appearance", "class", shards.classes["appearance"])
    protocol = Attentive(heads=4, segments=2, crops=3, epochs=2, batch=8, lr=(1e-3, 1e-2), standardise=True)
    said = []
    for where in ("memory", "stream"):
        eye = Counting()
        source = features(feed(shards, eye), where).source
        data = TrainingSet(source, list(range(30)), labels, task.target(labels, torch.device("cpu")))
        model, dress, chosen = select_and_train(protocol, task, data, [str(i) for i in range(30)])
        said.append((protocol.predict([model], dress(source), list(range(30)), task), chosen, eye.clips))
    torch.testing.assert_close(said[0][0], said[1][0], atol=1e-3, rtol=1e-2)
    assert said[0][1] == said[1][1]
    held = said[0][1]["n_held_out"]
    passes = (
        30 * 6 + 2 * (30 - held) * 2 + held * 6 + 2 * 30 * 2 + 30 * 6
    )  # statistics, grid, choice, again, predict
    assert (said[0][2], said[1][2]) == (
        30 * 6 + 1,
        passes + 1,
    )  # and one to see the shape; not twice for two heads


def test_a_kill_costs_a_block_and_damage_is_found(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "ROWS_PER_BLOCK", 8)
    whole = features(feed(shards, Counting(), cache=str(tmp_path / "a")), "disk").source.tokens.clone()
    options = {"cache": str(tmp_path / "b")}
    with pytest.raises(KeyboardInterrupt):
        features(feed(shards, Counting(most=1 + 20 * 6), **options), "disk")
    (folder,) = (tmp_path / "b").iterdir()
    assert [p.name for p in sorted((folder / "blocks").iterdir())] == ["000000.json", "000001.json"]
    again = Counting()
    assert torch.equal(features(feed(shards, again, **options), "disk").source.tokens, whole)
    assert again.clips == 1 + (30 - 16) * 6
    with open(folder / "features.bin", "rb+") as f:  # one bit of sample 25
        f.seek(25 * whole[0].numel() * 4 + 1000)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))
    mended = Counting()
    assert torch.equal(features(feed(shards, mended, **options), "disk").source.tokens, whole)
    assert mended.clips == 1 + 6 * 6  # samples 24 to 29
    third = Counting()
    features(feed(shards, third, **options), "disk")
    assert third.clips == 1


def test_bf16_rounds_and_takes_half(shards, tmp_path):
    full = features(feed(shards, Counting(), cache=str(tmp_path / "a")), "disk").source.tokens
    half = features(feed(shards, Counting(), cache=str(tmp_path / "b"), cache_dtype="bf16"), "disk").source
    assert torch.equal(half.tokens, full.bfloat16())
    assert next(half.batches(2, [[0]])).dtype == torch.float32
    assert used_gb(tmp_path / "b", []) == pytest.approx(used_gb(tmp_path / "a", []) / 2, rel=0.02)


def test_what_cannot_be_read_is_remembered(shards, tmp_path, monkeypatch):
    bad = feed(shards, Counting(), cache=str(tmp_path))
    samples = [s._replace(size=100) if i in (3, 17) else s for i, s in enumerate(bad.samples)]
    bad = bad._replace(samples=samples)
    reasons = features(bad, "memory").unreadable
    assert list(reasons) == [3, 17] == list(features(bad, "stream").unreadable)
    for _ in range(2):  # computed, found
        found = features(bad, "disk")
        assert found.unreadable == reasons and not found.source.tokens[17].any()
    none = bad._replace(samples=[s._replace(size=100) for s in samples])
    with pytest.raises(UserError, match="none of the 30 samples can be decoded"):
        features(none, "memory")


def test_the_bound(tmp_path):
    shape = FeatureShape(1000, 2, 500, 1000)  # 4 GB in fp32
    about = {"encoder": "x"}
    assert choose_storage([shape], [about], FeatureStorage(memory_gb=4.1), 1)[0] == "memory"
    assert choose_storage([shape], [about], FeatureStorage(memory_gb=4.1), 2)[0] == "stream"
    assert choose_storage([shape, shape], [about, about], FeatureStorage(memory_gb=4.1), 1)[0] == "stream"
    assert choose_storage([shape], [about], FeatureStorage(memory_gb=4.1, stream="always"), 1)[0] == "stream"
    with pytest.raises(UserError, match=r"4 GB of features, probe.memory_gb is 3.9: raise it"):
        choose_storage([shape], [about], FeatureStorage(memory_gb=3.9, stream="never"), 1)
    options = {"cache": str(tmp_path), "cache_gb": 2.1}
    assert choose_storage([shape], [about], FeatureStorage(**options), 1)[0] == "stream"
    where, said = choose_storage([shape], [about], FeatureStorage(**options, cache_dtype="bf16"), 1)
    assert where == "disk" and said.startswith(
        "1000 videos x 2 clips x 500 tokens x 1000: 2 GB of features, kept in"
    )
    rows = FeatureStore(tmp_path, about, shape._replace(samples=2), torch.float32)
    with rows.lock():
        rows.write((n, torch.ones(2, 500, 1000)) for n in range(2))
    assert (
        choose_storage([shape], [{"other": 1}], FeatureStorage(cache=str(tmp_path), cache_gb=4.0079), 1)[0]
        == "stream"
    )
    assert (
        choose_storage([shape], [about], FeatureStorage(cache=str(tmp_path), cache_gb=4.0079), 1)[0] == "disk"
    )  # its own are no more
    assert json.loads((rows.folder / "about.json").read_text())["encoder"] == "x"


def test_controls_and_crops_by_hand(shards):
    clip = np.arange(4 * 2 * 5 * 3, dtype=np.uint8).reshape(4, 2, 5, 3)
    shuffle = np.array([2, 0, 3, 1])
    assert np.array_equal(reorder(clip, "reversed", shuffle), clip[[3, 2, 1, 0]])
    assert np.array_equal(reorder(clip, "still", shuffle), clip[[2, 2, 2, 2]])
    assert np.array_equal(reorder(clip, "shuffled", shuffle), clip[shuffle])
    assert [square(clip, i, 3)[0, 0, 0, 0] // 3 for i in range(3)] == [0, 2, 3] and square(clip, 0, 1).shape[
        1:3
    ] == (
        2,
        2,
    )
    tall = clip.transpose(0, 2, 1, 3)
    assert np.array_equal(square(tall, 2, 3), tall[:, 3:])
    sample = shards.all()[0]
    video = open_video(shards.read(sample), sample.ext, sample.meta)
    start = len(video.times) - 1 - 6  # the last segment
    crop = CenterCrop(16)
    _, clips = EvalClips(shards, [sample], VIEW, 6)[0]
    assert torch.equal(
        clips[1], crop(video.get(np.arange(start, start + 7, 2)))
    )  # square videos: all crops are one
    for order in ("shuffled", "reversed", "still"):
        view = VIEW._replace(order=order)
        _, whole = EvalClips(shards, [sample], view, 6)[0]
        for example in (1, 4):
            assert torch.equal(EvalClips(shards, [sample], view, 1)[example][1][0], whole[example])


def test_patch_means():
    video = torch.rand(2, 3, 4, 16, 24)
    tokens = PatchMeans(2, 8)(video)
    assert tokens.shape == (2, 2 * 2 * 3, 96)
    patch = video[1, :, 2:4, 8:16, 16:24]  # second slice, second row, third column
    want = patch.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)).transpose(0, 1).flatten()
    torch.testing.assert_close(tokens[1, 6 + 3 + 2], want)


def test_the_folder_is_named_in_the_error_where_it_cannot_be(tmp_path):
    Path(tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        FeatureStore(tmp_path / "file", {}, FeatureShape(1, 1, 1, 1), torch.float32)
