"""Operands that are no layer, no matrix or no mask are refused by name before anything is computed."""

import math

import pytest
import torch

from surgeon_kernels import (
    NotPositiveDefiniteError,
    SymmetricAccumulator,
    WeightCosts,
    cholesky_with_jitter,
    chunked_update,
    column_block_cost,
    damp,
    element_cost,
    independent_update,
    inverse_and_diagonal,
    inverse_diagonal,
    joint_estimate,
    joint_update,
    k_cheapest,
    nm_group_cost,
    nm_select,
    objective,
    quadratic_form,
    rms_norm,
    rotary,
    rows_columns_update,
    spd_inverse,
    swap_cost,
    unchecked_inverse,
)
from tests.kernels.dense import factor, random_mask, random_weight

R, C = 4, 8


def layer():
    G, A = factor(R, "plain", 0), factor(C, "plain", 1)
    return {
        "weight": random_weight(R, C, 2),
        "pruned": random_mask(R, C, "random", 3),
        "G": G,
        "A": A,
        "G_inv": torch.linalg.inv(G),
        "A_inv": torch.linalg.inv(A),
    }


def call(function, parts):
    """``function`` with those of the layer's parts that it takes."""
    takes = {
        joint_update: ("weight", "pruned", "G", "A", "G_inv", "A_inv"),
        joint_estimate: ("weight", "pruned", "G", "A", "G_inv", "A_inv"),
        chunked_update: ("weight", "pruned", "G_inv", "A_inv"),
        independent_update: ("weight", "pruned", "G_inv", "A_inv"),
        objective: ("weight", "G", "A"),
        rows_columns_update: ("weight", "G", "A"),
        swap_cost: ("weight", "pruned", "weight", "G", "A"),
    }[function]
    more = {
        rows_columns_update: (torch.zeros(R, dtype=torch.bool), torch.zeros(C, dtype=torch.bool)),
        swap_cost: (parts["G_inv"].diagonal(), parts["A_inv"].diagonal()),
    }
    return takes, lambda: function(*(parts[name] for name in takes), *more.get(function, ()))


LAYER_OPS = [
    joint_update,
    joint_estimate,
    chunked_update,
    independent_update,
    objective,
    rows_columns_update,
    swap_cost,
]


@pytest.mark.parametrize("function", LAYER_OPS, ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("weight", lambda x: x[0], ValueError),
        ("weight", lambda x: x.long(), TypeError),
        ("pruned", lambda x: x[:2], ValueError),
        ("pruned", lambda x: x.double(), TypeError),
        ("pruned", lambda x: x.to("meta"), ValueError),
        ("G", lambda x: x[:, :3], ValueError),
        ("G", lambda x: x[:1, :1], ValueError),
        ("A", lambda x: x.float(), TypeError),
        ("A", lambda x: x.to("meta"), ValueError),
        ("G_inv", lambda x: x[:1], ValueError),
        ("A_inv", lambda x: x.bfloat16(), TypeError),
    ],
)
def test_parts_of_a_layer_that_do_not_fit(function, name, wrong, error):
    parts = layer()
    takes, run = call(function, parts)
    if name not in takes:
        return
    run()
    parts[name] = wrong(parts[name])
    _, run = call(function, parts)
    with pytest.raises(error, match=name):
        run()


@pytest.mark.parametrize("solve", [joint_update, joint_estimate])
def test_what_cannot_be_solved_for(solve):
    parts = layer()
    for tolerance in (-0.1, math.nan):
        with pytest.raises(ValueError, match="tolerance must be at least 0"):
            solve(**parts, tolerance=tolerance)
    if solve is joint_update:
        for name in ("G_inv", "A_inv", "G"):
            with pytest.raises(NotPositiveDefiniteError, match="not positive throughout"):
                solve(**{**parts, name: torch.full_like(parts[name], math.nan)})
        with pytest.raises(ValueError, match="G_2"):
            joint_update(*list(parts.values())[:4], second=(parts["A"], parts["A"]))


@pytest.mark.parametrize(
    "function",
    [spd_inverse, cholesky_with_jitter, damp, unchecked_inverse, inverse_diagonal, inverse_and_diagonal],
    ids=lambda function: function.__name__,
)
def test_what_is_no_square_matrix_has_no_inverse(function):
    options = (0.1,) if function is damp else ()
    for M in (torch.ones(3), torch.ones(2, 3), torch.eye(2)[None], torch.eye(2).expand(3, 2, 2)):
        with pytest.raises(ValueError, match="must be a square matrix"):
            function(M, *options)
    with pytest.raises(TypeError, match="floating point"):
        function(torch.eye(2).long(), *options)


