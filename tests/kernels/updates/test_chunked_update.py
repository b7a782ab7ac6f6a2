import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import (
    NotPositiveDefiniteError,
    chunked_update,
    element_cost,
    independent_update,
    spd_inverse,
)
from tests.kernels import dense
from tests.kernels.dense import (
    assert_exactly_zero,
    build,
    factor,
    problems,
    random_mask,
    random_weight,
    relative_error,
    repeatable,
    with_condition,
)


def inverses(G, A):
    return torch.linalg.inv(G), torch.linalg.inv(A)


def chunk_list(pruned, m):
    """Positions of the pruned weights in runs of whole rows of at most m; only a row with more than m is split."""
    chunks, run = [], []
    for r, row in enumerate(pruned.tolist()):
        positions = [r * len(row) + c for c, yes in enumerate(row) if yes]
        if run and len(run) + len(positions) > m:
            chunks.append(run)
            run = []
        run = run + positions
        while len(run) > m:
            chunks.append(run[:m])
            run = run[m:]
    return [chunk for chunk in [*chunks, run] if chunk]


def by_dense_chunks(W, pruned, G, A, m, sequential):
    """Eq. 8 chunk by chunk with the dense F⁻¹; a chunk sees the earlier ones' Δ, or not."""
    F_inv = torch.linalg.inv(dense.kron(G, A))
    w, delta = W.flatten(), torch.zeros(W.numel(), dtype=torch.float64)
    for K in chunk_list(pruned, m):
        target = w[K] + delta[K] if sequential else w[K]
        delta = delta - F_inv[:, K] @ torch.linalg.solve(F_inv[K][:, K], target)
    return torch.where(pruned, -W, delta.view(W.shape))


@repeatable
@given(problems, st.booleans())
def test_one_chunk_is_eq_8(problem, sequential):
    W, pruned, G, A = build(problem)
    result = chunked_update(W, pruned, *inverses(G, A), max_correlated=W.numel(), sequential=sequential)
    assert result.jitter == 0.0
    assert relative_error(result.delta, dense.update(W, pruned, G, A)) < 1e-7
    assert_exactly_zero(W, pruned, result.delta)


@repeatable
@given(problems, st.integers(1, 12), st.booleans())
def test_chunks_of_any_size(problem, m, sequential):
    W, pruned, G, A = build(problem)
    result = chunked_update(W, pruned, *inverses(G, A), max_correlated=m, sequential=sequential)
    assert relative_error(result.delta, by_dense_chunks(W, pruned, G, A, m, sequential)) < 1e-7
    assert_exactly_zero(W, pruned, result.delta)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("m", range(1, 18))
def test_ragged_rows_and_split_rows(m, sequential):
    W, G, A = random_weight(6, 8, 0), factor(6, "plain", 1), factor(8, "plain", 2)
    pruned = torch.zeros(6, 8, dtype=torch.bool)
    for row, count in enumerate([0, 3, 8, 0, 1, 5]):
        pruned[row, torch.randperm(8, generator=torch.Generator().manual_seed(row))[:count]] = True
    delta = chunked_update(W, pruned, *inverses(G, A), max_correlated=m, sequential=sequential).delta
    assert relative_error(delta, by_dense_chunks(W, pruned, G, A, m, sequential)) < 1e-10


def test_the_dense_definition_depends_on_order_mode_and_m():
    """Guards the tests above: the variants they tell apart do differ on such problems."""
    W, pruned, G, A = build((5, 6, "random", "plain", "plain", 7))
    variants = [by_dense_chunks(W, pruned, G, A, m, s) for m in (1, 4, 30) for s in (True, False)]
    distinct = [variants[0]]
    for variant in variants[1:]:
        if all(relative_error(variant, other) > 1e-3 for other in distinct):
            distinct.append(variant)
    assert len(distinct) == 5  # the two modes agree only on the single chunk of m = 30


@repeatable
@given(problems)
def test_independent_update_is_the_sum_of_single_weight_updates(problem):
    W, pruned, G, A = build(problem)
    delta = independent_update(W, pruned, *inverses(G, A))
    single = [
        dense.update(W, mask, G, A) for mask in torch.eye(W.numel()).bool().view(-1, *W.shape) if (mask & pruned).any()
    ]
    expected = torch.where(pruned, -W, sum(single, torch.zeros_like(W)))
    assert relative_error(delta, expected) < 1e-7
    summed = chunked_update(W, pruned, *inverses(G, A), max_correlated=1, sequential=False).delta
    assert relative_error(summed, delta) < 1e-12
    assert_exactly_zero(W, pruned, delta)


