"""On a GPU the model computes what it computes on the CPU."""

import pytest
import torch

from vidssl.model.vit import Encoder

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("positions", ["sincos_uniform", "rope", "learned_separable"])
def test_encoder_agrees_with_the_cpu(positions):
    torch.manual_seed(0)
    encoder = Encoder(4, 32, 32, dim=48, depth=2, heads=4, positions=positions).eval()
    video = torch.randn(2, 3, 4, 32, 32)
    ids = torch.tensor([[0, 3, 5], [1, 2, 7]])
    on_cpu = encoder(video, ids)
    on_gpu = encoder.cuda()(video.cuda(), ids.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=1e-4)
