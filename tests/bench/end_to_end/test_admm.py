"""The ADMM baseline against its definition: brute force, dense float64 solves, and a model's layers."""

from itertools import combinations

import pytest
import torch

from bench.end_to_end.admm import admm_layer
from bench.end_to_end.trials import METHODS
from llm_surgeon import prune
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.methods.sparsegpt import sparsegpt_layer
from llm_surgeon.models.decoder import find_decoder
from tests.surgeon.methods.test_sparsegpt import DOUBLE, damped, problem
from tests.surgeon.tiny_models import VOCABULARY, build


def error(W, new, H):
    return float(((new - W) @ damped(H) * (new - W)).sum())


def optimum(W, H, pruned):
    """The least-squares optimum of all rows with these zeros."""
    A, new = damped(H), torch.zeros_like(W)
    for r, kept in enumerate(~pruned):
        new[r, kept] = torch.linalg.solve(A[kept][:, kept], (A[kept] @ W[r]))
    return new


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4), (4, 8)])
def test_kept_weights_are_at_their_optimum(pattern):
    W, H = problem(6, 24)
    new, pruned = admm_layer(W, H, sparsity=0.6, pattern=pattern, refinements=200)
    torch.testing.assert_close(new, optimum(W, H, pruned), rtol=1e-6, atol=1e-8)
    if pattern is None:
        assert int(pruned.sum()) == round(0.6 * W.numel())
    else:
        assert (pruned.unflatten(1, (-1, pattern[1])).sum(dim=2) == pattern[1] - pattern[0]).all()
    assert (new[pruned] == 0).all() and new.dtype == DOUBLE


def test_a_few_refinements_come_close_to_the_optimum():
    W, H = problem(16, 48)
    new, pruned = admm_layer(W, H, sparsity=0.5)
    assert error(W, new, H) < 1.01 * error(W, optimum(W, H, pruned), H)


def test_independent_inputs_lose_their_smallest_products():
    W, _ = problem(4, 10)
    H = torch.diag(torch.arange(1.0, 11.0, dtype=DOUBLE))
    new, pruned = admm_layer(W, H, sparsity=0.5)
    cost = W**2 * damped(H).diagonal()
    assert cost[pruned].max() < cost[~pruned].min()
    torch.testing.assert_close(new, W.masked_fill(pruned, 0.0))


def test_near_the_best_of_all_supports():
    ours, best, sparsegpt = 0.0, 0.0, 0.0
    for seed in range(20):
        W, H = problem(1, 10, seed=seed)
        masks = [torch.isin(torch.arange(10), torch.tensor(gone))[None] for gone in combinations(range(10), 5)]
        best += min(error(W, optimum(W, H, mask), H) for mask in masks)
        ours += error(W, admm_layer(W, H, sparsity=0.5)[0], H)
        sparsegpt += error(W, sparsegpt_layer(W, H, sparsity=0.5)[0], H)
    assert best <= ours < 1.3 * best < sparsegpt


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, None), (0.7, None), (0.5, (2, 4))])
def test_error_is_below_that_of_sparsegpt(sparsity, pattern):
    W, H = problem(32, 64)
    ours, sparsegpt = (
        error(W, layer(W, H, sparsity=sparsity, pattern=pattern)[0], H) for layer in (admm_layer, sparsegpt_layer)
    )
    assert ours < 0.9 * sparsegpt


def test_float32_makes_the_choice_of_float64():
    W, H = problem(16, 32)
    single, double = (admm_layer(W.to(dtype), H.to(dtype), sparsity=0.5) for dtype in (torch.float32, DOUBLE))
    assert torch.equal(single[1], double[1])
    torch.testing.assert_close(single[0].double(), double[0], rtol=1e-3, atol=1e-3)


def test_no_inputs_and_all_or_nothing():
    W, H = problem(3, 8)
    new, pruned = admm_layer(W, torch.zeros_like(H), sparsity=0.5)
    assert new.isfinite().all() and int(pruned.sum()) == 12
    new, pruned = admm_layer(W, H, sparsity=0.0)
    torch.testing.assert_close(new, W)
    assert not pruned.any()
    new, pruned = admm_layer(W, H, sparsity=1.0)
    assert not new.any() and pruned.all()


def test_what_does_not_fit_is_refused():
    W, H = problem(3, 10)
    with pytest.raises(InputError, match=r"^up: 2:4 needs a number of inputs divisible by 4, not 10$"):
        admm_layer(W, H, sparsity=0.5, pattern=(2, 4), name="up")
    with pytest.raises(NumericalError, match=r"^up: .*NaN or infinity"):
        admm_layer(W, H.fill_(torch.nan), sparsity=0.5, name="up")


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_layers_of_a_model_are_pruned_on_the_inputs_that_the_blocks_before_leave(name):
    tokens = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    model = build(name, DOUBLE)
    dense = {linear.name: linear.matrix() for linear in find_decoder(model).linears}
    report = prune(model, tokens, structure="2:4", **METHODS["admm"])
    assert report.sparsity == 0.5
    decoder = find_decoder(model)
    linear = next(x for x in decoder.linears if x.depth == 1)  # the first that reads what a pruned block gives
    inputs = []
    hook = linear.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    (a,) = inputs
    weight = dense[linear.name][:, : linear.columns]
    new, pruned = admm_layer(weight, a.T @ a / len(a), sparsity=0.5, pattern=(2, 4))
    assert torch.equal(linear.weight == 0, pruned)
    torch.testing.assert_close(linear.weight, new, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(linear.matrix()[:, linear.columns :], dense[linear.name][:, linear.columns :])


def test_it_may_aim_at_the_dense_model_too():
    tokens = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    outputs = []
    for method in (None, "admm", "admm sequential"):
        model = build("llama")
        if method is not None:
            assert prune(model, tokens, structure="2:4", **METHODS[method]).sparsity == 0.5
        with torch.no_grad():
            outputs.append(model.model(tokens).last_hidden_state)
    dense, own, corrected = outputs
    assert (corrected - dense).norm() < 0.9 * (own - dense).norm()
