"""Scores of a network that learns where tokens are hard to predict, by policy gradient."""

import torch
from torch import Tensor, nn

from vidssl.config import NonNegativeFloat, PositiveInt
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, patchify
from vidssl.model.positions import PositionEncoding
from vidssl.model.prediction import Predicted
from vidssl.model.vit import Block, Encoder, TransformerStack, check_heads, init_weights
from vidssl.objective.score_base import Score


class Sampler(Score):
    """Probability of each token to be seen: a transformer block on the patch embeddings, a linear layer and
    a softmax over the clip. For mask.rule=sample.

    Its loss is -log p times the error, averaged over the predicted tokens, with no gradient to the error: it
    raises the probability of tokens that are hard to predict. Source: AdaMAE (arXiv 2211.09120), section 3.2
    and models/pretrain/vit.py, without its dropout of 0.1, and without the last two biases, which the softmax
    cancels.
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: PositiveInt = 8,
        weight: NonNegativeFloat = 1e-4,
        detach: bool = False,
    ):
        """weight: of its loss. detach: the loss does not reach the encoder's patch embedding; the published
        code lets it."""
        super().__init__()
        check_heads(encoder.dim, heads)
        self.weight = weight
        self.detach = detach
        self.positions = PositionEncoding("learned", encoder.grid, encoder.dim, heads)
        nn.init.zeros_(self.positions.table)
        block = Block(encoder.dim, heads, eps=1e-5)
        block.attn.qkv = nn.Linear(encoder.dim, 3 * encoder.dim, bias=False)
        # What adds a constant to all tokens before the softmax has no effect.
        last = block.mlp.get_submodule("fc2")
        last.register_parameter("bias", None)
        self.blocks = TransformerStack([block])
        self.proj = nn.Linear(encoder.dim, 1, bias=False)
        init_weights(self, "xavier")

    def forward(self, video: Tensor, grid: Grid, rng: KeyedRNG, encoder: Encoder) -> Tensor:
        x = encoder.patch_embed_of(grid)(patchify(video, video.shape[2] // grid.t, encoder.patch)).float()
        x = (x.detach() if self.detach else x) + self.positions.embedding(grid, None)
        (x,) = self.blocks(x, None, [0])
        return self.proj(x).squeeze(-1).float().softmax(-1)

    def aux(self, predicted: Predicted) -> dict[str, Tensor]:
        scores = predicted.encoded.scores
        assert scores is not None
        log_p = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        hidden = log_p.gather(1, predicted.encoded.mask.target.flatten(1))
        return {"aux_sampler": -self.weight * (hidden * predicted.error.detach().flatten(1)).mean()}
