"""Features on disk, in memory and streamed are equal; keys, interrupted runs, damage and size limits of the
cache."""

import json
import os
import stat
import traceback
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import packages_distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.data.augment import CenterCrop
from vidssl.data.decoding import open_video
from vidssl.data.shards import Shards
from vidssl.evaluation import extractor as extractor_module
from vidssl.evaluation import feature_cache
from vidssl.evaluation import features as features_module
from vidssl.evaluation.controls import CONTROLS
from vidssl.evaluation.extractor import (
    FeatureExtractor,
    FeaturePlan,
    Split,
    cache_provenance,
    make_extractor,
    plan_features,
)
from vidssl.evaluation.feature_cache import FeatureShape, FeatureStore, missing_gb, used_gb
from vidssl.evaluation.features import (
    CACHE_DTYPES,
    FeatureLoader,
    Features,
    FeatureStorage,
    choose_storage,
    compute_features,
)
from vidssl.evaluation.heads import Attentive
from vidssl.evaluation.neighbours import Knn
from vidssl.evaluation.probe_config import ProbeConfig, ProbeData
from vidssl.evaluation.probe_data import make_view
from vidssl.evaluation.protocol import TrainingSet, select_and_train
from vidssl.evaluation.protocols import PROTOCOLS
from vidssl.evaluation.tasks import Task
from vidssl.evaluation.views import EvalClips, PatchMeans, View, reorder_frames, square_crop
from vidssl.model.vit import Encoder
from vidssl.pretrained.load import LoadedEncoder

VIEW = View(frames=4, stride=2, fps=None, segments=2, crops=3, size=16)
SAMPLES = 30
NOT_NORMALISED = {"mean": [0.0] * 3, "std": [1.0] * 3}


class CountingEncoder:
    """Patch means; counts the clips it encodes, and is interrupted after `limit` of them."""

    def __init__(self, limit: int = 10**9):
        self.means = PatchMeans(2, 8)
        self.clips = 0
        self.limit = limit

    def __call__(self, video: Tensor) -> Tensor:
        self.clips += len(video)
        if self.clips > self.limit:
            raise KeyboardInterrupt
        return self.means(video.float() / 255)


@pytest.fixture(scope="module")
def shards(synthetic_shards) -> Shards:
    return Shards([str(synthetic_shards / "train")])


def make_loader(shards: Shards, encoder: CountingEncoder, **storage: Any) -> FeatureLoader:
    options = FeatureStorage(workers=0, encode_batch=4, **storage)
    samples = shards.list_samples()[:SAMPLES]
    return FeatureLoader(encoder, shards, samples, VIEW, Accelerator(cpu=True), options, "features")


def compute(loader: FeatureLoader, where: str) -> Features:
    shape = loader.shape()
    store = None
    if where == "disk":
        provenance = {"view": list(loader.view), "encoder": "x"}
        dtype = CACHE_DTYPES[loader.storage.cache_dtype]
        store = FeatureStore(Path(loader.storage.cache), provenance, shape, dtype)
    return compute_features(loader, shape, where, store)


def compute_on_disk(shards: Shards, folder: Path, encoder: CountingEncoder, **storage: Any) -> Tensor:
    """The features [n, C, N, D]."""
    return compute(make_loader(shards, encoder, cache=str(folder), **storage), "disk").source.tokens


def test_disk_memory_and_stream_are_equal(shards, tmp_path):
    storages = {"disk": {"cache": str(tmp_path)}, "memory": {}, "recompute": {}}
    sources = [
        compute(make_loader(shards, CountingEncoder(), **storage), where).source
        for where, storage in storages.items()
    ]
    for clips_per_example, batches in (
        (2, [[0, 5, 89], [7], [20, 3, 60, 61]]),
        (1, [[0, 10, 178], [14], [40, 6]]),
        (6, [[0, 1, 29], [2]]),
    ):
        found = [list(source.batches(clips_per_example, batches)) for source in sources]
        for disk, memory, stream in zip(*found, strict=True):
            assert disk.shape[1:] == (clips_per_example * 8, 96)
            torch.testing.assert_close(disk, memory, atol=0, rtol=0)
            torch.testing.assert_close(disk, stream, atol=1e-6, rtol=1e-5)


