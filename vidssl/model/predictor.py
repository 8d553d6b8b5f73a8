"""Queries and predictors: the vector at each target token, and the network that maps it to a prediction."""

from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from vidssl.config import NonNegativeFloat, PositiveFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.model.conditioning import Modulation
from vidssl.model.conv_predictor import ConvPredictor
from vidssl.model.cross_predictor import CrossPredictor
from vidssl.model.grid import Grid, Mask
from vidssl.model.head_predictor import HeadPredictor
from vidssl.model.positions import PositionEncoding, PositionKind
from vidssl.model.prediction import Encoded, Prediction
from vidssl.model.queries import ContextMean, Noise, Noised
from vidssl.model.vit import (
    LAYER_NORM_EPS,
    Block,
    Encoder,
    Feedforward,
    Init,
    TransformerStack,
    check_heads,
    init_weights,
)


class MaskToken(nn.Module):
    """One learned token per mask of the method (index modulo `groups`); V-JEPA has 2, VideoMAE 1."""

    def __init__(self, width: int, groups: PositiveInt = 1, std: NonNegativeFloat = 0.02):
        """std: standard deviation at initialisation (VideoMAE 0.02; V-JEPA starts at zero)."""
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(groups, width))
        if std > 0:
            nn.init.trunc_normal_(self.tokens, std=std)

    def forward(self, encoded: Encoded, predictor: nn.Module) -> Tensor:
        """Returns the query [width] of the mask with this number."""
        return self.of_mask(encoded.mask_index)

    def of_mask(self, index: int) -> Tensor:
        """[width]: the token of mask `index` of a step."""
        return self.tokens[index % len(self.tokens)]


