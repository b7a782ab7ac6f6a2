import pytest
import torch

from surgeon_kernels.linalg.sweep_inverse import sweep_inverse
from tests.kernels.dense import factor, relative_error, with_condition


@pytest.mark.parametrize("n", [1, 5, 16, 17, 40, 65])
@pytest.mark.parametrize("block", [16, 64])
def test_inverse_of_any_size(n, block):
    M = factor(n, "plain", n)
    before = M.clone()
    lower = M.tril() + torch.full_like(M, float("nan")).triu(1)
    for matrix in (M, lower):
        inverse, good = sweep_inverse(matrix, block=block)
        assert bool(good) and torch.equal(inverse, inverse.T)
        torch.testing.assert_close(inverse, torch.linalg.inv(M), rtol=1e-11, atol=1e-12)
    assert torch.equal(M, before)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_sweeps_are_as_accurate_as_the_library(condition):
    M = with_condition(96, condition, 0)
    exact, L = torch.linalg.inv(M), torch.linalg.cholesky(M.float())
    error = relative_error(sweep_inverse(M.float(), block=16)[0], exact)
    assert error < 2 * relative_error(torch.cholesky_inverse(L), exact) + 1e-6


def test_what_is_not_positive_definite_is_told():
    assert not bool(sweep_inverse(-torch.eye(40), block=16)[1])
    assert not bool(sweep_inverse(torch.ones(40, 40), block=16)[1])
    M = torch.eye(40)
    M[39, 39] = float("nan")
    assert not bool(sweep_inverse(M, block=16)[1])
    M[39, 39] = -1.0
    assert not bool(sweep_inverse(M, block=16)[1])
