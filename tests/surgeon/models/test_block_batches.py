"""Batches on their way through the blocks, and what the blocks get besides."""

import pytest
import torch
from torch.utils._pytree import tree_flatten

from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.block_batches import record_batches
from llm_surgeon.models.decoder import find_decoder
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(0))


def padded():
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, 10:] = False
    mask[4, :5] = False
    return Calibration(TOKENS, mask)


def recorded(model, decoder, data):
    """Batches, and how often the first linear ran for them."""
    runs = []
    handle = decoder.linears[0].module.register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        batches = list(record_batches(model, decoder, data.batches(2, "cpu")))
    handle.remove()
    return batches, len(runs)


@pytest.mark.parametrize("data", [Calibration(TOKENS), padded()])
@pytest.mark.parametrize("name", [*NAMES, "gpt_neo", "gemma4_text", "gemma4_shared", "ctrl"])
def test_arguments_are_those_of_whole_passes(name, data):
    """With the arguments of a batch the blocks compute the model's own hidden states."""
    model = build(name)
    decoder, expected = find_decoder(model), []
    whole = decoder.blocks[-1].register_forward_hook(
        lambda _, args, y: expected.append(y[0] if type(y) is tuple else y)
    )
    for ids, mask in data.batches(2, "cpu"):
        with torch.no_grad():
            list(record_batches(model, decoder, [(ids, mask)]))
    whole.remove()
    batches, runs = recorded(model, decoder, data)
    # Some blocks of Gemma 4 leave keys and values to later ones.
    assert runs == 3 if name == "gemma4_shared" else runs == 1 or name == "gemma4_text"
    assert len(batches) == 3
    assert not any("forward" in vars(block) for block in decoder.blocks)
    with torch.no_grad():
        for batch, output in zip(batches, expected[::2], strict=True):  # a pass that computes, and one that does not
            for block in decoder.blocks:
                batch.hidden = batch.run(block)
            assert torch.equal(batch.hidden, output)


@pytest.mark.parametrize("fails", [False, True])
def test_blocks_compute_where_others_get_what_they_computed(fails, monkeypatch):
    model = build("llama")
    decoder = find_decoder(model)
    first, second = decoder.blocks
    forward, computed = second.forward, []

    def hand_over(block, args, kwargs, output):
        computed.append(output)
        if fails and output is args[0]:
            raise ValueError("nothing was computed")

    first.register_forward_hook(hand_over, with_kwargs=True)
    second.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "more": computed[-1]}), with_kwargs=True)
    monkeypatch.setattr(second, "forward", lambda *args, more, **kwargs: forward(*args, **kwargs))
    batches, runs = recorded(model, decoder, Calibration(TOKENS))
    assert runs == 3
    for batch in batches:
        leaves, _ = tree_flatten(batch.arguments[second])
        with torch.no_grad():
            output = batch.run(first)
        assert any(isinstance(x, torch.Tensor) and x.shape == output.shape and torch.equal(x, output) for x in leaves)
