"""Attention alone runs with torch's switch on, forward and backward."""

import pytest
import torch
from torch.nn import functional

from llm_surgeon.models.passes import checkpointed, run_model
from llm_surgeon.models.repeatable import repeatable
from tests.surgeon.tiny_models import VOCABULARY, build


class _Seen(torch.autograd.Function):
    """Identity; notes the switch in its backward pass."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append(torch.are_deterministic_algorithms_enabled())
        return gradient, None


def switch():
    fills = torch.utils.deterministic.fill_uninitialized_memory
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns, fills


@pytest.fixture
def thrown(monkeypatch):
    """How torch's switch was thrown, in order."""
    found = []
    throw = torch.use_deterministic_algorithms
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *a, **k: (found.append(a[0]), throw(*a, **k)))
    return found


def test_the_switch_is_on_in_attention_alone(thrown):
    around = []
    before, attention = switch(), functional.scaled_dot_product_attention
    x = torch.randn(1, 2, 8, 10, requires_grad=True)
    with repeatable():
        inner = _Seen.apply(x, around)
        out = functional.scaled_dot_product_attention(inner, inner, inner, is_causal=True)
        _Seen.apply(out, around).sum().backward()
        assert thrown == [True, False] * 2 and around == [False, False]
        assert switch() == before
    assert switch() == before and functional.scaled_dot_product_attention is attention


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_every_block_of_a_model_is_seen(again, thrown):
    model = build("llama")
    ids = torch.randint(0, VOCABULARY, (2, 7))
    with checkpointed(model.model.layers if again else []), repeatable():
        run_model(model, ids, None).logits.sum().backward()
    passes = 3 if again else 2  # forward, forward again, backward
    assert thrown.count(True) == passes * model.config.num_hidden_layers


def test_what_was_chosen_is_restored_after_a_failure():
    before, attention = switch(), functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), repeatable():
        torch.use_deterministic_algorithms(True)
        raise ZeroDivisionError
    assert switch() == before and functional.scaled_dot_product_attention is attention
