"""Which tokens an encoder's tokens depend on, and tokens that are replaced before the first block."""

import pytest
import torch
from torch import Tensor

from vidssl.model.vit import Encoder

SLICES, PLACES = 4, 16


def make_encoder(attention: str, class_token: bool = False) -> Encoder:
    torch.manual_seed(0)
    sizes = {"frames": SLICES, "height": 32, "width": 32, "dim": 24, "depth": 2, "heads": 2}
    return Encoder(
        **sizes, tubelet=1, patch=8, positions="sincos", attention=attention, class_token=class_token
    ).eval()


def changed_slices(encoder: Encoder, ids: Tensor | None) -> list[bool]:
    """For each time slice whether its features change when slice 2 of the video does."""
    video = torch.randn(1, 3, SLICES, 32, 32)
    other = video.clone()
    other[:, :, 2] += 1
    with torch.no_grad():
        change = (encoder(video, ids) != encoder(other, ids))[0].any(-1)
    slices = (torch.arange(SLICES * PLACES) if ids is None else ids[0]) // PLACES
    return [bool(change[slices == t].any()) for t in range(SLICES)]


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("kept", [None, 24])
@pytest.mark.parametrize(
    "attention, changed",
    [
        ("full", [True, True, True, True]),
        ("frame", [False, False, True, False]),
        ("causal", [False, False, True, True]),
    ],
)
def test_a_slice_depends_on_the_slices_that_it_attends_to(attention, changed, kept, class_token):
    ids = None if kept is None else torch.randperm(SLICES * PLACES)[:kept].sort()[0][None]
    assert changed_slices(make_encoder(attention, class_token), ids) == changed


@pytest.mark.parametrize("attention", ["frame", "causal"])
def test_the_class_token_reads_all_and_is_read_by_none(attention):
    encoder = make_encoder(attention, class_token=True)
    video = torch.randn(1, 3, SLICES, 32, 32)
    with torch.no_grad():
        before = encoder(video, return_levels=True)
        for t in range(SLICES):
            other = video.clone()
            other[:, :, t] += 1
            assert (encoder(other, return_levels=True)[:, 0] != before[:, 0]).any()
        encoder.class_token.add_(1.0)
        after = encoder(video, return_levels=True)
    assert (after[:, 0] != before[:, 0]).any() and after[:, 1:].equal(before[:, 1:])


def test_a_replaced_token_forgets_its_patch_and_keeps_its_place():
    encoder = make_encoder("full")
    video = torch.randn(1, 3, SLICES, 32, 32)
    replaced = torch.zeros(1, SLICES * PLACES, dtype=torch.bool)
    replaced[:, :PLACES] = True
    token = torch.randn(24, requires_grad=True)
    first = encoder(video, replaced=(replaced, token))
    first.sum().backward()
    assert token.grad.any()
    other = video.clone()
    other[:, :, 0] += 1
    assert first.equal(encoder(other, replaced=(replaced, token)))
    assert not first[0, 0].equal(first[0, 1])
    ids = torch.arange(8, 24)[None]
    some = encoder(video, ids, replaced=(replaced, token))
    other[:, :, 0] += 1
    assert some.equal(encoder(other, ids, replaced=(replaced, token)))


def test_all_layers_are_the_input_and_the_output_of_every_block():
    encoder = make_encoder("full", class_token=True)
    video = torch.randn(1, 3, SLICES, 32, 32)
    layers = encoder(video, all_layers=True).unflatten(-1, (3, 24))
    assert layers.shape == (1, 1 + SLICES * PLACES, 3, 24)
    assert encoder.norm(layers[:, :, -1]).equal(encoder(video, return_levels=True))
    assert encoder.blocks[0](layers[:, :, 0]).equal(layers[:, :, 1])
