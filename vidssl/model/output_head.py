"""A multi-layer perceptron on the encoder's output, for training alone."""

import itertools

from torch import nn


def output_head(dim: int, width: int, depth: int) -> nn.Sequential:
    """`depth` linear layers without biases, each with a LayerNorm, GELUs between them: [..., dim] to [...,
    dim]. Without layers it returns its input.

    Source: Latent MIM (arXiv 2407.15837; models_lmim.py, _build_mlp).
    """
    head = nn.Sequential()
    widths = [dim, *[width] * (depth - 1), dim] if depth else []
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        head.append(nn.Linear(before, after, bias=False))
        head.append(nn.LayerNorm(after))
        if i < depth - 1:
            head.append(nn.GELU())
    return head
