"""Exact counts, global thresholds, guards: what is chosen from given costs."""

import itertools
import math

import pytest
import torch

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.methods.select import Selection, select_elements, select_rows_columns
from surgeon_kernels import WeightCosts


def random_costs(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) for shape in shapes]


def weights_of(costs):
    """Weights with (nearly) these costs; their exact costs."""
    layers = [WeightCosts((2 * cost).sqrt(), torch.ones(len(cost)), torch.ones(cost.shape[1])) for cost in costs]
    return layers, [layer.dense() for layer in layers]


def nothing(costs):
    return [torch.zeros_like(cost, dtype=torch.bool) for cost in costs]


def no_lines(costs):
    return [Selection.of_rows_columns(torch.zeros(len(r)).bool(), torch.zeros(len(c)).bool()) for r, c in costs]


def lines_removed(selections):
    return sum(int(s.pruned.sum()) for s in selections)


def test_global_threshold_takes_the_cheapest_of_all_layers():
    costs = random_costs([(5, 7), (3, 4), (1, 9)])
    costs[1] += 0.5
    layers, costs = weights_of(costs)
    config = PruneConfig(structure="unstructured", sparsity=0.4, min_kept=0.0)
    chosen, threshold = select_elements(layers, nothing(costs), config, 0.4)
    flat = torch.cat([cost.flatten() for cost in costs])
    k = round(0.4 * flat.numel())
    assert threshold == pytest.approx(float(flat.sort().values[k - 1]), rel=0, abs=0)
    for selection, cost in zip(chosen, costs, strict=True):
        assert torch.equal(selection.pruned, cost <= threshold)


def test_previously_pruned_weights_stay_and_count():
    costs = random_costs([(6, 6), (6, 6)])
    before = nothing(costs)
    before[0][2] = True  # a row gone already
    costs[0][2] = 0.0
    costs[1][:] = 0.0  # weights that happen to be zero are not pruned for it
    layers, costs = weights_of(costs)
    config = PruneConfig(structure="unstructured", sparsity=0.5)
    chosen, _ = select_elements(layers, before, config, 0.5)
    assert bool(chosen[0].pruned[2].all())
    assert sum(int(s.pruned.sum()) for s in chosen) == 36


def test_guard_keeps_the_most_expensive_part_of_a_layer_that_costs_nothing():
    costs = [torch.rand(10, 10) * 1e-9, torch.rand(10, 10) + 1.0]
    layers, costs = weights_of(costs)
    config = PruneConfig(structure="unstructured", sparsity=0.5, min_kept=0.1)
    chosen, _ = select_elements(layers, nothing(costs), config, 0.5)
    assert int(chosen[0].pruned.sum()) == 90
    assert int(chosen[1].pruned.sum()) == 10
    assert costs[0][~chosen[0].pruned].min() >= costs[0][chosen[0].pruned].max()


@pytest.mark.parametrize("method", ["magnitude", "l-obd"])
def test_methods_blind_to_the_loss_prune_every_layer_alike(method):
    costs = [torch.rand(8, 8) * 1e-6, torch.rand(4, 8)]
    layers, costs = weights_of(costs)
    config = PruneConfig(structure="unstructured", method=method, sparsity=0.25)
    chosen, threshold = select_elements(layers, nothing(costs), config, 0.25)
    assert [int(s.pruned.sum()) for s in chosen] == [16, 8]
    assert threshold is None


def test_wanda_compares_within_rows_with_an_exact_total():
    costs = random_costs([(3, 7)])
    layers, costs = weights_of(costs)
    config = PruneConfig(structure="unstructured", method="wanda", sparsity=0.5)
    (chosen,), _ = select_elements(layers, nothing(costs), config, 0.5)
    assert chosen.pruned.sum(dim=1).tolist() == [4, 3, 3]  # round(10.5) = 10, rows take turns
    for row, mask in zip(costs[0], chosen.pruned, strict=True):
        assert row[mask].max() < row[~mask].min()


@pytest.mark.parametrize("method", ["surgeon", "magnitude", "wanda"])
def test_n_m_on_the_last_shot_is_the_pattern_everywhere(method):
    costs = random_costs([(4, 8), (2, 12)])
    layers, costs = weights_of(costs)
    config = PruneConfig(structure="2:4", method=method)
    chosen, _ = select_elements(layers, nothing(costs), config, 0.5)
    for selection in chosen:
        assert bool((selection.pruned.view(-1, 4).sum(dim=1) == 2).all())


def test_n_m_groups_are_ranked_by_summed_cost_and_stay_between_shots():
    costs = random_costs([(4, 8), (2, 12)])  # 14 groups
    layers, costs = weights_of(costs)
    config = PruneConfig(structure="1:4", shots=3)
    first, threshold = select_elements(layers, nothing(costs), config, 0.25)
    groups = torch.cat([c.view(-1, 4).sort(dim=1).values[:, :3].sum(dim=1) for c in costs])
    cheapest = groups <= groups.sort().values[round(14 / 3) - 1]  # of 14 groups a third: 0.25 of 0.75
    taken = torch.cat([s.pruned.view(-1, 4).any(dim=1) for s in first])
    assert torch.equal(taken, cheapest)
    assert threshold == pytest.approx(float(groups[cheapest].max()))
    turned = [c.flip(0).masked_fill(s.pruned, 0.0) * 7 for c, s in zip(costs, first, strict=True)]
    second, _ = select_elements(weights_of(turned)[0], [s.pruned for s in first], config, 0.5)
    for before, after in zip(first, second, strict=True):
        assert bool((after.pruned | ~before.pruned).all())
    assert sum(int(s.pruned.sum()) for s in second) == 9 * 3


