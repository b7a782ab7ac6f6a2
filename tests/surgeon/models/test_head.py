"""The output head, left out of a model and multiplied with a chunk of hidden states at a time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from llm_surgeon.models.head import HeadLogits, left_out, plain_head
from llm_surgeon.models.loss import WholeLogits, next_token_loss
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build


@pytest.mark.parametrize("name", NAMES)
def test_plain_heads_are_found(name: str) -> None:
    model = build(name)
    head = plain_head(model)
    assert head is model.get_output_embeddings()
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        with left_out(head):
            hidden = model(input_ids=ids).logits
        assert hidden.shape[-1] == head.in_features
        assert torch.equal(head(hidden), logits) and torch.equal(model(input_ids=ids).logits, logits)


def test_heads_that_more_is_done_to_are_not() -> None:
    capped, shifted, hooked, replaced = build("llama"), build("llama"), build("llama"), build("llama")
    capped.lm_head.forward = lambda h: 30.0 * torch.tanh(nn.functional.linear(h, capped.lm_head.weight) / 30.0)
    shifted.register_forward_hook(lambda module, args, output: setattr(output, "logits", 0.5 + output.logits))
    hooked.lm_head.register_forward_hook(lambda module, args, y: y)
    replaced.set_output_embeddings(nn.Sequential(nn.Linear(32, VOCABULARY)))
    assert [plain_head(model) for model in (capped, shifted, hooked, replaced)] == [None] * 4


def test_a_model_is_probed_once_until_it_is_changed() -> None:
    model, passes = build("llama"), []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    head = plain_head(model)
    for _ in range(2):
        assert plain_head(model) is head and len(passes) == 2
    shift = model.register_forward_hook(lambda module, args, output: setattr(output, "logits", 0.5 + output.logits))
    assert plain_head(model) is None and plain_head(model) is None and len(passes) == 4
    shift.remove()
    assert plain_head(model) is head and len(passes) == 6
    model.lm_head = nn.Linear(32, VOCABULARY, bias=False)
    assert plain_head(model) is model.lm_head and len(passes) == 8
    gone = weakref.ref(model)
    del model, head, shift
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_losses_gradients_and_drawn_labels_are_those_of_whole_logits(
    bias: bool, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_surgeon.models.loss.CHUNK", 4 * VOCABULARY)
    torch.manual_seed(0)
    head = nn.Linear(8, VOCABULARY, bias=bias, dtype=torch.float64)
    hidden = torch.randn(8, 3, 5, dtype=torch.float64).permute(1, 2, 0).requires_grad_()
    ids = torch.arange(15).view(3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[2, 3:] = False
    draws = torch.rand(ids.shape) if sampled else None
    found = []
    for whole in (True, False):
        if whole:
            logits = WholeLogits(head(hidden), with_gradient=True)
        else:
            logits = HeadLogits(hidden, head.weight, head.bias, with_gradient=True)
        loss = next_token_loss(logits, ids, mask, draws)
        assert logits.gradient is not None
        (gradient,) = torch.autograd.grad(logits.source, hidden, logits.gradient)
        found.append((loss, gradient))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_products_of_16_bits_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(64, VOCABULARY, bias=False), torch.randn(2, 5, 64)
    rows = HeadLogits(hidden, head.weight.bfloat16(), None).rows(slice(3, 7))
    exact = hidden.bfloat16().double().flatten(0, 1)[3:7] @ head.weight.bfloat16().double().T
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-6)
