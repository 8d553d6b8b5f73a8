"""The base of all auxiliary losses, which auxiliary.py lists."""

from torch import Tensor, nn

from vidssl.config import NonNegativeFloat
from vidssl.model.prediction import Predicted


class Auxiliary(nn.Module):
    """Base of all auxiliary losses."""

    kind: str  # name in the table, for the log

    def __init__(self, weight: NonNegativeFloat):
        super().__init__()
        self.weight = weight

    def forward(self, predicted: Predicted) -> Tensor:
        """Returns a scalar, without the weight."""
        raise NotImplementedError
