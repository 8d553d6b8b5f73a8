"""A small generative decoder: pixels of hidden patches, given what a frozen predictor says of them.

Flow matching (Lipman et al. 2022, arXiv 2210.02747): with noise e and pixels x, the network sees
x_t = (1 - t) e + t x and the time t, and learns the velocity x - e; samples follow it from t = 0 to 1. The
network's output is an estimate of x, from which the velocity is (x - x_t) / (1 - t): a narrow network cannot
carry the noise of all pixels of a patch to its output.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vidssl.model.grid import Grid
from vidssl.model.positions import PositionEncoding
from vidssl.model.vit import Block, TransformerStack

TIME_WAVES = 32  # frequencies of the embedding of t
LAST_TIME = 0.95  # above it 1 - t counts as if it were this: the velocity has no bounds there


class FlowDecoder(nn.Module):
    """Maps noisy patches of hidden tokens, t, and the condition to an estimate of the clean patches.

    All tokens of a clip that are decoded attend to each other. The condition of a clip can be nothing: a
    learned vector in the place of every prediction.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        grid: Grid,
        pixels: int,
        condition: int,
        context: int | None = None,
        width: int = 192,
        depth: int = 4,
        heads: int = 6,
    ):
        """pixels: numbers of a patch; condition: width of a prediction; context: width of the encoder's
        features, which are then given, too."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(condition))
        self.register_buffer("std", torch.ones(condition))
        self.noisy = nn.Linear(pixels, width)
        self.condition = nn.Linear(condition, width)
        self.nothing = nn.Parameter(torch.zeros(width))
        self.context = None if context is None else nn.Linear(context, width)
        self.time = nn.Sequential(nn.Linear(2 * TIME_WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.positions = PositionEncoding("sincos_uniform", grid, width, heads)
        self.blocks = TransformerStack(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.clean = nn.Linear(width, pixels)
        nn.init.zeros_(self.clean.weight)
        nn.init.zeros_(self.clean.bias)

    def forward(
        self,
        noisy: Tensor,
        t: Tensor,
        values: Tensor,
        ids: Tensor,
        given: Tensor,
        context: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """noisy f32 [B, n, P] in -1..1, t f32 [B], values f32 [B, n, K] predictions, ids i64 [B, n], given
        bool [B]: whether the clip's predictions are given; context: (features f32 [B, Nc, D], ids i64
        [B, Nc]). Returns f32 [B, n, P]."""
        grid = self.positions.grid
        condition = self.condition((values - self.mean) / self.std)
        condition = torch.where(given[:, None, None], condition, self.nothing)
        x = self.noisy(noisy) + condition + self.positions.embedding(grid, ids)
        x = x + self.time(time_waves(t))[:, None]
        if self.context is not None and context is not None:
            features, places = context
            seen = self.context(F.layer_norm(features, features.shape[-1:]))
            x = torch.cat([seen + self.positions.embedding(grid, places), x], 1)
        (x,) = self.blocks(x, None, [len(self.blocks) - 1], ids.shape[1])
        return self.clean(self.norm(x))

    @torch.no_grad()
    def set_statistics(self, values: Tensor) -> None:
        """Mean and deviation of predictions f32 [..., K], with which they are normalised."""
        tokens = values.flatten(0, -2)
        self.mean.copy_(tokens.mean(0))
        self.std.copy_(tokens.std(0).clamp_min(1e-6))


def time_waves(t: Tensor) -> Tensor:
    """t f32 [B] in 0..1 as sines and cosines f32 [B, 2 * TIME_WAVES]."""
    waves = torch.exp(torch.linspace(0, math.log(1000), TIME_WAVES, device=t.device))
    angles = t[:, None] * waves
    return torch.cat([angles.sin(), angles.cos()], 1)


def flow_loss(
    decoder: FlowDecoder,
    clean: Tensor,
    values: Tensor,
    ids: Tensor,
    given: Tensor,
    weight: Tensor,
    noise: Tensor,
    t: Tensor,
    context: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean squared error of the velocity. clean, noise f32 [B, n, P], weight f32 [B, n]; see FlowDecoder."""
    time = t[:, None, None]
    noisy = (1 - time) * noise + time * clean
    estimate = decoder(noisy, t, values, ids, given, context)
    # (x - x_t) / (1 - t) of estimate and truth differ by this
    error = ((estimate - clean) / (1 - time).clamp_min(1 - LAST_TIME)).square().mean(-1)
    return (error * weight).sum() / weight.sum().clamp_min(1)


@torch.no_grad()
def sample_patches(
    decoder: FlowDecoder,
    values: Tensor,
    ids: Tensor,
    given: Tensor,
    noise: Tensor,
    steps: int,
    context: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Samples f32 [B, S, n, P] in 0..1 from noise f32 [B, S, n, P], by `steps` steps of Euler's method."""
    samples = noise.shape[1]
    x = rearrange(noise, "b s n p -> (b s) n p")
    values, ids, given = (_repeated(tensor, samples) for tensor in (values, ids, given))
    if context is not None:
        context = (_repeated(context[0], samples), _repeated(context[1], samples))
    for step in range(steps):
        t = step / steps
        estimate = decoder(x, x.new_full((len(x),), t), values, ids, given, context)
        # at the last step all that is left of the way to the estimate
        x = x + (estimate - x) / (1 - t) / steps
    x = rearrange(x, "(b s) n p -> b s n p", s=samples)
    return ((x + 1) / 2).clamp(0, 1)


def _repeated(tensor: Tensor, times: int) -> Tensor:
    return repeat(tensor, "b ... -> (b s) ...", s=times)
