"""Swaps of kept and pruned weights: better selections of the same count and pattern, never worse ones."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.factors import DampedFactor, DampedFactors, KroneckerFactors
from llm_surgeon.methods import swaps
from llm_surgeon.methods.select import Selection, reselect
from llm_surgeon.methods.swaps import solve_with_swaps
from llm_surgeon.methods.update import remove_and_compensate
from surgeon_kernels import element_cost, k_smallest, leading_vectors, nm_select
from tests.kernels import dense
from tests.surgeon.one_layer import CPU, C, damped, layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_swaps_lower_the_objective_at_the_same_count_and_pattern(structure, bias):
    linear, curvature = layer(bias)
    config = PruneConfig(structure=structure, tolerance=1e-9, swaps=0)
    factors = DampedFactors(curvature, config, [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    # The worst choice: there is something to gain.
    cost = -weight[:, :C].abs()
    selection = Selection(nm_select(cost, 2, 4) if structure == "2:4" else k_smallest([cost], 20)[1][0])
    before = selection.pruned.clone()
    plain = remove_and_compensate(weight, selection, factors, config, linear.name)
    better = remove_and_compensate(weight, selection, factors, dataclasses.replace(config, swaps=6), linear.name)
    assert torch.equal(plain.selection.pruned, before) and torch.equal(selection.pruned, before)
    chosen = better.selection.pruned
    assert int(chosen.sum()) == int(before.sum())
    if structure == "2:4":
        assert bool((chosen.unflatten(1, (-1, 4)).sum(dim=2) == 2).all())
    assert better.objective[-1] < 0.8 * plain.objective[-1]
    G, A = curvature.factors(linear)
    best = dense.optimum(weight, better.selection.with_bias(C + bias), damped(G, 0.1), damped(A, 0.01))
    assert better.objective[-1] == pytest.approx(best, rel=1e-6)
    assert bool((better.weight[:, :C][chosen] == 0.0).all())


def test_rounds_and_solution_share_the_leading_vectors_and_rough_updates_need_none(monkeypatch):
    R, C = 60, 90
    outliers = torch.ones(C, dtype=torch.float64)
    outliers[:5] = 30.0
    factors = KroneckerFactors(
        DampedFactor.checked(dense.factor(R, "plain", 2), 0.01, "G"),
        DampedFactor.checked(outliers[:, None] * dense.factor(C, "plain", 3) * outliers, 1e-4, "A"),
    )
    weight, config = dense.random_weight(R, C, 0), PruneConfig(structure="unstructured", tolerance=1e-6)
    selection = Selection(weight.abs() < 0.7)
    asked = []
    for module in ("surgeon_kernels.updates.joint_update", "llm_surgeon.curvature.factors"):
        monkeypatch.setattr(f"{module}.leading_vectors", lambda *a: asked.append(len(a[0])) or leading_vectors(*a))
    rough = dataclasses.replace(config, swaps=0, max_iterations=8)
    remove_and_compensate(weight, selection, factors, rough, "x")
    assert not asked
    shared = remove_and_compensate(weight, selection, factors, config, "x")
    assert asked == [R, C]
    # Each for itself they find the same.
    alone = SimpleNamespace(**{name: getattr(factors, name) for name in ("damped", "inverses", "inverse_diagonals")})
    alone.leading = None
    found, chosen = solve_with_swaps(weight, selection, alone, config)
    assert len(asked) > 4
    assert torch.equal(found.delta, shared.delta) and torch.equal(chosen.pruned, shared.selection.pruned)


def test_more_rounds_of_swaps_find_a_better_selection():
    linear, curvature = layer(False)
    config = PruneConfig(structure="2:4", tolerance=1e-9)
    factors = DampedFactors(curvature, config, [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    selection = Selection(nm_select(-weight.abs(), 2, 4))
    found = [
        remove_and_compensate(weight, selection, factors, dataclasses.replace(config, swaps=rounds), linear.name)
        for rounds in (0, 1, 4)
    ]
    none, one, four = (update.objective[-1] for update in found)
    assert one < 0.8 * none and four < 0.95 * one


@pytest.mark.parametrize(
    "structure, sparsity", [("2:4", 0.5), ("1:4", 0.75), *(("unstructured", s) for s in (0.6, 0.7, 0.85))]
)
def test_swaps_pay_at_every_sparsity(structure, sparsity):
    """A selection by costs of single weights is far from the best of correlated ones, the more so the more go."""
    generator = torch.Generator().manual_seed(0)
    R, columns = 24, 32

    def factor(n):
        X = torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
        return X.T @ X / len(X) + 1.5 * torch.ones(n, n, dtype=torch.float64)

    W = torch.randn(R, columns, generator=generator, dtype=torch.float64)
    factors = KroneckerFactors(*(DampedFactor(factor(n), 0.01) for n in (R, columns)))
    g, a = factors.inverse_diagonals
    config = PruneConfig(structure=structure, sparsity=sparsity, tolerance=1e-6, update="joint")
    count = R * columns if config.structure_record.m else sparsity * R * columns  # a pattern chooses within its groups
    wanted = torch.arange(R * columns).view(R, columns) + 0.5 < count
    selection = Selection(reselect(wanted, element_cost(W, 1.0 / g, 1.0 / a), config))
    objectives = []
    for rounds in (0, 8):
        solved, chosen = solve_with_swaps(W, selection, factors, dataclasses.replace(config, swaps=rounds))
        assert int(chosen.pruned.sum()) == round(sparsity * R * columns)
        objectives.append(solved.objective[-1])
    assert objectives[1] < 0.97 * objectives[0]


@pytest.mark.parametrize("kept, gain, comes_back", [(6, 1.0, True), (4, 1.0, False), (4, 1.2, True)])
def test_gains_of_pruned_weights_count_less_where_few_are_kept(kept, gain, comes_back, monkeypatch):
    pruned = torch.arange(10).view(1, 10) >= kept
    monkeypatch.setattr(swaps, "swap_cost", lambda *_: torch.where(pruned, gain, 0.9))
    estimate = SimpleNamespace(delta=torch.zeros(1, 10), gradient=None)
    factors = SimpleNamespace(damped=(), inverse_diagonals=())
    config = PruneConfig(structure="unstructured")
    found = swaps._swapped(torch.ones(1, 10), Selection(pruned), estimate, factors, config).pruned
    assert bool((found != pruned).any()) == comes_back and found.sum() == pruned.sum()


def test_a_swap_that_does_not_pay_is_taken_back(monkeypatch):
    linear, curvature = layer(False)
    config = PruneConfig(structure="unstructured", tolerance=1e-9, swaps=0)
    factors = DampedFactors(curvature, config, [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    selection, worst = (Selection(k_smallest([sign * weight.abs()], 20)[1][0]) for sign in (1.0, -1.0))
    monkeypatch.setattr("llm_surgeon.methods.swaps.reselect", lambda *_: worst.pruned)
    plain, bad = (remove_and_compensate(weight, chosen, factors, config, linear.name) for chosen in (selection, worst))
    assert bad.objective[-1] > 1.5 * plain.objective[-1]
    tried = remove_and_compensate(weight, selection, factors, dataclasses.replace(config, swaps=2), linear.name)
    assert tried.selection is selection
    assert torch.equal(tried.weight, plain.weight) and tried.objective == plain.objective


@pytest.mark.parametrize("swaps", [1, 3])
def test_swaps_that_harm_are_taken_back(swaps, monkeypatch):
    linear, curvature = layer(False)
    factors = DampedFactors(curvature, PruneConfig(), [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    selection = Selection(nm_select(weight.abs(), 2, 4))
    plain, harmed = (
        remove_and_compensate(weight, selection, factors, PruneConfig(tolerance=1e-9, swaps=count), linear.name)
        for count in (0, swaps)
    )
    assert harmed.objective[-1] <= plain.objective[-1] * (1 + 1e-8)
    # Whatever is kept goes, whatever it costs.
    monkeypatch.setattr("llm_surgeon.methods.swaps.swap_cost", lambda weight, pruned, *_: pruned.to(weight.dtype))
    harmed = remove_and_compensate(weight, selection, factors, PruneConfig(tolerance=1e-9, swaps=swaps), linear.name)
    assert harmed.objective[-1] <= plain.objective[-1] * (1 + 1e-8)
    assert int(harmed.selection.pruned.sum()) == int(selection.pruned.sum())
    if swaps == 1:
        assert torch.equal(harmed.selection.pruned, selection.pruned)
