"""Planned memory of the joint solver, against what it takes on a CUDA device."""

import pytest
import torch

from llm_surgeon.planning.memory import SOLVER_MATRICES
from surgeon_kernels import joint_update, nm_select, spd_inverse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_solver_takes_what_is_planned():
    shape = 4096, 4096
    torch.manual_seed(0)
    factors = []
    for n in shape:
        x = torch.randn(2 * n, n, device="cuda") * torch.arange(1, n + 1, device="cuda") ** -0.5
        factors.append(spd_inverse(x.T @ x / n, 0.05))
    g, a = factors
    weight = torch.randn(shape, device="cuda")
    pruned = nm_select(weight**2 / torch.outer(g.inverse.diagonal(), a.inverse.diagonal()), 2, 4)
    inputs = weight, pruned, g.damped, a.damped, g.inverse, a.inverse
    joint_update(*inputs, max_iterations=10)  # libraries take their workspaces
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    joint_update(*inputs, tolerance=1e-4, max_iterations=60)
    taken = torch.cuda.max_memory_allocated() - before
    planned = (SOLVER_MATRICES - 1.25) * weight.nbytes  # without the weight and the mask
    assert 0.75 * planned <= taken <= planned
