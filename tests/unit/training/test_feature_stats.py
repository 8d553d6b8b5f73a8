"""Feature statistics of constructed features; collapse detection in a collapsing and in a healthy run."""

import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vidssl.config import load_config
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.core.spectrum import alpha_req, rankme, singular_values
from vidssl.objective.ema_target import level_norm
from vidssl.objective.target_base import Target
from vidssl.training.clip_share import ClipShare
from vidssl.training.feature_stats import FeatureStats, feature_statistics, target_variance
from vidssl.training.optim import build_optimizer, schedule, schedule_progress, set_schedule
from vidssl.training.schema import TrainConfig

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from test_methods import small

ROOT = Path(__file__).parents[3]
STEPS, EVERY = 300, 50
FILES = [
    str(ROOT / f"configs/{name}.yaml") for name in ("method/vjepa_tiny", "model/vit_micro", "data/quickstart")
]
SMALL = ["model.dim=32", "model.depth=1", "method.predictor.width=16", "augment.size=16", "optim.warmup=10"]
SMALL += ["run.out=x", f"run.steps={STEPS}", "run.batch=16", "optim.lr=1e-3"]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_each_deviation_measures_its_own_axis():
    clip, time, place = noise(8, 1, 1, 32), noise(1, 4, 1, 32), noise(1, 1, 9, 32)
    constant = torch.ones(8, 4, 9, 32)
    varying_over = {"clip": clip, "time": time, "place": place}
    stats = {k: feature_statistics((constant + x).flatten(1, 2), 4) for k, x in varying_over.items()}
    assert stats["clip"]["std_clips"] > 0.3 and stats["clip"]["std_tokens"] < 1e-6
    assert stats["place"]["std_tokens"] > 0.3 and stats["place"]["std_clips"] < 1e-6
    assert stats["time"]["std_time"] < 1e-6  # the same in every clip: due to position
    assert feature_statistics((constant + clip * time).flatten(1, 2), 4)["std_time"] > 0.3
    assert stats["place"]["cosine"] == pytest.approx(1, abs=1e-5) and stats["clip"]["cosine"] < 0.9
    varying = constant + noise(8, 4, 9, 32)
    dead_channel = varying.index_fill(3, torch.tensor([5]), 1.0)
    assert feature_statistics(dead_channel.flatten(1, 2), 4)["std_channel_min"] < 1e-6
    constant_place = varying.index_fill(2, torch.tensor([5]), 1.0)
    assert feature_statistics(constant_place.flatten(1, 2), 4)["std_clips_min"] < 1e-6


def test_rank_and_alpha_of_known_spectra():
    assert rankme(torch.cat([torch.ones(10), torch.zeros(30)])) == pytest.approx(10, rel=1e-3)
    assert alpha_req(torch.arange(1, 65).float() ** -0.75) == pytest.approx(1.5, rel=1e-4)
    rank_3 = feature_statistics(noise(8, 4 * 9, 3) @ noise(3, 32), 4)
    assert rank_3["rank"] < 3.01 and rank_3["rank_slice"] < 3.01
    assert singular_values(torch.full((4, 4), torch.nan)).isnan().all()


def test_non_finite_features_do_not_raise():
    assert feature_statistics(torch.full((4, 8, 6), torch.inf), 2)["rank"] != 0


class Exchange:
    """Sums tensors over threads that stand for processes."""

    def __init__(self, world: int):
        self.barrier = threading.Barrier(world)
        self.given: list[Any] = [None] * world

    def reduce(self, rank: int, values: torch.Tensor) -> torch.Tensor:
        self.given[rank] = values
        self.barrier.wait()
        total = sum(self.given)
        self.barrier.wait()
        return total


@pytest.mark.parametrize(("shares", "tokens"), [((5, 3), 36), ((1, 1), 4), ((4, 4), 1024)])
def test_processes_measure_their_clips_together(shares, tokens):
    """The last ones have more tokens than the spectrum is made of."""
    world = len(shares)
    x = noise(sum(shares), tokens, 16)
    # clip k of a process is clip k * world + rank of all
    parts = [x[rank::world] for rank in range(world)] if shares[0] == shares[1] else x.split(shares)
    exchange = Exchange(world)

    def measure(rank: int) -> dict[str, float]:
        share = ClipShare(rank, world, partial(exchange.reduce, rank))
        target_var = target_variance(parts[rank], share)
        return feature_statistics(parts[rank], 4, share) | {"target_var": target_var}

    with ThreadPoolExecutor(world) as threads:
        first, second = threads.map(measure, range(world))
    want = feature_statistics(x, 4) | {"target_var": float(x.flatten(0, 1).var(0).mean())}
    assert first == second == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_small_batches_are_buffered_over_steps():
    stats = FeatureStats()
    for step in range(9):
        stats.add_clips(torch.full((3, 1, 1, 1, 1), step, dtype=torch.uint8))
    assert torch.cat(list(stats.clips)).flatten().tolist() == [6] * 3 + [7] * 3 + [8] * 3
    stats.add_clips(torch.zeros(40, 1, 1, 1, 1, dtype=torch.uint8))
    assert len(torch.cat(list(stats.clips))) == 32
    assert [c.untyped_storage().nbytes() for c in stats.clips] == [32]  # the batch is not held


