"""A predictor without attention: a head on the encoder's own tokens."""

from torch import Tensor, nn

from vidssl.config import PositiveFloat, PositiveInt
from vidssl.model.cosine import WeightNormedCosine
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.model.prediction import Prediction
from vidssl.model.vit import Encoder, Init, init_weights


class HeadPredictor(nn.Module):
    """Predicts a target from the encoder's output at its place, for encoders that see hidden tokens corrupted
    (MaskFeat, BEiT, denoising autoencoders). It has no query."""

    needs_query = False
    needs_all_tokens = True

    def __init__(
        self,
        encoder: Encoder,
        out: int,
        hidden: PositiveInt | None = None,
        bottleneck: PositiveInt | None = None,
        init: Init = "trunc_normal",
        init_std: PositiveFloat = 0.02,
    ):
        """hidden: width of the hidden layer of an MLP; None: one linear layer. bottleneck: the head of DINO
        and iBOT, with two hidden layers, the width before the cosines with `out` learned vectors."""
        super().__init__()
        if bottleneck is not None:
            width = hidden or 2048
            layers = [nn.Linear(encoder.feature_width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
            cosine = WeightNormedCosine(bottleneck, out)
            cosine.factors.requires_grad_(False)
            self.proj: nn.Module = nn.Sequential(*layers, nn.Linear(width, bottleneck), cosine)
        elif hidden is None:
            self.proj = nn.Linear(encoder.feature_width, out)
        else:
            layers = [nn.Linear(encoder.feature_width, hidden), nn.GELU(), nn.Linear(hidden, out)]
            self.proj = nn.Sequential(*layers)
        init_weights(self, init, init_std)

    def forward(self, z: Tensor, mask: Mask, query: Tensor | None, grid: Grid) -> Prediction:
        """z [B, (1 +) N, D] of all tokens; returns the prediction at mask.target, [B, M, Nt, out]."""
        return Prediction(self.proj(gather_tokens(z[:, -grid.n :], mask.target)))
