"""Curvature as a sum of two Kronecker products, against the singular values of the dense Fisher matrix."""

import functools

import pytest
import torch

from llm_surgeon import InputError, PruneConfig, prune
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.methods.two_terms import TwoTermCurvature
from llm_surgeon.models.decoder import find_decoder
from tests.surgeon.tiny_models import build

TOKENS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def dense_rearranged(model, decoder, linear):
    """``R(F) = (1/N) Σ vec(g gᵀ) vec(a aᵀ)ᵀ`` ``[R², C'²]``, from gradients that autograd finds."""
    captured = {}

    def keep(_, args, y):
        captured["a"], captured["y"] = args[0].detach(), y
        y.retain_grad()

    handle = linear.module.register_forward_hook(keep)
    logits = model(TOKENS).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    loss.backward()
    handle.remove()
    a, g = (x.reshape(-1, x.shape[-1]).double() for x in (captured["a"], captured["y"].grad))
    if linear.has_bias:
        a = torch.cat([a, torch.ones(len(a), 1)], dim=1)
    gg, aa = torch.einsum("nr,ns->nrs", g, g).flatten(1), torch.einsum("nc,nd->ncd", a, a).flatten(1)
    return gg.T @ aa / len(a)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_two_rounds_come_close_to_the_best_sum_of_two(name):
    model = build(name)
    decoder = find_decoder(model)
    estimate = functools.partial(
        estimate_curvature, model, decoder, Calibration.of(TOKENS), batch_size=2, gradients=True
    )
    curvature = estimate()
    two_terms = TwoTermCurvature(decoder, PruneConfig(), curvature, estimate)
    for linear in (decoder.linears[0], decoder.linears[-1]):
        exact = dense_rearranged(model, decoder, linear)
        norm, singular = exact.norm(), torch.linalg.svdvals(exact)
        best = (singular[2:] ** 2).sum().sqrt() / norm
        G, A = (x.double() for x in two_terms._pairs[linear.name])
        rank_2 = (exact - sum(torch.outer(g.flatten(), a.flatten()) for g, a in zip(G, A, strict=True))).norm() / norm
        G, A = (x.double() for x in curvature.factors(linear))
        rank_1 = (exact - torch.outer(G.flatten(), A.flatten())).norm() / norm
        assert best <= rank_2 * (1 + 1e-6)
        assert rank_2 < 1.15 * best + 0.02
        assert rank_2 < rank_1


@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_prunes_a_model(structure):
    model = build("llama")
    report = prune(model, TOKENS, structure=structure, shots=2, kron_rank=2)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all(shot.predicted_increase is not None for shot in report.shots)
    for linear in find_decoder(model).linears:
        assert torch.isfinite(linear.module.weight).all()


def test_what_it_does_not_go_with_is_refused():
    for options in ({"structure": "rows-columns"}, {"update": "chunked"}, {"method": "wanda"}, {"swaps": 1}):
        with pytest.raises(InputError, match="kron_rank 2"):
            PruneConfig(kron_rank=2, **options)
    with pytest.raises(InputError, match="kron_rank must be at most 2, not 3"):
        PruneConfig(kron_rank=3)
