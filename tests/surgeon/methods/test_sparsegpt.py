"""SparseGPT on one layer, against a slow reference by explicit inverses."""

import pytest
import torch

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.methods.sparsegpt import sparsegpt_layer

DOUBLE = torch.float64
CONFIG = PruneConfig(structure="2:4", method="sparsegpt", batch_size=2)


def problem(rows, columns, tokens=200, seed=0):
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=DOUBLE)
    a = torch.randn(tokens, columns, generator=generator, dtype=DOUBLE) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=DOUBLE), a.T @ a / tokens


def damped(H, damp=0.01):
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def obs_inverse(H, c):
    """Inverse of the Hessian of the columns that can still change when column ``c`` is visited."""
    return torch.linalg.inv(H[c:, c:])


def obs_update(W, H, pruned, c):
    """Remove the pruned weights of column ``c`` by the optimal-brain-surgeon update of the columns to its right."""
    inverse = obs_inverse(H, c)
    for r in range(len(W)):
        if pruned[r, c]:
            W[r, c:] -= W[r, c] / inverse[0, 0] * inverse[0]
            W[r, c] = 0.0


def slow_layer(W, H, sparsity, pattern, block):
    """The method by explicit inverses, one weight after the other; ``H`` is damped."""
    W = W.clone()
    R, C = W.shape
    pruned = torch.zeros(R, C, dtype=torch.bool)
    step = pattern[1] if pattern else block
    for c in range(C):
        if c % step == 0:
            end = min(c + step, C)
            cost = torch.stack([W[:, j] ** 2 / obs_inverse(H, j)[0, 0] for j in range(c, end)], dim=1)
            if pattern:
                cheapest = cost.argsort(dim=1, stable=True)[:, : pattern[1] - pattern[0]]
                pruned[:, c:end] = torch.zeros_like(cost).scatter_(1, cheapest, 1.0).bool()
            else:
                count = round(sparsity * R * end) - round(sparsity * R * c)
                mask = torch.zeros(cost.numel(), dtype=torch.bool)
                mask[cost.flatten().argsort(stable=True)[:count]] = True
                pruned[:, c:end] = mask.view_as(cost)
        obs_update(W, H, pruned, c)
    return W, pruned


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 12), (5, 24), (7, 36)])
@pytest.mark.parametrize("sparsity, block", [(0.5, 128), (0.5, 8), (0.3, 7), (0.83, 5), (0.5, 1)])
def test_unstructured_equals_explicit_inverses(rows, columns, sparsity, block):
    W, H = problem(rows, columns)
    expected, mask = slow_layer(W, damped(H), sparsity, None, block)
    actual, pruned = sparsegpt_layer(W, H, sparsity=sparsity, block=block)
    assert torch.equal(pruned, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern, columns", [((2, 4), 24), ((1, 4), 8), ((4, 8), 32), ((1, 3), 15), ((3, 5), 5)])
@pytest.mark.parametrize("block", [1, 6, 8, 13, 128])
def test_pattern_equals_explicit_inverses_for_every_block_size(pattern, columns, block):
    W, H = problem(6, columns)
    expected, mask = slow_layer(W, damped(H), None, pattern, block)
    actual, pruned = sparsegpt_layer(W, H, sparsity=0.5, pattern=pattern, block=block)
    assert torch.equal(pruned, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_update_is_the_least_squares_optimum():
    # One removed weight in the first column: everything else is free, so the update is the least-squares optimum.
    W, H = problem(1, 6)
    W[0, 0] = 1e-3
    actual, pruned = sparsegpt_layer(W, H, sparsity=1 / 6)
    assert pruned.tolist() == [[True] + [False] * 5]
    A = damped(H)
    delta = torch.linalg.solve(A[1:, 1:], A[1:, :1] @ W[:, :1].T).T
    torch.testing.assert_close(actual[:, 1:], W[:, 1:] + delta, rtol=1e-10, atol=1e-12)


def test_independent_inputs_need_no_compensation():
    W, _ = problem(4, 10)
    H = torch.diag(torch.arange(1.0, 11.0, dtype=DOUBLE))
    actual, pruned = sparsegpt_layer(W, H, sparsity=0.5)
    cost = W**2 * damped(H).diagonal()
    assert cost[pruned].max() < cost[~pruned].min()
    assert torch.equal(actual, W.masked_fill(pruned, 0.0))


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (5, 129), (4, 300)])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("weights", ["equal", "zero", "random"])
def test_unstructured_count_is_exact(rows, columns, sparsity, weights):
    W, H = problem(rows, columns)
    W = {"equal": torch.ones_like(W), "zero": torch.zeros_like(W), "random": W}[weights]
    H = torch.eye(columns, dtype=DOUBLE) if weights == "equal" else H
    actual, pruned = sparsegpt_layer(W, H, sparsity=sparsity)
    assert int(pruned.sum()) == round(sparsity * rows * columns)
    assert (actual[pruned] == 0).all() and not actual[pruned].signbit().any()
    if weights == "random":
        assert (actual[~pruned] != 0).all()


def test_every_block_removes_its_share():
    W, H = problem(3, 20)
    _, pruned = sparsegpt_layer(W, H, sparsity=0.25, block=8)
    assert [int(part.sum()) for part in pruned.split(8, dim=1)] == [6, 6, 3]


def test_ties_go_to_the_first_index():
    W, H = torch.ones(2, 8, dtype=DOUBLE), torch.eye(8, dtype=DOUBLE)
    _, pruned = sparsegpt_layer(W, H, sparsity=0.375)
    assert pruned.flatten().tolist() == [True] * 6 + [False] * 10
    _, pruned = sparsegpt_layer(W, H, sparsity=0.5, pattern=(2, 4))
    assert pruned.tolist() == [[True, True, False, False] * 2] * 2


