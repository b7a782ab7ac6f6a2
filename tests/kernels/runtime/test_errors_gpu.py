"""CUDA ops beside errors that are not theirs."""

import ctypes
import math
from pathlib import Path

import pytest
import torch

from surgeon_kernels.runtime import extension
from surgeon_kernels.sparse24.linear_2_4 import prepare_2_4
from surgeon_kernels.sparse24.pack_2_4 import pack_2_4
from tests.kernels.sparse24.test_linear_2_4 import weight_2_4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

INVALID_DEVICE = 101


@pytest.fixture
def runtime():
    """The CUDA runtime of this process, which keeps the last error of every thread."""
    if not extension.available(torch.device("cuda")):
        pytest.skip("the CUDA extension cannot be built here")
    torch.zeros(1, device="cuda")
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart.so" in line}
    if len(mapped) != 1:
        pytest.skip("the process has not one CUDA runtime")
    runtime = ctypes.CDLL(mapped.pop())
    yield runtime
    runtime.cudaGetLastError()


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize(
    "op",
    ["nm_select", "nm_group_cost", "nm_prune", "cost_mask", "linear_2_4", "linear_2_4_choice", "linear_2_4_unpack"],
)
def test_an_earlier_error_is_neither_taken_for_the_ops_own_nor_away(runtime, op, tokens):
    weight, invalid = torch.randn(32, 64, device="cuda"), torch.zeros((), dtype=torch.bool, device="cuda")
    g, a = torch.rand(32, device="cuda"), torch.rand(64, device="cuda")
    prepared = prepare_2_4(pack_2_4(weight_2_4(32, 64 * tokens, device="cuda")))
    x = torch.randn(tokens, 64 * tokens, device="cuda").bfloat16()
    arguments = {
        "nm_select": (weight, None, None, 2, 4, None, math.inf, True, invalid),
        "nm_group_cost": (weight, g, a, 2, 4, invalid),
        "nm_prune": (weight, g, a, 2, 4, invalid),
        "cost_mask": (weight, g, a, 0.1, True),
        "linear_2_4": (x, prepared.fragments, None, 32, 0),
        "linear_2_4_choice": (x, prepared.fragments, 32),
        "linear_2_4_unpack": (prepared.fragments, 32, 64 * tokens, torch.bfloat16),
    }[op]
    # CUDA itself drops an earlier error when it is asked for a kernel's occupancy, which it is once in a process.
    getattr(torch.ops.surgeon_kernels, op)(*arguments)
    torch.cuda.synchronize()
    assert runtime.cudaSetDevice(1 << 20) == INVALID_DEVICE == runtime.cudaPeekAtLastError()
    getattr(torch.ops.surgeon_kernels, op)(*arguments)
    assert runtime.cudaGetLastError() == INVALID_DEVICE
    torch.cuda.synchronize()
