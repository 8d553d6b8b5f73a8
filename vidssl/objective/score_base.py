"""The base of all scores, which scores.py lists."""

from torch import Tensor, nn

from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid
from vidssl.model.prediction import Predicted
from vidssl.model.vit import Encoder


class Score(nn.Module):
    """Base of all scores."""

    needs_video = True  # False: it looks at the clip's shape alone, so that masks are drawn ahead on the host

    def forward(self, video: Tensor, grid: Grid, rng: KeyedRNG, encoder: Encoder) -> Tensor:
        """Returns f32 [B, N]. video f32 [B, 3, T, H, W]."""
        raise NotImplementedError

    def aux(self, predicted: Predicted) -> dict[str, Tensor]:
        """Losses of its own, weighted, by their names in the log."""
        return {}
