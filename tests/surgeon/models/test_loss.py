from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llm_surgeon.models.loss import WholeLogits, differentiable_loss, divergence, next_token_loss

VOCABULARY = 11


def head(kind: str, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, x.shape[-1], generator=generator, dtype=x.dtype)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=x.dtype) if kind == "bias" else None
    logits = functional.linear(x, weight, bias)
    return 3.0 * torch.tanh(logits / 3.0) if kind == "soft cap" else logits


@pytest.mark.parametrize("kind", ["plain", "bias", "soft cap"])
@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_gradient_are_those_of_autograd(kind: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_surgeon.models.loss.CHUNK", 4 * VOCABULARY)
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(15).view(3, 5) % VOCABULARY
    mask = torch.ones(3, 5, dtype=torch.bool)
    if padded:
        mask[0, :2] = False
        mask[2, 3:] = False
    wanted = (mask[:, :-1] & mask[:, 1:]).flatten()
    flat = functional.cross_entropy(head(kind, x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    expected = flat[wanted].sum()
    (expected_gradient,) = torch.autograd.grad(expected, x)

    logits = head(kind, x)
    whole = WholeLogits(logits, with_gradient=True)
    loss, gradient = next_token_loss(whole, ids, mask if padded else None), whole.gradient
    assert gradient is not None
    # The gradient of a soft cap is computed from what it returned; with a bias the logits are a view.
    assert (gradient.data_ptr() == logits.data_ptr()) == (kind == "plain")
    logits.register_hook(lambda g: None)
    logits.backward(gradient)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, expected_gradient, rtol=1e-12, atol=1e-12)


def test_logits_are_left_alone_without_a_gradient() -> None:
    logits = nn.Linear(4, VOCABULARY)(torch.randn(2, 3, 4))
    before = logits.detach().clone()
    whole = WholeLogits(logits)
    loss = next_token_loss(whole, torch.zeros(2, 3, dtype=torch.long), None)
    assert whole.gradient is None and loss.isfinite()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_that_autograd_derives_is_the_same(padded: bool) -> None:
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(15).view(3, 5) % VOCABULARY
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, :2] = not padded
    whole = WholeLogits(head("plain", x), with_gradient=True)
    expected, gradient = next_token_loss(whole, ids, mask), whole.gradient
    logits = head("plain", x)
    total = differentiable_loss(logits, ids, mask if padded else None, "sum")
    (found,) = torch.autograd.grad(total, logits, retain_graph=True)
    torch.testing.assert_close(total.detach(), expected)
    torch.testing.assert_close(found, gradient)
    targets = 12 - 2 * padded
    torch.testing.assert_close(differentiable_loss(logits, ids, mask, "mean"), total / targets)


@pytest.mark.parametrize("padded", [False, True])
def test_the_divergence_and_its_gradient_are_those_of_autograd(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_surgeon.models.loss.CHUNK", 4 * VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, :2] = not padded
    z = head("plain", x).requires_grad_()
    wanted = head("plain", y)
    wanted[..., 3] = -torch.inf  # a token that cannot be
    terms = functional.kl_div(z.log_softmax(-1), wanted.softmax(-1), reduction="none").sum(-1)
    expected = terms[mask].sum()
    (expected_gradient,) = torch.autograd.grad(expected, z)
    logits = WholeLogits(z.detach(), with_gradient=True)
    found = divergence(logits, WholeLogits(wanted), mask if padded else None)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    assert divergence(WholeLogits(wanted), WholeLogits(wanted.clone()), mask) == 0.0
