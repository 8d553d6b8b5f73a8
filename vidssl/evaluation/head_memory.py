"""Device memory of heads in training: how many examples fit at once, known before any work is done. Tests
compare the numbers with what autograd keeps and with the peak of a training step."""

from typing import Literal, NamedTuple

FLOAT_BYTES = 4
OPTIMIZER_COPIES = 4  # weight, gradient and AdamW's two moments
TOKEN_BYTES = 8  # per token and channel: the tokens, and their copy from the store or from single examples
# Per token and channel, by precision of the products; the residual stream is f32
BLOCK_BYTES = {"fp32": 64, "bf16": 36}  # that the backward pass of a self-attention block needs
BACKWARD_BYTES = {"fp32": 16, "bf16": 13}  # norm of the cross-attention, and gradients of one block at a time
INPUT_BYTES = 4  # of a block: all that is kept of it if the rest is computed again
SCORE_BYTES = 13  # per token, attention head and setting: scores of one query, their softmax and gradients
CAST_BYTES = 2
POOLED_BYTES = 64  # per example, channel and setting


class HeadSize(NamedTuple):
    """Attentive heads that are trained side by side."""

    width: int  # of a token
    tokens: int  # of an example
    heads: int  # attention heads of each
    depth: int  # layers, of which the last one is the cross-attention
    settings: int  # number of heads, one per setting
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: bool = False  # activations of self-attention blocks are computed again in the backward pass

    @property
    def example_bytes(self) -> int:
        """Bytes per example of a forward and backward pass. Deep heads run one by one, others together."""
        channel_bytes = TOKEN_BYTES
        scores = self.heads
        if self.depth > 1:
            blocks = self.depth - 1
            block_bytes = BLOCK_BYTES[self.precision]
            kept = block_bytes + INPUT_BYTES * (blocks - 1) if self.recompute else block_bytes * blocks
            channel_bytes += kept + BACKWARD_BYTES[self.precision]
        else:
            scores *= self.settings
            # the normed tokens, and their rounded copy
            channel_bytes += FLOAT_BYTES
        pooled = POOLED_BYTES * self.width * self.settings
        return self.tokens * (channel_bytes * self.width + SCORE_BYTES * scores) + pooled

    @property
    def weights(self) -> int:
        """Number of weights of a head, without its last layer."""
        block = 12 * self.width**2
        cross_attention = 11 * self.width**2
        return block * (self.depth - 1) + cross_attention

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and moments of all heads."""
        return FLOAT_BYTES * OPTIMIZER_COPIES * self.weights * self.settings

    @property
    def cast_bytes(self) -> int:
        """Bytes of the rounded weights of the heads that run at once."""
        at_once = 1 if self.depth > 1 else self.settings
        return CAST_BYTES * self.weights * at_once if self.precision == "bf16" else 0

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