class JointPredictor(nn.Module):
    """Context and queries attend to each other in a narrow ViT (VideoMAE's decoder, V-JEPA's predictor)."""

    def __init__(
        self,
        encoder: Encoder,
        out: int,
        width: PositiveInt = 384,
        depth: PositiveInt = 4,
        heads: PositiveInt = 6,
        mlp_ratio: PositiveFloat = 4.0,
        mlp: Feedforward = "gelu",
        embed_bias: bool = True,
        positions: PositionKind = "sincos_uniform",
        rope_grid: PositiveInt | None = None,
        class_token: Literal["none", "own", "encoder"] = "none",
        modality: bool = False,
        context_head: bool = False,
        eps: PositiveFloat = LAYER_NORM_EPS,
        init: Init = "trunc_normal",
        init_std: PositiveFloat = 0.02,
        depth_rescale: bool = False,
        conditioned: bool = False,
    ):
        """out: width K of the target. embed_bias: of the layer from encoder to predictor (VideoMAE has none).

        class_token: the predictor's own (MAE-ST), or the encoder's, embedded (MAE). modality: adds a learned
        image or video embedding; context_head: a second head predicts at the context tokens too (both V-JEPA
        2.1). For an encoder with several levels the embedding is an MLP (V-JEPA 2.1). conditioned: blocks and
        last norm are told the noise level, as the encoder is (UMD).
        """
        super().__init__()
        check_heads(width, heads)
        if class_token == "encoder" and encoder.class_token is None:
            raise UserError("method.predictor.class_token: encoder needs model.class_token: true")
        self.width = width
        self.reads_class = class_token == "encoder"
        self.drop_encoder_token = encoder.class_token is not None and class_token != "encoder"
        self.embed: nn.Module = nn.Linear(encoder.dim, width, bias=embed_bias)
        if encoder.feature_width > encoder.dim:
            self.embed = nn.Sequential(nn.Linear(encoder.feature_width, encoder.dim), nn.GELU(), self.embed)
        self.positions = PositionEncoding(positions, encoder.grid, width, heads, rope_grid)
        if class_token != "none" and positions.startswith("rope"):
            raise UserError(
                "method.predictor.class_token has no position, so it cannot be combined with rotary positions"
            )
        self.class_token = nn.Parameter(0.02 * torch.randn(width)) if class_token == "own" else None
        # Row 0 is added for videos, row 1 for images.
        self.modality = nn.Parameter(1e-6 * torch.randn(2, width)) if modality else None
        if conditioned and encoder.noise_level is None:
            raise UserError("method.predictor.conditioned needs model.conditioned=true")
        self.needs_condition = conditioned
        of_condition = encoder.dim if conditioned else 0
        self.blocks = TransformerStack(
            Block(width, heads, mlp_ratio, mlp, eps, condition=of_condition) for _ in range(depth)
        )
        self.modulation = Modulation(encoder.dim, width, 2) if conditioned else None
        self.norm = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Linear(width, out)
        self.proj_context = nn.Linear(width, out) if context_head else None
        init_weights(self, init, init_std)
        if depth_rescale:
            self.blocks.rescale()

    def forward(
        self, z: Tensor, mask: Mask, query: Tensor, grid: Grid, condition: Tensor | None = None
    ) -> Prediction:
        """z [B, (1 +) Nc, D], query [width] or [B, M, Nt, width]; condition [B, D] of the encoder, if it is
        told one. Target groups do not attend to each other."""
        if self.proj_context is None:
            return Prediction(self.proj(self.forward_tokens(z, mask, query, grid, False, condition)))
        x = self.forward_tokens(z, mask, query, grid, True, condition)
        num_context = mask.context.shape[1]
        return Prediction(self.proj(x[:, :, num_context:]), self.proj_context(x[:, :, :num_context]))

    def forward_tokens(
        self,
        z: Tensor,
        mask: Mask,
        query: Tensor,
        grid: Grid,
        include_context: bool = False,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Returns normed tokens [B, M, Nt, width]; with include_context [B, M, Nc + Nt, width], context
        first. Without, context tokens serve as keys and values only in the last block."""
        groups, num_targets = mask.target.shape[1:]
        num_context = mask.context.shape[1]
        # The residual stream is f32 under autocast, too: a young mask token is smaller than the
        # rounding of bf16 beside it.
        z = self.embed(z[:, int(self.drop_encoder_token) :]).float()
        class_tokens, z = z[:, :-num_context], z[:, -num_context:]
        if self.class_token is not None:
            class_tokens = self.class_token.expand(len(z), 1, -1)
        context = torch.cat([class_tokens, z + self.positions.embedding(grid, mask.context)], 1)
        queries = query + self.positions.embedding(grid, mask.target)
        queries = queries.expand(*mask.target.shape, -1)
        x = torch.cat(
            [repeat(context, "b n d -> (b m) n d", m=groups), rearrange(queries, "b m n d -> (b m) n d")], 1
        )
        if self.modality is not None:
            x = x + self.modality[int(grid.image)]
        context_ids = repeat(mask.context, "b n -> (b m) n", m=groups)
        ids = torch.cat([context_ids, rearrange(mask.target, "b m n -> (b m) n")], 1)
        num_outputs = num_targets + (num_context if include_context else 0)
        rope = self.positions.rope(grid, ids, x.device)
        if condition is not None:
            condition = repeat(condition, "b d -> (b m) d", m=groups)
        (x,) = self.blocks(x, rope, [len(self.blocks) - 1], num_outputs, condition=condition)
        x = self.norm(x)
        if self.modulation is not None:
            shift, factor = self.modulation(condition)
            x = x * (1 + factor) + shift
        return rearrange(x, "(b m) n d -> b m n d", m=groups)


class ParallelPredictor(nn.Module):
    """`copies` joint predictors, each of which predicts its share of the target's dimensions (MVD)."""

    def __init__(
        self,
        encoder: Encoder,
        out: int,
        copies: PositiveInt = 2,
        width: PositiveInt = 384,
        depth: PositiveInt = 2,
        heads: PositiveInt = 6,
        mlp_ratio: PositiveFloat = 4.0,
        embed_bias: bool = True,
        positions: PositionKind = "sincos_uniform",
        init: Init = "trunc_normal",
    ):
        """The other options are those of the joint predictor."""
        super().__init__()
        if out % copies:
            raise UserError(f"method.predictor.copies: {copies} do not divide the target's {out} dimensions")
        self.width = width
        options = {"mlp_ratio": mlp_ratio, "embed_bias": embed_bias, "positions": positions, "init": init}
        self.members = nn.ModuleList(
            JointPredictor(encoder, out // copies, width, depth, heads, **options)  # type: ignore[arg-type]
            for _ in range(copies)
        )

    def forward(self, z: Tensor, mask: Mask, query: Tensor, grid: Grid) -> Prediction:
        predictions = [member(z, mask, query, grid).target for member in self.members]
        return Prediction(torch.cat(predictions, -1))


QUERIES = {"token": MaskToken, "noise": Noise, "context_mean": ContextMean, "noised": Noised}
PREDICTORS = {
    "joint": JointPredictor,
    "cross": CrossPredictor,
    "parallel": ParallelPredictor,
    "conv": ConvPredictor,
    "head": HeadPredictor,
}
