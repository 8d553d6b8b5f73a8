"""A checkpoint whose pixels are normalised otherwise becomes one of ours that computes the same."""

import torch

from vidssl.core.pixels import MEAN, STD
from vidssl.model.vit import Encoder
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.init import with_pixels


def test_the_patch_embedding_takes_up_other_statistics():
    torch.manual_seed(0)
    model = {"frames": 2, "height": 16, "width": 16, "dim": 24, "depth": 1, "heads": 2, "patch": 8}
    encoder = Encoder(**model).eval()
    pixels = {"mean": [0.5, 0.4, 0.5], "std": [0.5, 0.5, 0.25]}
    checkpoint = Checkpoint("ViT", model, encoder.state_dict(), pixels, online=encoder.state_dict())
    found = with_pixels(checkpoint)
    video = torch.rand(1, 3, 2, 16, 16)

    def normalised(mean, std):
        return (video - torch.tensor(mean)[:, None, None, None]) / torch.tensor(std)[:, None, None, None]

    with torch.no_grad():
        expected = encoder(normalised(pixels["mean"], pixels["std"]))
        for weights in (found.encoder, found.online):
            ours = found.build_encoder(weights)(normalised(MEAN, STD))
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert found.pixels == {"mean": list(MEAN), "std": list(STD)}
    assert with_pixels(found) is found