def test_recomputed_features_train_equal_heads(shards):
    """Also counts the passes over the videos: one for all heads."""
    labels = [s.meta["labels"]["appearance"] for s in shards.list_samples()[:SAMPLES]]
    task = Task("appearance", "class", shards.classes["appearance"])
    protocol = Attentive(heads=4, segments=2, crops=3, epochs=2, batch=8, lr=(1e-3, 1e-2), standardise=True)
    indices = list(range(SAMPLES))
    outputs, selections, clips = [], [], []
    for where in ("memory", "recompute"):
        encoder = CountingEncoder()
        source = compute(make_loader(shards, encoder), where).source
        data = TrainingSet(source, indices, labels, task.label_tensor(labels, torch.device("cpu")))
        probe = select_and_train(protocol, task, data, [str(i) for i in indices])
        outputs.append(protocol.predict([probe.model], probe.apply_standardisation(source), indices, task))
        selections.append(probe.selection)
        clips.append(encoder.clips)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-2)
    assert selections[0] == selections[1]
    held_out = selections[0]["n_held_out"]
    predict = SAMPLES * 6
    # standardisation is fitted to what the heads are trained on, in selection and at the end
    statistics = (SAMPLES - held_out) * 6 + SAMPLES * 6
    grid = 2 * (SAMPLES - held_out) * 2
    selection = held_out * 6
    final = 2 * SAMPLES * 2
    shape = 1
    assert clips == [SAMPLES * 6 + shape, statistics + grid + selection + final + predict + shape]


def test_interrupted_and_damaged_blocks_are_computed_again(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "ROWS_PER_BLOCK", 8)
    expected = compute_on_disk(shards, tmp_path / "a", CountingEncoder()).clone()
    with pytest.raises(KeyboardInterrupt):
        compute_on_disk(shards, tmp_path / "b", CountingEncoder(limit=1 + 20 * 6))
    (folder,) = (tmp_path / "b").iterdir()
    assert sorted(p.name for p in (folder / "blocks").iterdir()) == ["000000.json", "000001.json"]

    def clips_computed() -> int:
        encoder = CountingEncoder()
        assert torch.equal(compute_on_disk(shards, tmp_path / "b", encoder), expected)
        return encoder.clips - 1  # one for the shape

    assert clips_computed() == (SAMPLES - 16) * 6
    with open(folder / "features.bin", "rb+") as f:  # flips a bit of sample 25
        f.seek(25 * expected[0].numel() * 4 + 1000)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))
    assert clips_computed() == 6 * 6  # samples 24 to 29
    assert clips_computed() == 0


def test_bf16_rounds_and_halves_the_size(shards, tmp_path):
    full = compute_on_disk(shards, tmp_path / "a", CountingEncoder())
    source = compute(
        make_loader(shards, CountingEncoder(), cache=str(tmp_path / "b"), cache_dtype="bf16"), "disk"
    ).source
    assert torch.equal(source.tokens, full.bfloat16())
    assert next(source.batches(2, [[0]])).dtype == torch.float32
    assert used_gb(tmp_path / "b", []) == pytest.approx(used_gb(tmp_path / "a", []) / 2, rel=0.02)


def test_another_dtype_in_the_same_folder_leaves_mapped_features_alone(shards, tmp_path):
    """The reader of fp32 features has them mapped while another job writes bf16 into the same folder."""
    mapped = compute_on_disk(shards, tmp_path, CountingEncoder())
    expected = mapped.clone()
    half = compute_on_disk(shards, tmp_path, CountingEncoder(), cache_dtype="bf16")
    assert torch.equal(mapped, expected) and torch.equal(half, expected.bfloat16())
    encoder = CountingEncoder()
    compute_on_disk(shards, tmp_path, encoder)
    assert encoder.clips == 1  # one for the shape
    dtypes = {json.loads(p.read_text())["dtype"] for p in tmp_path.glob("*/provenance.json")}
    assert dtypes == {"torch.float32", "torch.bfloat16"}


