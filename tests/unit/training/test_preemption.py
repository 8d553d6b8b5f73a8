"""Which errors count as a lost peer."""

import pytest
import torch

from vidssl.training.preemption import is_lost_peer

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(
    "error, lost",
    [
        (torch.distributed.DistNetworkError("The client socket has timed out"), True),
        (torch.distributed.DistStoreError("wait timeout after 3000ms"), True),
        (torch.distributed.DistBackendError("NCCL error: ncclRemoteError: a call failed"), True),
        (torch.distributed.DistBackendError("NCCL error: ncclInvalidUsage: same device twice"), False),
        (RuntimeError(GLOO + "pair.cc:547] Connection closed by peer [127.0.0.1]:51"), True),
        (RuntimeError(GLOO + "unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation"), True),
        (RuntimeError("Detected mismatch between collectives on ranks (backend gloo)"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"), False),
    ],
)
def test_only_lost_connections_and_timeouts_are_requeued(error, lost):
    assert is_lost_peer(error) is lost
