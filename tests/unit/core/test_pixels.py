"""Normalisation of pixels."""

import torch

from vidssl.core.pixels import MEAN, STD, normalise


def test_normalise():
    video = torch.randint(0, 256, (2, 3, 2, 4, 4), dtype=torch.uint8)
    normalised = normalise(video)
    assert normalised.dtype == torch.float32
    for channel in range(3):
        expected = (video[:, channel].float() / 255 - MEAN[channel]) / STD[channel]
        assert torch.allclose(normalised[:, channel], expected)


def test_normalise_with_other_statistics():
    video = torch.full((1, 3, 1, 1, 1), 255, dtype=torch.uint8)
    assert normalise(video, ([0.5] * 3, [0.25, 0.5, 1.0])).flatten().tolist() == [2.0, 1.0, 0.5]
