"""Updates of single layers, with and without bias, against dense float64 mathematics."""

import pytest
import torch

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.factors import DampedFactors
from llm_surgeon.methods.select import Selection
from llm_surgeon.methods.update import remove, remove_and_compensate
from surgeon_kernels import objective
from tests.kernels import dense
from tests.surgeon.one_layer import CPU, C, R, damped, layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("update", ["joint", "chunked"])
def test_compensation_reaches_the_dense_optimum_and_moves_the_bias(bias, update):
    linear, curvature = layer(bias)
    config = PruneConfig(structure="unstructured", update=update, tolerance=1e-12, swaps=0)
    factors = DampedFactors(curvature, config, [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    selection = Selection(torch.rand(R, C) < 0.5)
    new = remove_and_compensate(weight, selection, factors, config, linear.name)
    G, A = curvature.factors(linear)
    G, A = damped(G, 0.1), damped(A, 0.01)
    expected = dense.update(weight, selection.with_bias(C + bias), G, A)
    torch.testing.assert_close(new.delta, expected, rtol=1e-4, atol=1e-6)
    assert bool((new.weight[:, :C][selection.pruned] == 0.0).all())
    assert not bool(torch.signbit(new.weight[:, :C][selection.pruned]).any())
    if bias:
        assert not torch.equal(new.weight[:, C], weight[:, C])


@pytest.mark.parametrize("bias", [False, True])
def test_rows_and_columns_reach_the_dense_optimum_and_a_removed_row_loses_its_bias(bias):
    linear, curvature = layer(bias)
    config = PruneConfig(structure="rows-columns", sparsity=0.3)
    factors = DampedFactors(curvature, config, [linear], CPU).of(linear)
    rows, columns = torch.tensor([1, 0, 0, 1, 0]).bool(), torch.tensor([0, 1, 0, 0, 1, 0, 0, 0]).bool()
    selection = Selection.of_rows_columns(rows, columns)
    weight = linear.matrix(torch.float64)
    new = remove_and_compensate(weight, selection, factors, config, linear.name)
    G, A = curvature.factors(linear)
    pruned = selection.with_bias(C + bias)
    expected = dense.update(weight, pruned, damped(G, 0.01), damped(A, 0.01))
    torch.testing.assert_close(new.delta, expected, rtol=1e-8, atol=1e-10)
    assert bool((new.weight[rows] == 0.0).all())
    assert bool((new.weight[:, :C][:, columns] == 0.0).all())
    if bias:
        assert bool((new.weight[~rows, C] != 0.0).all())


def test_independent_rows_and_columns_sum_the_single_updates():
    linear, curvature = layer(bias=True)
    config = PruneConfig(structure="rows-columns", sparsity=0.3, update="independent")
    factors = DampedFactors(curvature, config, [linear], CPU).of(linear)
    weight = linear.matrix(torch.float64)
    rows, columns = torch.tensor([1, 0, 0, 1, 0]).bool(), torch.tensor([0, 1, 0, 0, 1, 0, 0, 0]).bool()
    new = remove_and_compensate(weight, Selection.of_rows_columns(rows, columns), factors, config, linear.name)
    expected = torch.zeros_like(weight)
    for r in rows.nonzero()[:, 0].tolist():
        alone = torch.zeros_like(weight, dtype=torch.bool)
        alone[r] = True
        expected += dense.update(weight, alone, *factors.damped)
    for c in columns.nonzero()[:, 0].tolist():
        alone = torch.zeros_like(weight, dtype=torch.bool)
        alone[:, c] = True
        expected += dense.update(weight, alone, *factors.damped)
    pruned = Selection.of_rows_columns(rows, columns).with_bias(C + 1)
    torch.testing.assert_close(new.delta, torch.where(pruned, -weight, expected), rtol=1e-8, atol=1e-10)


def test_more_correlation_never_predicts_a_greater_loss():
    linear, curvature = layer(bias=True)
    weight, selection = linear.matrix(torch.float64), Selection(torch.rand(R, C) < 0.5)
    values = {}
    for update in ("none", "chunked", "joint"):
        config = PruneConfig(
            structure="unstructured", update=update, max_correlated=6, tolerance=1e-10, max_iterations=200
        )
        factors = DampedFactors(curvature, config, [linear], CPU).of(linear)
        new = remove_and_compensate(weight, selection, factors, config, linear.name)
        values[update] = objective(new.delta, *factors.damped)
    assert values["joint"] < values["chunked"] < values["none"]


def test_remove_only_zeroes():
    weight = torch.randn(R, C)
    selection = Selection(torch.rand(R, C) < 0.5)
    new = remove(weight, selection)
    assert torch.equal(new.weight, torch.where(selection.pruned, 0.0, weight))
    assert torch.equal(new.delta, new.weight - weight)
