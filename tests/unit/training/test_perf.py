"""FLOP counts of a step, and the allocator's memory."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from vidssl.model.vit import Attention, Block
from vidssl.training import perf


@pytest.mark.parametrize("backward", [False, True])
def test_flops_of_a_block_are_those_of_its_products(backward):
    """Also on the CPU, whose attention torch itself does not count."""
    batch, tokens, dim = 2, 96, 64
    block = Block(dim, heads=4)
    x = torch.randn(batch, tokens, dim, requires_grad=True)
    with perf.count_flops() as total:
        y = block(x)
        if backward:
            y.sum().backward()
    linear = 2 * batch * tokens * dim * dim * (3 + 1 + 4 + 4)  # q, k, v; output projection; MLP of width 4
    product = 2 * batch * tokens * tokens * dim  # q k^T, or scores v
    assert total() == (3 * linear + (2 + 5) * product if backward else linear + 2 * product)


def test_flops_do_not_depend_on_the_kernel_of_attention():
    layer = Attention(64, heads=4)
    x = torch.randn(2, 96, 64)
    counted = []
    for kernel in (nn.attention.SDPBackend.FLASH_ATTENTION, nn.attention.SDPBackend.MATH):
        with nn.attention.sdpa_kernel(kernel), perf.count_flops() as total:
            layer(x)
        counted.append(total())
    assert counted[0] == counted[1] > 0


FAULTS = """
import resource, torch
from vidssl.training.malloc import tune_malloc
tuned = {tune} and tune_malloc()
for i in range(30):  # the first ones warm the allocator up
    if i == 20:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
print(tuned, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


@pytest.mark.slow
def test_tuned_malloc_keeps_freed_memory():
    """Counts page faults while 64 MB are allocated and freed ten times."""
    faults = {}
    for tune in (True, False):
        script = FAULTS.format(tune=tune)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        tuned, faults[tune] = done.stdout.split()
        if tune and tuned == "False":
            pytest.skip("a GPU, or a C library without mallopt")
    assert int(faults[True]) < 20 and int(faults[False]) >= 10 * (64 // 2)  # with pages of 2 MB
