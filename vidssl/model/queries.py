"""Queries that depend on the mask, the clip or chance: what a predictor starts from at a hidden token."""

from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from vidssl.config import PositiveFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.pixels import channel_statistics
from vidssl.model.grid import gather_tokens, patchify
from vidssl.model.positions import PositionEncoding
from vidssl.model.prediction import Encoded
from vidssl.model.vit import Encoder

NoiseSchedule = Literal["linear", "cosine"]


def embedding_of(predictor: nn.Module, kind: str) -> nn.Module:
    """The layer from encoder to predictor."""
    embed = getattr(predictor, "embed", None)
    if not isinstance(embed, nn.Module):
        raise UserError(
            f"method.query.kind: {kind} goes through the predictor's embedding of the encoder's tokens: take "
            "predictor joint, or cross with embed: true"
        )
    return embed


class Noise(nn.Module):
    """Normally distributed vectors, new in each step.

    through_embed: of the encoder's width, mapped by the layer that embeds the encoder's tokens (StoP, arXiv
    2308.00566; FlexPredict); otherwise of the predictor's width (data2vec 2.0, arXiv 2212.07525).
    """

    def __init__(self, width: int, encoder: Encoder, std: PositiveFloat = 0.25, through_embed: bool = False):
        """std: standard deviation; StoP has 0.25, data2vec 2.0 0.01."""
        super().__init__()
        self.width = encoder.feature_width if through_embed else width
        self.std = std
        self.through_embed = through_embed

    def check_predictor(self, predictor: nn.Module) -> None:
        """Raises UserError if it has no layer from the encoder, and the noise goes through it."""
        if self.through_embed:
            embedding_of(predictor, "noise")

    def forward(self, encoded: Encoded, predictor: nn.Module) -> Tensor:
        """Returns [B, M, Nt, width]."""
        noise = self.std * encoded.rng.normal(*encoded.mask.target.shape[1:], self.width)
        return embedding_of(predictor, "noise")(noise) if self.through_embed else noise


class ContextMean(nn.Module):
    """A learned token plus the mean of the embedded context, weighted by the similarity of positions.

    The weights are softmax(p_hidden . p_visible / sqrt(width)) of the predictor's positions. Source: Latent
    MIM (arXiv 2407.15837; vits.py, CrossPositionAttentionStem).
    """

    def __init__(self, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))
        self.mean = PositionMean()

    def check_predictor(self, predictor: nn.Module) -> None:
        """Raises UserError if it has no added positions or no layer from the encoder."""
        positions = getattr(predictor, "positions", None)
        if not isinstance(positions, PositionEncoding) or positions.kind.startswith("rope"):
            raise UserError(
                "method.query.kind: context_mean needs predictor joint or cross, with added positions, "
                "not rope"
            )
        embedding_of(predictor, "context_mean")

    def forward(self, encoded: Encoded, predictor: nn.Module) -> Tensor:
        """Returns [B, M, Nt, width]."""
        mask = encoded.mask
        embedding: Any = predictor.positions.embedding  # type: ignore[union-attr]
        hidden, visible = (embedding(encoded.grid, ids) for ids in (mask.target, mask.context))
        z = embedding_of(predictor, "context_mean")(encoded.z[:, -mask.context.shape[1] :])
        return self.token + self.mean(z[:, None], hidden, visible[:, None])


class PositionMean(nn.Module):
    """Mean of z [B, 1, Nc, width] for each hidden token, weighted by softmax(hidden . visible / sqrt(width))
    of positions [B, M, Nt, width] and [B, 1, Nc, width]. Returns [B, M, Nt, width]."""

    def forward(self, z: Tensor, hidden: Tensor, visible: Tensor) -> Tensor:
        return (hidden @ visible.transpose(-1, -2) / hidden.shape[-1] ** 0.5).softmax(-1) @ z


def signal_shares(schedule: NoiseSchedule, steps: int) -> Tensor:
    """f32 [steps + 1]: share of the signal's variance that is left after t steps of diffusion, 1 at t = 0.

    linear: the variances of the noise rise from 1e-4 to 0.02 (DDPM, arXiv 2006.11239); cosine: cos^2 (arXiv
    2102.09672).
    """
    if schedule == "linear":
        # for other numbers of steps the same noise in all
        betas = np.linspace(1e-4, 0.02, steps) * 1000 / steps
        shares = np.concatenate([[1.0], np.cumprod(1 - betas.clip(max=0.999))])
    else:
        angle = (np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2
        shares = np.cos(angle) ** 2 / np.cos(angle[0]) ** 2
    return torch.from_numpy(shares.clip(0, 1)).float()


class Noised(nn.Module):
    """The hidden patches after t steps of diffusion, linearly embedded; t is drawn from 1..steps for each
    clip.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, of pixels in [-1, 1]. Source: DiffMAE (arXiv 2304.03283,
    section 3); there is no official code.
    """

    shares: Tensor

    def __init__(
        self,
        width: int,
        encoder: Encoder,
        steps: PositiveInt = 1000,
        schedule: NoiseSchedule = "linear",
        exponent: PositiveFloat = 1.0,
    ):
        """steps: of the diffusion; exponent: power to which a_t is raised, less than 1 for less noise."""
        super().__init__()
        self.tubelet = encoder.tubelet
        self.patch = encoder.patch
        self.steps = steps
        self.register_buffer("shares", signal_shares(schedule, steps) ** exponent, persistent=False)
        self.embed = nn.Linear(3 * encoder.tubelet * encoder.patch**2, width)

    def forward(self, encoded: Encoded, predictor: nn.Module) -> Tensor:
        """Returns [B, M, Nt, width]."""
        t = 1 + (encoded.rng.rand(1) * self.steps).long()
        return self.embed(self.noised_patches(encoded, t))

    def noised_patches(self, encoded: Encoded, t: Tensor) -> Tensor:
        """f32 [B, M, Nt, K] after t i64 [B, 1] steps."""
        mean, std = channel_statistics(encoded.video)
        pixels = 2 * (encoded.video.float() * std + mean) - 1
        patches = rearrange(patchify(pixels, self.tubelet, self.patch), "b n c u p q -> b n (u p q c)")
        x = gather_tokens(patches, encoded.mask.target)
        share = self.shares[t][:, :, None, None]
        return share.sqrt() * x + (1 - share).sqrt() * encoded.rng.normal(*x.shape[1:])
