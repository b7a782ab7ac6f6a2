"""Linears that share an input, computed together for a single token."""

import copy

import pytest
import torch
from torch.nn import functional

from llm_surgeon.inference.merged_linears import merge_linears
from llm_surgeon.models.decoder import find_decoder
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))


def steps(model, tokens):
    """Logits of the last tokens, fed one at a time."""
    with torch.no_grad():
        output = model(tokens[:, :4], use_cache=True)
        logits = []
        for position in range(4, tokens.shape[1]):
            output = model(tokens[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_linears_alone(name):
    model = build(name, torch.float64)
    state, forwards = copy.deepcopy(model.state_dict()), [vars(m).get("forward") for m in model.modules()]
    expected, prompt = steps(model, TOKENS), model(TOKENS).logits
    with merge_linears(model):
        torch.testing.assert_close(steps(model, TOKENS), expected, rtol=0.0, atol=1e-10)
        torch.testing.assert_close(steps(model, TOKENS.expand(2, -1)), expected.expand(2, -1, -1), rtol=0, atol=1e-10)
        torch.testing.assert_close(model(TOKENS).logits, prompt, rtol=0.0, atol=1e-10)
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    torch.testing.assert_close(steps(model, TOKENS), expected, rtol=0.0, atol=0.0)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_step_makes_one_product_of_those_that_share_an_input(monkeypatch):
    model = build("llama")
    shapes = []
    own = functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, w, b=None: (shapes.append(tuple(w.shape)), own(x, w, b))[1])
    block = find_decoder(model).blocks[0]
    with merge_linears(model):
        shapes.clear()
        with torch.no_grad():
            model(TOKENS[:, :1])
        assert shapes == 2 * [(64, 32), (32, 32), (96, 32), (32, 48)] + [(VOCABULARY, 32)]
        # Another tensor, and the same one written to in between, are other inputs.
        x = torch.randn(1, 1, 32)
        with torch.no_grad():
            block.self_attn.q_proj(x)
            y = torch.randn(1, 1, 32)
            torch.testing.assert_close(block.self_attn.k_proj(y), own(y, block.self_attn.k_proj.weight))
            block.self_attn.q_proj(x)
            x.mul_(2.0)
            torch.testing.assert_close(block.self_attn.k_proj(x), own(x, block.self_attn.k_proj.weight))
