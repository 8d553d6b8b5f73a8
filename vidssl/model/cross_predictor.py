"""A predictor whose queries attend to the encoder's tokens, which are not processed again."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint

from vidssl.config import PositiveFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.model.cosine import WeightNormedCosine
from vidssl.model.grid import Grid, Mask
from vidssl.model.positions import PositionEncoding, PositionKind, RotaryTable, apply_rope
from vidssl.model.prediction import Prediction
from vidssl.model.vit import KERNELS_OF_ANY_SHAPE, LAYER_NORM_EPS, Encoder, Init, check_heads, init_weights

SelfAttention = Literal["none", "before", "after"]
NormPlace = Literal["pre", "post"]
NormKind = Literal["layer", "rms"]
Ropes = tuple[RotaryTable, RotaryTable]  # of the queries and of the memory
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class MemoryAttention(nn.Module):
    """Multi-head attention of x [B, n, width] to memory [B, m, memory_width]. Returns [B, n, width]."""

    counts_vary = False  # as of Attention

    def __init__(self, width: int, memory_width: int, heads: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(memory_width, 2 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, memory: Tensor, ropes: Ropes | None = None) -> Tensor:
        q = rearrange(self.q(x), "b n (h e) -> b n 1 h e", h=self.heads)
        k, v = rearrange(self.kv(memory), "b m (kv h e) -> kv b m 1 h e", kv=2, h=self.heads)
        if ropes is not None:
            q, k = apply_rope(q, ropes[0]), apply_rope(k, ropes[1])
        q, k, v = (rearrange(part, "b n 1 h e -> b h n e") for part in (q, k, v))
        with sdpa_kernel(KERNELS_OF_ANY_SHAPE) if self.counts_vary else nullcontext():
            attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(attended, "b h n e -> b n (h e)"))


class CrossBlock(nn.Module):
    """Cross-attention to a memory and an MLP, with self-attention of the queries before or after them.

    norm: of the input of each part (pre) or of its sum with the residual (post).
    """

    def __init__(
        self,
        width: int,
        memory_width: int,
        heads: int,
        mlp_ratio: float,
        self_attention: SelfAttention,
        norm: NormPlace,
        norm_kind: NormKind,
        bias: bool,
        eps: float,
    ):
        super().__init__()
        order = {"none": [], "before": ["self"], "after": []}[self_attention] + ["cross", "mlp"]
        self.order = [*order, "self"] if self_attention == "after" else order
        self.norm = norm
        self.norms = nn.ModuleDict({name: NORMS[norm_kind](width, eps=eps) for name in self.order})
        self.cross = MemoryAttention(width, memory_width, heads, bias)
        self.mlp = Mlp(width, round(width * mlp_ratio), bias=bias)
        self.own = None if self_attention == "none" else MemoryAttention(width, width, heads, bias)

    def forward(self, x: Tensor, memory: Tensor, ropes: Ropes | None = None) -> Tensor:
        for name in self.order:
            if self.norm == "pre":
                x = x + self._part(name, self.norms[name](x), memory, ropes)
            else:
                x = self.norms[name](x + self._part(name, x, memory, ropes))
        return x

    def _part(self, name: str, x: Tensor, memory: Tensor, ropes: Ropes | None) -> Tensor:
        if name == "mlp":
            return self.mlp(x)
        if name == "cross":
            return self.cross(x, memory, ropes)
        assert self.own is not None
        return self.own(x, x, ropes and (ropes[0], ropes[0]))


class CrossStack(nn.ModuleList):
    """A stack of CrossBlocks, with TransformerStack's option activation_checkpointing."""

    activation_checkpointing = False

    def forward(self, x: Tensor, memories: Sequence[Tensor], ropes: Ropes | None = None) -> Tensor:
        """x [B, n, width]; memories: what each block attends to, [B, m, memory_width]."""
        for block, memory in zip(self, memories, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, memory, ropes, use_reentrant=False)
            else:
                x = block(x, memory, ropes)
        return x


