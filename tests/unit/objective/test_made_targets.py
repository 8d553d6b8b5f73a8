"""Targets computed from the pixels of a clip."""

import io
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask
from vidssl.model.prediction import Encoded
from vidssl.model.vit import Encoder
from vidssl.objective.errors import ERRORS
from vidssl.objective.given_network import GivenNetwork
from vidssl.objective.given_tokens import GivenTokens
from vidssl.objective.hog import Hog, gradient_histograms
from vidssl.objective.motion import FrameDifference, HogMotion, Motion, block_motion

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from given_networks import MeanFlow, RedLevels, write_network
from test_methods import make_teacher, small


def encoder(**options) -> Encoder:
    return Encoder(4, 32, 32, **{"dim": 12, "depth": 1, "heads": 2, **options})


@pytest.mark.parametrize(("turned", "of_bin"), [(False, 4), (True, 0)])
def test_a_step_edge_falls_in_one_bin(turned, of_bin):
    """Vertical edge: left minus right is negative, so the angle is -pi / 2, half of the unsigned range."""
    step = torch.zeros(1, 1, 16, 16)
    step[..., 4:] = 1
    histograms = gradient_histograms(step.mT if turned else step, bins=9, cell=8)
    assert histograms.nonzero()[:, 2].unique().tolist() == [of_bin]
    # both columns beside the edge, four times the step, over eight rows of two cells
    assert histograms.sum() == 4 * 2 * 16


def test_hog_is_of_the_first_frame_of_a_token_and_of_unit_norm():
    video = torch.randn(2, 3, 4, 32, 32)
    target = Hog(encoder())
    histograms = target(video)
    assert histograms.shape == (2, 8, target.width) and target.width == 108
    torch.testing.assert_close(histograms.unflatten(2, (3, 9, 4)).norm(dim=3), torch.ones(2, 8, 3, 4))
    changed = video.clone()
    changed[:, :, 1::2] = 0
    assert target(changed).equal(histograms)
    sums = Hog(encoder(), norm=False)(video).unflatten(2, (3, 9, 4))
    torch.testing.assert_close(torch.nn.functional.normalize(sums, dim=3).flatten(2), histograms)
    for value in (histograms, Hog(encoder())(torch.zeros_like(video))):
        assert value.isfinite().all()


def test_cells_divide_patches():
    with pytest.raises(UserError, match=r"method.target.cell: 8 pixels do not divide model.patch 12: give"):
        Hog(Encoder(4, 24, 24, dim=12, depth=1, heads=2, patch=12))


def moving(x: int, y: int, frames: int = 4, size: int = 32) -> torch.Tensor:
    """f32 [1, 3, frames, size, size]: noise that moves (x, y) pixels a frame, new at the borders."""
    noise = torch.randn(1, 3, 3 * size, 3 * size, generator=torch.Generator().manual_seed(0))
    starts = [(size - y * t, size - x * t) for t in range(frames)]
    return torch.stack([noise[..., row : row + size, column : column + size] for row, column in starts], 2)


def test_frame_difference():
    video = torch.arange(4.0)[None, None, :, None, None].expand(2, 3, 4, 32, 32)
    assert FrameDifference(encoder())(video).equal(torch.ones(2, 8, 768))
    with pytest.raises(UserError, match="one frame"):
        FrameDifference(encoder()).check_clip(1, 32)


@pytest.mark.parametrize(("x", "y"), [(3, -1), (0, 2), (0, 0)])
def test_blocks_are_found_where_they_went(x, y):
    video = moving(x, y)
    motion = block_motion(video[:, :, 0], video[:, :, 1], cell=8, radius=4)
    assert motion[0, :, 1:3, 1:3].equal(torch.tensor([x, y])[:, None, None].expand(2, 2, 2).float())
    flat = torch.zeros_like(video[:, :, 0])
    assert not block_motion(flat, flat, cell=8, radius=4).any()


def test_tracks_go_on_where_they_were_and_end_with_the_frame_and_the_clip():
    """Two steps in a clip of two tokens' time: the second step of the last token is beyond the clip."""
    target = Motion(encoder(), steps=2)
    moves, weights = target(moving(4, 0)).unflatten(-1, (2, 2, 2, 4)).unbind(2)  # [1, N, step, xy, cell]
    assert (weights[0, :4, 0] > 0).sum() == 4 * 2 * 4
    inner = moves[0, [0, 4], :, :, 1:3]
    assert inner[0, :, 0].equal(torch.full((2, 2), 0.5)) and not inner[0, :, 1].any()
    assert not weights[0, 4:, 1].any() and weights[0, 4:, 0].all()
    assert weights.unique().tolist() == [0, pytest.approx(1 / target.width)]
    assert not (moves[0, :4, 0, 0] > 0.5).any()