def test_a_single_weight_costs_what_element_cost_predicts():
    W, G, A = random_weight(4, 5, 0), factor(4, "plain", 1), factor(5, "plain", 2)
    G_inv, A_inv = inverses(G, A)
    pruned = random_mask(4, 5, "single", 0)
    delta = chunked_update(W, pruned, G_inv, A_inv).delta
    predicted = element_cost(W, 1 / G_inv.diagonal(), 1 / A_inv.diagonal())[pruned]
    assert dense.objective(delta, G, A) == pytest.approx(float(predicted), rel=1e-10)


def test_the_truth_is_the_constrained_minimum():
    """Eq. 8 as the tests compute it: feasible, and no gradient on the kept weights."""
    W, pruned, G, A = build((5, 6, "random", "plain", "outlier", 3))
    delta = dense.update(W, pruned, G, A)
    assert relative_error(delta[pruned], -W[pruned]) < 1e-9
    gradient = G @ delta @ A
    assert float(gradient[~pruned].abs().max()) < 1e-9 * float(gradient.abs().max())


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("ill", ["G", "A"])
@pytest.mark.parametrize("condition", [1e8, 1e10])
def test_ill_conditioned_factors(condition, ill, sequential):
    W, pruned = random_weight(5, 6, 0), random_mask(5, 6, "random", 1)
    G = with_condition(5, condition, 2) if ill == "G" else factor(5, "plain", 2)
    A = with_condition(6, condition, 3) if ill == "A" else factor(6, "plain", 3)
    G_inv, A_inv = spd_inverse(G).inverse, spd_inverse(A).inverse
    for m in (4, 30):
        delta, jitter = chunked_update(W, pruned, G_inv, A_inv, max_correlated=m, sequential=sequential)
        assert jitter == 0.0
        expected = by_dense_chunks(W, pruned, G, A, m, sequential)
        assert relative_error(delta, expected) < 1e-14 * condition


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero", ["G", "A", "both"])
def test_a_layer_that_no_data_reaches_loses_its_weights_and_nothing_else_moves(zero, dtype):
    W, pruned = random_weight(4, 6, 0).to(dtype), random_mask(4, 6, "random", 1)
    G = torch.zeros(4, 4) if zero != "A" else torch.eye(4)
    A = torch.zeros(6, 6) if zero != "G" else torch.eye(6)
    G_inv, A_inv = (spd_inverse(M.to(dtype), 0.01).inverse for M in (G, A))
    zeroed = torch.where(pruned, -W, torch.zeros_like(W))
    for m in (1, 5, 24):
        for sequential in (True, False):
            delta, jitter = chunked_update(W, pruned, G_inv, A_inv, max_correlated=m, sequential=sequential)
            assert torch.equal(delta, zeroed) and jitter == 0.0
    assert torch.equal(independent_update(W, pruned, G_inv, A_inv), zeroed)


