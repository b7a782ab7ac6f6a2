import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgeon_kernels
from surgeon_kernels import column_block_cost, column_cost, element_cost, row_cost, spd_inverse, swap_cost
from tests.kernels import dense
from tests.kernels.dense import FACTOR_KINDS, factor, random_weight, relative_error, repeatable, with_condition

problems = st.tuples(
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from(FACTOR_KINDS),
    st.sampled_from(FACTOR_KINDS),
    st.integers(0, 2**31),
)


def build(problem):
    R, C, kind_g, kind_a, seed = problem
    return random_weight(R, C, seed), factor(R, kind_g, seed + 1), factor(C, kind_a, seed + 2)


def reciprocal(M):
    """``1 / diag(M⁻¹)``, as the pruning system computes it."""
    return 1.0 / spd_inverse(M).inverse.diagonal()


def marked(weight, index):
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[index] = True
    return mask


def brute(weight, G, A, sets):
    return torch.tensor([dense.cost(weight, marked(weight, K), G, A) for K in sets], dtype=torch.float64)


def elements(weight):
    return [(r, c) for r in range(weight.shape[0]) for c in range(weight.shape[1])]


def column(*indices):
    return slice(None), list(indices)


@repeatable
@given(problems)
def test_element_cost_is_eq_7_for_one_weight(problem):
    W, G, A = build(problem)
    expected = brute(W, G, A, elements(W)).view(W.shape)
    torch.testing.assert_close(element_cost(W, reciprocal(G), reciprocal(A)), expected, rtol=1e-6, atol=0)


@repeatable
@given(problems)
def test_element_cost_of_diagonals_is_the_loss_without_compensation(problem):
    W, G, A = build(problem)
    zeroed = [dense.objective(-W * marked(W, rc), G, A) for rc in elements(W)]
    expected = torch.tensor(zeroed, dtype=torch.float64).view(W.shape)
    torch.testing.assert_close(element_cost(W, G.diagonal(), A.diagonal()), expected, rtol=1e-12, atol=0)


@repeatable
@given(problems)
def test_row_cost_is_eq_7_for_a_whole_row(problem):
    W, G, A = build(problem)
    expected = brute(W, G, A, range(W.shape[0]))
    torch.testing.assert_close(row_cost(W, A, reciprocal(G)), expected, rtol=1e-6, atol=0)


@repeatable
@given(problems)
def test_column_cost_is_eq_7_for_a_whole_column(problem):
    W, G, A = build(problem)
    expected = brute(W, G, A, [column(c) for c in range(W.shape[1])])
    torch.testing.assert_close(column_cost(W, G, reciprocal(A)), expected, rtol=1e-6, atol=0)


@repeatable
@given(problems, st.integers(1, 4), st.integers(1, 3))
def test_column_block_cost_is_eq_7_for_the_block(problem, size, count):
    W, G, A = build(problem)
    size = min(size, W.shape[1])
    generator = torch.Generator().manual_seed(problem[-1])
    blocks = torch.stack([torch.randperm(W.shape[1], generator=generator)[:size] for _ in range(count)])
    expected = brute(W, G, A, [column(*block) for block in blocks.tolist()])
    actual = column_block_cost(W, G, spd_inverse(A).inverse, blocks)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("condition", [1e8, 1e10])
@pytest.mark.parametrize("ill", ["G", "A"])
def test_ill_conditioned_factors(condition, ill):
    W = random_weight(4, 5, 0)
    G = with_condition(4, condition, 1) if ill == "G" else factor(4, "plain", 1)
    A = with_condition(5, condition, 2) if ill == "A" else factor(5, "plain", 2)
    tolerance = 1e-14 * condition
    pairs = [
        (element_cost(W, reciprocal(G), reciprocal(A)).flatten(), elements(W)),
        (row_cost(W, A, reciprocal(G)), range(4)),
        (column_cost(W, G, reciprocal(A)), [column(c) for c in range(5)]),
        (column_block_cost(W, G, spd_inverse(A).inverse, torch.tensor([[3, 1]])), [column(3, 1)]),
    ]
    for actual, sets in pairs:
        torch.testing.assert_close(actual, brute(W, G, A, sets), rtol=tolerance, atol=0)


