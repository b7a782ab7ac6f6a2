"""Costs and updates of single layers, with and without bias, against dense float64 mathematics."""

import dataclasses

import pytest
import torch

from llm_surgeon.config.methods import method
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.estimate import Curvature
from llm_surgeon.curvature.factors import DampedFactors
from llm_surgeon.errors import NumericalError
from llm_surgeon.methods.costs import element_costs, row_column_costs
from llm_surgeon.methods.select import Selection
from llm_surgeon.methods.update import remove, remove_and_compensate, with_bias
from llm_surgeon.models.decoder import PrunableLinear
from surgeon_kernels import SymmetricAccumulator, gram_accumulate_, inverse_diagonal, k_smallest, nm_select, objective
from tests.kernels import dense

R, C = 5, 8
CPU = torch.device("cpu")


def layer(bias: bool, dtype: torch.dtype = torch.float64):
    """A linear with its curvature, both factors of full rank."""
    torch.manual_seed(1)
    module = torch.nn.Linear(C, R, bias=bias, dtype=dtype)
    linear = PrunableLinear("layers.0.proj", module, 0, "proj", "layers.0.proj")
    a, g = torch.randn(50, C + bias, dtype=dtype), torch.randn(50, R, dtype=dtype)
    if bias:
        a[:, -1] = 1.0
    return linear, Curvature(1.0, 50, {linear.name: accumulated(a)}, {linear.name: accumulated(g)})


def accumulated(rows: torch.Tensor) -> SymmetricAccumulator:
    sums = SymmetricAccumulator.zeros(rows.shape[1], dtype=rows.dtype)
    gram_accumulate_(sums, rows)
    return sums


