"""SparseGPT on a model, against a slow reference by complete forward passes."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.pytorch_utils import Conv1D

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.methods.sparsegpt import prune_sparsegpt, sparsegpt_layer
from llm_surgeon.models.decoder import find_decoder
from tests.surgeon.tiny_models import NAMES, build

DOUBLE = torch.float64
CONFIG = PruneConfig(structure="2:4", method="sparsegpt", batch_size=2)


def build_double(name):
    torch.manual_seed(0)
    if name == "gemma3":  # masks and rotary embeddings differ between its blocks
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        kinds = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(
            vocab_size=64, head_dim=8, num_hidden_layers=2, sliding_window=4, layer_types=kinds, **sizes
        )
        return Gemma3ForCausalLM(config).double()
    if name == "bloom":  # has no position_ids; blocks return tuples
        return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).double()
    return build(name, DOUBLE)


def model_and_data(name, *, padded=False):
    ids = torch.randint(0, 64, (5, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(5, 16, dtype=torch.bool)
    mask[1, 10:] = False
    if name != "bloom":  # which gives NaN in float64 when padded on the left
        mask[3, :5] = False
    return build_double(name), Calibration(ids, mask if padded else None)


def weight_of(module):
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def slow_model(model, calibration, config):
    """Prune block after block; every Hessian from a complete forward pass of all samples, per linear."""
    decoder = find_decoder(model)
    model.eval()
    ids, mask = calibration.input_ids, calibration.attention_mask
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    positions = {}
    if mask is not None and model.config.model_type != "bloom":
        positions["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    structure = config.structure_record
    pattern = (structure.n, structure.m) if structure.m else None
    masks = {}
    for depth in range(len(decoder.blocks)):
        linears = [linear for linear in decoder.linears if linear.depth == depth]
        inputs = {}
        handles = [
            linear.module.register_forward_hook(
                lambda _, args, y, name=linear.name, inputs=inputs: inputs.update({name: args[0].flatten(0, -2)})
            )
            for linear in linears
        ]
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
        for handle in handles:
            handle.remove()
        for linear in linears:
            a = inputs[linear.name][real.flatten()]
            W = weight_of(linear.module)
            new, masks[linear.name] = sparsegpt_layer(
                W, a.T @ a / len(a), sparsity=config.sparsity, pattern=pattern, damp=config.damp_a
            )
            W.copy_(new)
    return masks


def assert_same(model, other):
    for (key, actual), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7, msg=key)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "gemma3", "bloom"])
def test_model_equals_complete_forward_passes(name, padded):
    model, calibration = model_and_data(name, padded=padded)
    other, _ = model_and_data(name)
    masks = prune_sparsegpt(model, find_decoder(model), calibration, CONFIG)
    expected = slow_model(other, calibration, CONFIG)
    assert list(masks) == list(expected)
    for linear in find_decoder(model).linears:
        assert torch.equal(masks[linear.name], expected[linear.name])
        assert torch.equal(weight_of(linear.module) == 0, masks[linear.name])
    assert_same(model, other)


def test_unstructured_model_and_damping():
    config = PruneConfig(structure="unstructured", sparsity=0.37, method="sparsegpt", batch_size=3, damp_a=0.1)
    model, calibration = model_and_data("llama")
    other, _ = model_and_data("llama")
    masks = prune_sparsegpt(model, find_decoder(model), calibration, config)
    expected = slow_model(other, calibration, config)
    for linear in find_decoder(model).linears:
        assert torch.equal(masks[linear.name], expected[linear.name])
        assert int(masks[linear.name].sum()) == round(0.37 * linear.rows * linear.columns)
    assert_same(model, other)


def test_cache_is_not_carried_from_pass_to_pass():
    model, calibration = model_and_data("llama")
    other, _ = model_and_data("llama")
    forward = model.model.forward
    model.model.forward = lambda **inputs: forward(**{**inputs, "use_cache": True})
    prune_sparsegpt(model, find_decoder(model), calibration, CONFIG)
    slow_model(other, calibration, CONFIG)
    assert_same(model, other)


def test_batch_size_left_out_changes_nothing():
    model, calibration = model_and_data("opt", padded=True)
    other, _ = model_and_data("opt")
    prune_sparsegpt(model, find_decoder(model), calibration, CONFIG)
    prune_sparsegpt(other, find_decoder(other), calibration, PruneConfig(structure="2:4", method="sparsegpt"))
    assert_same(model, other)


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_only_the_weights_of_the_linears_change(name):
    model, calibration = model_and_data(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    decoder = find_decoder(model)
    prune_sparsegpt(model, decoder, calibration, CONFIG)
    pruned = {f"{linear.name}.weight" for linear in decoder.linears}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in pruned)
    assert sum(key.endswith("bias") for key in before) > 0


def state(model):
    """Everything that a pruning run must leave as it was."""
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        [id(parameter) for parameter in model.parameters()],
        model.config.use_cache,
    )


def test_model_state_is_restored():
    model, calibration = model_and_data("llama")
    decoder = find_decoder(model)
    model.train()
    decoder.blocks[1].mlp.eval()
    model.lm_head.requires_grad_(False)
    before = state(model)
    masks = prune_sparsegpt(model, decoder, calibration, CONFIG)
    assert state(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(mask.is_inference() for mask in masks.values())


def test_dropout_is_off():
    model, calibration = model_and_data("gpt2")
    other, _ = model_and_data("gpt2")
    prune_sparsegpt(model.train(), find_decoder(model), calibration, CONFIG)
    prune_sparsegpt(other.eval(), find_decoder(other), calibration, CONFIG)
    assert_same(model, other)


def test_nan_in_activations_is_named_with_block_and_batch():
    model, calibration = model_and_data("llama")
    decoder = find_decoder(model)
    model.train()
    before = state(model)
    calibration.input_ids[:4][calibration.input_ids[:4] == 7] = 8
    calibration.input_ids[4, -1] = 7
    model.model.embed_tokens.weight.data[7] = float("nan")  # only the third batch of two meets it
    with pytest.raises(
        NumericalError, match=r"NaN .* inputs of model\.layers\.0\.self_attn\.q_proj \(block 0, batch 3 of 3\)$"
    ):
        prune_sparsegpt(model, decoder, calibration, CONFIG)
    assert state(model) == before


def test_nan_behind_a_block_is_named_there():
    model, calibration = model_and_data("llama")
    decoder = find_decoder(model)
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("inf")
    with pytest.raises(
        NumericalError, match=r"NaN .* inputs of model\.layers\.1\.mlp\.gate_proj \(block 1, batch 1 of 3\)$"
    ):
        prune_sparsegpt(model, decoder, calibration, CONFIG)


def test_nan_in_a_weight_is_named():
    model, calibration = model_and_data("llama")
    decoder = find_decoder(model)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"^model\.layers\.1\.mlp\.down_proj: the weight holds NaN"):
        prune_sparsegpt(model, decoder, calibration, CONFIG)


def test_width_that_does_not_fit_is_refused_before_anything_changes():
    model, calibration = model_and_data("llama")  # widths 32 and 48
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = PruneConfig(structure="16:32", method="sparsegpt")
    with pytest.raises(InputError, match=r"^model\.layers\.0\.mlp\.down_proj: 16:32 .* divisible by 32, not 48$"):
        prune_sparsegpt(model, find_decoder(model), calibration, config)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_progress_counts_linears():
    model, calibration = model_and_data("opt")
    calls = []
    prune_sparsegpt(model, find_decoder(model), calibration, CONFIG, lambda done, total: calls.append((done, total)))
    assert calls == [(done, 12) for done in range(1, 13)]


def test_bfloat16_model_keeps_its_dtype_and_pattern():
    model, calibration = model_and_data("llama")
    model = model.bfloat16()
    masks = prune_sparsegpt(model, find_decoder(model), calibration, CONFIG)
    for linear in find_decoder(model).linears:
        weight = linear.module.weight
        assert weight.dtype == torch.bfloat16 and weight.isfinite().all()
        assert (weight[masks[linear.name]] == 0).all()
        assert (masks[linear.name].unflatten(1, (-1, 4)).sum(dim=2) == 2).all()
