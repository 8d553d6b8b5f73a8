"""The figures of the representation mean what they say; a run made to collapse is told from a healthy one."""

from pathlib import Path

import pytest
import torch
from torch import nn

from vidssl import config
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.core.spectrum import alpha_req, rankme, singular_values
from vidssl.objective.build import build_objective
from vidssl.objective.targets import Ema, level_norm
from vidssl.train import SCHEMA
from vidssl.training.feature_stats import FeatureStats, feature_statistics
from vidssl.training.optim import OptimConfig, build_optimizer, schedule, set_schedule

ROOT = Path(__file__).parents[3]
STEPS, EVERY = 300, 50
FILES = [
    str(ROOT / f"configs/{name}.yaml") for name in ("method/vjepa_tiny", "model/vit_micro", "data/quickstart")
]
SMALL = ["model.dim=32", "model.depth=1", "method.predictor.width=16", "augment.size=16", "optim.warmup=10"]
SMALL += ["run.out=x", f"run.steps={STEPS}", "run.batch=16", "optim.lr=1e-3"]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_deviations_say_over_what_the_features_differ():
    clip, time, place = noise(8, 1, 1, 32), noise(1, 4, 1, 32), noise(1, 1, 9, 32)
    flat = torch.ones(8, 4, 9, 32)
    over = {
        n: feature_statistics((flat + x).flatten(1, 2), 4)
        for n, x in (("clip", clip), ("time", time), ("place", place))
    }
    assert over["clip"]["std_clips"] > 0.3 and over["clip"]["std_tokens"] < 1e-6
    assert over["place"]["std_tokens"] > 0.3 and over["place"]["std_clips"] < 1e-6
    assert over["time"]["std_time"] < 1e-6  # it is the same in every clip: the positions' share
    assert feature_statistics((flat + clip * time).flatten(1, 2), 4)["std_time"] > 0.3
    assert over["place"]["cosine"] == pytest.approx(1, abs=1e-5) and over["clip"]["cosine"] < 0.9
    dead = (flat + noise(8, 4, 9, 32)).index_fill(3, torch.tensor([5]), 1.0)
    assert feature_statistics(dead.flatten(1, 2), 4)["std_channel_min"] < 1e-6
    still = (flat + noise(8, 4, 9, 32)).index_fill(2, torch.tensor([5]), 1.0)
    assert feature_statistics(still.flatten(1, 2), 4)["std_clips_min"] < 1e-6


def test_rank_and_decay_of_known_spectra():
    assert rankme(torch.cat([torch.ones(10), torch.zeros(30)])) == pytest.approx(10, rel=1e-3)
    assert alpha_req(torch.arange(1, 65).float() ** -0.75) == pytest.approx(1.5, rel=1e-4)
    low = noise(8, 4 * 9, 3) @ noise(3, 32)
    assert feature_statistics(low, 4)["rank"] < 3.01 and feature_statistics(low, 4)["rank_slice"] < 3.01
    assert singular_values(torch.full((4, 4), torch.nan)).isnan().all()


def test_features_that_are_not_finite_are_told_not_raised():
    assert feature_statistics(torch.full((4, 8, 6), torch.inf), 2)["rank"] != 0


def test_a_small_batch_is_measured_on_those_of_the_last_steps():
    health = FeatureStats()
    for step in range(9):
        health.see(torch.full((3, 1, 1, 1, 1), step, dtype=torch.uint8))
    assert torch.cat(list(health.clips)).flatten().tolist() == [6] * 3 + [7] * 3 + [8] * 3
    health.see(torch.zeros(40, 1, 1, 1, 1, dtype=torch.uint8))
    assert len(torch.cat(list(health.clips))) == 32


class NoStop(nn.Module):
    """The online encoder's own features as target, and no stop of the gradient: what collapses by design."""

    def __init__(self, encoder):
        super().__init__()
        self.hidden, self.width = [encoder], encoder.width

    def forward(self, video):
        return level_norm(self.hidden[0](video), self.width)


def clips(step: int, n: int = 16) -> torch.Tensor:
    """u8 [n, 3, 8, 16, 16]: smooth random pictures, each moving at a speed of its own."""
    g = torch.Generator().manual_seed(step)
    coarse = torch.rand(n, 3, 6, 6, generator=g)
    wide = nn.functional.interpolate(coarse, size=(40, 40), mode="bicubic").clamp(0, 1) * 255
    speed = torch.randint(0, 4, (n, 2), generator=g).tolist()
    frames = [
        torch.stack([wide[i, :, t * a : t * a + 16, t * b : t * b + 16] for t in range(8)], 1)
        for i, (a, b) in enumerate(speed)
    ]
    return torch.stack(frames).to(torch.uint8)


def run(collapsing: bool) -> tuple[list[dict], list[str], FeatureStats]:
    """Rows with figures, what was said of a collapse, and the Health at the end."""
    cfg = config.load([*FILES, *SMALL], SCHEMA)
    objective, optim = build_objective(cfg), config.build(cfg["optim"], OptimConfig)
    if collapsing:
        objective.target = NoStop(objective.encoder)
    optimizer, health, rows, said = build_optimizer(objective, optim), FeatureStats(), [], []
    for step in range(STEPS):
        video, now = clips(step), schedule(optim, step, STEPS)
        set_schedule(optimizer, now)
        loss = objective(normalise(video), KeyedRNG(0, step, torch.arange(16) + 16 * step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(objective.target, Ema):
            objective.target.update(objective.encoder, now["momentum"])
        health.see(video)
        if (step + 1) % EVERY == 0 or step == 0:
            rows.append({"step": step + 1, "loss": loss.item(), **health.measure(objective)})
            said += [line] if (line := health.collapse(rows[-1])) else []
    return rows, said, health


def test_a_run_made_to_collapse_says_so_within_a_few_hundred_steps():
    _, said, health = run(collapsing=True)
    assert len(said) == 1 and "the features have collapsed" in said[0] and health.collapsed
    assert "std_clips" in said[0] and "at the start" in said[0]


def test_a_healthy_run_does_not():
    rows, said, health = run(collapsing=False)
    assert not said and not health.low
    assert rows[-1]["feature_drift_weights"] > rows[0]["feature_drift_weights"] > 0
    assert rows[-1]["feature_clips"] == 16


if __name__ == "__main__":
    for collapsing in (True, False):
        rows, said, _ = run(collapsing)
        print("collapsing" if collapsing else "healthy", said)
        for r in rows:
            print({k.removeprefix("feature_"): round(v, 4) for k, v in r.items()})
