"""The correction of the dual's preconditioner, against its formula and by what it does to the spectrum."""

import pytest
import torch

from surgeon_kernels.linalg.low_rank import leading_vectors, low_rank_correction
from surgeon_kernels.linalg.masked_cg import MaskedCG
from tests.kernels import dense
from tests.kernels.dense import random_mask, with_condition


def problem(R, C, density=0.5):
    G, A = with_condition(R, 1e2, 1), with_condition(C, 1e4, 2)
    return G, A, torch.linalg.inv(G), torch.linalg.inv(A), random_mask(R, C, "random", 3, density)


def matrix(correction, pruned):
    """The correction on the pruned entries, as a matrix."""
    columns = []
    for r, c in pruned.nonzero().tolist():
        X = torch.zeros(pruned.shape, dtype=torch.float64)
        X[r, c] = 1.0
        left, right, energy = correction.factors(X)
        assert energy == pytest.approx(float((left @ right.T)[r, c]), rel=1e-9, abs=1e-12)
        columns.append((left @ right.T)[pruned])
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("shape", [(1, 1), (3, 20), (20, 3), (18, 21)])
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_rows_and_columns_by_their_formula(shape, density):
    *factors, pruned = problem(*shape, density=density)
    correction = low_rank_correction(leading_vectors(*factors[::2]), leading_vectors(*factors[1::2]), pruned)
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).masked_fill(~pruned, 0.0)
    left, right, _ = correction.factors(X)
    expected = torch.zeros(shape, dtype=torch.float64)
    for V, mask, x, out in ((correction.V, ~pruned, X, expected), (correction.U, ~pruned.T, X.T, expected.T)):
        for r, kept in enumerate(mask):
            system = torch.eye(V.shape[1], dtype=torch.float64) + V[kept].T @ V[kept]
            out[r] += V @ torch.linalg.solve(system, V.T @ x[r])
    torch.testing.assert_close(left @ right.T, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_the_eigenvectors_are_the_leading_ones_of_the_scaled_factors():
    G, A, G_inv, A_inv, pruned = problem(40, 50)
    correction = low_rank_correction(leading_vectors(G, G_inv), leading_vectors(A, A_inv), pruned)
    for found, M, inverse in ((correction.U, G, G_inv), (correction.V, A, A_inv)):
        scales = inverse.diagonal().sqrt()
        values, vectors = torch.linalg.eigh(scales[:, None] * M * scales)
        expected = (vectors[:, -1:] * (values[-1:] - 1.0)) @ vectors[:, -1:].T
        rest = found @ found.T - expected
        assert torch.linalg.matrix_norm(rest, 2) <= values[-2] * (1 + 1e-3)
        assert found.shape[1] == 16


@pytest.mark.parametrize("density", [0.5, 0.8])
def test_symmetric_nonnegative_and_the_spectrum_it_leaves(density):
    G, A, G_inv, A_inv, pruned = problem(14, 18, density=density)
    correction = matrix(low_rank_correction(leading_vectors(G, G_inv), leading_vectors(A, A_inv), pruned), pruned)
    scale = float(correction.abs().max())
    assert (correction - correction.T).abs().max() <= 1e-9 * scale
    assert torch.linalg.eigvalsh(correction).min() >= -1e-9 * scale
    gone = pruned.flatten()
    S = dense.kron(G_inv, A_inv)[gone][:, gone]
    scales = S.diagonal().rsqrt()
    S = scales[:, None] * S * scales
    root = torch.linalg.cholesky(torch.eye(len(S), dtype=torch.float64) + correction)
    corrected, plain = torch.linalg.eigvalsh(root.T @ S @ root), torch.linalg.eigvalsh(S)
    assert corrected[-1] / corrected[0] < 0.2 * plain[-1] / plain[0]


def test_fewer_iterations_to_the_same_solution():
    G, A, G_inv, A_inv, pruned = problem(30, 40)
    b = torch.randn(30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).masked_fill(~pruned, 0.0)
    gone = pruned.flatten()
    exact = torch.linalg.solve(dense.kron(G_inv, A_inv)[gone][:, gone], b[pruned])
    best, lowered = 0.5 * float(exact @ b[pruned]), {}
    for correction in (None, low_rank_correction(leading_vectors(G, G_inv), leading_vectors(A, A_inv), pruned)):
        solver = MaskedCG([(G_inv, A_inv)], pruned, b.clone(), correction)
        lowered[correction is None] = torch.tensor(solver.run(600)).cumsum(0)
        assert (solver.x[pruned] - exact).norm() <= 1e-6 * exact.norm()
        assert solver.x[~pruned].eq(0).all()
    corrected, plain = (int((lowered[key] < 0.99 * best).sum()) for key in (False, True))
    assert corrected <= 0.6 * plain, (corrected, plain)
