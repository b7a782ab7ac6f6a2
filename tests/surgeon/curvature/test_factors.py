"""Damped factors of layers: their jitter, inverses and products against dense float64 mathematics."""

import pytest
import torch

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.factors import DampedFactor, DampedFactors, KroneckerFactors
from llm_surgeon.errors import NumericalError
from llm_surgeon.models.decoder import PrunableLinear
from surgeon_kernels import gram_accumulate_, inverse_diagonal
from tests.surgeon.one_layer import CPU, C, R, accumulated, damped, layer


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


def test_factors_need_gradients_but_for_the_diagonal_of_A():
    linear, curvature = layer(True)
    curvature._gradients.clear()
    factors = DampedFactors(curvature, PruneConfig(), [linear], CPU)
    g, a = factors.diagonals(linear)
    assert g is None and torch.equal(a, curvature.factors(linear)[1].diagonal())
    with pytest.raises(ValueError, match="not enough values"):
        factors.of(linear)


def kronecker_factors():
    """Factors ``[3, 3]`` and ``[4, 4]`` with damping 0.1 and 0.01; the undamped ones."""
    generator = torch.Generator().manual_seed(0)
    G, A = (x @ x.T for x in (torch.randn(n, 9, dtype=torch.float64, generator=generator) for n in (3, 4)))
    factors = KroneckerFactors(DampedFactor(G.clone(), 0.1), DampedFactor(A.clone(), 0.01, jitter=1e-3))
    return factors, G, A, torch.randn(3, 4, dtype=torch.float64, generator=generator)


def test_kronecker_factors_act_as_the_dense_kronecker_product():
    factors, G, A, X = kronecker_factors()
    G_damped, A_damped = damped(G, 0.1), damped(A, 0.01 + 1e-3)
    F, F_inv = torch.kron(G_damped, A_damped), torch.linalg.inv(torch.kron(G_damped, A_damped))
    torch.testing.assert_close(factors.product(X).flatten(), F @ X.flatten())
    torch.testing.assert_close(factors.inverse_product(X).flatten(), F_inv @ X.flatten())
    for (g, a), dense_diagonal in ((factors.diagonals, F.diagonal()), (factors.inverse_diagonals, F_inv.diagonal())):
        torch.testing.assert_close(torch.outer(g, a).flatten(), dense_diagonal)
    assert all(torch.equal(*pair) for pair in zip(factors.damped, (G_damped, A_damped), strict=True))
    for inverse, M in zip(factors.inverses, factors.damped, strict=True):
        torch.testing.assert_close(inverse @ M, torch.eye(len(M), dtype=torch.float64))


def test_the_predicted_increase_is_without_damping():
    factors, G, A, X = kronecker_factors()
    expected = 0.5 * X.flatten() @ torch.kron(G, A) @ X.flatten()
    found = factors.predicted_increase(X)
    assert found.dtype == torch.float64 and float(found) == pytest.approx(float(expected))
    torch.testing.assert_close(factors.g.undamped(), G)


def test_a_checked_factor_has_the_jitter_it_needs():
    M = torch.diag(torch.tensor([1.0, 1.0, 1.0, -3e-5], dtype=torch.float64))
    factor = DampedFactor.checked(M.clone(), 1e-9, "A of mlp.up")
    assert factor.jitter == 1e-4
    assert torch.equal(factor.damped, damped(M, 1e-9 + 1e-4))
    torch.testing.assert_close(factor.inverse, torch.linalg.inv(factor.damped))
    with pytest.raises(NumericalError, match=r"A of mlp\.up is not positive definite"):
        DampedFactor.checked(-M, 1e-9, "A of mlp.up")
