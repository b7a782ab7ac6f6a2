"""The joint solver's kernels on a CUDA device, against the PyTorch reference and the float64 solution."""

import pytest
import torch

from surgeon_kernels import joint_update, objective, rows_columns_update
from surgeon_kernels.linalg.low_rank import leading_vectors, low_rank_correction
from surgeon_kernels.linalg.masked_cg import MaskedCG, masked_cg
from tests.kernels.dense import factor, random_mask, random_weight, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(1, 1), (5, 7), (64, 128), (300, 321), (128, 5000), (2500, 96)]


def problem(rows, columns, density=0.5, kinds=("plain", "outlier")):
    W, pruned = random_weight(rows, columns, 0), random_mask(rows, columns, "random", 1, density)
    G, A = factor(rows, kinds[0], 2), factor(columns, kinds[1], 3)
    return W, pruned, G, A


def on_gpu(*tensors):
    return [x.cuda() if x.dtype == torch.bool else x.cuda().float() for x in tensors]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("terms", [1, 2])
def test_iterations_follow_the_reference(shape, terms):
    pairs = [
        tuple(on_gpu(factor(shape[0], "plain", 2 * i), factor(shape[1], "plain", 2 * i + 1))) for i in range(terms)
    ]
    W, free = on_gpu(random_weight(*shape, 0), random_mask(*shape, "random", 1))
    b = W.masked_fill(~free, 0.0)
    solver, reference = masked_cg(pairs, free, b.clone()), MaskedCG(pairs, free, b.clone())
    assert type(solver) is not MaskedCG
    solver._image.fill_(float("nan"))
    solver._half.fill_(float("nan"))
    for _ in range(2):
        assert solver.run(3) == pytest.approx(reference.run(3), rel=1e-2, abs=1e-9)
    for name in ("x", "residual"):
        actual, expected = getattr(solver, name), getattr(reference, name)
        assert float((actual - expected).norm()) <= 1e-2 * float(b.norm())
        assert actual[~free].eq(0).all()


@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (300, 321), (128, 5000), (2500, 96)])
def test_corrected_iterations_follow_the_reference(shape):
    G, A = on_gpu(factor(shape[0], "plain", 2), factor(shape[1], "outlier", 3))
    inverses = [torch.linalg.inv(M.double()).float() for M in (G, A)]
    W, free = on_gpu(random_weight(*shape, 0), random_mask(*shape, "random", 1))
    b = W.masked_fill(~free, 0.0)
    correction = low_rank_correction(*map(leading_vectors, (G, A), inverses), free)
    solver = masked_cg([tuple(inverses)], free, b.clone(), correction)
    reference = MaskedCG([tuple(inverses)], free, b.clone(), correction)
    solver._image.fill_(float("nan"))
    solver._half.fill_(float("nan"))
    actual, expected = solver.run(3) + solver.run(3), reference.run(3) + reference.run(3)
    # Decreases at the rounding errors of the large ones (a small problem is solved by then) follow those.
    assert actual == pytest.approx(expected, rel=2e-2, abs=max(1e-5 * sum(expected), 1e-9))
    assert float((solver.x - reference.x).norm()) <= 2e-2 * float(reference.x.norm())
    assert solver.x[~free].eq(0).all() and solver.residual[~free].eq(0).all()


def test_the_same_inputs_give_the_same_bits():
    inputs = on_gpu(*problem(700, 900))
    inverses = [torch.linalg.inv(M) for M in inputs[2:]]
    first, again = (joint_update(*inputs, *inverses, tolerance=1e-3) for _ in range(2))
    assert torch.equal(first.delta, again.delta) and first.objective == again.objective


def test_inputs_in_another_memory_order():
    inputs = on_gpu(*problem(300, 500))
    inputs += [torch.linalg.inv(M) for M in inputs[2:]]
    expected = joint_update(*inputs)
    result = joint_update(*(x.T.contiguous().T for x in inputs))
    assert relative_error(result.delta.cpu(), expected.delta.cpu()) < 1e-4
    assert result.objective[-1] == pytest.approx(expected.objective[-1], rel=1e-4)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 321), (64, 1100)])
@pytest.mark.parametrize("kinds", [("plain", "outlier"), ("outlier", "deficient")])
def test_reaches_the_tolerance_in_float64s_eyes(shape, density, kinds):
    W, pruned, G, A = (x.cuda() for x in problem(*shape, density, kinds))
    G_inv, A_inv = torch.linalg.inv(G), torch.linalg.inv(A)
    best = joint_update(W, pruned, G, A, G_inv, A_inv, tolerance=1e-5, max_iterations=600)
    result = joint_update(*on_gpu(W, pruned, G, A, G_inv, A_inv))
    assert result.gap <= 0.01
    true = objective(result.delta.double(), G, A)
    assert true == pytest.approx(result.objective[-1], rel=1e-3, abs=1e-9)
    assert best.objective[-1] * (1 - 1e-4) <= true <= 1.015 * best.objective[-1] + 1e-9
    assert torch.equal(result.delta[pruned], -W.float()[pruned])


def test_whole_columns_agree_with_their_closed_form_to_1e_4():
    W, _, G, A = problem(200, 300, kinds=("plain", "plain"))
    columns = random_mask(1, 300, "random", 4, 0.3)[0]
    expected = rows_columns_update(W, G, A, torch.zeros(200, dtype=torch.bool), columns)
    inputs = on_gpu(W, columns.expand(200, -1), G, A, torch.linalg.inv(G), torch.linalg.inv(A))
    result = joint_update(*inputs, tolerance=0.0, max_iterations=400)
    assert relative_error(result.delta.cpu(), expected) < 1e-4


def test_float64_takes_the_reference_and_full_precision():
    W, pruned, G, A = problem(40, 60)
    expected = joint_update(W, pruned, G, A, tolerance=1e-9, max_iterations=500)
    result = joint_update(*(x.cuda() for x in (W, pruned, G, A)), tolerance=1e-9, max_iterations=500)
    assert relative_error(result.delta.cpu(), expected.delta) < 1e-6
