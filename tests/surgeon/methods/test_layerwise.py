"""Layer-wise pruning that aims at the dense model, against least squares on inputs that complete passes show."""

import pytest
import torch

from llm_surgeon import prune
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import NumericalError
from llm_surgeon.methods.sparsegpt import prune_sparsegpt, sparsegpt_layer
from llm_surgeon.models.decoder import find_decoder
from tests.surgeon.methods.test_sequential import (
    DOUBLE,
    KINDS,
    TOKENS,
    padded_tokens,
    places,
    seen,
    stream_before,
    target_of,
)
from tests.surgeon.tiny_models import build


def slowly(name, data, config):
    """The model in which every linear, at its turn, is pruned around its target, and what is pruned."""
    model = build(name, DOUBLE)
    dense = seen(model, data, places(model, name))
    real = torch.ones_like(TOKENS, dtype=torch.bool) if data.attention_mask is None else data.attention_mask
    real, masks = real.flatten(), {}
    pattern = (2, 4) if config.structure == "2:4" else None
    decoder = find_decoder(model)
    for group in dict.fromkeys(linear.input_group for linear in decoder.linears):
        after = seen(model, data, places(model, name))
        for linear in [linear for linear in decoder.linears if linear.input_group == group]:
            key, C = f"{linear.depth} {linear.kind}", linear.columns
            inputs, wanted = after[key][0][real], dense[key][1][real]
            ones = torch.ones(len(inputs), linear.has_bias, dtype=DOUBLE)
            lack = None
            if linear.kind in KINDS[name]:
                streams = [stream_before(name, linear.kind, linear.depth, found)[real] for found in (dense, after)]
                lack = streams[0] - streams[1]
            weights = torch.ones(len(inputs), dtype=DOUBLE)
            target = target_of(linear.matrix(), torch.cat([inputs, ones], dim=1), wanted, lack, weights, config)
            target[:, :C], masks[linear.name] = sparsegpt_layer(
                target[:, :C],
                inputs.T @ inputs / len(inputs),
                sparsity=config.sparsity,
                pattern=pattern,
                damp=config.damp_a,
            )
            linear.write(target)
    return model, masks


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "padded, options",
    [
        (False, {"structure": "2:4"}),
        (True, {"structure": "2:4", "target_damping": 0.03, "residual_weight": 0.6, "damp_a": 0.05}),
        (False, {"structure": "unstructured", "sparsity": 0.7, "residual_weight": 0.0}),
    ],
)
def test_sparsegpt_goes_around_the_least_squares_target(name, padded, options):
    data = padded_tokens() if padded else Calibration(TOKENS)
    config = PruneConfig(method="sparsegpt", update="sequential", batch_size=4, **options)
    model = build(name, DOUBLE)
    masks = prune_sparsegpt(model, find_decoder(model), data, config)
    other, expected = slowly(name, data, config)
    for linear in find_decoder(model).linears:
        assert torch.equal(masks[linear.name], expected[linear.name])
    for (key, actual), value in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-6, msg=key)


def test_the_dense_model_is_followed_more_closely():
    outputs, errors = [], {}
    for update in (None, "none", "sequential"):
        model = build("llama")
        if update is not None:
            report = prune(model, TOKENS, structure="2:4", method="sparsegpt", update=update)
            assert report.sparsity == 0.5 and report.config["update"] == update
        with torch.no_grad():
            outputs.append(model.model(TOKENS).last_hidden_state)
        errors[update] = float((outputs[-1] - outputs[0]).norm() / outputs[0].norm())
    assert errors["sequential"] < 0.9 * errors["none"]


def test_the_model_is_as_it_was_after_a_failure():
    model = build("llama").train()
    forwards = [module.forward for module in model.modules()]
    find_decoder(model).linears[-1].module.weight.data[0, 0] = float("nan")
    config = PruneConfig(structure="2:4", method="sparsegpt", update="sequential")
    with pytest.raises(NumericalError, match="NaN") as caught:  # which keeps what was under way alive
        prune_sparsegpt(model, find_decoder(model), Calibration(TOKENS), config)
    assert caught.tb is not None and model.training
    assert [module.forward for module in model.modules()] == forwards