@pytest.mark.parametrize("pattern, columns", [((2, 4), 260), ((1, 4), 8), ((3, 7), 21), ((64, 160), 320)])
def test_pattern_holds_in_every_group(pattern, columns):
    n, m = pattern
    W, H = problem(5, columns)
    actual, pruned = sparsegpt_layer(W, H, sparsity=0.5, pattern=pattern)
    assert (pruned.view(5, columns // m, m).sum(dim=2) == m - n).all()
    assert torch.equal(actual == 0, pruned)


@pytest.mark.parametrize("rows, columns", [(0, 8), (3, 0), (0, 0)])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_empty_weight(rows, columns, pattern):
    actual, pruned = sparsegpt_layer(torch.zeros(rows, columns), torch.eye(columns), sparsity=0.5, pattern=pattern)
    assert actual.shape == pruned.shape == (rows, columns)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_dead_inputs_leave_the_rest_as_if_they_were_absent(pattern, scale):
    W, H = problem(6, 24)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[0, 5, 6, 7, 23]] = True
    H[dead] = 0.0
    H[:, dead] = 0.0
    actual, pruned = sparsegpt_layer(W, scale * H, sparsity=0.5, pattern=pattern)
    assert (actual[:, dead] == 0).all()
    if pattern is None:
        # Weights of dead inputs cost nothing: they are the first of the exact count.
        assert pruned[:, dead].all() and int(pruned.sum()) == 72
        live, _ = sparsegpt_layer(W[:, ~dead], scale * H[~dead][:, ~dead], sparsity=(72 - 30) / (6 * 19))
        torch.testing.assert_close(actual[:, ~dead], live, rtol=1e-10, atol=1e-10)
    else:
        assert (pruned.view(6, 6, 4).sum(dim=2) == 2).all()


def test_inputs_that_are_all_dead():
    actual, pruned = sparsegpt_layer(torch.ones(2, 8), torch.zeros(8, 8), sparsity=0.5)
    assert (actual == 0).all() and int(pruned.sum()) == 8


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_singular_hessian_is_damped(dtype, pattern):
    W, H = problem(8, 64, tokens=2)  # rank 2
    W, H = W.to(dtype), (1e-8 * H).to(dtype)
    actual, pruned = sparsegpt_layer(W, H, sparsity=0.5, pattern=pattern)
    assert actual.isfinite().all() and int(pruned.sum()) == 256
    delta, zeroed = actual - W, W.masked_fill(pruned, 0.0) - W
    assert error(delta, H) < 0.2 * error(zeroed, H)


def error(delta, H):
    return float(((delta @ H) * delta).sum())


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_loses_less_than_magnitude_pruning(pattern):
    W, H = problem(32, 64)
    actual, _ = sparsegpt_layer(W, H, sparsity=0.5, pattern=pattern)
    groups = W.abs().view(-1, pattern[1] if pattern else 64)
    cheapest = groups.argsort(dim=1)[:, : groups.shape[1] // 2]
    magnitude = W.masked_fill(torch.zeros_like(groups).scatter_(1, cheapest, 1.0).bool().view_as(W), 0.0)
    assert error(actual - W, H) < error(magnitude - W, H)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_works_in_float32_on_narrower_weights(dtype):
    W, H = problem(4, 16)
    W = W.to(dtype)
    before = W.clone()
    actual, pruned = sparsegpt_layer(W, H.float(), sparsity=0.5, pattern=(2, 4))
    expected, mask = sparsegpt_layer(W.double(), H, sparsity=0.5, pattern=(2, 4))
    assert actual.dtype == torch.float32 and torch.equal(W, before)
    assert torch.equal(pruned, mask)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)


def test_arguments_are_left_as_they_were():
    W, H = problem(4, 16)
    H[3] = H[:, 3] = 0.0
    before = W.clone(), H.clone()
    sparsegpt_layer(W, H, sparsity=0.5)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sparsity": 1.1}, r"proj: sparsity must be in \[0, 1\], not 1.1"),
        ({"sparsity": float("nan")}, r"proj: sparsity must be in \[0, 1\], not nan"),
        ({"block": 0}, "proj: block must be at least 1, not 0"),
        ({"pattern": (2, 3)}, "proj: 2:3 needs a number of inputs divisible by 3, not 16"),
        ({"pattern": (4, 4)}, "proj: an N:M pattern needs 0 < N < M, not 4:4"),
        ({"pattern": (0, 4)}, "proj: an N:M pattern needs 0 < N < M, not 0:4"),
        ({"hessian": torch.eye(17)}, r"proj: the Hessian must be \[16, 16\], not \[17, 17\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"weight": torch.ones(4, 16), "hessian": torch.eye(16), "sparsity": 0.5} | change
    with pytest.raises(InputError, match=message):
        sparsegpt_layer(**arguments, name="proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["weight", "hessian"])
def test_nan_is_refused_by_name(which, value):
    arguments = {"weight": torch.ones(4, 16), "hessian": torch.eye(16)}
    arguments[which][2, 2] = value
    with pytest.raises(NumericalError, match=r"proj: the .* NaN"):
        sparsegpt_layer(**arguments, sparsity=0.5, name="proj")


def test_indefinite_hessian_is_named():
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 5.0
    with pytest.raises(NumericalError, match=r"proj: .* not positive definite"):
        sparsegpt_layer(torch.ones(2, 8), H, sparsity=0.5, name="proj")
