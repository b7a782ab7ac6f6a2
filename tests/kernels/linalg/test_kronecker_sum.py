"""Sums of two Kronecker products against dense float64 mathematics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels.linalg.kronecker_sum import KroneckerSum, orthonormal
from tests.kernels import dense
from tests.kernels.dense import factor, relative_error, repeatable


def symmetric(n, seed):
    x = torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + x.transpose(1, 2)


def dense_sum(pairs):
    return sum(dense.kron(G, A) for G, A in pairs)


@repeatable
@given(R=st.integers(1, 5), C=st.integers(1, 6), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("positive", [False, True])
def test_the_inverse_of_the_sum(positive, R, C, seed):
    G = [factor(R, "plain", seed), factor(R, "outlier", seed + 1) if positive else symmetric(R, seed + 1)[0]]
    A = [factor(C, "plain", seed + 2), factor(C, "deficient", seed + 3) if positive else symmetric(C, seed + 3)[0]]
    total = KroneckerSum((G[0], G[1]), (A[0], A[1]))
    F = dense_sum(total.terms)
    first = dense.kron(G[0], A[0])
    assert torch.linalg.eigvalsh(F - 0.1 * first).min() > -1e-9 * F.norm()
    if positive:  # the second pair is taken whole
        assert relative_error(total.terms[1][0], G[1]) < 1e-12
    inverse = torch.linalg.inv(F)
    X = torch.randn(R, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert relative_error(total.solve(X), (inverse @ X.flatten()).view(R, C)) < 1e-6
    assert relative_error(total.inverse_diagonal(), inverse.diagonal().view(R, C)) < 1e-6


def test_orthonormal_keeps_the_first_direction_and_the_span():
    pair = symmetric(4, 0)
    made = orthonormal(pair)
    assert relative_error(made.flatten(1) @ made.flatten(1).T, torch.eye(2)) < 1e-12
    assert relative_error(made[0] * pair[0].norm(), pair[0]) < 1e-12
    projected = sum((pair[1] * M).sum() * M for M in made)
    assert relative_error(projected, pair[1]) < 1e-12


def test_orthonormal_of_dependent_matrices_is_finite():
    M = symmetric(3, 0)[0]
    pair = orthonormal(torch.stack([M, 2 * M]))
    assert pair[0].norm() == pytest.approx(1.0) and pair.isfinite().all()