def test_every_ingredient_changes_the_key(shards, tmp_path, monkeypatch):
    samples = shards.list_samples()[:3]
    encoder = {"encoder": "hash", "model": {"dim": 8}, "precision": "no", "pixels": {"mean": [0], "std": [1]}}

    def key(
        view: View = VIEW,
        samples: list = samples,
        shape: FeatureShape = FeatureShape(3, 6, 8, 96),
        dtype: torch.dtype = torch.float32,
        **changed: Any,
    ) -> str:
        extractor = FeatureExtractor(lambda video: video, {**encoder, **changed})
        provenance = cache_provenance(extractor, view, shards.hash, samples)
        return FeatureStore(tmp_path, provenance, shape, dtype).folder.name

    other = {**encoder, "encoder": "x", "model": {"dim": 9}, "precision": "bf16", "pixels": {}}
    keys = [key(**{name: value}) for name, value in other.items()]
    views = {"frames": 8, "stride": 1, "fps": 2.0, "segments": 1, "crops": 1, "size": 8}
    views |= {"order": "still", "first_frames": 2}
    assert set(views) == set(View._fields)
    keys += [key(view=VIEW._replace(**{name: value})) for name, value in views.items()]
    keys += [key(samples=samples[::-1]), key(dtype=torch.bfloat16), key(shape=FeatureShape(3, 6, 8, 95))]
    original = key()
    assert original == key()
    changes: list[tuple[Callable, str, Any]] = [
        (extractor_module, "code_hash", lambda *prefixes: "other code"),
        (av, "library_versions", {"libavcodec": (1, 2, 3)}),
        (extractor_module, "version_of", lambda name: "other version"),
        (shards, "hash", "other data"),
    ]
    for owner, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            keys.append(key())
    assert len({original, *keys}) == 1 + len(keys)


VIEW_OPTIONS = {  # field of the configuration -> another value; each decides the pixels that are encoded
    "probe.segments": 3,
    "probe.crops": 2,
    "data.frames": 8,
    "data.size": 16,
    "data.stride": 3,
    "data.fps": 5.0,
}
KEYED_ELSEWHERE = {  # field -> the ingredient of the key that it changes
    "encoder": "weights",
    "encoder_file": "weights",
    "random_init": "weights",
    "data.train": "data",
    "data.test": "data",
    "data.labels": "samples",
    "probe.cache_dtype": "dtype",
    "probe.precision": "precision",
    "probe.tokens": "tokens",
    "probe.seed": "weights under the control random_init",
}
OF_HEADS = {  # fields that are used after the features are read, or do not change them
    *("out", "probe.kind", "data.tags", "data.numbers", "data.train_fractions", "data.seeds"),
    *("data.cache_dir", "data.cache_gb"),
    *("probe.cache", "probe.cache_gb", "probe.memory_gb", "probe.recompute", "probe.allow_unreadable"),
    *("probe.workers", "probe.encode_batch", "probe.aggregate", "probe.controls", "probe.standardise"),
    *("probe.val_fraction", "probe.epochs", "probe.batch", "probe.lr", "probe.weight_decay"),
    *("probe.clip_grad", "probe.depth", "probe.heads", "probe.solver", "probe.l2", "probe.temporal_bins"),
    *(
        "probe.head_memory_gb",
        "probe.k",
        "probe.temperature",
        "probe.decode_timeout_s",
        "probe.decode_memory_mb",
        *("probe.width", "probe.hidden", "probe.set_temperature"),
    ),
}


def test_every_option_is_known_to_change_the_key_or_to_be_of_heads():
    """A new option fails here until somebody has decided which it is."""
    names = {f"data.{field.name}" for field in fields(ProbeData)}
    names |= {field.name for field in fields(ProbeConfig)} - {"data", "probe"} | {"probe.kind"}
    names |= {f"probe.{field.name}" for protocol in PROTOCOLS.values() for field in fields(protocol)}
    assert names == {*VIEW_OPTIONS, *KEYED_ELSEWHERE, *OF_HEADS}


@pytest.mark.parametrize("name", VIEW_OPTIONS)
def test_an_option_of_the_view_changes_it(name):
    model = {"frames": 16, "height": 32, "width": 32, "tubelet": 2, "patch": 16}
    loaded = LoadedEncoder(None, {"model": model, "config": {"data": {"stride": 4, "fps": None}}})
    section, _, field = name.partition(".")
    changed: dict[str, dict[str, Any]] = {"data": {}, "probe": {}}
    changed[section][field] = VIEW_OPTIONS[name]
    views = [
        make_view(ProbeData(train=["a"], test=["b"], **data), Knn(**probe), loaded, "none")
        for data, probe in (({}, {}), (changed["data"], changed["probe"]))
    ]
    assert views[0] != views[1]


class StayingEncoder(torch.nn.Linear):
    """Its weights keep their values on every device."""

    def to(self, device: torch.device) -> "StayingEncoder":
        return self


