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
from surgeon_kernels.spd_inverse import JITTERS

from . import dense
from .dense import (
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

INF, NAN = float("inf"), float("nan")


@repeatable
@given(problems)
def test_objective_is_the_dense_quadratic_form(problem):
    W, pruned, G, A = build(problem)
    for delta in (W, zeroing(W, pruned)):
        assert objective(delta, G, A) == pytest.approx(dense.objective(delta, G, A), rel=1e-10)


@repeatable
@given(problems)
def test_converges_to_eq_8(problem):
    W, pruned, G, A = build(problem)
    result = joint_update(W, pruned, G, A, tolerance=0.0, max_iterations=300)
    assert result.gap == 0.0 and result.jitter == 0.0
    assert relative_error(result.delta, dense.update(W, pruned, G, A)) < 1e-6
    assert objective(result.delta, G, A) <= dense.optimum(W, pruned, G, A) * (1 + 1e-6)
    assert result.objective[-1] == pytest.approx(objective(result.delta, G, A), rel=1e-6)
    assert_never_increases(result.objective)
    assert_exactly_zero(W, pruned, result.delta)


@pytest.mark.parametrize("ill", ["G", "A"])
@pytest.mark.parametrize("condition", [1e8, 1e10])
def test_ill_conditioned_factors(condition, ill):
    W, pruned = random_weight(5, 6, 0), random_mask(5, 6, "random", 1)
    G = with_condition(5, condition, 2) if ill == "G" else factor(5, "plain", 2)
    A = with_condition(6, condition, 3) if ill == "A" else factor(6, "plain", 3)
    result = joint_update(W, pruned, G, A, tolerance=0.0, max_iterations=2000)
    best = dense.optimum(W, pruned, G, A)
    assert abs(objective(result.delta, G, A) - best) < 1e-6 * best
    assert relative_error(result.delta, dense.update(W, pruned, G, A)) < 1e-2
    assert_never_increases(result.objective)


@repeatable
@given(
    R=st.integers(1, 6),
    C=st.integers(1, 7),
    kind_g=st.sampled_from(FACTOR_KINDS),
    kind_a=st.sampled_from(FACTOR_KINDS),
    seed=st.integers(0, 2**31),
)
def test_whole_rows_and_columns_agree_with_their_closed_form(R, C, kind_g, kind_a, seed):
    W, G, A = random_weight(R, C, seed), factor(R, kind_g, seed + 1), factor(C, kind_a, seed + 2)
    rows, columns = random_mask(1, R, "random", seed + 3)[0], random_mask(1, C, "random", seed + 4)[0]
    pruned = rows[:, None] | columns[None, :]
    result = joint_update(W, pruned, G, A, tolerance=0.0, max_iterations=300)
    assert relative_error(result.delta, rows_columns_update(W, G, A, rows, columns)) < 1e-6


def test_one_chunk_is_the_same_optimum():
    W, pruned, G, A = typical(kind="plain")
    result = joint_update(W, pruned, G, A, tolerance=0.0, max_iterations=300)
    chunk = chunked_update(W, pruned, torch.linalg.inv(G), torch.linalg.inv(A))
    assert relative_error(result.delta, chunk.delta) < 1e-6


@pytest.mark.parametrize("started", [False, True])
def test_nothing_pruned_moves_nothing(started):
    W, pruned, G, A = typical(density=0.0)
    assert not pruned.any()
    result = joint_update(W, pruned, G, A, start=random_weight(8, 12, 4) if started else None)
    assert result.delta.eq(0).all()
    assert result.objective == [0.0] and result.gap == 0.0


@pytest.mark.parametrize("started", [False, True])
def test_everything_pruned_is_minus_the_weight(started):
    W, pruned, G, A = typical(density=2.0)
    assert pruned.all()
    result = joint_update(W, pruned, G, A, start=random_weight(8, 12, 4) if started else None)
    assert_exactly_zero(W, pruned, result.delta)
    assert result.objective == [pytest.approx(dense.objective(-W, G, A), rel=1e-12)]
    assert result.gap == 0.0


def test_uncoupled_weights_are_solved_at_once():
    W, pruned, *_ = typical()
    G, A = torch.diag(torch.arange(1.0, 9)).double(), torch.diag(torch.arange(1.0, 13)).double()
    result = joint_update(W, pruned, G, A)
    assert torch.equal(result.delta, zeroing(W, pruned))
    assert len(result.objective) == 1 and result.gap == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero", ["G", "A", "both"])
def test_a_layer_that_no_data_reaches_loses_its_weights_and_nothing_else_moves(zero, dtype):
    W, pruned, *_ = typical()
    W = W.to(dtype)
    G = torch.zeros(8, 8) if zero != "A" else torch.eye(8)
    A = torch.zeros(12, 12) if zero != "G" else torch.eye(12)
    G, A = damp(G.to(dtype), 0.1), damp(A.to(dtype), 0.01)
    for start in (None, random_weight(8, 12, 4).to(dtype)):
        result = joint_update(W, pruned, G, A, start=start)
        torch.testing.assert_close(result.delta, zeroing(W, pruned), rtol=1e-5, atol=1e-5)
        assert result.objective[0] > 0 and result.gap <= 0.01
        assert_never_increases(result.objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_channels(dtype):
    """A kept weight of a dead output and a dead input compensates for nothing; the others follow eq. 8."""
    W, pruned, *_ = typical()
    G, A = factor(8, "dead", 1, damping=0.0), factor(12, "dead", 2, damping=0.0)
    G, A = damp(G.to(dtype), 0.1), damp(A.to(dtype), 0.01)
    result = joint_update(W.to(dtype), pruned, G, A, tolerance=0.0, max_iterations=300)
    expected = dense.update(W, pruned, G, A)
    assert relative_error(result.delta, expected) < (1e-3 if dtype == torch.float32 else 1e-6)
    assert result.delta[::3, ::3][~pruned[::3, ::3]].abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_float32_on_ill_conditioned_factors(seed):
    W, pruned = random_weight(16, 20, seed), random_mask(16, 20, "random", seed + 3)
    G, A = with_condition(16, 1e3, seed + 1), with_condition(20, 1e6, seed + 2)
    single = [x.float() for x in (W, G, A)]
    result = joint_update(single[0], pruned, single[1], single[2], tolerance=0.0, max_iterations=200)
    assert result.delta.dtype == torch.float32 and result.delta.isfinite().all()
    assert all(0.0 <= value < INF for value in result.objective)
    assert_never_increases(result.objective)
    assert_exactly_zero(single[0], pruned, result.delta)
    best, zeroed = dense.optimum(W, pruned, G, A), dense.objective(zeroing(W, pruned), G, A)
    assert best < dense.objective(result.delta, G, A) < 0.2 * zeroed


def test_float32_follows_float64():
    W, pruned, G, A = typical(kind="plain")
    exact = joint_update(W, pruned, G, A, tolerance=1e-4)
    single = joint_update(W.float(), pruned, G.float(), A.float(), tolerance=1e-4)
    assert relative_error(single.delta, exact.delta) < 1e-3
    assert single.objective == pytest.approx(exact.objective, rel=1e-4)


def test_the_inputs_are_left_alone():
    W, pruned, G, A = typical()
    inputs = (W, pruned, G, A, random_weight(8, 12, 5))
    before = [x.clone() for x in inputs]
    joint_update(W, pruned, G, A, start=inputs[-1])
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_rows_or_no_columns(shape):
    R, C = shape
    W = torch.zeros(R, C)
    result = joint_update(W, W.bool(), torch.eye(R), torch.eye(C))
    assert result.delta.shape == shape and result.objective == [0.0] and result.gap == 0.0


@pytest.mark.parametrize("which", ["G", "A"])
@pytest.mark.parametrize("jitter", JITTERS[1:])
def test_the_jitter_of_the_preconditioner_is_reported(jitter, which):
    """A factor so indefinite that its shrunk form lacks half of this jitter: the one before it is too small."""
    W, pruned, G, A = typical(density=0.25, kind="plain")
    rho = (1.0 - float(pruned.double().mean())) ** 0.5
    n = 8 if which == "G" else 12
    # Equal correlations c have the eigenvalue 1 + (n - 1) c; shrinking multiplies c by rho.
    c = -(1.0 + 0.5 * jitter) / ((n - 1) * rho)
    M = torch.full((n, n), c, dtype=torch.float64).fill_diagonal_(1.0)
    result = joint_update(W, pruned, *((M, A) if which == "G" else (G, M)))
    assert result.jitter == jitter
    assert result.delta.isfinite().all()
    assert_never_increases(result.objective)


@pytest.mark.parametrize("which", ["G", "A"])
def test_the_error_names_layer_and_factor(which):
    W, pruned, G, A = typical()
    (G if which == "G" else A).neg_()
    with pytest.raises(NotPositiveDefiniteError, match=rf"blocks\.3\.fc: shrunk {which} is not positive"):
        joint_update(W, pruned, G, A, name="blocks.3.fc")
    (G if which == "G" else A)[0, 1] = NAN
    with pytest.raises(NotPositiveDefiniteError, match=rf"blocks\.3\.fc: shrunk {which} holds NaN"):
        joint_update(W, pruned, G, A, name="blocks.3.fc")
