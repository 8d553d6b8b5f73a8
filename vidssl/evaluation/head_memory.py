"""Device memory of heads in training: how many examples fit at once, known before any work is done.

Numbers are of f32; tests compare them with what autograd keeps.
"""

from typing import NamedTuple

BYTES = 4  # of an f32
TOKEN_VALUES = 3  # per token and channel: the tokens, their copy from the store, and their norm
BLOCK_VALUES = 17  # the same, that the backward pass of a self-attention block needs
BACKWARD_VALUES = 8  # the same, gradients of one block at a time
OPTIMIZER_COPIES = 4  # weight, gradient and AdamW's two moments


class HeadSize(NamedTuple):
    """Attentive heads that are trained side by side."""

    width: int  # of a token
    tokens: int  # of an example
    heads: int  # attention heads of each
    depth: int  # layers, of which the last one is the cross-attention
    settings: int  # number of heads, one per setting

    @property
    def example_bytes(self) -> int:
        """Bytes per example of a forward and backward pass. Deep heads run one by one, others together."""
        token_values = TOKEN_VALUES * self.width
        if self.depth > 1:
            per_channel = BLOCK_VALUES * (self.depth - 1) + BACKWARD_VALUES
            token_values += per_channel * self.width + 4 * self.heads
        else:
            token_values += 4 * self.settings * self.heads
        pooled_values = 16 * self.width * self.settings
        return BYTES * (self.tokens * token_values + pooled_values)

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and moments of all heads, without their last layers."""
        block = 12 * self.width**2
        cross_attention = 11 * self.width**2
        weights = block * (self.depth - 1) + cross_attention
        return BYTES * OPTIMIZER_COPIES * weights * self.settings

    def examples_at_once(self, batch: int, limit_bytes: float) -> int:
        """The largest part of a batch that takes at most `limit_bytes`; 0: not even one example does."""
        return min(batch, int(limit_bytes // self.example_bytes))


def attention_heads(width: int, of_encoder: int | None) -> int:
    """Heads of an attentive head where none are given: as many as the encoder has; where they do not divide
    the width (or are not known), heads of 64 channels, or as many as divide the width and 16."""
    if of_encoder is not None and width % of_encoder == 0:
        return of_encoder
    if width % 64 == 0:
        return width // 64
    return next(n for n in (16, 8, 4, 2, 1) if width % n == 0)
