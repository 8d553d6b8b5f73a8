"""Several streams in one run: corpora in given shares, clips of several lengths, images; and the step for
them."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from programs import run_here, run_world

from vidssl import train as train_program
from vidssl.config import from_tree, load_config, to_tree
from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.data.augment import RandomCrop
from vidssl.data.dataset import STREAM_STRIDE, MultiStreamDataset
from vidssl.data.loader import Batch, make_streams, train_steps
from vidssl.data.schema import DataConfig, ExtraStream
from vidssl.data.shards import Shards
from vidssl.objective.masks import MASKS
from vidssl.training.distributed import Strategy
from vidssl.training.micro_batches import PartMaker
from vidssl.training.schema import TrainConfig
from vidssl.training.step import forward_backward

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FILES = ["configs/method/vjepa.yaml", "configs/model/vit_micro.yaml", "configs/data/quickstart.yaml"]
FILES = [str(ROOT / file) for file in [*FILES, "configs/run/smoke.yaml"]]
SMALL = ["method.predictor.width=96", "method.predictor.depth=1", "method.predictor.heads=4", "model.depth=1"]
SMALL += ["method.mask.truncate=random", "model.image_tokenizer=true"]


@pytest.fixture(scope="module")
def corpora(synthetic_shards) -> list[str]:
    return [str(synthetic_shards / name) for name in ("train", "test")]  # 60 and 30 samples


def streams_of(data: DataConfig, seed: int = 0) -> MultiStreamDataset:
    return make_streams(data, [Shards(d.train) for d in data.streams()], RandomCrop(16), seed, 4, 10)


def also(corpora: list[str], **more) -> DataConfig:
    further = (
        ExtraStream(corpora[1:], frames=2, clips=4, fps=5.0),
        ExtraStream(corpora[:1], frames=1, clips=8, stride=1),
    )
    return DataConfig(corpora[:1], frames=4, stride=2, extra_streams=further, **more)


def test_corpora_are_shown_in_their_shares(corpora):
    streams = streams_of(DataConfig(corpora, frames=1, stride=1, weights=(0.2, 0.8)))
    keys = {s.key: i for i, folder in enumerate(corpora) for s in Shards([folder]).list_samples()}
    shown = [key for (b,) in train_steps(streams, 0, 20, [8]) for key in b.key]
    assert Counter(keys[k] for k in shown) == {0: 32, 1: 128}
    small = Counter(k for k in shown if keys[k] == 1)
    assert len(small) == 30 and set(small.values()) <= {4, 5}  # four epochs and a bit of the small corpus
    assert set(Counter(k for k in shown if keys[k] == 0).values()) == {1}
    later = [b for (b,) in train_steps(streams, 13, 20, [8], workers=2)]
    assert [k for b in later for k in b.key] == shown[13 * 8 :]


def test_a_step_has_a_batch_of_each_stream(corpora):
    data = also(corpora)
    assert data.clips(24) == [12, 4, 8]
    steps = list(train_steps(streams_of(data), 0, 6, data.clips(24)))
    for s, step in enumerate(steps):
        assert [b.video.shape for b in step] == [(12, 3, 4, 16, 16), (4, 3, 2, 16, 16), (8, 3, 1, 16, 16)]
        for i, (batch, n) in enumerate(zip(step, (12, 4, 8), strict=True)):
            assert batch.position.tolist() == [i * STREAM_STRIDE + s * n + j for j in range(n)]
    small = [key for step in steps for key in step[1].key]
    assert set(small) <= {s.key for s in Shards(corpora[1:]).list_samples()} and len(set(small)) == 24
    alone = streams_of(DataConfig(corpora[:1], frames=4, stride=2))
    for step, (batch,) in zip(steps, train_steps(alone, 0, 6, [12]), strict=True):
        assert (
            step[0].video.equal(batch.video) and step[0].key == batch.key
        )  # the first is as if it were alone


@pytest.mark.parametrize("workers, isolate", [(0, False), (2, True)])
def test_streams_do_not_depend_on_workers_and_processes(corpora, workers, isolate):
    data = also(corpora)
    whole = list(train_steps(streams_of(data), 2, 5, data.clips(24)))
    parts = [
        list(train_steps(streams_of(data), 2, 5, data.clips(24), rank, 2, workers, isolate))
        for rank in range(2)
    ]
    for step, batches in enumerate(whole):
        for i, batch in enumerate(batches):
            halves = [parts[rank][step][i] for rank in range(2)]
            order = torch.cat([h.position for h in halves]).argsort()
            assert torch.cat([h.video for h in halves])[order].equal(batch.video)


def test_equal_streams_are_shuffled_independently(corpora):
    further = (ExtraStream(corpora[:1], frames=4, clips=8, stride=2),)
    data = DataConfig(corpora[:1], frames=4, stride=2, extra_streams=further)
    first, second = next(train_steps(streams_of(data), 0, 1, data.clips(16)))
    assert first.key != second.key
    keys = [KeyedRNG(0, 0, b.position).rand(3) for b in (first, second)]
    assert not keys[0].equal(keys[1])


@dataclass(frozen=True)
class Sections:
    data: DataConfig


def test_configuration_of_streams(corpora):
    def load(*settings: str) -> DataConfig:
        base = ["data.train=x", "data.frames=4", "data.stride=2"]
        return load_config([*base, *settings], Sections).data

    got = load(
        "data.extra_streams=[{train: y, frames: 1, stride: 1, clips: 8, weights: [1]}]", "data.weights=[0.5]"
    )
    assert got.extra_streams == (ExtraStream(["y"], 1, 8, stride=1, weights=(1.0,)),) and got.weights == (
        0.5,
    )
    assert [d.frames for d in got.streams()] == [4, 1] and got.streams()[
        1
    ].max_decode_error_rate == got.max_decode_error_rate
    for wrong, words in (
        ("data.extra_streams=[{train: y, frames: 1, clips: 8}]", r"data\.extra_streams: give either stride"),
        ("data.extra_streams=[{train: y, frames: 1, stride: 1, clips: 8, size: 3}]", "size"),
        ("data.extra_streams=[{train: y, frames: 1, stride: 1}]", "clips"),
        ("data.weights=[1,-1]", "greater than 0"),
        ("data.decoder=opencv", "auto"),
    ):
        with pytest.raises(UserError, match=words):
            load(wrong)


# --- the step ---


def tiny(further: str = "[]", *more: str) -> TrainConfig:
    settings = ["data.train=x", "run.out=x", "run.batch=8", f"data.extra_streams={further}", *SMALL, *more]
    return load_config([*FILES, *settings], TrainConfig)


def batch_of(n: int, frames: int, first: int) -> Batch:
    rng = torch.Generator().manual_seed(first % 1000)
    video = torch.randint(0, 256, (n, 3, frames, 32, 32), dtype=torch.uint8, generator=rng)
    return Batch(video, torch.zeros(n), first + torch.arange(n), ["k"] * n, [])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_are_weighted_over_streams(micro_batches):
    strategy = Strategy(Accelerator(cpu=True))
    objective = tiny().build_objective()
    batches = [batch_of(6, 8, 0), batch_of(2, 4, STREAM_STRIDE)]
    make_parts = PartMaker(objective, strategy, seed=0, micro_batches=micro_batches)
    losses_and_parts = forward_backward(strategy, objective, make_parts(3, batches))
    got = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    losses = []
    for batch in batches:
        losses.append(objective(normalise(batch.video), KeyedRNG(0, 3, batch.position))["loss"])
    (0.75 * losses[0] + 0.25 * losses[1]).backward()
    assert float(losses_and_parts["loss"]) == pytest.approx(
        sum(w * loss.item() for w, loss in zip((0.75, 0.25), losses, strict=True)), rel=1e-5
    )
    for i, loss in enumerate(losses):
        assert float(losses_and_parts[f"loss_stream_{i}"]) == pytest.approx(loss.item(), rel=1e-5)
    for name, p in objective.named_parameters():
        if p.grad is not None:
            assert torch.allclose(got[name], p.grad, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("kind", ["tube", "multiblock_3d", "random", "multiblock_2d"])
def test_masks_are_drawn_on_the_grid_of_each_stream(kind):
    objective = tiny("[{train: x, frames: 1, stride: 1, clips: 8}]").build_objective()
    objective.mask = MASKS[kind]()
    for frames, slices in ((8, 4), (4, 2), (1, 1)):
        batch = batch_of(4, frames, STREAM_STRIDE)
        video = normalise(batch.video)
        draws = KeyedRNG(0, 0, batch.position)
        grid = objective.encoder.grid_of(video)
        assert grid.t == slices
        for m in objective.mask(video, grid, draws):
            assert max(int(m.context.max()), int(m.target.max())) < grid.n
        assert objective(video, KeyedRNG(0, 0, batch.position))["loss"].isfinite()


def test_unsuitable_streams_are_refused_before_training():
    image = "[{train: x, frames: 1, stride: 1, clips: 8}]"
    refused = r"data.extra_streams\[0\].frames 1 is not a multiple of model.tubelet 2"
    with pytest.raises(UserError, match=refused):
        tiny(image, "model.image_tokenizer=false")
    tree = to_tree(tiny(image))
    tree["method"]["mask"] = {"kind": "future", "visible": 0.5, "past": 2}
    with pytest.raises(UserError, match="two or more time slices, not an image"):
        from_tree(tree, TrainConfig, "test").build_objective()


def run(corpora: list[str], out: Path, processes: int) -> list[dict]:
    train, test = corpora
    clips = f"{{train: {test}, frames: 4, stride: 2, clips: 8}}"
    images = f"{{train: {train}, frames: 1, stride: 1, clips: 8}}"
    further = f"[{clips}, {images}]"
    settings = [
        f"data.train={train}",
        f"data.extra_streams={further}",
        "run.batch=24",
        f"run.out={out}",
        "run.steps=3",
        *SMALL,
    ]
    if processes == 1:
        assert run_here(train_program.main, *FILES, *settings) == 0
    else:
        done = run_world(processes, "vidssl.train", *FILES, *settings)
        assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_training_on_several_streams_with_one_and_two_processes(corpora, tmp_path):
    one, two = (run(corpora, tmp_path / str(n), n) for n in (1, 2))
    assert [r["samples_hash"] for r in one] == [r["samples_hash"] for r in two] and len(
        {r["samples_hash"] for r in one}
    ) == 3
    for row in one:
        assert row["loss"] == pytest.approx(np.mean([row[f"loss_stream_{i}"] for i in range(3)]), rel=1e-5)
    for name in ("loss", "loss_stream_0", "loss_stream_1", "loss_stream_2"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-4)
