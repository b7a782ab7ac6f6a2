"""Copies of the dense weights, in place of those of a pruned model for a pass."""

from __future__ import annotations

import pytest
import torch

from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.dense_weights import DenseWeights
from tests.surgeon.tiny_models import build


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_the_model_computes_as_when_the_copies_were_made(kind: str) -> None:
    model, ids = build(kind), torch.arange(10).view(2, 5)
    decoder = find_decoder(model)
    copies = DenseWeights(decoder)
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        for linear in decoder.linears:
            linear.write(0.5 * linear.matrix())
        own = model(input_ids=ids).logits
        places = [p.data_ptr() for p in model.parameters()]
        with pytest.raises(KeyError), copies.in_place():
            assert torch.equal(model(input_ids=ids).logits, dense)
            raise KeyError
        assert torch.equal(model(input_ids=ids).logits, own) and not torch.equal(own, dense)
    assert [p.data_ptr() for p in model.parameters()] == places