@pytest.mark.parametrize("control", CONTROLS)
def test_every_fact_about_an_encoder_is_in_its_provenance(control, monkeypatch):
    """Weights, model, pixel statistics, precision and kind of device each give another key."""

    def provenance(device: str = "cpu", precision: str = "no", seed: int = 0, **changed: Any) -> str:
        facts = {"model": {"tubelet": 2, "patch": 8}, "pixels": {"mean": [0.0], "std": [1.0]}} | changed
        torch.manual_seed(changed.get("weights", 0))
        loaded = LoadedEncoder(StayingEncoder(2, 2), facts)
        accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=precision)

        def untrained(seed: int) -> LoadedEncoder:
            torch.manual_seed(seed)
            return LoadedEncoder(StayingEncoder(2, 2), facts)

        return json.dumps(make_extractor(untrained, loaded, control, seed, accelerator).provenance)

    changes: list[dict[str, Any]] = [{"pixels": {"mean": [1.0], "std": [1.0]}}, {"device": "meta"}]
    changes.append({"model": {"tubelet": 1, "patch": 8}})
    if control != "pixels":
        changes.append({"precision": "bf16"})
        changes.append({"seed": 1} if control == "random_init" else {"weights": 1})
    found = [provenance(), *(provenance(**change) for change in changes)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
        found.append(provenance())
    assert provenance() == found[0] and len(set(found)) == len(found)


def test_installed_decoders_are_in_the_key():
    """A distribution may have another name than its module: decord2 installs decord."""
    found = {name for name in extractor_module.FEATURE_LIBRARIES if extractor_module.version_of(name)}
    for module in ("torch", "av", "decord", "PIL", "numpy", "einops"):
        assert found & set(packages_distributions()[module])


@pytest.mark.parametrize("control", ["none", "random_init"])
def test_tokens_are_those_asked_for(control):
    """patches: as without the option; class: the normed class token, the only one; both: it, then the
    patches. The key of the cache says which, and the plan has their number."""
    model = {"tubelet": 2, "patch": 8}
    encoder = Encoder(4, 16, 16, 24, 1, 2, patch=8, class_token=True).eval()
    loaded = LoadedEncoder(encoder, {"model": model, "pixels": NOT_NORMALISED})
    video = torch.randint(0, 256, (3, 3, 4, 16, 16), dtype=torch.uint8)
    accelerator = Accelerator(cpu=True)
    extractors = {
        tokens: make_extractor(lambda _: loaded, loaded, control, 0, accelerator, tokens)
        for tokens in ("patches", "class", "both")
    }
    found = {tokens: extractor.encode(video) for tokens, extractor in extractors.items()}
    want = encoder(normalise(video, ([0.0] * 3, [1.0] * 3)), return_levels=True)
    assert torch.equal(found["both"], want) and want.shape[1] == 1 + 8
    assert torch.equal(found["class"], want[:, :1]) and torch.equal(found["patches"], want[:, 1:])
    assert len({json.dumps(extractor.provenance) for extractor in extractors.values()}) == 3
    loaders = [
        FeatureLoader(extractor.encode, None, [None] * 5, VIEW, accelerator, FeatureStorage(), "")
        for extractor in extractors.values()
    ]
    assert [loader.shape() for loader in loaders] == [(5, 6, n, 24) for n in (8, 1, 9)]


@pytest.mark.parametrize("encoder", [StayingEncoder(2, 2), Encoder(4, 16, 16, 24, 1, 2, patch=8)])
def test_an_encoder_without_a_class_token_is_refused(encoder):
    model = {"tubelet": 2, "patch": 8, "name": "timm:other"}
    loaded = LoadedEncoder(encoder, {"model": model, "pixels": NOT_NORMALISED})
    for tokens in ("class", "both"):
        with pytest.raises(UserError, match=f"^probe.tokens={tokens}: timm:other has no class token .*$"):
            make_extractor(lambda _: loaded, loaded, "none", 0, Accelerator(cpu=True), tokens)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")


def as_other_user(uid: int, function: Callable[[], None]) -> None:
    """Calls the function in a fork of this process that belongs to another user, with umask 022."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.umask(0o022)
            os.setgid(uid)
            os.setuid(uid)
            function()
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@needs_root
@pytest.mark.parametrize("complete", [True, False])
def test_two_users_share_a_cache(complete):
    """The second one reads complete features of the first one; else it writes its own beside them."""
    shape = FeatureShape(70, 1, 2, 4)
    rows = torch.rand(shape)

    def fill(count: int) -> None:
        store = FeatureStore(folder, {"encoder": "x"}, shape, torch.float32)
        with store.lock():
            missing = [b for b in range(store.num_blocks) if not store.is_valid(b)]
            if missing:
                store.write((n, rows[n]) for b in missing for n in store.block_rows(b) if n < count)
        if count == shape.samples:
            assert torch.equal(store.read()[0], rows)

    with TemporaryDirectory(dir="/tmp") as root:
        os.chmod(root, 0o777)
        folder = Path(root) / "cache"
        folder.mkdir()
        os.chmod(folder, 0o777)
        as_other_user(12345, lambda: fill(70 if complete else 64))
        for file in folder.rglob("*"):
            assert stat.S_IMODE(file.stat().st_mode) == (0o755 if file.is_dir() else 0o644)
        as_other_user(12346, lambda: fill(70))
        assert len(list(folder.iterdir())) == (1 if complete else 2)


def test_unreadable_samples_are_recorded(shards, tmp_path):
    loader = make_loader(shards, CountingEncoder(), cache=str(tmp_path))
    samples = [s._replace(size=100) if i in (3, 17) else s for i, s in enumerate(loader.samples)]
    loader = loader._replace(samples=samples)
    reasons = compute(loader, "memory").unreadable
    assert list(reasons) == [3, 17] == list(compute(loader, "recompute").unreadable)
    for _ in range(2):  # computed, then read
        features = compute(loader, "disk")
        assert features.unreadable == reasons and not features.source.tokens[17].any()
    all_broken = loader._replace(samples=[s._replace(size=100) for s in samples])
    with pytest.raises(UserError, match="none of the 30 samples can be decoded"):
        compute(all_broken, "memory")


def test_memory_limit():
    shape = FeatureShape(1000, 2, 500, 1000)  # 4 GB in fp32
    assert choose_storage([shape], FeatureStorage(memory_gb=4.1), 1)[0] == "memory"
    assert choose_storage([shape], FeatureStorage(memory_gb=2.1), 2)[0] == "memory"  # of each process
    assert choose_storage([shape], FeatureStorage(memory_gb=2.1), 1)[0] == "recompute"
    assert choose_storage([shape, shape], FeatureStorage(memory_gb=4.1), 1)[0] == "recompute"
    assert choose_storage([shape], FeatureStorage(memory_gb=4.1, recompute="always"), 1)[0] == "recompute"
    with pytest.raises(UserError, match=r"4 GB of features, probe.memory_gb is 3.9: raise it"):
        choose_storage([shape], FeatureStorage(memory_gb=3.9, recompute="never"), 1)


def test_cache_limit(tmp_path):
    shape = FeatureShape(1000, 2, 500, 1000)  # 4 GB in fp32

    def choose(cache_gb: float, dtype: str = "fp32", **provenance: Any) -> tuple[str, str]:
        storage = FeatureStorage(cache=str(tmp_path), cache_gb=cache_gb, cache_dtype=dtype)
        stores = [FeatureStore(tmp_path, provenance, shape, CACHE_DTYPES[dtype])]
        return choose_storage([shape], storage, 1, stores)

    assert choose(2.1)[0] == "recompute"
    where, line = choose(2.1, "bf16")
    assert where == "disk"
    assert line.startswith("1000 videos x 2 clips x 500 tokens x 1000: 2 GB of features, kept in")
    store = FeatureStore(tmp_path, {"encoder": "x"}, shape, torch.float32)
    with store.lock():
        store.write((n, torch.ones(2, 500, 1000)) for n in range(2))
    assert choose(4.0079, encoder="y")[0] == "recompute"  # 8 MB are used
    assert choose(4.0079, encoder="x")[0] == "disk"  # its own do not count
    assert json.loads((store.folder / "provenance.json").read_text())["encoder"] == "x"


class FirstOfTwo(SimpleNamespace):
    """An accelerator of a CPU without collectives."""

    device = torch.device("cpu")
    mixed_precision = "no"
    num_processes, process_index, is_main_process = 2, 0, True


def test_plans_count_what_earlier_ones_will_write_and_the_first_process_decides(
    shards, tmp_path, monkeypatch
):
    means = PatchMeans(2, 8)
    splits = {name: Split(shards, shards.list_samples()[:SAMPLES]) for name in ("train", "test")}
    decided: list = []

    def plan(name: str, cache_gb: float, earlier: list, rank: int = 0) -> FeaturePlan:
        protocol = Knn(cache=str(tmp_path), cache_gb=cache_gb, segments=2)
        extractor = FeatureExtractor(lambda video: means(video.float()), {"encoder": name})
        accelerator = FirstOfTwo(process_index=rank, is_main_process=not rank)
        return plan_features(protocol, extractor, VIEW, splits, accelerator, "none", None, earlier=earlier)

    def exchange(values: list, device: torch.device) -> None:
        values[:] = decided or values

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", exchange)
    first = plan("a", 1.0, [])
    size = missing_gb(list(first.stores.values()))
    assert first.where == "disk" and size > 0
    assert plan("b", 2.1 * size, [first]).where == "disk"
    assert plan("a", 1.1 * size, [first]).where == "disk"  # the same features
    too_much = plan("b", 1.9 * size, [first])
    assert too_much.where == "recompute" and f"will hold {size:.3g} GB before" in too_much.line
    monkeypatch.setattr(feature_cache, "free_gb", lambda folder: 1.9 * size)
    with pytest.raises(UserError, match="GB of features are to be written"):
        plan("b", 1.0, [first])
    decided[:] = [("memory", "x"), None]
    monkeypatch.setattr(extractor_module, "choose_storage", lambda *_: pytest.fail("the first one decides"))
    assert plan("b", 1.0, [first], rank=1).where == "memory"


def test_a_pass_that_only_decodes_shows_its_progress(shards, monkeypatch):
    shown = []
    monkeypatch.setattr(features_module, "track", lambda items, name, *_, **__: shown.append(name) or items)
    compute(make_loader(shards, CountingEncoder()), "recompute")
    assert shown == ["features"]


def test_reorder_frames():
    clip = np.arange(4 * 2 * 5 * 3, dtype=np.uint8).reshape(4, 2, 5, 3)
    permutation = np.array([2, 0, 3, 1])
    assert np.array_equal(reorder_frames(clip, "reversed", permutation), clip[[3, 2, 1, 0]])
    assert np.array_equal(reorder_frames(clip, "still", permutation), clip[[2, 2, 2, 2]])
    assert np.array_equal(reorder_frames(clip, "shuffled", permutation), clip[permutation])


def test_square_crop():
    clip = np.arange(4 * 2 * 5 * 3, dtype=np.uint8).reshape(4, 2, 5, 3)
    assert [square_crop(clip, i, 3)[0, 0, 0, 0] // 3 for i in range(3)] == [0, 2, 3]
    assert square_crop(clip, 0, 1).shape[1:3] == (2, 2)
    tall = clip.transpose(0, 2, 1, 3)
    assert np.array_equal(square_crop(tall, 2, 3), tall[:, 3:])


def test_eval_clips(shards):
    sample = shards.list_samples()[0]
    video = open_video(shards.read(sample), sample.ext, sample.meta)
    start = len(video.times) - 1 - 6  # of the last segment
    _, clips = EvalClips(shards, [sample], VIEW, 6)[0]
    expected = CenterCrop(16)(video.get(np.arange(start, start + 7, 2)))
    assert torch.equal(clips[1], expected)  # a square video: all crops are the center one
    for order in ("shuffled", "reversed", "still"):
        view = VIEW._replace(order=order)
        _, clips = EvalClips(shards, [sample], view, 6)[0]
        for example in (1, 4):
            assert torch.equal(EvalClips(shards, [sample], view, 1)[example][1][0], clips[example])


def test_patch_means():
    video = torch.rand(2, 3, 4, 16, 24)
    tokens = PatchMeans(2, 8)(video)
    assert tokens.shape == (2, 2 * 2 * 3, 96)
    patch = video[1, :, 2:4, 8:16, 16:24]  # second tubelet, second row, third column
    expected = patch.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)).transpose(0, 1).flatten()
    torch.testing.assert_close(tokens[1, 6 + 3 + 2], expected)


def test_error_names_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    store = FeatureStore(tmp_path / "file", {}, FeatureShape(1, 1, 1, 1), torch.float32)
    with pytest.raises(UserError, match="cannot be made"), store.lock():
        pass
