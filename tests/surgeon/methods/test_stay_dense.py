"""Linears that stay dense: which, by what they would lose, and what becomes of the model."""

from __future__ import annotations

import pytest
import torch

from llm_surgeon import InputError, PruneConfig, prune
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.curvature.factors import DampedFactor, KroneckerFactors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.methods.stay_dense import choose_dense, loss_of_pattern
from llm_surgeon.models.decoder import find_decoder
from surgeon_kernels import joint_update, nm_select
from tests.surgeon.tiny_models import VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "fraction, expected",
    [
        (0.0, [False, False, False, False]),
        (0.3, [False, True, False, False]),  # 3 of 10; the next dearest per weight does not fit
        (0.4, [True, True, False, False]),  # 4 of 10
        (0.95, [True, True, True, False]),
    ],
)
def test_those_that_lose_most_for_a_weight_stay_dense_as_far_as_they_fit(fraction, expected):
    assert choose_dense([2.0, 9.0, 8.0, 0.1], [1, 3, 4, 2], fraction) == expected


def test_where_all_lose_alike_they_are_spread():
    assert choose_dense([0.0] * 8, [5] * 8, 0.25) == [False, True, False, False] * 2
    assert sum(choose_dense([0.0] * 100, [5] * 100, 0.37)) == 37
    mixed = [1, 1, 6] * 50
    large = choose_dense([0.0] * 150, mixed, 0.3)[2::3]
    assert 10 <= sum(large) <= 20  # not the small ones alone


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_losses_are_those_of_joint_updates(kind):
    model = build(kind).double()
    decoder, config = find_decoder(model), PruneConfig(dense_fraction=0.5)
    curvature = estimate_curvature(model, decoder, Calibration(TOKENS), batch_size=12, fisher="sampled", seed=0)
    for linear in decoder.linears[:3]:
        G, A = curvature.factors(linear)
        factors = KroneckerFactors(DampedFactor(G, 0.1), DampedFactor(A, 0.01))
        W, (G_inv, A_inv) = linear.matrix(), factors.inverses
        cost = W.square() / G_inv.diagonal()[:, None] / A_inv.diagonal()
        pruned = torch.zeros_like(W, dtype=torch.bool)
        pruned[:, : linear.columns] = nm_select(cost[:, : linear.columns], 2, 4)
        exact = joint_update(W, pruned, *factors.damped, *factors.inverses, tolerance=1e-8).objective[-1]
        assert loss_of_pattern(linear, factors, config) == pytest.approx(exact, rel=0.06)


@pytest.mark.parametrize(
    "options", [{}, {"update": "joint", "shots": 2}, {"structure": "4:8", "shots": 2}, {"dense_by": "wanda"}]
)
def test_a_part_of_the_model_stays_dense_and_the_rest_has_the_pattern(options):
    model, dense = build("llama"), build("llama")
    report = prune(model, TOKENS, dense_fraction=0.3, **options)
    m, total = 8 if "structure" in options else 4, sum(layer.weights for layer in report.layers)
    assert report.shots[-1].target_sparsity == pytest.approx(report.sparsity, abs=1e-9)
    stay = {layer.name for layer in report.layers if not layer.removed}
    assert 0.2 * total < sum(layer.weights for layer in report.layers if layer.name in stay) <= 0.3 * total
    changed = False  # inputs, by what is gone before
    linears, group = find_decoder(model).linears, ""
    for linear, before in zip(linears, find_decoder(dense).linears, strict=True):
        zeros = (linear.weight == 0.0).unflatten(1, (-1, m)).sum(dim=2)
        assert bool((zeros == (0 if linear.name in stay else m // 2)).all()), linear.name
        if linear.input_group != group:
            earlier = linears[: linears.index(linear)]
            changed, group = any(each.name not in stay for each in earlier), linear.input_group
        if linear.name in stay and "update" not in options:  # they make up for what is gone before them
            assert torch.equal(linear.weight, before.weight) == (not changed), linear.name


def test_what_loses_most_is_worth_more_than_an_even_spread():
    predicted = {}
    for by in ("loss", "none"):
        report = prune(build("llama"), TOKENS, dense_fraction=0.3, dense_by=by)
        predicted[by] = report.shots[0].predicted_increase
    whole = prune(build("llama"), TOKENS).shots[0].predicted_increase
    assert predicted["loss"] < 0.5 * predicted["none"] < 0.5 * whole


@pytest.mark.parametrize(
    "options, words",
    [
        ({"structure": "unstructured"}, "no meaning for structure 'unstructured'"),
        ({"method": "wanda"}, "method 'wanda' with update 'none' does not"),
        ({"update": "none"}, "with update 'none' does not"),
        ({"dense_fraction": 0.0, "dense_by": "wanda"}, "dense_by means nothing without dense_fraction"),
    ],
)
def test_what_has_no_use_for_it_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        PruneConfig(**{"dense_fraction": 0.3, **options})
