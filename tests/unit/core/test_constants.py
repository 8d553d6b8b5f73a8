"""Constants are made on a device once; small copies do not wait for it."""

from types import SimpleNamespace

import pytest
import torch

from vidssl.core.constants import pin, upload

SHARING = {
    "expanded": torch.arange(4).expand(3, 4),
    "expanded within": torch.arange(4)[:, None].expand(4, 3),
    "overlapping windows": torch.arange(9).unfold(0, 4, 1),
    "transposed": torch.arange(6).reshape(2, 3).T,
    "contiguous": torch.arange(4),
}


@pytest.mark.parametrize("name", SHARING)
def test_only_tensors_of_memory_of_their_own_are_pinned(name, monkeypatch):
    def pin_memory(tensor):  # as CUDA's does
        if torch._debug_has_internal_overlap(tensor) == 1:
            raise RuntimeError("more than one element of the written-to tensor refers to a single memory")
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    assert torch.equal(pin(SHARING[name]), SHARING[name])


def test_what_is_on_the_device_is_not_pinned(monkeypatch):
    monkeypatch.setattr("vidssl.core.constants.pin", lambda _: pytest.fail("it is not on the host"))
    tensor = SimpleNamespace(device=torch.device("cuda:0"), to=lambda device: str(device))
    assert upload(tensor, torch.device("cuda")) == "cuda"
    host = torch.arange(3)
    assert upload(host, torch.device("cpu")) is host
