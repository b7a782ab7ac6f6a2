import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import WeightCosts, nm_group_cost, nm_prune, nm_select
from tests.kernels.dense import repeatable

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
    totals = nm_group_cost(cost, n, m)
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
    cost = torch.tensor([[INF, -INF, INF, 1.0, INF, INF, INF, INF, INF, -INF, INF, INF]])
    pruned = nm_select(cost, 2, 4)
    assert pruned.tolist() == [[False, True, False, True, True, True, False, False, True, True, False, False]]
    assert nm_group_cost(cost, 2, 4)[0, :2].tolist() == [-INF, INF]


def by_formula(costs, n, m, previous=None):
    """Masks and group costs of ``½ w² g a``, each computed and sorted in plain Python, in float32."""
    w, g, a = (tensor.float().tolist() for tensor in costs)
    half = torch.tensor(0.5)
    masks, totals = [], []
    for r, row in enumerate(w):
        mask, total = [False] * len(row), []
        for start in range(0, len(row), m):
            cost = {c: torch.tensor(row[c]).square() * (half * g[r]) * a[c] for c in range(start, start + m)}
            gone = {c: previous is not None and bool(previous[r, c]) for c in cost}
            cheapest = sorted(cost, key=lambda c: (not gone[c], float(cost[c]), c))[: m - n]
            for c in cheapest:
                mask[c] = True
            total.append(float(sum((cost[c] for c in sorted(cheapest) if not gone[c]), torch.tensor(0.0))))
        masks.append(mask)
        totals.append(total)
    return torch.tensor(masks).view(costs.weight.shape), torch.tensor(totals).view(len(w), -1)


@repeatable
@given(st.sampled_from(PATTERNS), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 2**31))
def test_costs_from_weights_and_two_vectors(pattern, rows, groups, ties, seed):
    n, m = pattern
    costs = random_costs(rows, groups * m, seed, ties)
    pruned, total = by_formula(costs, n, m)
    assert torch.equal(nm_select(costs, n, m), pruned)
    assert torch.equal(nm_group_cost(costs, n, m), total)
    weight = nm_prune(costs, n, m)
    assert weight.dtype == costs.weight.dtype
    assert torch.equal(weight, torch.where(pruned, 0.0, costs.weight.float()).to(weight.dtype))


@repeatable
@given(st.sampled_from(PATTERNS), st.floats(0, 1), st.booleans(), st.integers(0, 2**31))
def test_a_threshold_chooses_groups_and_what_is_pruned_stays(pattern, fraction, ties, seed):
    n, m = pattern
    costs = random_costs(5, 3 * m, seed, ties=True)
    ranked = nm_group_cost(costs, n, m).flatten().sort().values
    threshold = float(ranked[round(fraction * (len(ranked) - 1))])
    previous = nm_select(costs, n, m, threshold=float(ranked[4]), ties=False)
    costs.weight[previous] = 0.0
    costs.a[::2] = 0.0  # weights that cost nothing must not take the place of those that are pruned
    pruned, total = by_formula(costs, n, m, previous)
    chosen = (total <= threshold) if ties else (total < threshold)
    chosen |= previous.view(5, 3, m).any(dim=-1)
    actual = nm_select(costs, n, m, previous=previous, threshold=threshold, ties=ties)
    assert torch.equal(actual, pruned & chosen.repeat_interleave(m, dim=1))
    assert bool((actual | ~previous).all())


def random_costs(rows, columns, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    g, a = torch.rand(rows, generator=generator), torch.rand(columns, generator=generator)
    if ties:
        weight, g, a = weight.round(), (2 * g).round(), (2 * a).round()
    return WeightCosts(weight.to(torch.bfloat16) if seed % 2 else weight, g, a)


@pytest.mark.parametrize("spoil", ["weight", "g", "a"])
def test_invalid_factors_are_refused(spoil):
    for value in (NAN, -1.0):
        costs = WeightCosts(torch.zeros(2, 8), torch.ones(2), torch.ones(8))
        getattr(costs, spoil).view(-1)[-1] = value
        if spoil == "weight" and value == -1.0:
            nm_select(costs, 2, 4)
            continue
        for function in (nm_select, nm_group_cost, nm_prune):
            with pytest.raises(ValueError, match="NaN or negative"):
                function(costs, 2, 4)


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
        nm_group_cost(torch.ones(shape), 2, 4)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4)])
def test_no_pattern_is_refused(n, m):
    with pytest.raises(ValueError, match=f"{n}:{m}"):
        nm_select(torch.ones(2, 8), n, m)
