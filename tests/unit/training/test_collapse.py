"""Collapse detection on families of constructed features: collapses of every kind, and healthy runs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vidssl.training.collapse import CollapseDetector
from vidssl.training.feature_stats import feature_statistics

CLIPS, TIMES, PLACES, WIDTH = 12, 4, 6, 48
MEASUREMENTS = 12
Features = Callable[[float, torch.Generator], Tensor]  # of the progress in [0, 1] -> [B, T, P, D]


def noise(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)


def features(
    g: torch.Generator,
    clips: int = CLIPS,
    times: int = TIMES,
    *,
    common: float = 1.0,
    content: float = 1.0,
    position: float = 0.5,
    decay: float = 0.3,
) -> Tensor:
    """[B, T, P, D]: what all share + a function of the position + the clip's content, of which a part changes
    over time. decay: exponent of the power law of the channels' deviations."""
    fixed = torch.Generator().manual_seed(0)
    shared = common * noise(fixed, 1, 1, 1, WIDTH) + position * noise(fixed, 1, times, PLACES, WIDTH)
    rotation, _ = torch.linalg.qr(noise(fixed, WIDTH, WIDTH))
    own = noise(g, clips, 1, 1, WIDTH) + 0.6 * noise(g, clips, times, 1, WIDTH)
    own = own + 0.5 * noise(g, clips, times, PLACES, WIDTH)
    spectrum = torch.arange(1, WIDTH + 1).float() ** -decay
    return shared + content * (own * spectrum) @ rotation


def to_a_point(s: float, g: torch.Generator) -> Tensor:
    x = features(g)
    return x.mean((0, 1, 2)) + (1 - 0.98 * s) * (x - x.mean((0, 1, 2)))


def to_the_position(s: float, g: torch.Generator) -> Tensor:
    return features(g, content=1 - 0.98 * s)


def to_a_point_of_a_large_mean(s: float, g: torch.Generator) -> Tensor:
    """The deviation is a tenth of its start, the cosine goes from 0.9 to 0.998."""
    return features(g, common=1.5, position=0.1, content=1 - 0.93 * s)


def to_directions(count: int) -> Features:
    def of(s: float, g: torch.Generator) -> Tensor:
        x = features(g)
        basis, _ = torch.linalg.qr(noise(torch.Generator().manual_seed(1), WIDTH, count))
        return (1 - 0.99 * s) * x + 0.99 * s * (x @ basis @ basis.T)

    return of


def to_channels(s: float, g: torch.Generator) -> Tensor:
    x = features(g, common=0.2, position=0.2)
    return x * torch.cat([torch.ones(3), torch.full((WIDTH - 3,), 1 - 0.99 * s)])


def along_time(s: float, g: torch.Generator) -> Tensor:
    x = features(g)
    return x.lerp(x.mean(1, keepdim=True).expand_as(x), 0.99 * s)


def over_tokens(s: float, g: torch.Generator) -> Tensor:
    x = features(g)
    return x.lerp(x.mean((1, 2), keepdim=True).expand_as(x), 0.99 * s)


COLLAPSES: dict[str, tuple[Features, str]] = {
    "point": (to_a_point, "all clips are alike"),
    "position": (to_the_position, "all clips are alike"),
    "large mean": (to_a_point_of_a_large_mean, "all clips are alike"),
    "one direction": (to_directions(1), "few directions vary"),
    "two directions": (to_directions(2), "few directions vary"),
    "four directions": (to_directions(4), "few directions vary"),
    "channels": (to_channels, "few directions vary"),
    "time": (along_time, "the time slices of a clip are alike"),
    "tokens": (over_tokens, "the tokens of a clip are alike"),
}
# Progress of the collapse over the run: from t = 0 to 1.
PACES: dict[str, Callable[[float], float]] = {
    "slow": lambda t: 1 - (1 - min(1, t / 0.8)) ** 1.2,
    "sudden": lambda t: float(t > 0.5),
    "at the end": lambda t: float(t > 0.85),
}


def warnings_of(of: Callable[[float, torch.Generator], Tensor], count: int = MEASUREMENTS) -> list[str]:
    """of: features of t in [0, 1] and a generator."""
    detector = CollapseDetector()
    warnings = []
    for i in range(count):
        x = of(i / (count - 1), torch.Generator().manual_seed(i + 1))
        detector.add(feature_statistics(x.flatten(1, 2), x.shape[1]))
        warnings += [line for line in [detector.warning()] if line]
    return warnings


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("kind", COLLAPSES)
def test_a_collapse_is_said_with_its_kind(kind, pace):
    of, text = COLLAPSES[kind]
    warnings = warnings_of(lambda t, g: of(PACES[pace](t), g))
    assert warnings and text in warnings[-1] and "(best " in warnings[-1]


