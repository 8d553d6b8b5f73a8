"""Pretext tasks: the transformation is the one that its class names."""

import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.vit import Encoder
from vidssl.objective.pretext import PRETEXTS, FrameRotation, Jigsaw, Pace, PieceOrder, crop_apart, draw_class
from vidssl.objective.pretext_frames import paced_length, piece_length
from vidssl.training.clip_share import ClipShare
from vidssl.training.diagnostics import Diagnostics

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from test_methods import small

CLIPS = 64


def encoder() -> Encoder:
    return Encoder(4, 16, 16, dim=12, depth=1, heads=2, patch=8)


def rng(n: int = CLIPS) -> KeyedRNG:
    return KeyedRNG(0, 0, torch.arange(n))


def counting(frames: int, clips: int = CLIPS) -> torch.Tensor:
    """[B, 3, T, 16, 16]: each frame has its number."""
    return torch.arange(float(frames))[None, None, :, None, None].expand(clips, 3, frames, 16, 16)


def test_classes_are_drawn_evenly():
    counts = draw_class(24, rng(6000)).bincount(minlength=24)
    assert len(counts) == 24 and (counts - 250).abs().max() < 4.5 * 250**0.5


@pytest.mark.parametrize("kind", PRETEXTS)
def test_a_clip_is_transformed_by_its_key_alone(kind):
    task = PRETEXTS[kind](encoder())
    video = torch.randn(6, 3, 16, 16, 16)
    views, label = task.transform(video, rng(6))
    part = task.transform(video[3:5], KeyedRNG(0, 7, torch.tensor([3, 4])))
    assert part.label.equal(label[3:5]) and part.video.equal(views[3:5])
    assert label.max() < task.classes


@pytest.mark.parametrize("kind", PRETEXTS)
def test_loss_longhand(kind):
    torch.manual_seed(0)
    task = PRETEXTS[kind](encoder())
    torch.nn.init.normal_(task.head.weight)
    video = torch.randn(5, 3, 16, 16, 16)
    found = task(video, rng(5))
    views, label = task.transform(video, rng(5))
    total, right = 0.0, 0
    for view, number in zip(views, label.tolist(), strict=True):
        scores = task.head(task.encoder(view[None])[0].mean(0))
        total -= (scores[number] - scores.logsumexp(0)).item()
        right += int(scores.argmax()) == number
    assert found["loss"].item() == pytest.approx(total / 5, rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / 5)
    assert found["chance"] == pytest.approx(1 / task.classes)


@pytest.mark.parametrize("kind", PRETEXTS)
def test_the_encoder_keeps_the_weights_that_it_was_built_with(kind):
    made = encoder()
    before = [p.clone() for p in made.parameters()]
    task = PRETEXTS[kind](made)
    assert all(map(torch.equal, before, task.encoder.parameters()))
    assert not task.head.bias.any() and task.head.weight.std() < 0.03


@pytest.mark.parametrize("both_ways", [True, False])
def test_pieces_are_shown_in_the_order_of_the_class(both_ways):
    task = PieceOrder(encoder(), pieces=3, crop=1.0, both_ways=both_ways)
    assert task.classes == (6 if both_ways else 3)
    views, label = task.transform(counting(16), rng())
    pieces = views[:, 0, :, 0, 0].unflatten(1, (3, 4))
    assert pieces.diff(dim=2).eq(1).all()
    shown = pieces[:, :, 0].argsort(1).argsort(1).tolist()
    orders = [p for p in permutations(range(3)) if both_ways or p[0] < p[-1]]
    for clip, number in zip(shown, label.tolist(), strict=True):
        assert tuple(clip) in {orders[number], orders[number] if both_ways else orders[number][::-1]}
    first = pieces.flatten(1).sort(1)[0].unflatten(1, (3, 4))
    gaps = first[:, 1:, 0] - first[:, :-1, -1] - 1
    assert {0, 1, 2, 3} <= set(gaps.flatten().tolist()) <= {0, 1, 2, 3, 4} and pieces.max() <= 15


def test_pace_is_the_distance_of_frames():
    task = Pace(encoder(), paces=(1, 2, 4), crop=1.0)
    views, label = task.transform(counting(16), rng())
    frames = views[:, 0, :, 0, 0]
    assert frames.shape == (CLIPS, 4) and frames.max() <= 15
    assert frames.diff(dim=1).equal(torch.tensor([1.0, 2, 4])[label][:, None].expand(-1, 3))
    assert len(frames[label == 0, 0].unique()) > 6


