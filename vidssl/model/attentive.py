"""The attentive probe head of V-JEPA: one learned query that cross-attends to all tokens."""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vidssl.model.vit import check_heads, init_weights


class CrossAttention(nn.Module):
    """One query [B, 1, D] over tokens [B, N, D] -> [B, 1, D]. No output projection: the reference holds one, never
    applied.

    With a single query, q . (K x + b) = (K' q) . x + q . b and sum a (V x + b) = V (sum a x) + b, so keys and values of
    the tokens are never formed: 2 * heads * N * D multiplications in place of 2 * N * D^2, the same function.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        q = self.q(query[:, 0]).unflatten(-1, (self.heads, -1))  # [B, H, D/H]
        key, value = self.kv.weight.unflatten(0, (2, self.heads, -1))  # [H, D/H, D] each
        key_bias, value_bias = self.kv.bias.unflatten(0, (2, self.heads, -1))  # [H, D/H] each
        reach = torch.einsum("bhe,hed->bhd", q, key)
        score = reach @ tokens.transpose(1, 2) + (q * key_bias).sum(-1, keepdim=True)  # [B, H, N]
        pooled = (score / q.shape[-1] ** 0.5).softmax(-1) @ tokens  # [B, H, D]
        return (torch.einsum("bhd,hed->bhe", pooled, value) + value_bias).flatten(1)[:, None]


class AttentiveHead(nn.Module):
    """tokens [B, N, D] -> logits [B, classes].

    Source: V-JEPA, src/models/attentive_pooler.py with depth 1 (norm on keys and values only, residual to the query,
    MLP of width 4D, then a linear layer); checked against its outputs and loss.
    """

    def __init__(self, dim: int, heads: int, classes: int):
        super().__init__()
        check_heads(dim, heads)
        self.query_tokens = nn.Parameter(torch.empty(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.xattn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, 4 * dim)
        self.linear = nn.Linear(dim, classes)
        init_weights(self, "trunc_normal")
        nn.init.trunc_normal_(self.query_tokens, std=0.02)
        with torch.no_grad():
            self.mlp.fc2.weight.div_(2**0.5)  # the reference's depth rescale, first layer

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query_tokens.expand(len(tokens), -1, -1)
        query = query + self.xattn(query, self.norm1(tokens))
        query = query + self.mlp(self.norm2(query))
        return self.linear(query[:, 0])