def test_weights_already_zero_are_removed_for_free():
    """A weight pruned in an earlier shot is in the mask, at zero: with no others pruned, nothing moves."""
    W, G, A = random_weight(4, 5, 0), factor(4, "plain", 1), factor(5, "plain", 2)
    pruned = random_mask(4, 5, "random", 1)
    W[pruned] = -0.0
    for sequential in (True, False):
        delta = chunked_update(W, pruned, *inverses(G, A), max_correlated=3, sequential=sequential).delta
        assert delta.eq(0).all()
        assert_exactly_zero(W, pruned, delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sequential", [True, False])
def test_a_singular_system_gets_jitter_and_the_others_do_not(dtype, sequential):
    W = random_weight(2, 6, 0).to(dtype)
    pruned = torch.tensor([[False] * 3 + [True] * 3, [True] * 3 + [False] * 3])
    G_inv = torch.eye(2, dtype=dtype)
    A_inv = torch.zeros(6, 6, dtype=dtype)
    A_inv[:3, :3] = 1.0  # the system of row 1 is exactly singular
    A_inv[3:, 3:] = factor(3, "plain", 1).to(dtype)
    A_inv[2, 4] = A_inv[4, 2] = 0.25
    delta, jitter = chunked_update(W, pruned, G_inv, A_inv, max_correlated=3, sequential=sequential)
    assert jitter == 1e-6
    assert delta.isfinite().all()
    assert_exactly_zero(W, pruned, delta)
    expected = -torch.linalg.solve(A_inv[3:, 3:], W[0, 3:]) @ A_inv[3:, :3]
    torch.testing.assert_close(delta[0, :3], expected)
    if dtype == torch.float64:
        system = A_inv[:3, :3] + 1e-6 * torch.eye(3, dtype=dtype)
        expected = -torch.linalg.solve(system, W[1, :3]) @ A_inv[:3, 3:]
        torch.testing.assert_close(delta[1, 3:], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sequential", [True, False])
def test_the_largest_jitter_is_reported(sequential):
    W = random_weight(2, 6, 0)
    pruned = torch.tensor([[False] * 3 + [True] * 3, [True] * 3 + [False] * 3])
    A_inv = torch.zeros(6, 6, dtype=torch.float64)
    A_inv[:3, :3] = 1.0  # row 1, the later: singular, needs 1e-6
    A_inv[3:, 3:] = -0.5 * (1 + 5e-5)  # row 0: lowest eigenvalue -5e-5, needs 1e-4
    A_inv.fill_diagonal_(1.0)
    G_inv = torch.eye(2, dtype=torch.float64)
    assert chunked_update(W, pruned, G_inv, A_inv, max_correlated=3, sequential=sequential).jitter == 1e-4


@pytest.mark.parametrize("sequential", [True, False])
def test_float32_near_singular_factors_stay_finite(sequential):
    """G and A each have one eigenvalue of 1e-9 in the midst of ones: in float32 the inverses are rank one."""
    W, pruned = random_weight(6, 8, 0).float(), random_mask(6, 8, "random", 1)
    u, v = (torch.nn.functional.normalize(random_weight(1, n, n)).float() for n in (6, 8))
    G_inv, A_inv = torch.eye(6) + 1e9 * u.T @ u, torch.eye(8) + 1e9 * v.T @ v
    delta, jitter = chunked_update(W, pruned, G_inv, A_inv, max_correlated=12, sequential=sequential)
    assert 0.0 < jitter <= 1e-4
    assert delta.dtype == torch.float32 and delta.isfinite().all()
    assert_exactly_zero(W, pruned, delta)


@pytest.mark.parametrize("sequential", [True, False])
def test_float32_follows_float64(sequential):
    W, pruned, G, A = build((5, 6, "random", "plain", "plain", 5))
    exact = chunked_update(W, pruned, *inverses(G, A), max_correlated=7, sequential=sequential).delta
    G_inv, A_inv = (M.float() for M in inverses(G, A))
    single = chunked_update(W.float(), pruned, G_inv, A_inv, max_correlated=7, sequential=sequential).delta
    assert single.dtype == torch.float32
    assert relative_error(single, exact) < 1e-4


@pytest.mark.parametrize("sequential", [True, False])
def test_no_rows_or_no_columns(sequential):
    for R, C in ((0, 3), (3, 0)):
        W = torch.zeros(R, C)
        delta, jitter = chunked_update(W, W.bool(), torch.eye(R), torch.eye(C), sequential=sequential)
        assert delta.shape == (R, C) and jitter == 0.0


def test_the_inputs_are_left_alone():
    W, pruned, G, A = build((4, 5, "random", "plain", "plain", 1))
    inputs = (W, pruned, *inverses(G, A))
    before = [x.clone() for x in inputs]
    for sequential in (True, False):
        chunked_update(*inputs, max_correlated=3, sequential=sequential)
    independent_update(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_system_beyond_repair_is_an_error(sequential, bad):
    W, pruned = random_weight(2, 3, 0), random_mask(2, 3, "all", 0)
    with pytest.raises(NotPositiveDefiniteError, match="system of 6 correlated weights"):
        chunked_update(W, pruned, torch.eye(2).double(), bad * torch.eye(3).double(), sequential=sequential)


@pytest.mark.parametrize("m", [0, -5])
def test_m_must_be_positive(m):
    with pytest.raises(ValueError, match=f"at least 1, not {m}"):
        chunked_update(torch.ones(1, 1), torch.ones(1, 1).bool(), torch.eye(1), torch.eye(1), max_correlated=m)
