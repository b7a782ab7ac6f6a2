import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import (
    NotPositiveDefiniteError,
    chunked_update,
    damp,
    joint_update,
    objective,
    rows_columns_update,
)
from tests.kernels import dense
from tests.kernels.dense import (
    FACTOR_KINDS,
    assert_exactly_zero,
    assert_never_increases,
    build,
    factor,
    problems,
    random_mask,
    random_weight,
    relative_error,
    repeatable,
    typical,
    with_condition,
    zeroing,
)

both_ways = pytest.mark.parametrize("dual", [False, True], ids=["kept", "dual"])


def solve(W, pruned, G, A, dual, **options):
    """With the inverses, or without: on the kept weights alone."""
    inverses = (torch.linalg.inv(G), torch.linalg.inv(A)) if dual else ()
    return joint_update(W, pruned, G, A, *inverses, **options)


@repeatable
@given(problems)
def test_objective_is_the_dense_quadratic_form(problem):
    W, pruned, G, A = build(problem)
    for delta in (W, zeroing(W, pruned)):
        assert objective(delta, G, A) == pytest.approx(dense.objective(delta, G, A), rel=1e-10)


@both_ways
@repeatable
@given(problem=problems)
def test_converges_to_eq_8(dual, problem):
    W, pruned, G, A = build(problem)
    result = solve(W, pruned, G, A, dual, tolerance=0.0, max_iterations=300)
    assert result.gap < 1e-6 or result.objective[-1] < 1e-20
    assert relative_error(result.delta, dense.update(W, pruned, G, A)) < 1e-6
    assert objective(result.delta, G, A) <= dense.optimum(W, pruned, G, A) * (1 + 1e-6)
    assert result.objective[-1] == pytest.approx(objective(result.delta, G, A), rel=1e-6)
    assert_never_increases(result.objective)
    assert_exactly_zero(W, pruned, result.delta)


@both_ways
@pytest.mark.parametrize("ill", ["G", "A"])
@pytest.mark.parametrize("condition", [1e6, 1e8])
def test_ill_conditioned_factors(condition, ill, dual):
    W, pruned = random_weight(5, 6, 0), random_mask(5, 6, "random", 1)
    G = with_condition(5, condition, 2) if ill == "G" else factor(5, "plain", 2)
    A = with_condition(6, condition, 3) if ill == "A" else factor(6, "plain", 3)
    result = solve(W, pruned, G, A, dual, tolerance=0.0, max_iterations=2000)
    best = dense.optimum(W, pruned, G, A)
    assert abs(objective(result.delta, G, A) - best) < 1e-6 * best
    assert relative_error(result.delta, dense.update(W, pruned, G, A)) < 1e-2
    assert_never_increases(result.objective)


@both_ways
@repeatable
@given(
    R=st.integers(1, 6),
    C=st.integers(1, 7),
    kind_g=st.sampled_from(FACTOR_KINDS),
    kind_a=st.sampled_from(FACTOR_KINDS),
    seed=st.integers(0, 2**31),
)
def test_whole_rows_and_columns_agree_with_their_closed_form(dual, R, C, kind_g, kind_a, seed):
    W, G, A = random_weight(R, C, seed), factor(R, kind_g, seed + 1), factor(C, kind_a, seed + 2)
    rows, columns = random_mask(1, R, "random", seed + 3)[0], random_mask(1, C, "random", seed + 4)[0]
    pruned = rows[:, None] | columns[None, :]
    result = solve(W, pruned, G, A, dual, tolerance=0.0, max_iterations=300)
    assert relative_error(result.delta, rows_columns_update(W, G, A, rows, columns)) < 1e-6