class CrossPredictor(nn.Module):
    """Queries attend to the encoder's tokens: the decoders of CrossMAE, SiamMAE, Latent MIM, DiffMAE, CAPI.

    Sources: CrossMAE (arXiv 2401.14391; models_cross.py), CropMAE (arXiv 2403.17823;
    models/components/DecoderBlock.py), Latent MIM (arXiv 2407.15837; xvits.py), CAPI (arXiv 2502.08769;
    model.py). No dropout: CropMAE has 0.1.
    """

    reads_class = True  # in the memory

    def __init__(
        self,
        encoder: Encoder,
        out: int,
        width: PositiveInt = 512,
        depth: PositiveInt = 12,
        heads: PositiveInt = 16,
        mlp_ratio: PositiveFloat = 4.0,
        positions: PositionKind = "sincos_uniform",
        rope_grid: PositiveInt | None = None,
        self_attention: SelfAttention = "none",
        memory: Literal["last", "mix"] = "last",
        memory_slices: Literal["all", "first"] = "all",
        memory_positions: bool = False,
        memory_norm: bool = False,
        embed: bool = False,
        visible_too: bool = False,
        class_query: bool = False,
        norm: NormPlace = "pre",
        norm_kind: NormKind = "layer",
        final_norm: bool = True,
        bias: bool = True,
        head: Literal["linear", "cosine"] = "linear",
        eps: PositiveFloat = LAYER_NORM_EPS,
        init: Init = "trunc_normal",
        init_std: PositiveFloat = 0.02,
    ):
        """out: width K of the target. self_attention: of the queries to one another, before cross-attention
        (Latent MIM), after the MLP (SiamMAE), or none (CrossMAE, CAPI).

        memory: the encoder's output, or for each block a learned mix of the encoder's input and of all its
        blocks' outputs, with a norm (CrossMAE). memory_slices: all tokens, or those of the first time slice
        alone, which the mask must show whole (SiamMAE). memory_positions: added to the memory, which needs
        `embed`; memory_norm: each block norms it (Latent MIM). embed: a linear layer from encoder to
        predictor before the blocks; false: keys and values are made of the encoder's width (CrossMAE, CAPI).
        visible_too: tokens that the encoder saw are queries beside the hidden ones, too, embedded; of these
        not those of a memory of the first slice (SiamMAE). class_query: a learned query without a position
        (Latent MIM). head: cosine for clusters (CAPI).
        """
        super().__init__()
        check_heads(width, heads)
        if not embed and (memory_positions or visible_too):
            raise UserError(
                "method.predictor: memory_positions and visible_too need embed: true, for the encoder's "
                f"tokens are {encoder.dim} wide and the predictor's {width}"
            )
        if memory == "mix" and embed:
            raise UserError("method.predictor.memory: mix needs embed: false, as CrossMAE has it")
        if memory == "mix" and not isinstance(encoder.norm, nn.Identity):
            raise UserError(
                "method.predictor.memory: mix reads the layers before the encoder's last norm, which would "
                "not be trained: give model.final_norm: false"
            )
        if class_query:
            check_class_query(self_attention, positions)
        self.width = width
        self.needs_all_layers = memory == "mix"
        self.memory_slices = memory_slices
        self.memory_positions = memory_positions
        self.visible_too = visible_too
        self.mixes_queries = self_attention != "none"
        source = encoder.dim if memory == "mix" else encoder.feature_width
        self.embed = nn.Linear(source, width) if embed else None
        source = width if embed else source
        self.positions = PositionEncoding(positions, encoder.grid, width, heads, rope_grid)
        self.class_query = nn.Parameter(0.02 * torch.randn(width)) if class_query else None
        arguments = (width, source, heads, mlp_ratio, self_attention, norm, norm_kind, bias, eps)
        self.blocks = CrossStack(CrossBlock(*arguments) for _ in range(depth))
        norms = memory == "mix" or memory_norm
        self.memory_norms = nn.ModuleList(nn.LayerNorm(source, eps=eps) for _ in range(depth if norms else 0))
        self.norm = NORMS[norm_kind](width, eps=eps) if final_norm else nn.Identity()
        self.proj = WeightNormedCosine(width, out) if head == "cosine" else nn.Linear(width, out)
        init_weights(self, init, init_std)
        self.levels = len(encoder.blocks) + 1
        self.mix = nn.Linear(self.levels, depth, bias=False) if memory == "mix" else None
        if self.mix is not None:
            nn.init.normal_(self.mix.weight, std=self.levels**-0.5)

    def forward(self, z: Tensor, mask: Mask, query: Tensor, grid: Grid) -> Prediction:
        """z [B, (1 +) Nc, D], query [width] or [B, M, Nt, width]. Target groups do not attend to each
        other."""
        groups, num_targets = mask.target.shape[1:]
        num_context = mask.context.shape[1]
        first = grid.h * grid.w if self.memory_slices == "first" else num_context
        if first > num_context or (self.memory_slices == "first" and first == num_context):
            raise UserError(
                "method.predictor.memory_slices: first needs a mask that shows the whole first slice and "
                "some of the others, such as next_frame"
            )
        z = z if self.embed is None else self.embed(z)
        z = z.float()
        queries = (query + self.positions.embedding(grid, mask.target)).expand(*mask.target.shape, -1)
        ids = mask.target
        if self.visible_too:
            shown = slice(first if self.memory_slices == "first" else 0, None)
            shown_ids = mask.context[:, shown]
            visible = z[:, z.shape[1] - num_context :][:, shown] + self.positions.embedding(grid, shown_ids)
            queries = torch.cat([repeat(visible, "b n d -> b m n d", m=groups), queries], 2)
            ids = torch.cat([repeat(shown_ids, "b n -> b m n", m=groups), ids], 2)
        if self.class_query is not None:
            queries = torch.cat([self.class_query.expand(len(z), groups, 1, -1), queries], 2)
        context = mask.context[:, :first]
        memory = z[:, : z.shape[1] - num_context + first]
        if self.memory_positions:
            position = self.positions.embedding(grid, context)
            memory = torch.cat([memory[:, : memory.shape[1] - first], memory[:, -first:] + position], 1)
        # Without self-attention no query sees another, and all groups share one memory.
        pattern = "(b m) n" if self.mixes_queries else "b (m n)"
        if self.mixes_queries:
            memory, context = (repeat(t, "b ... -> (b m) ...", m=groups) for t in (memory, context))
        tokens = self.decode(
            rearrange(queries, f"b m n d -> {pattern} d"),
            self.memories(memory),
            self._ropes(
                grid, rearrange(ids, f"b m n -> {pattern}"), context, memory.shape[1] - context.shape[1]
            ),
        )
        tokens = rearrange(tokens, f"{pattern} d -> b m n d", m=groups)
        return Prediction(self.proj(tokens[:, :, -num_targets:]))

    def memories(self, z: Tensor) -> Sequence[Tensor]:
        """What each block attends to, [B, m, ...], from the encoder's tokens [B, m, ...]."""
        if self.mix is not None:
            mixed = self.mix(rearrange(z, "b n (k d) -> b n d k", k=self.levels)).unbind(-1)
            return [norm(tokens) for norm, tokens in zip(self.memory_norms, mixed, strict=True)]
        if len(self.memory_norms):
            return [norm(z) for norm in self.memory_norms]
        return [z] * len(self.blocks)

    def decode(self, queries: Tensor, memories: Sequence[Tensor], ropes: Ropes | None = None) -> Tensor:
        """queries [B, n, width]. Returns normed tokens of the same shape."""
        return self.norm(self.blocks(queries, memories, ropes))

    def _ropes(self, grid: Grid, queries: Tensor, memory: Tensor, class_tokens: int) -> Ropes | None:
        """Of queries i64 [B, n] and memory i64 [B, m] after class tokens; None without rotary positions."""
        of_queries = self.positions.rope(grid, queries, queries.device)
        of_memory = self.positions.rope(grid, memory, queries.device, class_tokens)
        return None if of_queries is None or of_memory is None else (of_queries, of_memory)


def check_class_query(self_attention: SelfAttention, positions: PositionKind) -> None:
    """Raises UserError if a query without a position cannot be, or nothing would train it."""
    if self_attention == "none":
        raise UserError(
            "method.predictor.class_query: without self_attention no other query sees it, so that it would "
            "not be trained: leave it out, or give self_attention: before or after"
        )
    if positions.startswith("rope"):
        raise UserError("method.predictor.class_query has no position, so it cannot be combined with rope")
