import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import nm_group_cost, nm_select

from .dense import repeatable

PATTERNS = [(2, 4), (1, 4), (4, 8), (8, 16), (3, 5)]
INF, NAN = float("inf"), float("nan")


def by_sorting(cost, n, m):
    """Prune by ascending (cost, column) in each group, in plain Python."""
    mask = torch.zeros(cost.shape, dtype=torch.bool)
    for r, row in enumerate(cost.tolist()):
        for start in range(0, len(row), m):
            for c in sorted(range(start, start + m), key=lambda c: (row[c], c))[: m - n]:
                mask[r, c] = True
    return mask


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prunes_the_cheapest_combination_of_every_group(n, m, dtype):
    cost = torch.randn(2, 2 * m, generator=torch.Generator().manual_seed(m), dtype=torch.float64).to(dtype)
    pruned = nm_select(cost, n, m)
    assert pruned.dtype == torch.bool and pruned.shape == cost.shape
    totals = nm_group_cost(cost, pruned, n, m)
    assert totals.shape == (2, 2)
    for r, group in itertools.product(range(2), range(2)):
        costs, chosen = (x[r, group * m : (group + 1) * m].tolist() for x in (cost, pruned))
        assert sum(chosen) == m - n
        cheapest = min(sum(combination) for combination in itertools.combinations(costs, m - n))
        assert sum(c for c, yes in zip(costs, chosen, strict=True) if yes) == pytest.approx(cheapest, abs=1e-5)
        assert float(totals[r, group]) == pytest.approx(cheapest, abs=1e-5)


@repeatable
@given(
    pattern=st.sampled_from(PATTERNS),
    rows=st.integers(0, 3),
    groups=st.integers(0, 3),
    data=st.data(),
)
def test_ties_and_infinities(pattern, rows, groups, data):
    n, m = pattern
    values = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, INF, -INF])
    width = groups * m
    flat = data.draw(st.lists(values, min_size=rows * width, max_size=rows * width))
    cost = torch.tensor(flat).view(rows, width)
    pruned = nm_select(cost, n, m)
    assert torch.equal(pruned, by_sorting(cost, n, m))
    assert torch.equal(nm_select(cost.T.contiguous().T, n, m), pruned)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_of_equal_costs_the_lower_column_goes_first(n, m):
    pruned = nm_select(torch.full((3, 2 * m), 7.0), n, m)
    group = [True] * (m - n) + [False] * n
    assert pruned.tolist() == [group * 2] * 3


def test_infinite_costs():
    cost = torch.tensor([[INF, -INF, INF, 1.0, INF, INF, INF, INF]])
    pruned = nm_select(cost, 2, 4)
    assert pruned.tolist() == [[False, True, False, True, True, True, False, False]]
    assert nm_group_cost(cost, pruned, 2, 4).tolist() == [[-INF, INF]]


def test_group_cost_sums_the_pruned_alone():
    cost = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [INF, 1.0, 3.0, 0.5, NAN, 0.25]])
    pruned = torch.tensor([[True, False, True, False, False, True], [False, True, False, True, False, True]])
    assert nm_group_cost(cost, pruned, 1, 3).tolist() == [[5.0, 32.0], [1.0, 0.75]]


def test_nan_is_refused():
    cost = torch.ones(2, 8)
    cost[1, 5] = NAN
    with pytest.raises(ValueError, match="NaN"):
        nm_select(cost, 2, 4)


@pytest.mark.parametrize("shape", [(3, 6), (8,), (2, 2, 4)])
def test_a_shape_that_does_not_divide_is_refused(shape):
    with pytest.raises(ValueError, match="divisible by 4"):
        nm_select(torch.ones(shape), 2, 4)
    with pytest.raises(ValueError, match="divisible by 4"):
        nm_group_cost(torch.ones(shape), torch.ones(shape, dtype=torch.bool), 2, 4)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4)])
def test_no_pattern_is_refused(n, m):
    with pytest.raises(ValueError, match=f"{n}:{m}"):
        nm_select(torch.ones(2, 8), n, m)