@pytest.mark.parametrize("kind", ["point", "two directions", "time"])
def test_a_collapse_after_a_healthy_growth_is_said(kind):
    of, text = COLLAPSES[kind]

    def run(t: float, g: torch.Generator) -> Tensor:
        grown = min(1, 0.1 + 2 * t)
        return grown * of(min(1, max(0, 3 * t - 1.5)), g) + 0.3 * noise(
            torch.Generator().manual_seed(2), WIDTH
        )

    assert text in warnings_of(run)[-1]


def grows(t: float, g: torch.Generator) -> Tensor:
    return features(g, content=0.1 + t, position=0.5 + t)


def is_noisy(t: float, g: torch.Generator) -> Tensor:
    content, position = (0.5 * noise(g, 2)).exp().tolist()
    return features(g, content=content, position=position)


def learns_positions(t: float, g: torch.Generator) -> Tensor:
    """As pixel targets: content falls to an eighth of the features."""
    return features(g, content=1 - 0.7 * t, position=0.5 + 0.8 * t)


def aligns(t: float, g: torch.Generator) -> Tensor:
    """A part that all share becomes large, as before a final normalisation: cosine 0.99."""
    return features(g, common=1 + 3 * t, content=1.2 - 0.4 * t)


def few_videos(t: float, g: torch.Generator) -> Tensor:
    """Clips of two videos, which differ by their crops."""
    videos = features(g, 2)
    return videos[torch.randint(0, 2, (CLIPS,), generator=g)] + 0.3 * features(g, common=0, position=0)


HEALTHY: dict[str, Callable[[float, torch.Generator], Tensor]] = {
    "constant": lambda t, g: features(g),
    "untrained of low rank": lambda t, g: features(g, decay=1.5, common=5.0),
    "untrained of one direction": lambda t, g: features(g, decay=4.0, common=5.0),
    "nearly constant from the start": lambda t, g: features(g, content=0.05, position=0.05),
    "rank rises": lambda t, g: features(g, decay=1.5 - t),
    "rank falls by half": lambda t, g: features(g, decay=0.2 + 0.6 * t),
    "grows": grows,
    "noisy": is_noisy,
    "learns positions": learns_positions,
    "aligns": aligns,
    "small batches": lambda t, g: features(g, clips=8),
    "few videos": few_videos,
    "images": lambda t, g: features(g, times=1),
    "still clips": lambda t, g: (
        features(g, times=1).expand(-1, TIMES, -1, -1) + 0.01 * noise(g, CLIPS, TIMES, PLACES, 1)
    ),
    "one bad measurement": lambda t, g: to_a_point(float(0.5 < t < 0.6), g),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_nothing_is_said_of_a_healthy_run(kind):
    assert warnings_of(HEALTHY[kind]) == []


def test_a_collapse_is_said_once_and_again_after_a_recovery():
    def pace(t: float) -> float:
        return float(0.2 < t < 0.5 or t > 0.8)

    assert len(warnings_of(lambda t, g: to_a_point(pace(t), g))) == 2


def test_a_restored_state_continues_the_comparison():
    def stats(s: float, seed: int) -> dict[str, float]:
        x = to_a_point(s, torch.Generator().manual_seed(seed))
        return feature_statistics(x.flatten(1, 2), TIMES)

    detector = CollapseDetector()
    for seed, s in enumerate((0.0, 0.0, 1.0)):
        detector.add(stats(s, seed))
    restored = CollapseDetector()
    restored.load(detector.state())
    assert not restored.collapsed
    restored.add(stats(1.0, 9))
    assert restored.collapsed and "all clips are alike" in restored.warning()
    restored.load({"baseline": {"rank": 9.0}, "low_in_a_row": 1})  # of an earlier version
    assert restored.best == {} and not restored.collapsed


def test_features_that_are_not_finite_are_no_collapse():
    detector = CollapseDetector()
    for _ in range(4):
        detector.add(feature_statistics(torch.full((8, 24, 6), torch.nan), 4))
    assert not detector.collapsed and detector.best == {}
