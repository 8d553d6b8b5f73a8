"""The kinds of dense tasks."""

from vidssl.evaluation.dense.depth import Depth
from vidssl.evaluation.dense.propagation import Keypoints, Masks

TASKS = {"depth": Depth, "masks": Masks, "keypoints": Keypoints}
