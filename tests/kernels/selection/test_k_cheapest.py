"""The k cheapest weights or groups of many layers, against a sort of all costs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import WeightCosts, k_cheapest, nm_group_cost, nm_select
from surgeon_kernels.selection import k_cheapest as module
from tests.kernels.dense import repeatable

NAN = float("nan")


def by_sorting(layers, k, pattern=None, previous=None, limits=None):
    """The cheapest one after the other, none of a layer that is at its limit; pruned ones first among equals."""
    costs = [nm_group_cost(layer, *pattern) if pattern else layer.dense() for layer in layers]
    gone = [torch.zeros_like(cost, dtype=torch.bool) for cost in costs]
    if previous is not None:
        gone = [groups(mask, pattern) for mask in previous]
    ranked = sorted(
        (value, not before, layer, index)
        for layer, (cost, pruned) in enumerate(zip(costs, gone, strict=True))
        for index, (value, before) in enumerate(zip(cost.flatten().tolist(), pruned.flatten().tolist(), strict=True))
    )
    left = list(limits or [cost.numel() for cost in costs])
    masks = [torch.zeros(cost.numel(), dtype=torch.bool) for cost in costs]
    for _, _, layer, index in ranked:
        if k > 0 and left[layer] > 0:
            masks[layer][index] = True
            left[layer] -= 1
            k -= 1
    masks = [mask.view(cost.shape) for mask, cost in zip(masks, costs, strict=True)]
    if pattern is None:
        return masks
    before = previous or [None] * len(layers)
    return [
        nm_select(layer, *pattern, previous=pruned) & mask.repeat_interleave(pattern[1], dim=1)
        for layer, mask, pruned in zip(layers, masks, before, strict=True)
    ]


def groups(mask, pattern):
    return mask.unflatten(1, (mask.shape[1] // pattern[1], pattern[1])).any(dim=-1) if pattern else mask


def random_layers(shapes, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index, (rows, columns) in enumerate(shapes):
        weight = torch.randn(rows, columns, generator=generator)
        g, a = torch.rand(rows, generator=generator), torch.rand(columns, generator=generator)
        if ties:
            weight, g, a = weight.round(), (2 * g).round(), (2 * a).round()
        layers.append(WeightCosts(weight.to([torch.float32, torch.bfloat16, torch.float64][index % 3]), g, a))
    return layers


@st.composite
def problems(draw):
    pattern = draw(st.sampled_from([None, (2, 4), (1, 4), (3, 5)]))
    m = pattern[1] if pattern else 1
    shapes = [(draw(st.integers(0, 5)), m * draw(st.integers(0, 3))) for _ in range(draw(st.integers(1, 4)))]
    layers = random_layers(shapes, draw(st.integers(0, 2**31)), draw(st.booleans()))
    sizes = [rows * columns // m for rows, columns in shapes]
    limits = [draw(st.integers(0, size)) for size in sizes] if draw(st.booleans()) else None
    first = draw(st.integers(0, sum(limits or sizes)))
    return layers, pattern, limits, first, draw(st.integers(first, sum(limits or sizes)))


@repeatable
@given(problems(), st.booleans(), st.sampled_from([1, 7, 1 << 24]))
def test_exactly_k_then_more_of_the_pruned_weights(problem, sampled, ties_at_once):
    layers, pattern, limits, first, second = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SAMPLED_FROM", 1 if sampled else 1 << 26)
        patch.setattr(module, "_SAMPLE_STEP", 2)
        patch.setattr(module, "_TIES_AT_ONCE", ties_at_once)
        previous = None
        for k in (first, second):
            threshold, masks = k_cheapest(layers, k, pattern=pattern, previous=previous, at_most=limits)
            expected = by_sorting(layers, k, pattern, previous, limits)
            assert all(map(torch.equal, masks, expected))
            assert sum(int(groups(mask, pattern).sum()) for mask in masks) == k
            assert (threshold == -math.inf) == (k == 0)
            if limits is None and k > 0:
                costs = [nm_group_cost(layer, *pattern) if pattern else layer.dense() for layer in layers]
                assert threshold == float(torch.cat([cost.flatten() for cost in costs]).sort().values[k - 1])
            if previous is not None:  # written over
                _, again = k_cheapest(layers, k, pattern=pattern, previous=previous, at_most=limits, out=previous)
                assert all(ours is theirs for ours, theirs in zip(again, previous, strict=True))
                assert all(map(torch.equal, again, expected))
            for layer, mask in zip(layers, masks, strict=True):
                layer.weight[mask] = 0.0
            previous = masks


def test_costs_that_span_all_of_float32():
    exponent = torch.linspace(-22, 18, 5000)
    layers = [WeightCosts((10**exponent).view(100, 50), torch.ones(100), torch.ones(50))]
    assert layers[0].dense().flatten()[0] < 1e-40 and layers[0].dense().max() > 1e35
    for k in (1, 17, 2500, 4999, 5000):
        threshold, (mask,) = k_cheapest(layers, k)
        assert threshold == layers[0].dense().flatten()[k - 1]
        assert mask.flatten().tolist() == [True] * k + [False] * (5000 - k)


def test_a_sample_that_misleads_costs_passes_not_exactness(monkeypatch):
    monkeypatch.setattr(module, "_SAMPLED_FROM", 1)
    for sign in (1, -1):  # every 64th row is far too expensive, or far too cheap
        weight = torch.rand(640, 8) + 1.0
        weight[::64] *= 10.0 ** (8 * sign)
        layers = [WeightCosts(weight, torch.ones(640), torch.ones(8))]
        threshold, (mask,) = k_cheapest(layers, 2000)
        expected = layers[0].dense().flatten().sort().values[1999]
        assert threshold == expected and torch.equal(mask, layers[0].dense() <= expected)


def test_infinite_costs_come_last():
    layers = [WeightCosts(torch.tensor([[1.0, 1e30], [2.0, 1e25]]), torch.ones(2), torch.ones(2))]
    threshold, (mask,) = k_cheapest(layers, 3)
    assert threshold == math.inf and mask.tolist() == [[True, True], [True, False]]


def test_the_weights_are_left_alone():
    layers = random_layers([(4, 8)], 0, ties=False)
    copies = [tensor.clone() for tensor in layers[0]]
    k_cheapest(layers, 3, pattern=(2, 4))
    assert all(map(torch.equal, layers[0], copies))


def test_what_cannot_be_selected_is_refused():
    layers = random_layers([(4, 8), (2, 4)], 0, ties=False)
    for k in (-1, 41):
        with pytest.raises(ValueError, match=f"{k} of 40"):
            k_cheapest(layers, k)
    with pytest.raises(ValueError, match="11 of 10"):
        k_cheapest(layers, 11, pattern=(2, 4))
    with pytest.raises(ValueError, match="21 of 20"):
        k_cheapest(layers, 21, at_most=[20, 0])
    previous = [torch.ones(4, 8, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)]
    layers[0].weight[previous[0]] = 0.0
    for k in (0, 31):
        with pytest.raises(ValueError, match="more are pruned already"):
            k_cheapest(layers, k, previous=previous)
    for spoil in range(3):
        spoilt = random_layers([(4, 8)], 0, ties=False)
        spoilt[0][spoil].view(-1)[3] = NAN
        for pattern in (None, (2, 4)):
            with pytest.raises(ValueError, match="NaN or negative"):
                k_cheapest(layers + spoilt, 3, pattern=pattern)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_costs_that_are_given_are_selected_as_those_that_are_computed(pattern):
    layers = random_layers([(6, 16), (5, 12)], 3, ties=True)
    given = [WeightCosts(layer.dense()) for layer in layers]
    for k in (7, 20):
        threshold, masks = k_cheapest(layers, k, pattern=pattern)
        other, same = k_cheapest(given, k, pattern=pattern)
        assert threshold == other and all(map(torch.equal, masks, same))
    given[1].weight[2, 3] = -1e-9
    if pattern is None:
        with pytest.raises(ValueError, match="NaN or negative"):
            k_cheapest(given, 7)
