"""Targets computed from pixels, compared with the reference implementations."""

import torch.nn.functional as F
from case import Case

from vidssl.model.vit import Encoder
from vidssl.objective import hog


def check_hog(case: Case) -> None:
    """MaskFeat's histograms: of one frame, and as the target of every token."""
    histograms = hog.gradient_histograms(case["clips"][:1, :, 0], bins=9, cell=8)
    case.compare("hog", F.normalize(histograms, dim=2))
    size = case.geometry["img"]
    encoder = Encoder(case.geometry["frames"], size, size, dim=12, depth=1, heads=2)
    case.compare("target", hog.Hog(encoder)(case["clips"]))
