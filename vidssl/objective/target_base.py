"""The base of all targets; the targets themselves and their table are in targets.py."""

from torch import Tensor, nn

from vidssl.model.prediction import Encoded
from vidssl.model.vit import Encoder


class Target(nn.Module):
    """Base of all targets. `encoder` is the EMA encoder, which evaluation then uses; None where there is
    none."""

    per_mask = False  # the target depends on the mask: `for_mask` makes it
    has_gradients = False  # whether the loss of features reaches the encoder

    encoder: Encoder | None
    width: int
    weighted = False  # True: features are [B, N, 2 K], K values and K weights, for error weighted_l2
    momentum: tuple[float, float]  # of `update`, at the first and at the last step, linear between them

    def __init__(self, width: int, momentum: tuple[float, float] = (1.0, 1.0)):
        super().__init__()
        self.encoder = None
        self.width = width
        self.momentum = momentum

    def check_clip(self, frames: int, size: int) -> None:
        """Raises UserError if the target cannot be made of a clip of so many frames of size x size pixels."""

    @property
    def ema_encoder(self) -> Encoder | None:
        return self.encoder

    def bind(self, predictor: nn.Module) -> None:
        """Called once with the predictor of this target's width."""

    def with_aux(self, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the target [B, N, K] of every token, and losses of its own by their names in the log."""
        return self(video), {}

    def prepare(self, video: Tensor) -> Tensor | None:
        """Returns what `for_mask` finds in encoded.prepared: made once for all masks of a step."""
        return None

    def for_mask(self, encoded: Encoded) -> Tensor:
        """Returns the target [B, M, Nt, K] of one mask; for targets with `per_mask`."""
        raise NotImplementedError

    @property
    def teacher(self) -> Encoder | None:
        """A frozen network that is no submodule, so that checkpoints do not hold it."""
        return None

    def update(self, encoder: Encoder, momentum: float) -> None:
        """Called after every optimizer step; a target without an EMA encoder does nothing."""
