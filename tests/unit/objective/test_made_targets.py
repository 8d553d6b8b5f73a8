"""Targets computed from the pixels of a clip."""

import pytest
import torch

from vidssl.core.errors import UserError
from vidssl.model.vit import Encoder
from vidssl.objective.hog import Hog, gradient_histograms


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