def test_masks_of_rows_and_columns_are_masks():
    parts = layer()
    W, G, A = parts["weight"], parts["G"], parts["A"]
    rows, columns = torch.zeros(R, dtype=torch.bool), torch.zeros(C, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"rows must be \[4\], not \[5\]"):
        rows_columns_update(W, G, A, torch.zeros(5, dtype=torch.bool), columns)
    with pytest.raises(TypeError, match="columns must be bool"):
        rows_columns_update(W, G, A, rows, torch.tensor([0, 2, 1, 0, 0, 0, 0, 0]))


def test_a_factor_is_not_needed_where_nothing_goes():
    parts = layer()
    W, G, A = parts["weight"], parts["G"], parts["A"]
    rows, columns = torch.zeros(R, dtype=torch.bool), torch.arange(C) < 3
    assert torch.equal(rows_columns_update(W, None, A, rows, columns), rows_columns_update(W, G, A, rows, columns))
    with pytest.raises(ValueError, match="A of the kept columns is needed"):
        rows_columns_update(W, G, None, rows, columns)


def test_factors_of_costs():
    W, g, a = torch.randn(R, C), torch.rand(R), torch.rand(C)
    with pytest.raises(ValueError, match=r"g \[R\] and a \[C\]"):
        element_cost(W[0], g, a)
    for costs in (WeightCosts(W, g[:1], a), WeightCosts(W, g, a[:4]), WeightCosts(W, g)):
        for select in (lambda c: nm_select(c, 2, 4), lambda c: nm_group_cost(c, 2, 4), lambda c: k_cheapest([c], 3)):
            with pytest.raises(ValueError, match="costs need"):
                select(costs)
    with pytest.raises(TypeError, match="floating point"):
        nm_select(W.long(), 2, 4)


def test_blocks_of_columns():
    parts = layer()
    W, G, A_inv = parts["weight"], parts["G"], parts["A_inv"]
    for blocks in (torch.tensor([0, 1]), torch.tensor([[0.0, 1.0]])):
        with pytest.raises(ValueError, match="blocks must be int64"):
            column_block_cost(W, G, A_inv, blocks)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        column_block_cost(W, G, A_inv, torch.tensor([[2, 2]]))
    with pytest.raises(ValueError, match="A_inv must be"):
        column_block_cost(W, G, G, torch.tensor([[0, 1]]))


def test_what_was_pruned_before_is_a_mask_of_the_weight():
    W = torch.rand(R, C)
    for previous, error in ((torch.zeros(2, 2).bool(), ValueError), (torch.zeros(R, C), TypeError)):
        with pytest.raises(error, match="previous must be"):
            nm_select(W, 2, 4, previous=previous)
        with pytest.raises(error, match=r"previous\[0\] must be"):
            k_cheapest([WeightCosts(W)], 3, previous=[previous])
    with pytest.raises(ValueError, match="threshold is NaN"):
        nm_select(W, 2, 4, threshold=math.nan)
    with pytest.raises(ValueError, match="at_most must not be negative"):
        k_cheapest([WeightCosts(W)] * 2, 3, at_most=[-1, 8])


def test_accumulators_are_square():
    with pytest.raises(ValueError, match="square"):
        SymmetricAccumulator.of(torch.ones(2, 3))
    with pytest.raises(ValueError, match="-1 rows"):
        SymmetricAccumulator.zeros(-1)


def test_parts_of_a_block():
    x = torch.randn(2, 3, 5, 6)
    for weight in (torch.ones(1), torch.ones(5), torch.ones(2, 6)):
        with pytest.raises(ValueError, match=r"weight \[C\]"):
            rms_norm(x, weight, 1e-6)
    with pytest.raises(TypeError, match="floating point"):
        rms_norm(x.long(), torch.ones(6), 1e-6)
    good = torch.ones(1, 5, 6)
    for heads, cos, sin in (
        (x[0], good, good),
        (x, good[:, :3], good[:, :3]),
        (x[..., :5], good[..., :5], good[..., :5]),
    ):
        with pytest.raises(ValueError, match=r"x must be \[batch, heads, length, D\]"):
            rotary(heads, cos, sin)
    with pytest.raises(ValueError, match="S on meta"):
        quadratic_form(x[0, 0], torch.eye(6, device="meta"))
