"""training/micro_batches.py and the measurements of a step: parts of a batch, samples, waiting time."""

import itertools
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from einops import repeat
from torch import nn

from vidssl.config import load_config
from vidssl.core.cpus import available_cpus
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.data.dataset import STREAM_STRIDE
from vidssl.data.loader import Batch
from vidssl.model.grid import Grid, Mask
from vidssl.objective.block_masks import MultiBlock3D
from vidssl.objective.masks import mask_from_scores
from vidssl.objective.objective import Objective
from vidssl.training import perf
from vidssl.training.metrics_log import count_samples, samples_hash
from vidssl.training.micro_batches import PartMaker, make_cut_groups, split_batch
from vidssl.training.run_summary import wait_advice
from vidssl.training.schema import EfficiencyConfig, TrainConfig

ROOT = Path(__file__).parents[3]
FILES = [str(ROOT / f"configs/{name}.yaml") for name in ("method/vjepa_tiny", "data/quickstart", "run/smoke")]


def configured(*settings: str) -> TrainConfig:
    return load_config([*FILES, "model.kind=vit_tiny", "data.train=x", "run.out=x", *settings], TrainConfig)


def batch(positions: list[int], keys: list[str]) -> Batch:
    n = len(keys)
    return Batch(torch.empty(n, 3, 1, 1, 1), torch.zeros(n), torch.tensor(positions), keys, [])


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_parts_of_a_batch_hold_each_clip_once_and_no_two_groups(groups):
    for micro_batches, world, first in itertools.product((1, 2, 3, 6), (1, 2, 4), (0, STREAM_STRIDE + 48)):
        check_parts(micro_batches, world, groups, first)


def check_parts(micro_batches: int, world: int, groups: int, first: int) -> None:
    seen = []
    for rank in range(world):
        own = [first + j for j in range(24) if j % world == rank]
        numbers = torch.tensor(own)[:, None, None, None, None]
        held = batch(own, [str(p) for p in own])._replace(video=numbers, motion=numbers)
        parts = split_batch(held, micro_batches, groups, rank, world)
        for part in parts:
            assert part.video.flatten().equal(part.position) and part.batch == (first, 24)
            assert part.motion.equal(part.video)
            assert len(part.position) <= len(own) // micro_batches
            assert len({(p - first) % groups for p in part.position.tolist()}) == 1
            seen += part.position.tolist()
        if groups == 1:
            assert len(parts) == micro_batches and torch.cat([p.position for p in parts]).tolist() == own
    assert sorted(seen) == [first + j for j in range(24)]


class Speed(nn.Module):
    """The motion of each token, in a clip of 4 x 4 places."""

    needs_video = False
    needs_motion = True

    def forward(self, motion: torch.Tensor, grid: Grid, rng: KeyedRNG, encoder: nn.Module) -> torch.Tensor:
        speed = motion.float().norm(dim=1)  # [B, T, h, w]
        return F.adaptive_avg_pool3d(speed, (grid.t, grid.h, grid.w)).flatten(1)