def test_rotation_turns_all_frames():
    video = torch.randn(CLIPS, 3, 4, 16, 16)
    views, label = FrameRotation(encoder()).transform(video, rng())
    for clip, view, turns in zip(video, views, label.tolist(), strict=True):
        assert view.equal(clip.rot90(turns, (2, 3)))


def test_quarters_are_shown_in_the_order_of_the_class():
    corner = torch.tensor([[0.0, 1], [2, 3]]).repeat_interleave(8, 0).repeat_interleave(8, 1)
    video = corner.expand(CLIPS, 3, 4, 16, 16)
    views, label = Jigsaw(encoder(), norm=False).transform(video, rng())
    order = torch.tensor(list(permutations(range(4))))[label].float()
    shown = views[:, 0, 0, ::8, ::8].flatten(1)
    torch.testing.assert_close(shown, order)
    flat = Jigsaw(encoder()).transform(video, rng()).video
    assert flat.abs().max() < 1e-3  # the brightness of a quarter is gone


def test_parts_are_cropped_apart():
    ramp = torch.arange(16.0).expand(CLIPS, 2, 3, 1, 16, 16).contiguous()
    cropped = crop_apart(ramp, 0.5, rng())
    torch.testing.assert_close(cropped[..., 4:12].diff(dim=-1), torch.full_like(cropped[..., 4:11], 0.5))
    corner = cropped[:, :, 0, 0, 0, 8]
    assert corner.min() < 5 and corner.max() > 10 and (corner[:, 0] != corner[:, 1]).all()
    assert crop_apart(ramp, 1.0, rng()) is ramp


@pytest.mark.parametrize(
    ("frames", "pieces", "tubelet", "want"), [(16, 3, 2, 4), (8, 3, 2, 2), (12, 3, 2, 2), (16, 4, 1, 3)]
)
def test_pieces_leave_room_for_gaps(frames, pieces, tubelet, want):
    assert piece_length(frames, pieces, tubelet) == want


def test_clips_that_are_too_short():
    with pytest.raises(UserError, match=r"data\.frames 6: give 8 frames or more"):
        piece_length(6, 3, 2)
    assert piece_length(8, 3, 2) == 2
    with pytest.raises(UserError, match=r"data\.frames 12 the pace 4 .*: give data\.frames 16"):
        paced_length(12, (1, 2, 4), 2)


def test_a_task_is_learnt():
    """Which way a ramp is turned, of new clips in each step: from guessing to nearly all right."""
    torch.manual_seed(0)
    task = FrameRotation(encoder())
    optimizer = torch.optim.AdamW(task.parameters(), 1e-2)
    ramp = torch.linspace(-1, 1, 16).expand(32, 3, 4, 16, 16)
    accuracy = []
    for step in range(20):
        found = task(ramp + 0.1 * torch.randn(ramp.shape), KeyedRNG(0, step, torch.arange(32) + 32 * step))
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        accuracy.append(found["accuracy"].item())
    assert accuracy[0] < 0.5 and min(accuracy[-3:]) > 0.9


@pytest.mark.parametrize(("kind", "frames"), [("pace", 2), ("order", 6), ("rotation", 8)])
def test_the_encoder_is_made_for_the_frames_that_it_gets(kind, frames):
    cfg = small(f"pretext_{kind}", "data.frames=8")
    objective = cfg.build_objective()
    assert cfg.encoder_arguments()["frames"] == frames
    assert objective.encoder.grid.t * objective.encoder.tubelet == frames
    assert objective.transform(torch.randn(2, 3, 8, 32, 32), rng(2)).video.shape[2] == frames


@pytest.mark.parametrize("method", ["pretext_pace", "pretext_order"])
def test_features_are_measured_on_clips_as_long_as_the_encoder_sees_them(method):
    cfg = small(method)
    strategy = SimpleNamespace(runs_diagnostics=True, clip_share=ClipShare())
    diagnostics = Diagnostics(cfg, cfg.build_objective(), strategy)
    loaded = torch.zeros(2, 3, cfg.data.frames, 32, 32, dtype=torch.uint8)
    diagnostics.measure_if_due(2, [SimpleNamespace(video=loaded)])
    grid = diagnostics.objective.encoder.grid_of(diagnostics.stats.clips[0])
    assert grid == diagnostics.objective.encoder.grid != diagnostics.objective.encoder.grid_of(loaded)
