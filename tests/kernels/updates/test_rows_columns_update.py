import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import NotPositiveDefiniteError, column_cost, row_cost, rows_columns_update, spd_inverse
from tests.kernels import dense
from tests.kernels.dense import (
    FACTOR_KINDS,
    assert_exactly_zero,
    factor,
    random_weight,
    relative_error,
    repeatable,
    with_condition,
)

removals = st.sampled_from(["random", "none", "all", "one"])


def removed(n, kind, seed):
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5
    if kind != "random":
        mask[:] = kind == "all"
    if kind == "one":
        mask[n // 2] = True
    return mask


def union(rows, columns):
    return rows[:, None] | columns[None, :]


@repeatable
@given(
    R=st.integers(1, 5),
    C=st.integers(1, 6),
    kind_g=st.sampled_from(FACTOR_KINDS),
    kind_a=st.sampled_from(FACTOR_KINDS),
    which_rows=removals,
    which_columns=removals,
    seed=st.integers(0, 2**31),
)
def test_is_eq_8_on_the_union_of_rows_and_columns(R, C, kind_g, kind_a, which_rows, which_columns, seed):
    W, G, A = random_weight(R, C, seed), factor(R, kind_g, seed + 1), factor(C, kind_a, seed + 2)
    rows, columns = removed(R, which_rows, seed + 3), removed(C, which_columns, seed + 4)
    delta = rows_columns_update(W, G, A, rows, columns)
    assert relative_error(delta, dense.update(W, union(rows, columns), G, A)) < 1e-7
    assert_exactly_zero(W, union(rows, columns), delta)


@pytest.mark.parametrize("which_rows", ["random", "none", "all", "one"])
@pytest.mark.parametrize("which_columns", ["random", "none", "all", "one"])
def test_every_combination(which_rows, which_columns):
    W, G, A = random_weight(5, 7, 0), factor(5, "plain", 1), factor(7, "outlier", 2)
    rows, columns = removed(5, which_rows, 3), removed(7, which_columns, 5)
    delta = rows_columns_update(W, G, A, rows, columns)
    assert relative_error(delta, dense.update(W, union(rows, columns), G, A)) < 1e-9
    known = int(rows.sum()), int(columns.sum())
    assert torch.equal(rows_columns_update(W, G, A, rows, columns, removed=known), delta)
    if which_rows == which_columns == "none":
        assert delta.eq(0).all()
    if "all" in (which_rows, which_columns):
        assert torch.equal(delta, -W)


def test_one_row_or_column_costs_what_was_predicted():
    W, G, A = random_weight(4, 6, 0), factor(4, "plain", 1), factor(6, "plain", 2)
    none_of_4, none_of_6 = torch.zeros(4).bool(), torch.zeros(6).bool()
    row, column = removed(4, "one", 0), removed(6, "one", 0)
    costs = row_cost(W, A, 1 / spd_inverse(G).inverse.diagonal())
    delta = rows_columns_update(W, G, A, row, none_of_6)
    assert dense.objective(delta, G, A) == pytest.approx(float(costs[row]), rel=1e-10)
    costs = column_cost(W, G, 1 / spd_inverse(A).inverse.diagonal())
    delta = rows_columns_update(W, G, A, none_of_4, column)
    assert dense.objective(delta, G, A) == pytest.approx(float(costs[column]), rel=1e-10)


@pytest.mark.parametrize("ill", ["G", "A"])
@pytest.mark.parametrize("condition", [1e8, 1e10])
def test_ill_conditioned_factors(condition, ill):
    W, rows, columns = random_weight(5, 6, 0), removed(5, "random", 3), removed(6, "random", 4)
    G = with_condition(5, condition, 1) if ill == "G" else factor(5, "plain", 1)
    A = with_condition(6, condition, 2) if ill == "A" else factor(6, "plain", 2)
    delta = rows_columns_update(W, G, A, rows, columns)
    assert relative_error(delta, dense.update(W, union(rows, columns), G, A)) < 1e-14 * condition


def test_uncorrelated_channels_do_not_move():
    W, rows, columns = random_weight(4, 6, 0), removed(4, "random", 3), removed(6, "random", 4)
    G, A = torch.diag(torch.arange(1.0, 5)).double(), torch.diag(torch.arange(1.0, 7)).double()
    delta = rows_columns_update(W, G, A, rows, columns)
    assert torch.equal(delta, torch.where(union(rows, columns), -W, torch.zeros_like(W)))


def test_float32_follows_float64_and_leaves_its_inputs_alone():
    W, G, A = random_weight(5, 7, 0), factor(5, "plain", 1), factor(7, "dead", 2)
    rows, columns = removed(5, "random", 3), removed(7, "random", 4)
    inputs = (W.float(), G.float(), A.float(), rows, columns)
    before = [x.clone() for x in inputs]
    delta = rows_columns_update(*inputs)
    assert delta.dtype == torch.float32
    assert relative_error(delta, rows_columns_update(W, G, A, rows, columns)) < 1e-4
    assert_exactly_zero(inputs[0], union(rows, columns), delta)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    untouched = rows_columns_update(inputs[0], inputs[1], inputs[2], rows & False, columns & False)
    untouched.add_(1.0)
    assert torch.equal(inputs[0], before[0])


@pytest.mark.parametrize("which", ["G", "A"])
def test_the_error_names_layer_and_factor(which):
    W, G, A = random_weight(4, 5, 0), factor(4, "plain", 1), factor(5, "plain", 2)
    (G if which == "G" else A).neg_()
    rows, columns = removed(4, "one", 0), removed(5, "one", 0)
    with pytest.raises(NotPositiveDefiniteError, match=rf"blocks\.3\.fc: {which} of the kept"):
        rows_columns_update(W, G, A, rows, columns, name="blocks.3.fc")
    assert rows_columns_update(W, G, A, rows, columns, removed=(1, 1)).isnan().any()