def test_rows_and_columns_meet_the_target_from_above_by_less_than_one_line():
    costs = [(torch.rand(6), torch.rand(9)), (torch.rand(12), torch.rand(5))]
    for target in (0.05, 0.3, 0.62):
        config = PruneConfig(structure="rows-columns", sparsity=target)
        chosen, _ = select_rows_columns(costs, no_lines(costs), config, target)
        wanted = target * (54 + 60)
        assert wanted <= lines_removed(chosen) < wanted + 12


def test_rows_and_columns_overlap_is_counted_once():
    rows, columns = torch.tensor([0.0, 1.0, 9.0, 9.0]), torch.tensor([0.0, 1.0, 9.0, 9.0])
    config = PruneConfig(structure="rows-columns", sparsity=0.75)
    (chosen,), _ = select_rows_columns([(rows, columns)], no_lines([(rows, columns)]), config, 0.75)
    # Two rows and two columns of a 4 x 4: 8 + 8 - 4 = 12 = 0.75 * 16.
    assert chosen.rows.tolist() == chosen.columns.tolist() == [True, True, False, False]
    assert int(chosen.pruned.sum()) == 12


def test_rows_and_columns_are_ranked_by_cost_per_weight():
    # A row removes 10 weights, a column 2: at equal cost per weight the row may cost five times as much.
    rows, columns = torch.tensor([4.0, 9.0]), torch.full((10,), 1.0)
    config = PruneConfig(structure="rows-columns", sparsity=0.5)
    (chosen,), threshold = select_rows_columns([(rows, columns)], no_lines([(rows, columns)]), config, 0.5)
    assert chosen.rows.tolist() == [True, False]
    assert not bool(chosen.columns.any())
    assert threshold == pytest.approx(0.4)


def test_rows_and_columns_removed_earlier_stay_and_are_not_charged_again():
    costs = [(torch.rand(8), torch.rand(8)), (torch.rand(8), torch.rand(8))]
    config = PruneConfig(structure="rows-columns", sparsity=0.4)
    first, _ = select_rows_columns(costs, no_lines(costs), config, 0.2)
    second, _ = select_rows_columns([(c.flip(0), r.flip(0)) for r, c in costs], first, config, 0.4)
    assert all(x.removed == (int(x.rows.sum()), int(x.columns.sum())) for x in (*first, *second))
    for before, after in zip(first, second, strict=True):
        assert bool((after.rows | ~before.rows).all() and (after.columns | ~before.columns).all())
    assert math.ceil(0.4 * 128) <= lines_removed(second) < 0.4 * 128 + 8


@pytest.mark.parametrize("min_kept, least", [(0.0, 1), (0.25, 2)])
def test_no_layer_loses_all_its_rows_or_columns(min_kept, least):
    free, dear = (torch.zeros(8), torch.zeros(8)), (torch.full((8,), 5.0), torch.full((8,), 5.0))
    config = PruneConfig(structure="rows-columns", sparsity=0.5, min_kept=min_kept)
    chosen, _ = select_rows_columns([free, dear], no_lines([free, dear]), config, 0.5)
    for selection in chosen:
        assert int((~selection.rows).sum()) >= least
        assert int((~selection.columns).sum()) >= least


def test_layerwise_methods_meet_the_target_in_every_layer():
    costs = [(torch.rand(20), torch.rand(10)), (torch.rand(10), torch.rand(40))]
    config = PruneConfig(structure="rows-columns", method="magnitude", sparsity=0.3)
    chosen, threshold = select_rows_columns(costs, no_lines(costs), config, 0.3)
    assert threshold is None
    for selection in chosen:
        size = selection.pruned.numel()
        assert 0.3 * size <= int(selection.pruned.sum()) < 0.3 * size + 40


def test_a_shot_too_small_to_choose_anything_has_no_threshold():
    costs = random_costs([(2, 4)])
    layers, costs = weights_of(costs)
    config = PruneConfig(structure="unstructured", sparsity=0.01)
    chosen, threshold = select_elements(layers, nothing(costs), config, 0.01)
    assert threshold is None
    assert not bool(chosen[0].pruned.any())


def test_ties_are_counted_exactly():
    costs = [torch.ones(6, 7), torch.ones(5, 3)]
    layers, costs = weights_of(costs)
    for sparsity in (0.1, 0.37, 0.9):
        config = PruneConfig(structure="unstructured", sparsity=sparsity)
        chosen, _ = select_elements(layers, nothing(costs), config, sparsity)
        assert sum(int(s.pruned.sum()) for s in chosen) == round(sparsity * 57)


def test_brute_force_optimum_on_a_small_network():
    costs = random_costs([(2, 3), (1, 2)], seed=3)
    layers, costs = weights_of(costs)
    config = PruneConfig(structure="unstructured", sparsity=0.5, min_kept=0.0)
    chosen, _ = select_elements(layers, nothing(costs), config, 0.5)
    flat = torch.cat([cost.flatten() for cost in costs]).double()
    best = min(sum(flat[list(c)].tolist()) for c in itertools.combinations(range(8), 4))
    taken = torch.cat([s.pruned.flatten() for s in chosen])
    assert float(flat[taken].sum()) == pytest.approx(best)