@both_ways
def test_whole_columns_in_float32_agree_with_their_closed_form_to_1e_4(dual):
    W, G, A = random_weight(40, 60, 0), factor(40, "plain", 1), factor(60, "plain", 2)
    columns = random_mask(1, 60, "random", 3, 0.3)[0]
    expected = rows_columns_update(W, G, A, torch.zeros(40, dtype=torch.bool), columns)
    pruned = columns.expand(40, -1)
    result = solve(W.float(), pruned, G.float(), A.float(), dual, tolerance=0.0, max_iterations=300)
    assert relative_error(result.delta, expected) < 1e-4


@repeatable
@given(problem=problems, seed=st.integers(0, 100))
def test_the_sum_of_two_kronecker_products(problem, seed):
    W, pruned, G, A = build(problem)
    G2, A2 = factor(len(G), "plain", seed), factor(len(A), "outlier", seed + 1)
    F = dense.kron(G, A) + dense.kron(G2, A2)
    kept, gone = ~pruned.flatten(), pruned.flatten()
    expected = dense.zeroing(W, pruned).flatten()
    expected[kept] = -torch.linalg.solve(F[kept][:, kept], F[kept][:, gone] @ expected[gone])
    result = joint_update(W, pruned, G, A, second=(G2, A2), tolerance=0.0, max_iterations=300)
    assert relative_error(result.delta, expected.view_as(W)) < 1e-6
    assert result.objective[-1] == pytest.approx(0.5 * float(expected @ F @ expected), rel=1e-6)


def test_one_chunk_is_the_same_optimum():
    W, pruned, G, A = typical(kind="plain")
    G_inv, A_inv = torch.linalg.inv(G), torch.linalg.inv(A)
    result = joint_update(W, pruned, G, A, G_inv, A_inv, tolerance=0.0, max_iterations=300)
    assert relative_error(result.delta, chunked_update(W, pruned, G_inv, A_inv).delta) < 1e-6


@both_ways
def test_nothing_pruned_moves_nothing(dual):
    W, pruned, G, A = typical(density=0.0)
    assert not pruned.any()
    result = solve(W, pruned, G, A, dual)
    assert result.delta.eq(0).all()
    assert result.objective == [0.0] and result.bound == [0.0] and result.gap == 0.0


@both_ways
def test_everything_pruned_is_minus_the_weight(dual):
    W, pruned, G, A = typical(density=2.0)
    assert pruned.all()
    result = solve(W, pruned, G, A, dual)
    assert_exactly_zero(W, pruned, result.delta)
    assert result.objective == [pytest.approx(dense.objective(-W, G, A), rel=1e-12)]
    assert result.gap == 0.0


@both_ways
def test_uncoupled_weights_are_solved_at_once(dual):
    W, pruned, *_ = typical()
    G, A = torch.diag(torch.arange(1.0, 9)).double(), torch.diag(torch.arange(1.0, 13)).double()
    result = solve(W, pruned, G, A, dual)
    assert relative_error(result.delta, zeroing(W, pruned)) < 1e-12
    assert len(result.objective) == 1 and len(result.bound) <= 5 and result.gap < 1e-12


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero", ["G", "A", "both"])
def test_a_layer_that_no_data_reaches_loses_its_weights_and_nothing_else_moves(zero, dtype, dual):
    W, pruned, *_ = typical()
    G = torch.zeros(8, 8) if zero != "A" else torch.eye(8)
    A = torch.zeros(12, 12) if zero != "G" else torch.eye(12)
    G, A = damp(G.to(dtype), 0.1), damp(A.to(dtype), 0.01)
    result = solve(W.to(dtype), pruned, G, A, dual)
    torch.testing.assert_close(result.delta, zeroing(W, pruned).to(dtype), rtol=1e-5, atol=1e-5)
    assert result.objective[0] > 0 and result.gap <= 0.01
    assert_never_increases(result.objective)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_channels(dtype, dual):
    """A kept weight of a dead output and a dead input compensates for nothing; the others follow eq. 8."""
    W, pruned, *_ = typical()
    G, A = factor(8, "dead", 1, damping=0.0), factor(12, "dead", 2, damping=0.0)
    G, A = damp(G.to(dtype), 0.1), damp(A.to(dtype), 0.01)
    result = solve(W.to(dtype), pruned, G, A, dual, tolerance=0.0, max_iterations=300)
    expected = dense.update(W, pruned, G, A)
    assert relative_error(result.delta, expected) < (1e-3 if dtype == torch.float32 else 1e-6)
    assert result.delta[::3, ::3][~pruned[::3, ::3]].abs().max() < 1e-5