def test_error_counts_what_is_known():
    """Written out: histograms and displacements have half of the error each; an ended track has none."""
    target = HogMotion(encoder(), steps=2, norm=False)
    features = target(moving(4, 0))
    values = features[..., : target.width]
    torch.testing.assert_close(values[..., :108], Hog(encoder(), norm=False)(moving(4, 0)))
    pred = torch.randn_like(values)
    got = ERRORS["weighted_l2"]()(pred, features)
    squares = (pred - values).square()
    known = Motion(encoder(), steps=2)(moving(4, 0))[..., 16:] > 0
    want = squares[..., :108].mean(-1) / 2 + torch.where(known, squares[..., 108:], 0.0).mean(-1) / 2
    torch.testing.assert_close(got, want)


def test_flow_of_a_given_network(tmp_path):
    """It gets pixels in [-1, 1]; what is not finite is unknown."""
    target = Motion(encoder(), flow=write_network(MeanFlow(), tmp_path / "flow.pt"))
    white = normalise(torch.full((1, 3, 4, 32, 32), 255, dtype=torch.uint8))
    moves, weights = target(white).chunk(2, -1)
    torch.testing.assert_close(moves, torch.full_like(moves, 1 / 8))
    assert weights.eq(1 / 8).all()
    broken = target(white * torch.inf)
    assert broken.isfinite().all() and not broken.any()


def test_tokens_of_a_given_tokenizer(tmp_path):
    """One-hot at the targets of the mask: the class of the first frame of each token."""
    small = Encoder(4, 32, 32, dim=12, depth=1, heads=2, patch=8)
    target = GivenTokens(small, write_network(RedLevels(), tmp_path / "red.pt"), vocabulary=10)
    target.check_clip(4, 32)
    video = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    ids = torch.tensor([[[3, 31]], [[0, 16]]])
    mask = Mask(torch.zeros(2, 1, dtype=torch.int64), ids)
    encoded = Encoded(
        normalise(video), video, Grid(2, 4, 4), 0, mask, None, None, None, target.prepare(normalise(video))
    )
    got = target.for_mask(encoded)
    assert got.shape == (2, 1, 2, 10) and got.sum(-1).eq(1).all()
    for clip, chosen, one_hot in zip(video, ids[:, 0].tolist(), got[:, 0], strict=True):
        for token, row in zip(chosen, one_hot, strict=True):
            top = 8 * (token // 4 % 4)
            left = 8 * (token % 4)
            patch = clip[0, token // 16 * 2, top : top + 8, left : left + 8]
            assert row.argmax() == round(float(patch.float().mean()) / 255 * 9)


@pytest.mark.parametrize(
    ("method", "network"), [("given_tokens", "_tokenizer"), ("ibot_patch", "encoder.forward")]
)
def test_a_target_looks_at_the_clips_once_for_all_masks(method, network, tmp_path, monkeypatch):
    cfg = small(method, *make_teacher(method, tmp_path), "method.masks_per_clip=3")
    objective = cfg.build_objective()
    owner, _, name = f"target.{network}".rpartition(".")
    called = objective.get_submodule(owner)
    look = getattr(called, name)
    calls: list[tuple] = []
    monkeypatch.setattr(called, name, lambda *args, **more: calls.append(args) or look(*args, **more))
    found = objective(torch.randn(2, 3, cfg.data.frames, 32, 32), KeyedRNG(0, 0, torch.arange(2)))
    assert len(calls) == 1 and "loss_2" in found


def test_networks_that_do_not_fit(tmp_path):
    path = write_network(RedLevels(), tmp_path / "red.pt")
    with pytest.raises(
        UserError, match=r"int64 \[1, 4, 4\]; it must give int64 \[1, 2, 2\], a class for each"
    ):
        GivenTokens(encoder(), path, vocabulary=10).check_clip(4, 32)
    GivenTokens(encoder(), path, vocabulary=10, size=16).check_clip(4, 32)
    with pytest.raises(
        UserError, match=r"method.target.flow: .*none.pt: no such file; give a file that torch"
    ):
        Motion(encoder(), flow=str(tmp_path / "none.pt"))
    for name, content in {"x.pt": b"x", "zip.pt": empty_archive(), "zip.pt2": empty_archive()}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"method.target.path: .*{name}.* give a file that"):
            GivenTokens(encoder(), str(tmp_path / name), vocabulary=10)


def empty_archive() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a", "b")
    return content.getvalue()


def test_exported_network(tmp_path):
    """A file of torch.export computes what its module computed, on any number of frames."""
    path = tmp_path / "red.pt2"
    frames = torch.rand(2, 3, 32, 32)
    batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(RedLevels(), (frames,), dynamic_shapes=batch), path)
    network = GivenNetwork(str(path), "method.target.path")
    more = torch.rand(5, 3, 32, 32)
    assert network(more).equal(RedLevels()(more))
    assert network(more.to("meta")).shape == (5, 4, 4)