def test_a_block_of_one_is_the_column_and_a_block_of_all_is_the_whole_matrix():
    W, G, A = random_weight(4, 6, 0), factor(4, "plain", 1), factor(6, "outlier", 2)
    A_inv = spd_inverse(A).inverse
    ones = column_block_cost(W, G, A_inv, torch.arange(6)[:, None])
    torch.testing.assert_close(ones, column_cost(W, G, reciprocal(A)))
    whole = column_block_cost(W, G, A_inv, torch.arange(6)[None])
    assert float(whole) == pytest.approx(dense.objective(-W, G, A), rel=1e-9)


def test_weights_already_zero_cost_nothing():
    W, G, A = random_weight(4, 6, 0), factor(4, "plain", 1), factor(6, "plain", 2)
    W[1], W[:, 3] = 0.0, 0.0
    cost = element_cost(W, reciprocal(G), reciprocal(A))
    assert cost[1].eq(0).all() and cost[:, 3].eq(0).all() and (cost != 0).sum() == 15
    assert row_cost(W, A, reciprocal(G))[1] == 0
    assert column_cost(W, G, reciprocal(A))[3] == 0


def test_float32_agrees_with_float64():
    W, G, A = random_weight(5, 7, 0), factor(5, "plain", 1), factor(7, "dead", 2)
    g, a, A_inv, blocks = reciprocal(G), reciprocal(A), spd_inverse(A).inverse, torch.tensor([[0, 4], [2, 1]])
    for function, arguments in [
        (element_cost, (W, g, a)),
        (row_cost, (W, A, g)),
        (column_cost, (W, G, a)),
        (column_block_cost, (W, G, A_inv, blocks)),
    ]:
        single = function(*(x.float() if x.is_floating_point() else x for x in arguments))
        assert single.dtype == torch.float32
        assert relative_error(single, function(*arguments)) < 1e-4


def test_swap_cost_is_exact_for_uncoupled_weights():
    """With diagonal factors one weight's removal or return changes the objective by just this."""
    W = random_weight(4, 6, 0)
    G, A = torch.diag(torch.arange(1.0, 5)).double(), torch.diag(torch.arange(1.0, 7)).double()
    pruned = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    delta = dense.update(W, pruned, G, A)
    cost = swap_cost(W + delta, pruned, G @ delta @ A, G, A, 1 / G.diagonal(), 1 / A.diagonal())
    now = dense.optimum(W, pruned, G, A)
    for r in range(4):
        for c in range(6):
            flipped = pruned.clone()
            flipped[r, c] ^= True
            assert float(cost[r, c]) == pytest.approx(abs(dense.optimum(W, flipped, G, A) - now), abs=1e-12)


@repeatable
@given(st.integers(0, 2**31))
def test_swap_cost_lies_between_its_bounds(seed):
    W, G, A = random_weight(4, 5, seed), factor(4, "plain", seed + 1), factor(5, "outlier", seed + 2)
    pruned = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)) < 0.5
    delta = dense.update(W, pruned, G, A)
    gradient = G @ delta @ A
    g_inv, a_inv = torch.linalg.inv(G).diagonal(), torch.linalg.inv(A).diagonal()
    cost = swap_cost(W + delta, pruned, gradient, G, A, g_inv, a_inv)
    low, high = 1 / torch.outer(g_inv, a_inv), torch.outer(G.diagonal(), A.diagonal())
    removal, back = 0.5 * (W + delta) ** 2, 0.5 * gradient**2
    assert (torch.where(pruned, back / high, removal * low) <= cost * (1 + 1e-9)).all()
    assert (cost <= torch.where(pruned, back / low, removal * high) * (1 + 1e-9)).all()
    assert (low <= high * (1 + 1e-9)).all()


def test_the_former_name_of_swap_cost_says_the_new_one():
    with pytest.warns(DeprecationWarning, match=r"^surgeon_kernels.exchange_cost is called swap_cost now$"):
        assert surgeon_kernels.exchange_cost is swap_cost
    with pytest.raises(AttributeError, match="has no attribute 'exchange_costs'"):
        surgeon_kernels.exchange_costs  # noqa: B018