@both_ways
@pytest.mark.parametrize("seed", range(4))
def test_float32_on_ill_conditioned_factors(seed, dual):
    W, pruned = random_weight(16, 20, seed), random_mask(16, 20, "random", seed + 3)
    G, A = with_condition(16, 1e3, seed + 1), with_condition(20, 1e4, seed + 2)
    single = [x.float() for x in (W, G, A)]
    result = solve(single[0], pruned, single[1], single[2], dual, tolerance=1e-3, max_iterations=300)
    assert result.delta.dtype == torch.float32 and result.delta.isfinite().all()
    assert_never_increases(result.objective, rounding=1e-3)
    assert_exactly_zero(single[0], pruned, result.delta)
    best, zeroed = dense.optimum(W, pruned, G, A), dense.objective(zeroing(W, pruned), G, A)
    assert best < dense.objective(result.delta, G, A) < 0.05 * zeroed


@both_ways
def test_float32_follows_float64(dual):
    W, pruned, G, A = typical(kind="plain")
    exact = solve(W, pruned, G, A, dual, tolerance=1e-6)
    single = solve(W.float(), pruned, G.float(), A.float(), dual, tolerance=1e-6)
    assert relative_error(single.delta, exact.delta) < 1e-3
    assert single.objective[-1] == pytest.approx(exact.objective[-1], rel=1e-4)


@both_ways
def test_the_inputs_are_left_alone_and_need_not_be_contiguous(dual):
    W, pruned, G, A = typical()
    inverses = (torch.linalg.inv(G), torch.linalg.inv(A)) if dual else ()
    inputs = (W, pruned, G, A, *inverses)
    expected = joint_update(*inputs)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in inputs]
    before = [x.clone() for x in strided]
    result = joint_update(*strided)
    assert all(torch.equal(x, y) for x, y in zip(strided, before, strict=True))
    assert relative_error(result.delta, expected.delta) < 1e-9


def test_settings_of_the_process_are_left_alone(monkeypatch):
    """Other threads multiply meanwhile, in the precision that they have asked for."""
    W, pruned, G, A = (x if x.dtype == torch.bool else x.float() for x in typical(R=8, C=12))

    def refuse(precision):
        raise AssertionError(precision)

    monkeypatch.setattr(torch, "set_float32_matmul_precision", refuse)
    for second in (None, (G, A)):
        assert joint_update(W, pruned, G, A, second=second).gap <= 0.01


@both_ways
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_rows_or_no_columns(shape, dual):
    R, C = shape
    W = torch.zeros(R, C)
    result = solve(W, W.bool(), torch.eye(R), torch.eye(C), dual)
    assert result.delta.shape == shape and result.objective == [0.0] and result.gap == 0.0


@both_ways
@pytest.mark.parametrize("which", ["G", "A"])
def test_a_negative_factor_is_refused(which, dual):
    W, pruned, G, A = typical()
    (G if which == "G" else A).neg_()
    with pytest.raises(NotPositiveDefiniteError, match="diagonal is not positive"):
        solve(W, pruned, G, A, dual)


def test_inverses_come_in_pairs_and_not_with_a_second_product():
    W, pruned, G, A = typical()
    with pytest.raises(ValueError, match="both inverses or neither"):
        joint_update(W, pruned, G, A, G)
    with pytest.raises(ValueError, match="both inverses or neither"):
        joint_update(W, pruned, G, A, G, A, second=(G, A))
