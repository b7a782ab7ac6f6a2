import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from surgeon_kernels import k_smallest, smallest_mask
from surgeon_kernels.selection.k_smallest import _mask_by_order
from tests.kernels.dense import repeatable

INF, NAN = float("inf"), float("nan")
NEXT = float(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
# Ties, both zeros, neighbours that differ in the last bit, denormals, the largest finite values.
AWKWARD = [0.0, -0.0, 1.0, NEXT, -1.0, -NEXT, 1e-45, -1e-45, 1e-39, 3.4028234663852886e38, INF, -INF]


def by_sorting(costs, k):
    """The k-th smallest value and the masks, by a stable sort of the concatenation in plain Python."""
    flat = [x for cost in costs for x in cost.flatten().tolist()]
    order = sorted(range(len(flat)), key=flat.__getitem__)[:k]
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order] = True
    parts = chosen.split([cost.numel() for cost in costs])
    return flat[order[-1]] if k else -INF, [p.view(cost.shape) for p, cost in zip(parts, costs, strict=True)]


def check(costs, k):
    threshold, masks = k_smallest(costs, k)
    expected_threshold, expected = by_sorting(costs, k)
    assert threshold == expected_threshold
    assert len(masks) == len(costs)
    assert sum(int(mask.sum()) for mask in masks) == k
    for mask, want, cost in zip(masks, expected, costs, strict=True):
        assert mask.dtype == torch.bool and mask.shape == cost.shape
        assert torch.equal(mask, want)
    whole = torch.cat([cost.flatten() for cost in costs])
    at_once = torch.cat([mask.flatten() for mask in masks])
    for alike in (smallest_mask(whole, torch.tensor(k)), _mask_by_order(whole, torch.tensor(k))):
        assert torch.equal(alike, at_once) and alike.dtype == torch.bool


@st.composite
def problems(draw, values):
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    costs = []
    for _ in range(draw(st.integers(1, 4))):
        rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        size = rows * columns
        flat = draw(st.lists(values, min_size=size, max_size=size))
        matrix = torch.tensor(flat, dtype=dtype).view(rows, columns)
        costs.append(matrix.T if draw(st.booleans()) else matrix)
    return costs, draw(st.integers(0, sum(cost.numel() for cost in costs)))


@repeatable
@given(problems(st.sampled_from(AWKWARD)))
@example(([torch.zeros(2, 3).T, torch.zeros(0), torch.zeros(2)], 5))
def test_awkward_values_and_many_ties(problem):
    check(*problem)


@repeatable
@given(problems(st.floats(allow_nan=False, width=32)))
def test_any_values(problem):
    check(*problem)


@repeatable
@given(st.sampled_from([torch.float32, torch.float64]), st.integers(1, 400), st.floats(0, 1), st.integers(0, 2**31))
def test_costs_that_span_many_orders_of_magnitude(dtype, size, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randn(2, size, generator=generator, dtype=torch.float64) * 8
    sign = torch.randn(2, size, generator=generator, dtype=torch.float64).sign()
    cost = (sign * 10**exponent).to(dtype)
    check([cost[0], cost[1, : size // 2]], round(fraction * (size + size // 2)))


def test_float64_is_not_rounded_to_float32():
    costs = [torch.tensor([1.0 + 3e-16, 1.0, 1.0 + 1e-9, 1.0 - 2e-16], dtype=torch.float64)]
    for k in range(5):
        check(costs, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_row_by_row_in_logical_order_whatever_the_strides(dtype):
    base = torch.zeros(4, 6, dtype=dtype)
    views = [base.T, base[::2, 1::2], base[:1].expand(3, 6), base.view(2, 2, 6).permute(2, 0, 1)]
    for cost in views:
        for k in (0, 1, cost.numel() // 2, cost.numel()):
            check([cost], k)


@pytest.mark.parametrize("k", range(9))
def test_ties_go_in_the_order_of_the_tensors(k):
    costs = [
        torch.tensor([2.0, 5.0]),
        torch.empty(0, 3),
        torch.tensor([[1.0, 2.0], [2.0, 7.0]]),
        torch.tensor([2.0, INF]),
    ]
    check(costs, k)


def test_infinities_are_first_and_last():
    cost = torch.tensor([INF, 0.0, -INF, INF, 3.0])
    assert k_smallest([cost], 1)[0] == -INF
    assert k_smallest([cost], 1)[1][0].tolist() == [False, False, True, False, False]
    assert k_smallest([cost], 3)[1][0].tolist() == [False, True, True, False, True]
    threshold, (mask,) = k_smallest([cost], 4)
    assert threshold == INF and mask.tolist() == [True, True, True, False, True]


def test_none_and_all():
    costs = [torch.tensor([[3.0, -1.0]]), torch.empty(0), torch.tensor(2.0)]
    threshold, masks = k_smallest(costs, 0)
    assert threshold == -INF and not any(mask.any() for mask in masks)
    threshold, masks = k_smallest(costs, 3)
    assert threshold == 3.0 and all(mask.all() for mask in masks)
    assert [mask.shape for mask in masks] == [(1, 2), (0,), ()]
    assert k_smallest([], 0) == (-INF, [])
    assert k_smallest([torch.empty(0)], 0)[1][0].shape == (0,)


def test_the_costs_are_left_alone():
    cost = torch.tensor([-0.0, 0.0, 2.0])
    k_smallest([cost], 2)
    assert cost.signbit().tolist() == [True, False, False] and cost.tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("costs", "k", "message"),
    [
        ([torch.zeros(3)], 4, "4 of 3"),
        ([torch.zeros(3)], -1, "-1 of 3"),
        ([], 1, "1 of 0"),
        ([torch.tensor([1.0, NAN])], 1, "NaN"),
        ([torch.tensor([1.0]), torch.tensor([-NAN])], 1, "NaN"),
        ([torch.zeros(2), torch.zeros(2, dtype=torch.float64)], 1, "float32"),
        ([torch.zeros(2, dtype=torch.bfloat16)], 1, "bfloat16"),
        ([torch.zeros(2, dtype=torch.int64)], 1, "int64"),
    ],
)
def test_what_cannot_be_selected_from_is_refused(costs, k, message):
    with pytest.raises(ValueError, match=message):
        k_smallest(costs, k)
