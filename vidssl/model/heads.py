"""Heads on frozen tokens: V-JEPA's attentive head, mean pooling, a linear layer, and dense depth."""

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from vidssl.model.vit import LAYER_NORM_EPS, Block, TransformerStack, check_heads, init_weights

HEAD_EPS = 1e-5  # of the attentive head's LayerNorms


class CrossAttention(nn.Module):
    """Attention of one query [B, 1, D] to tokens [B, N, D]. Returns [B, 1, D]. No output projection: the
    reference has one that is never applied.

    With a single query, q . (K x + b) = (K' q) . x + q . b and sum a (V x + b) = V (sum a x) + b, so keys and
    values of the tokens are never formed: 2 * heads * N * D multiplications instead of 2 * N * D^2, the same
    function.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)

    def weights(self, query: Tensor, tokens: Tensor) -> Tensor:
        """[B, H, N]: the attention of each head to the tokens."""
        q = rearrange(self.q(query), "b 1 (h e) -> b h e", h=self.heads)
        key = rearrange(self.kv.weight.chunk(2)[0], "(h e) d -> h e d", h=self.heads)
        key_bias = rearrange(self.kv.bias.chunk(2)[0], "(h e) -> h e", h=self.heads)
        projected_query = torch.einsum("bhe,hed->bhd", q, key)
        score = projected_query @ tokens.transpose(1, 2) + (q * key_bias).sum(-1, keepdim=True)
        return (score / q.shape[-1] ** 0.5).softmax(-1)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        pooled = self.weights(query, tokens) @ tokens  # [B, H, D]
        value = rearrange(self.kv.weight.chunk(2)[1], "(h e) d -> h e d", h=self.heads)
        value_bias = rearrange(self.kv.bias.chunk(2)[1], "(h e) -> h e", h=self.heads)
        output = torch.einsum("bhd,hed->bhe", pooled, value) + value_bias
        return rearrange(output, "b h e -> b 1 (h e)")


class AttentiveHead(nn.Module):
    """Maps tokens [B, N, D] to logits [B, classes] by one learned query that cross-attends to all tokens.

    depth 1 is V-JEPA's: norm on keys and values only, residual to the query, MLP of width 4D, then a linear
    layer. With depth d, d - 1 self-attention blocks over all tokens come first (V-JEPA 2: depth 4). Source:
    V-JEPA and V-JEPA 2, src/models/attentive_pooler.py; checked against outputs and loss of both.
    """

    def __init__(self, dim: int, heads: int, classes: int, depth: int = 1):
        super().__init__()
        check_heads(dim, heads)
        self.blocks = TransformerStack(Block(dim, heads, eps=HEAD_EPS) for _ in range(depth - 1))
        self.query_tokens = nn.Parameter(torch.empty(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim, eps=HEAD_EPS)
        self.xattn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=HEAD_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.linear = nn.Linear(dim, classes)
        init_weights(self, "trunc_normal")
        nn.init.trunc_normal_(self.query_tokens, std=0.02)
        self.blocks.rescale()
        with torch.no_grad():
            self.mlp.fc2.weight.div_((2 * depth) ** 0.5)  # as TransformerStack.rescale does for layer `depth`

    def attention(self, tokens: Tensor) -> Tensor:
        """[B, heads, N]: where the query looks among tokens f32 [B, N, D]."""
        query = self.query_tokens.expand(len(tokens), -1, -1)
        return self.xattn.weights(query, self.norm1(self._after_blocks(tokens)))

    def _after_blocks(self, tokens: Tensor) -> Tensor:
        return self.blocks(tokens, None, [len(self.blocks) - 1])[0] if len(self.blocks) else tokens

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self._after_blocks(tokens)
        query = self.query_tokens.expand(len(tokens), -1, -1)
        query = query + self.xattn(query, self.norm1(tokens))
        query = query + self.mlp(self.norm2(query))
        return self.linear(query[:, 0])


class MeanHead(nn.Module):
    """Maps tokens [B, N, D] to logits [B, classes]: mean, LayerNorm, linear layer, as VideoMAE fine-tunes."""

    def __init__(self, dim: int, classes: int, eps: float = LAYER_NORM_EPS):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.linear = nn.Linear(dim, classes)

    def features(self, tokens: Tensor) -> Tensor:
        """The input of the linear layer, [B, D]."""
        return self.norm(tokens.mean(1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.features(tokens))


class LinearHead(nn.Module):
    """A linear layer with zero initial weights: maps [B, 1, D] to logits [B, outputs]."""

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(dim, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens[:, 0])


MIN_DEPTH = 1e-3  # metres; as in DINOv2
DEPTH_UPSAMPLING = 4  # factor between the token grid and the predicted depth map


class DepthHead(nn.Module):
    """Maps tokens f32 [B, h, w, D] to depth f32 [B, 4 h, 4 w] by a linear layer on bilinearly upsampled
    tokens, whose outputs, clipped at 0 and normalised by their sum, weight depth bins spaced evenly up to
    `max_depth` (AdaBins, arXiv 2011.14141)."""

    bins: Tensor

    def __init__(self, dim: int, bins: int, max_depth: float):
        super().__init__()
        self.linear = nn.Linear(dim, bins)
        self.register_buffer("bins", torch.linspace(MIN_DEPTH, max_depth, bins))

    def forward(self, tokens: Tensor) -> Tensor:
        score = rearrange(self.linear(tokens), "b h w k -> b k h w")
        score = F.interpolate(score, scale_factor=DEPTH_UPSAMPLING, mode="bilinear")
        weight = score.relu() + 0.1  # keeps every sum above 0
        return torch.einsum("bkhw,k->bhw", weight / weight.sum(1, keepdim=True), self.bins)
