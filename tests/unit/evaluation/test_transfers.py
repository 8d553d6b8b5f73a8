"""Batches go to the device, are computed with and come back: all of them, unchanged and in order."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vidssl.evaluation.transfers import downloads, in_order, one_ahead, uploads

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
BATCHES = 6


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, 50, 50), generator=generator, dtype=torch.uint8) for _ in range(BATCHES)]


@pytest.mark.parametrize("name", DEVICES)
def test_batches_come_back_as_they_went(name):
    device = torch.device(name)
    sent = [batch.pin_memory() if name == "cuda" else batch for batch in batches()]

    def doubled() -> Iterator[tuple[int, Tensor]]:
        for copy in uploads(enumerate(sent), device):
            assert copy.tensor.device.type == name
            yield copy.label, 2 * copy.on_device().float()

    back = [(copy.label, copy.on_host().clone()) for copy in downloads(doubled(), device)]
    assert [label for label, _ in back] == list(range(BATCHES))
    for (_, found), batch in zip(back, batches(), strict=True):
        assert found.device.type == "cpu" and torch.equal(found, 2 * batch.float())


@pytest.mark.parametrize("name", DEVICES)
def test_tensors_arrive_in_order(name):
    for found, batch in zip(in_order(batches(), torch.device(name)), batches(), strict=True):
        assert found.device.type == name and torch.equal(found.cpu(), batch)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_next_item_is_requested_first(count):
    requested: list[int] = []

    def items() -> Iterator[int]:
        for number in range(count):
            requested.append(number)
            yield number

    for number in one_ahead(items()):
        assert requested == list(range(min(number + 2, count)))
    assert len(requested) == count
