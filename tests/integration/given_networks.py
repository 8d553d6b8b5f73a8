"""Stand-ins for networks that a user gives as a file, written as TorchScript."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


class MeanFlow(nn.Module):
    """Says that everything moves by the mean of the first frame, in pixels."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first.mean((1, 2, 3), keepdim=True).expand(-1, 2, 4, 4)


class ColourFlow(nn.Module):
    """Says that each pixel moves by its red and green, in pixels."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first[:, :2]


class RedLevels(nn.Module):
    """A tokenizer of 8 x 8 patches: their mean red, in levels from 0 to 9."""

    def forward(self, frames: Tensor) -> Tensor:
        return (nn.functional.avg_pool2d(frames[:, 0], 8) * 9).round().long()


def write_network(network: nn.Module, path: Path) -> str:
    """Writes the network and returns the path."""
    with warnings.catch_warnings():
        # torch calls TorchScript deprecated
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(network).save(path)
    return str(path)
