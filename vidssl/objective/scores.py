"""Scores: a number for each token, from which `mask.kind: scored` makes the mask."""

from collections.abc import Callable

from vidssl.objective.box_score import MotionBox
from vidssl.objective.change_score import Change
from vidssl.objective.loss_score import PredictedLoss
from vidssl.objective.noise_score import ColorNoise
from vidssl.objective.sampler_score import Sampler
from vidssl.objective.score_base import Score
from vidssl.objective.warp_score import Warp

SCORES: dict[str, Callable[..., Score]] = {
    "noise": ColorNoise,
    "change": Change,
    "warp": Warp,
    "motion_box": MotionBox,
    "sampler": Sampler,
    "loss": PredictedLoss,
}