def damped(M: torch.Tensor, damping: float) -> torch.Tensor:
    return M + damping * M.diagonal().mean() * torch.eye(len(M), dtype=M.dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("update", ["joint", "chunked"])
def test_compensation_reaches_the_dense_optimum_and_moves_the_bias(bias, update):
    linear, curvature = layer(bias)
    config = PruneConfig(structure="unstructured", update=update, tolerance=1e-12, exchanges=0)
    g, a = DampedFactors(curvature, config, [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    selection = Selection(torch.rand(R, C) < 0.5)
    new = remove_and_compensate(weight, selection, g, a, config, linear.name)
    G, A = curvature.factors(linear)
    G, A = damped(G, 0.1), damped(A, 0.01)
    expected = dense.update(weight, with_bias(selection, C + bias), G, A)
    torch.testing.assert_close(new.delta, expected, rtol=1e-4, atol=1e-6)
    assert bool((new.weight[:, :C][selection.pruned] == 0.0).all())
    assert not bool(torch.signbit(new.weight[:, :C][selection.pruned]).any())
    if bias:
        assert not torch.equal(new.weight[:, C], weight[:, C])


@pytest.mark.parametrize("bias", [False, True])
def test_rows_and_columns_reach_the_dense_optimum_and_a_removed_row_loses_its_bias(bias):
    linear, curvature = layer(bias)
    config = PruneConfig(structure="rows-columns", sparsity=0.3)
    g, a = DampedFactors(curvature, config, [linear], CPU).of(linear)
    rows, columns = torch.tensor([1, 0, 0, 1, 0]).bool(), torch.tensor([0, 1, 0, 0, 1, 0, 0, 0]).bool()
    selection = Selection.of_rows_columns(rows, columns)
    weight = linear.matrix(torch.float64)
    new = remove_and_compensate(weight, selection, g, a, config, linear.name)
    G, A = curvature.factors(linear)
    pruned = with_bias(selection, C + bias)
    expected = dense.update(weight, pruned, damped(G, 0.01), damped(A, 0.01))
    torch.testing.assert_close(new.delta, expected, rtol=1e-8, atol=1e-10)
    assert bool((new.weight[rows] == 0.0).all())
    assert bool((new.weight[:, :C][:, columns] == 0.0).all())
    if bias:
        assert bool((new.weight[~rows, C] != 0.0).all())


def test_independent_rows_and_columns_sum_the_single_updates():
    linear, curvature = layer(bias=True)
    config = PruneConfig(structure="rows-columns", sparsity=0.3, update="independent")
    g, a = DampedFactors(curvature, config, [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    rows, columns = torch.tensor([1, 0, 0, 1, 0]).bool(), torch.tensor([0, 1, 0, 0, 1, 0, 0, 0]).bool()
    new = remove_and_compensate(weight, Selection.of_rows_columns(rows, columns), g, a, config, linear.name)
    expected = torch.zeros_like(weight)
    for r in rows.nonzero()[:, 0].tolist():
        alone = torch.zeros_like(weight, dtype=torch.bool)
        alone[r] = True
        expected += dense.update(weight, alone, g.damped, a.damped)
    for c in columns.nonzero()[:, 0].tolist():
        alone = torch.zeros_like(weight, dtype=torch.bool)
        alone[:, c] = True
        expected += dense.update(weight, alone, g.damped, a.damped)
    pruned = with_bias(Selection.of_rows_columns(rows, columns), C + 1)
    torch.testing.assert_close(new.delta, torch.where(pruned, -weight, expected), rtol=1e-8, atol=1e-10)


def test_more_correlation_never_predicts_a_greater_loss():
    linear, curvature = layer(bias=True)
    weight, selection = linear.matrix(torch.float64), Selection(torch.rand(R, C) < 0.5)
    values = {}
    for update in ("none", "chunked", "joint"):
        config = PruneConfig(
            structure="unstructured", update=update, max_correlated=6, tolerance=1e-10, max_iterations=200
        )
        g, a = DampedFactors(curvature, config, [linear], CPU).of(linear)
        new = remove_and_compensate(weight, selection, g, a, config, linear.name)
        values[update] = objective(new.delta, g.damped, a.damped)
    assert values["joint"] < values["chunked"] < values["none"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_exchanges_lower_the_objective_at_the_same_count_and_pattern(structure, bias):
    linear, curvature = layer(bias)
    config = PruneConfig(structure=structure, tolerance=1e-9, exchanges=0)
    g, a = DampedFactors(curvature, config, [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    # The worst choice: there is something to gain.
    cost = -weight[:, :C].abs()
    selection = Selection(nm_select(cost, 2, 4) if structure == "2:4" else k_smallest([cost], 20)[1][0])
    before = selection.pruned.clone()
    plain = remove_and_compensate(weight, selection, g, a, config, linear.name)
    better = remove_and_compensate(weight, selection, g, a, dataclasses.replace(config, exchanges=6), linear.name)
    assert torch.equal(plain.selection.pruned, before) and torch.equal(selection.pruned, before)
    chosen = better.selection.pruned
    assert int(chosen.sum()) == int(before.sum())
    if structure == "2:4":
        assert bool((chosen.unflatten(1, (-1, 4)).sum(dim=2) == 2).all())
    assert better.objective[-1] < 0.8 * plain.objective[-1]
    G, A = curvature.factors(linear)
    best = dense.optimum(weight, with_bias(better.selection, C + bias), damped(G, 0.1), damped(A, 0.01))
    assert better.objective[-1] == pytest.approx(best, rel=1e-6)
    assert bool((better.weight[:, :C][chosen] == 0.0).all())


def test_more_rounds_of_exchanges_find_a_better_selection():
    linear, curvature = layer(False)
    config = PruneConfig(structure="2:4", tolerance=1e-9)
    g, a = DampedFactors(curvature, config, [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    selection = Selection(nm_select(-weight.abs(), 2, 4))
    found = [
        remove_and_compensate(weight, selection, g, a, dataclasses.replace(config, exchanges=rounds), linear.name)
        for rounds in (0, 1, 4)
    ]
    none, one, four = (update.objective[-1] for update in found)
    assert one < 0.8 * none and four < 0.95 * one


def test_an_exchange_that_does_not_pay_is_taken_back(monkeypatch):
    linear, curvature = layer(False)
    config = PruneConfig(structure="unstructured", tolerance=1e-9, exchanges=0)
    g, a = DampedFactors(curvature, config, [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    selection, worst = (Selection(k_smallest([sign * weight.abs()], 20)[1][0]) for sign in (1.0, -1.0))
    monkeypatch.setattr("llm_surgeon.methods.update.reselect", lambda *_: worst.pruned)
    plain, bad = (remove_and_compensate(weight, chosen, g, a, config, linear.name) for chosen in (selection, worst))
    assert bad.objective[-1] > 1.5 * plain.objective[-1]
    tried = remove_and_compensate(weight, selection, g, a, dataclasses.replace(config, exchanges=2), linear.name)
    assert tried.selection is selection
    assert torch.equal(tried.weight, plain.weight) and tried.objective == plain.objective


@pytest.mark.parametrize("exchanges", [1, 3])
def test_exchanges_that_harm_are_taken_back(exchanges, monkeypatch):
    linear, curvature = layer(False)
    g, a = DampedFactors(curvature, PruneConfig(), [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    selection = Selection(nm_select(weight.abs(), 2, 4))
    plain, harmed = (
        remove_and_compensate(weight, selection, g, a, PruneConfig(tolerance=1e-9, exchanges=count), linear.name)
        for count in (0, exchanges)
    )
    assert harmed.objective[-1] <= plain.objective[-1] * (1 + 1e-8)
    # Whatever is kept goes, whatever it costs.
    monkeypatch.setattr("llm_surgeon.methods.update.swap_cost", lambda weight, pruned, *_: pruned.to(weight.dtype))
    harmed = remove_and_compensate(
        weight, selection, g, a, PruneConfig(tolerance=1e-9, exchanges=exchanges), linear.name
    )
    assert harmed.objective[-1] <= plain.objective[-1] * (1 + 1e-8)
    assert int(harmed.selection.pruned.sum()) == int(selection.pruned.sum())
    if exchanges == 1:
        assert torch.equal(harmed.selection.pruned, selection.pruned)


def test_remove_only_zeroes():
    weight = torch.randn(R, C)
    selection = Selection(torch.rand(R, C) < 0.5)
    new = remove(weight, selection)
    assert torch.equal(new.weight, torch.where(selection.pruned, 0.0, weight))
    assert torch.equal(new.delta, new.weight - weight)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["surgeon", "k-obd", "l-obd", "wanda", "magnitude"])
def test_element_costs_follow_their_formulas(bias, name):
    linear, curvature = layer(bias, torch.float32)
    G, A = curvature.factors(linear)
    config = PruneConfig()
    cost = element_costs(linear, method(name), DampedFactors(curvature, config, [linear], CPU)).dense()
    g_inv = torch.linalg.inv(damped(G, 0.1).double()).diagonal()
    a_inv = torch.linalg.inv(damped(A, 0.01).double()).diagonal()
    sensitivity = {
        "surgeon": torch.outer(1 / g_inv, 1 / a_inv),
        "k-obd": torch.outer(G.diagonal(), A.diagonal()),
        "l-obd": A.diagonal().expand(R, -1),
        "wanda": A.diagonal().expand(R, -1),
        "magnitude": torch.ones(R, C + bias),
    }[name]
    expected = 0.5 * linear.matrix().double() ** 2 * sensitivity
    torch.testing.assert_close(cost.double(), expected[:, :C], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("bias", [False, True])
def test_row_and_column_costs_are_dense_eq_7(bias):
    linear, curvature = layer(bias, torch.float32)
    config = PruneConfig(structure="rows-columns")
    factors = DampedFactors(curvature, config, [linear], CPU)
    g, a = factors.of(linear)
    rows, columns = row_column_costs(linear, method("surgeon"), factors)
    weight, G, A = linear.matrix().double(), g.damped.double(), a.damped.double()
    assert len(rows) == R and len(columns) == C
    for r in range(R):
        alone = torch.zeros(R, C + bias, dtype=torch.bool)
        alone[r] = True
        assert float(rows[r]) == pytest.approx(float(dense.cost(weight, alone, G, A)), rel=1e-3)
    for c in range(C):
        alone = torch.zeros(R, C + bias, dtype=torch.bool)
        alone[:, c] = True
        assert float(columns[c]) == pytest.approx(float(dense.cost(weight, alone, G, A)), rel=1e-3)


def test_row_and_column_costs_without_correlation_are_sums_of_element_costs():
    linear, curvature = layer(True, torch.float32)
    rows, columns = row_column_costs(linear, method("k-obd"), DampedFactors(curvature, PruneConfig(), [linear], CPU))
    G, A = curvature.factors(linear)
    cost = 0.5 * linear.matrix() ** 2 * torch.outer(G.diagonal(), A.diagonal())
    torch.testing.assert_close(rows, cost.sum(dim=1))  # the bias goes with its row
    torch.testing.assert_close(columns, cost.sum(dim=0)[:C])


def test_shared_inputs_are_inverted_once_and_jitter_is_noted(monkeypatch):
    import llm_surgeon.curvature.factors as module

    linear, curvature = layer(False)
    twin = PrunableLinear("layers.0.twin", linear.module, 0, "twin", linear.name)
    curvature._gradients[twin.name] = curvature._gradients[linear.name]
    factorised = []

    def counted(M):
        factorised.append(M.shape[0])
        return inverse_diagonal(M)

    monkeypatch.setattr(module, "inverse_diagonal", counted)
    factors = DampedFactors(curvature, PruneConfig(), [linear, twin], CPU)
    (g, a), (twin_g, twin_a) = factors.of(linear), factors.of(twin)
    assert factorised == [R, C, R]
    assert a is twin_a and g is not twin_g
    g_inv, a_inv = factors.inverse_diagonals(twin)
    assert factorised == [R, C, R]
    torch.testing.assert_close(g_inv, torch.linalg.inv(twin_g.damped).diagonal())
    torch.testing.assert_close(a_inv, torch.linalg.inv(a.damped).diagonal())
    torch.testing.assert_close(a.inverse, torch.linalg.inv(a.damped))
    factors.note_jitter(linear, 1e-3)
    factors.note_jitter(linear, 1e-4)
    factors.note_jitter(twin, 0.0)
    assert factors.jitter == {"layers.0.proj": 1e-3}


def test_the_jitter_found_for_a_factor_is_in_it_ever_after():
    linear, curvature = layer(False)
    A = curvature.sums(linear)[0].storage
    A[0], A[:, 0] = 0.0, 0.0
    A[0, 0] = -3e-5 * A.diagonal().mean()
    factors = DampedFactors(curvature, PruneConfig(structure="unstructured", damp_a=1e-9), [linear], CPU)
    for _ in range(2):
        a = factors.of(linear)[1]
        assert a.jitter == factors.jitter[linear.name] == 1e-4
        assert bool((torch.linalg.eigvalsh(a.damped) > 0.0).all())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("singular", [False, True])
def test_inverses_that_are_kept_are_those_that_are_computed_again(bias, singular):
    linear, curvature = layer(bias)
    options = {}
    if singular:  # G needs jitter
        curvature._gradients[linear.name] = accumulated(torch.ones(50, R, dtype=torch.float64))
        options = {"damp_g": 1e-20}
    kept, again = (
        DampedFactors(curvature, PruneConfig(**options), [linear], CPU, keep_inverses=keep) for keep in (True, False)
    )
    for one, other in zip(kept.inverse_diagonals(linear), again.inverse_diagonals(linear), strict=True):
        torch.testing.assert_close(one, other)
    assert (kept.jitter == {}) is not singular and kept.jitter == again.jitter
    for one, other in zip(kept.of(linear), again.of(linear), strict=True):
        assert torch.equal(one.damped, other.damped)
        torch.testing.assert_close(one.inverse, other.inverse)
        torch.testing.assert_close(one.inverse @ one.damped, torch.eye(len(one.damped), dtype=torch.float64))


def test_a_factor_that_is_not_positive_definite_names_the_layer():
    linear, curvature = layer(False)
    gram_accumulate_(curvature._gradients[linear.name], 10 * torch.eye(R, dtype=torch.float64), alpha=-1e3)
    with pytest.raises(NumericalError, match=r"G of layers\.0\.proj"):
        DampedFactors(curvature, PruneConfig(), [linear], CPU).of(linear)