@pytest.mark.parametrize(("method", "alone"), [("dino", True), ("vicmae", False)])
def test_the_class_token_is_measured_where_nothing_else_is_trained(method, alone):
    """Its statistics do not depend on the patches; a step's single clip has some, too."""
    objective = small(method, "model.depth=1").build_objective()
    stats = FeatureStats()
    for count in (1, 8):
        video = clips(0, count)[:, :, : objective.encoder.grid.t * objective.encoder.tubelet]
        stats.add_clips(video)
        found = stats.measure(objective)
        assert all(math.isfinite(value) for value in found.values())
    video = normalise(torch.cat(list(stats.clips)))
    features = objective.eval_encoder(video, with_class=True)
    tokens, slices = (features[:, :1], 1) if alone else (features[:, 1:], objective.encoder.grid.t)
    want = feature_statistics(tokens, slices)
    assert {k: found[f"feature_{k}"] for k in want} == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert (found["feature_std_tokens"] == 0) == alone and found["feature_std_clips"] > 0
    if alone:
        assert found["feature_drift_features"] == pytest.approx(0, abs=1e-6)


class NoStopGradient(Target):
    """A target that collapses by design: the online encoder's features, with gradients."""

    def __init__(self, encoder):
        super().__init__(encoder.feature_width)
        self.encoders = [encoder]  # a list: not registered as a submodule

    def forward(self, video):
        return level_norm(self.encoders[0](video), self.width)


def clips(step: int, n: int = 16) -> torch.Tensor:
    """u8 [n, 3, 8, 16, 16]: smooth random images, each translated at its own velocity."""
    g = torch.Generator().manual_seed(step)
    coarse = torch.rand(n, 3, 6, 6, generator=g)
    images = nn.functional.interpolate(coarse, size=(40, 40), mode="bicubic").clamp(0, 1) * 255
    velocities = torch.randint(0, 4, (n, 2), generator=g).tolist()
    frames = [
        torch.stack([image[:, t * dy : t * dy + 16, t * dx : t * dx + 16] for t in range(8)], 1)
        for image, (dy, dx) in zip(images, velocities, strict=True)
    ]
    return torch.stack(frames).to(torch.uint8)


def train(collapsing: bool) -> tuple[list[dict], list[str], FeatureStats]:
    """Returns the rows with statistics, the collapse warnings, and the FeatureStats after the last step."""
    cfg = load_config([*FILES, *SMALL], TrainConfig)
    objective = cfg.build_objective()
    optim = cfg.optim
    if collapsing:
        objective.target = NoStopGradient(objective.encoder)
    optimizer = build_optimizer(objective, optim)
    stats = FeatureStats()
    rows, warnings = [], []
    for step in range(STEPS):
        video = clips(step)
        hparams = schedule(optim, step, STEPS, objective.momentum)
        set_schedule(optimizer, hparams)
        loss = objective(normalise(video), KeyedRNG(0, step, torch.arange(16) + 16 * step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.update(schedule_progress(optim, step, STEPS))
        stats.add_clips(video)
        if (step + 1) % EVERY == 0 or step == 0:
            rows.append({"step": step + 1, "loss": loss.item(), **stats.measure(objective)})
            warnings += [warning] if (warning := stats.detector.warning()) else []
    return rows, warnings, stats


@pytest.mark.slow
def test_a_collapse_is_detected_within_300_steps():
    _, warnings, stats = train(collapsing=True)
    assert len(warnings) == 1 and "the features have collapsed" in warnings[0] and stats.collapsed
    assert "all clips are alike" in warnings[0] and "std_clips" in warnings[0]


@pytest.mark.slow
def test_a_healthy_run_has_no_collapse_warning():
    rows, warnings, stats = train(collapsing=False)
    assert not warnings and not stats.detector.in_a_row
    assert rows[-1]["feature_drift_weights"] > rows[0]["feature_drift_weights"] > 0
    assert rows[-1]["feature_clips"] == 16


if __name__ == "__main__":
    for collapsing in (True, False):
        rows, warnings, _ = train(collapsing)
        print("collapsing" if collapsing else "healthy", warnings)
        for r in rows:
            print({k.removeprefix("feature_"): round(v, 4) for k, v in r.items()})


def test_the_drift_is_that_of_the_average_where_the_online_encoder_is_evaluated():
    objective = small("byol").build_objective()
    assert objective.eval_encoder is objective.encoder
    with torch.no_grad():
        for p in objective.ema_encoder.parameters():
            p.add_(0.1)
    stats = FeatureStats()
    stats.add_clips(torch.randint(0, 256, (4, 3, 16, 32, 32), dtype=torch.uint8))
    found = stats.measure(objective)
    assert found["feature_drift_weights"] > 0.1 and found["feature_drift_features"] > 1e-4