class Slowest:
    """Shows the slower half of the tokens."""

    def from_scores(self, scores: torch.Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        return [mask_from_scores(scores, grid.n // 2)]


def test_a_score_is_made_of_the_motion_of_its_clips():
    """Half of the tokens move, in each clip other ones; they are hidden."""
    cfg = configured("model.patch=8", "augment.size=32", "data.frames=4", "method.mask.past=1")
    objective = cfg.build_objective()
    objective.score = Speed()
    objective.mask = Slowest()
    assert objective.needs_motion
    tokens = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)).argsort(1) < 16
    motion = repeat(tokens.view(8, 2, 4, 4).half(), "b t h w -> b xy (t 2) h w", xy=2)
    clips = batch(list(range(8)), [""] * 8)._replace(video=torch.zeros(8, 3, 4, 32, 32), motion=motion)
    parts = PartMaker(objective, SimpleNamespace(rank=0, world=1), 0, micro_batches=2)(0, [clips])
    hidden = torch.cat([part.masks[0].target[:, 0] for part in parts])
    assert torch.zeros_like(tokens).scatter(1, hidden, True).equal(tokens)
    masks, scores = objective.make_masks(clips.video, KeyedRNG(0, 0, clips.position))
    assert not scores.any() and masks[0].target.shape == (8, 1, 16)


def test_a_score_of_motion_needs_clips_that_carry_it(monkeypatch):
    monkeypatch.setattr(Objective, "needs_motion", True)
    with pytest.raises(UserError, match=r"needs the motion vectors .* give data\.motion_vectors=true$"):
        configured().build_objective()
    configured("data.motion_vectors=true").build_objective()


@pytest.mark.parametrize("stream", ["first", "extra"])
def test_processes_that_cannot_share_the_groups_are_refused_with_those_that_can(stream):
    """24 clips, cut over 4 clips, are 6 groups."""
    data = SimpleNamespace(clips=lambda batch: [24] if stream == "first" else [4, 24])
    cfg = SimpleNamespace(run=SimpleNamespace(batch=24, lanes=24), data=data)
    mask = MultiBlock3D(truncate="raster", truncate_over=4)
    for world in (1, 2, 3, 6, 12, 24):
        make_cut_groups(cfg, mask, world)
    for world in (4, 8):
        words = rf"truncate_over 4 makes 6 groups .* {world} processes .* 1, 2, 3, 6, 12, 24 processes$"
        with pytest.raises(UserError, match=words):
            make_cut_groups(cfg, mask, world)
        make_cut_groups(cfg, MultiBlock3D(truncate_over=4), world)


def test_samples_hash_depends_on_the_samples_only():
    whole = count_samples([batch([0, 1, 2, 3], ["a", "b", "c", "d"])])
    halves = [count_samples([batch([2, 0], ["c", "a"])]), count_samples([batch([1, 3], ["b", "d"])])]
    summed = {name: float(halves[0][name] + halves[1][name]) for name in whole}
    assert samples_hash(summed) == samples_hash(whole) and len(samples_hash(whole)) == 16
    exchanged = count_samples([batch([1, 0, 2, 3], ["a", "b", "c", "d"])])
    assert samples_hash(exchanged) != samples_hash(whole)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now_s = 0.0
        monkeypatch.setattr(perf.time, "perf_counter", lambda: self.now_s)

    def passes(self, seconds: float) -> None:
        self.now_s += seconds


def test_wait_is_only_the_time_in_the_loader(monkeypatch):
    clock = Clock(monkeypatch)

    def loader():
        for seconds in (1, 3, 0, 1):
            clock.passes(seconds)
            yield seconds

    strategy = SimpleNamespace(device=torch.device("cpu"), is_main=False)
    throughput = perf.Throughput(strategy, "fp32", clips=8, model=torch.nn.Identity())
    rows = []
    for wait_s in throughput.timed(loader()):
        clock.passes(1)  # the step
        rows.append((wait_s, throughput.row()))
        clock.passes(20)  # diagnostics and logging
        if wait_s == 3:
            throughput.beside("save", clock.passes, 7)
    for wait_s, row in rows:
        assert row["wait"] == wait_s / (wait_s + 1) and row["clips_per_s"] == 8 / (wait_s + 1)
    assert [row.get("save_s") for _, row in rows] == [None, None, 7, None]


def test_a_row_of_several_steps_has_their_means(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(perf, "peak_memory", lambda _: 0)
    monkeypatch.setattr(perf, "matmul_rate", lambda *_: 1.0)

    def loader():
        for seconds in (1, 3, 0, 0):
            clock.passes(seconds)
            yield

    strategy = SimpleNamespace(device=torch.device("cpu"), is_main=True, world=2)
    throughput = perf.Throughput(strategy, "fp32", clips=8, model=torch.nn.Identity())
    rows = []
    for number, _ in enumerate(throughput.timed(loader())):
        clock.passes(1)  # the step
        throughput.utilization.flops.total = number
        if number in (2, 3):
            rows.append(throughput.row())
            clock.passes(20)  # diagnostics and logging
    several = {"clips_per_s": 24 / 7, "wait": 4 / 7, "flops": 2, "matmul_utilization": 3 / 7}
    one = {"clips_per_s": 8, "wait": 0, "flops": 6, "matmul_utilization": 3}
    assert rows == [{**several, "memory": 0}, {**one, "memory": 0}]


def test_a_run_that_waits_for_data_says_so_after_100_steps_and_at_its_end(monkeypatch, caplog):
    clock = Clock(monkeypatch)

    def loader():
        for _ in range(120):
            clock.passes(1)
            yield None

    strategy = SimpleNamespace(device=torch.device("cpu"), is_main=True, world=2)
    utilization = SimpleNamespace(row=lambda *_: {}, flops=SimpleNamespace(total=5))
    monkeypatch.setattr(perf, "Utilization", lambda *_: utilization)
    throughput = perf.Throughput(strategy, "fp32", 8, torch.nn.Identity(), "take more of it")
    for _ in throughput.timed(loader()):
        clock.passes(3)
        # of all processes, by this one's part
        assert throughput.row()["flops"] == 2 * 5
    words = "{} steps went to waiting for data: take more of it"
    assert [r.message for r in caplog.records] == ["25% of " + words.format(n) for n in (100, 119)]


def test_workers_by_default_use_the_share_of_the_cores(monkeypatch):
    monkeypatch.setattr("vidssl.training.schema.available_cpus", lambda: 64)
    for processes, workers in (("1", 16), ("4", 15), ("8", 7), ("64", 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert EfficiencyConfig().num_workers == workers
    assert EfficiencyConfig(workers=0).num_workers == 0


@pytest.mark.parametrize("workers, expected", [(None, 2), (5, 5)])
def test_the_machine_does_not_choose_the_order_of_a_stream(workers, expected, monkeypatch):
    monkeypatch.setattr("vidssl.training.schema.available_cpus", lambda: 64)
    cfg = configured("data.reader=stream")
    assert replace(cfg, efficiency=EfficiencyConfig(workers=workers)).num_workers == expected


def test_the_quota_of_a_container_limits_the_cpus(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    group = tmp_path / "sys/fs/cgroup"
    (group / "cpu").mkdir(parents=True)
    assert available_cpus(str(tmp_path)) == 64
    for quota, cpus in (("-1", 64), ("150000", 1), ("50000", 1)):
        (group / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu/cpu.cfs_period_us").write_text("100000\n")
        assert available_cpus(str(tmp_path)) == cpus
    for quota, cpus in (("max", 64), ("800000", 8), ("9900000", 64)):
        (group / "cpu.max").write_text(f"{quota} 100000\n")
        assert available_cpus(str(tmp_path)) == cpus


WORKERS = "efficiency.workers=16 uses all cores"
PLACE = "data.augment_on=device leaves only the decoding to the CPU"
CACHE = "data.cache=host keeps a small corpus decoded"
RANDAUGMENT = "augment.randaugment=rand-m7-n4"
PACK = "videos packed with --short-side decode faster"


@pytest.mark.parametrize(
    "settings, has_gpu, advice",
    [
        (["efficiency.workers=16"], True, [CACHE, PACK]),
        (["efficiency.workers=1", "data.augment_on=host"], False, [WORKERS, CACHE, PACK]),
        (["efficiency.workers=16", "data.augment_on=host"], True, [PLACE, CACHE, PACK]),
        (["efficiency.workers=16", "data.augment_on=host", RANDAUGMENT], True, [CACHE, PACK]),
        (["efficiency.workers=16", "data.reader=stream"], True, [PACK]),
        (["efficiency.workers=1", "data.cache=host"], True, [WORKERS]),
    ],
)
def test_advice_to_a_run_that_waits_is_of_use_to_it(settings, has_gpu, advice, monkeypatch):
    monkeypatch.setattr("vidssl.training.schema.available_cpus", lambda: 64)
    cfg = configured(*settings)
    assert wait_advice(cfg, has_gpu) == "; ".join(advice)
