"""How much of the machine is used: arithmetic that is counted, and memory that stays."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from vidssl.model.vit import Attention, Block
from vidssl.training import perf


@pytest.mark.parametrize("backward", [False, True])
def test_flops_of_a_block_are_those_of_its_products(backward):
    """On the CPU, too, whose attention torch itself does not count."""
    batch, tokens, dim = 2, 96, 64
    block, x = Block(dim, heads=4), torch.randn(batch, tokens, dim, requires_grad=True)
    with perf.count_flops() as total:
        y = block(x)
        if backward:
            y.sum().backward()
    linear = 2 * batch * tokens * dim * dim * (3 + 1 + 4 + 4)  # q, k, v; what mixes the heads; two of width 4
    product = 2 * batch * tokens * tokens * dim  # of q and k, or of scores and v
    assert total() == (3 * linear + (2 + 5) * product if backward else linear + 2 * product)


def test_flops_do_not_depend_on_the_kernel_of_attention():
    layer, x = Attention(64, heads=4), torch.randn(2, 96, 64)
    counted = []
    for kernel in (nn.attention.SDPBackend.FLASH_ATTENTION, nn.attention.SDPBackend.MATH):
        with nn.attention.sdpa_kernel(kernel), perf.count_flops() as total:
            layer(x)
        counted.append(total())
    assert counted[0] == counted[1] > 0


FAULTS = """
import resource, torch
from vidssl.training.perf import tune_malloc
kept = {keep} and tune_malloc()
for i in range(30):  # the first of them find their places
    if i == 20:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


def test_kept_memory_is_not_fetched_anew():
    """Counted: pages that the system had to give while 64 MB are taken and freed ten times."""
    told = {}
    for keep in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True
        )
        kept, told[keep] = done.stdout.split()
        if keep and kept == "False":
            pytest.skip("a GPU, or a C library without mallopt")
    assert int(told[True]) < 20 and int(told[False]) >= 10 * (64 // 2)  # 2 MB pages where the system has them
