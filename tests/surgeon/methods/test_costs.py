"""Costs of weights, rows and columns of single layers against their formulas in float64."""

import pytest
import torch

from llm_surgeon.config.methods import Method, method
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.factors import DampedFactors
from llm_surgeon.errors import InputError
from llm_surgeon.methods.costs import element_costs, row_column_costs
from tests.kernels import dense
from tests.surgeon.one_layer import CPU, C, R, damped, layer


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


def test_a_method_s_own_costs_are_taken_as_they_are_and_summed_with_the_bias():
    linear, _ = layer(True)
    own = torch.rand(R, C + 1, dtype=torch.float64)
    toy = Method("toy", rows_columns=True, costs=lambda linear, factors: own)
    assert torch.equal(element_costs(linear, toy, None).dense(), own[:, :C].float())
    rows, columns = row_column_costs(linear, toy, None)
    torch.testing.assert_close(rows, own.sum(dim=1))
    torch.testing.assert_close(columns, own.sum(dim=0)[:C])


@pytest.mark.parametrize(
    ("costs", "found"),
    [
        (None, "NoneType"),
        (torch.ones(R, C), r"\[5, 8\]"),
        (torch.ones(C + 1, R), r"\[9, 5\]"),
        ((torch.ones(R), torch.ones(C)), r"\[5\] and \[8\]"),
        ((None, torch.ones(C + 1)), r"NoneType and \[9\]"),
        ((), "nothing"),
    ],
)
def test_costs_of_other_sizes_are_refused_with_the_names_of_method_and_linear(costs, found):
    linear, _ = layer(True)
    toy = Method("toy", rows_columns=True, costs=lambda linear, factors: costs)
    message = rf"costs of method 'toy' for layers\.0\.proj must be \[5, 9\], or g \[5\] and a \[9\], not {found} "
    for function in (element_costs, row_column_costs):
        with pytest.raises(InputError, match=message):
            function(linear, toy, None)


def test_row_and_column_costs_without_correlation_are_sums_of_element_costs():
    linear, curvature = layer(True, torch.float32)
    rows, columns = row_column_costs(linear, method("k-obd"), DampedFactors(curvature, PruneConfig(), [linear], CPU))
    G, A = curvature.factors(linear)
    cost = 0.5 * linear.matrix() ** 2 * torch.outer(G.diagonal(), A.diagonal())
    torch.testing.assert_close(rows, cost.sum(dim=1))  # the bias goes with its row
    torch.testing.assert_close(columns, cost.sum(dim=0)[:C])
