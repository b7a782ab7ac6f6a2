"""SparseGPT against slow references: explicit inverses for a layer, complete forward passes for a model."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.pytorch_utils import Conv1D

from llm_surgeon.config import PruneConfig
from llm_surgeon.data import Calibration
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.models import find_decoder
from llm_surgeon.sparsegpt import prune_sparsegpt, sparsegpt_layer
from tests.surgeon.tiny_models import NAMES, build

DOUBLE = torch.float64
CONFIG = PruneConfig(structure="2:4", method="sparsegpt", batch_size=2)


def problem(rows, columns, tokens=200, seed=0):
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=DOUBLE)
    a = torch.randn(tokens, columns, generator=generator, dtype=DOUBLE) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=DOUBLE), a.T @ a / tokens


def damped(H, damp=0.01):
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def obs_inverse(H, c):
    """Inverse of the Hessian of the columns that can still change when column ``c`` is visited."""
    return torch.linalg.inv(H[c:, c:])


def obs_update(W, H, pruned, c):
    """Remove the pruned weights of column ``c`` by the optimal-brain-surgeon update of the columns to its right."""
    inverse = obs_inverse(H, c)
    for r in range(len(W)):
        if pruned[r, c]:
            W[r, c:] -= W[r, c] / inverse[0, 0] * inverse[0]
            W[r, c] = 0.0


def slow_layer(W, H, sparsity, pattern, block):
    """The method by explicit inverses, one weight after the other; ``H`` is damped."""
    W = W.clone()
    R, C = W.shape
    pruned = torch.zeros(R, C, dtype=torch.bool)
    step = pattern[1] if pattern else block
    for c in range(C):
        if c % step == 0:
            end = min(c + step, C)
            cost = torch.stack([W[:, j] ** 2 / obs_inverse(H, j)[0, 0] for j in range(c, end)], dim=1)
            if pattern:
                cheapest = cost.argsort(dim=1, stable=True)[:, : pattern[1] - pattern[0]]
                pruned[:, c:end] = torch.zeros_like(cost).scatter_(1, cheapest, 1.0).bool()
            else:
                count = round(sparsity * R * end) - round(sparsity * R * c)
                mask = torch.zeros(cost.numel(), dtype=torch.bool)
                mask[cost.flatten().argsort(stable=True)[:count]] = True
                pruned[:, c:end] = mask.view_as(cost)
        obs_update(W, H, pruned, c)
    return W, pruned


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 12), (5, 24), (7, 36)])
@pytest.mark.parametrize("sparsity, block", [(0.5, 128), (0.5, 8), (0.3, 7), (0.83, 5), (0.5, 1)])
def test_unstructured_equals_explicit_inverses(rows, columns, sparsity, block):
    W, H = problem(rows, columns)
    expected, mask = slow_layer(W, damped(H), sparsity, None, block)
    actual, pruned = sparsegpt_layer(W, H, sparsity=sparsity, block=block)
    assert torch.equal(pruned, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern, columns", [((2, 4), 24), ((1, 4), 8), ((4, 8), 32), ((1, 3), 15), ((3, 5), 5)])
@pytest.mark.parametrize("block", [1, 6, 8, 13, 128])
def test_pattern_equals_explicit_inverses_for_every_block_size(pattern, columns, block):
    W, H = problem(6, columns)
    expected, mask = slow_layer(W, damped(H), None, pattern, block)
    actual, pruned = sparsegpt_layer(W, H, sparsity=0.5, pattern=pattern, block=block)
    assert torch.equal(pruned, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_update_is_the_least_squares_optimum():
    # One removed weight in the first column: everything else is free, so the update is the least-squares optimum.
    W, H = problem(1, 6)
    W[0, 0] = 1e-3
    actual, pruned = sparsegpt_layer(W, H, sparsity=1 / 6)
    assert pruned.tolist() == [[True] + [False] * 5]
    A = damped(H)
    delta = torch.linalg.solve(A[1:, 1:], A[1:, :1] @ W[:, :1].T).T
    torch.testing.assert_close(actual[:, 1:], W[:, 1:] + delta, rtol=1e-10, atol=1e-12)


def test_independent_inputs_need_no_compensation():
    W, _ = problem(4, 10)
    H = torch.diag(torch.arange(1.0, 11.0, dtype=DOUBLE))
    actual, pruned = sparsegpt_layer(W, H, sparsity=0.5)
    cost = W**2 * damped(H).diagonal()
    assert cost[pruned].max() < cost[~pruned].min()
    assert torch.equal(actual, W.masked_fill(pruned, 0.0))


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (5, 129), (4, 300)])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("weights", ["equal", "zero", "random"])
def test_unstructured_count_is_exact(rows, columns, sparsity, weights):
    W, H = problem(rows, columns)
    W = {"equal": torch.ones_like(W), "zero": torch.zeros_like(W), "random": W}[weights]
    H = torch.eye(columns, dtype=DOUBLE) if weights == "equal" else H
    actual, pruned = sparsegpt_layer(W, H, sparsity=sparsity)
    assert int(pruned.sum()) == round(sparsity * rows * columns)
    assert (actual[pruned] == 0).all() and not actual[pruned].signbit().any()
    if weights == "random":
        assert (actual[~pruned] != 0).all()


def test_every_block_removes_its_share():
    W, H = problem(3, 20)
    _, pruned = sparsegpt_layer(W, H, sparsity=0.25, block=8)
    assert [int(part.sum()) for part in pruned.split(8, dim=1)] == [6, 6, 3]


def test_ties_go_to_the_first_index():
    W, H = torch.ones(2, 8, dtype=DOUBLE), torch.eye(8, dtype=DOUBLE)
    _, pruned = sparsegpt_layer(W, H, sparsity=0.375)
    assert pruned.flatten().tolist() == [True] * 6 + [False] * 10
    _, pruned = sparsegpt_layer(W, H, sparsity=0.5, pattern=(2, 4))
    assert pruned.tolist() == [[True, True, False, False] * 2] * 2


@pytest.mark.parametrize("pattern, columns", [((2, 4), 260), ((1, 4), 8), ((3, 7), 21), ((64, 160), 320)])
def test_pattern_holds_in_every_group(pattern, columns):
    n, m = pattern
    W, H = problem(5, columns)
    actual, pruned = sparsegpt_layer(W, H, sparsity=0.5, pattern=pattern)
    assert (pruned.view(5, columns // m, m).sum(dim=2) == m - n).all()
    assert torch.equal(actual == 0, pruned)


@pytest.mark.parametrize("rows, columns", [(0, 8), (3, 0), (0, 0)])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_empty_weight(rows, columns, pattern):
    actual, pruned = sparsegpt_layer(torch.zeros(rows, columns), torch.eye(columns), sparsity=0.5, pattern=pattern)
    assert actual.shape == pruned.shape == (rows, columns)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_dead_inputs_leave_the_rest_as_if_they_were_absent(pattern, scale):
    W, H = problem(6, 24)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[0, 5, 6, 7, 23]] = True
    H[dead] = 0.0
    H[:, dead] = 0.0
    actual, pruned = sparsegpt_layer(W, scale * H, sparsity=0.5, pattern=pattern)
    assert (actual[:, dead] == 0).all()
    if pattern is None:
        # Weights of dead inputs cost nothing: they are the first of the exact count.
        assert pruned[:, dead].all() and int(pruned.sum()) == 72
        live, _ = sparsegpt_layer(W[:, ~dead], scale * H[~dead][:, ~dead], sparsity=(72 - 30) / (6 * 19))
        torch.testing.assert_close(actual[:, ~dead], live, rtol=1e-10, atol=1e-10)
    else:
        assert (pruned.view(6, 6, 4).sum(dim=2) == 2).all()


def test_inputs_that_are_all_dead():
    actual, pruned = sparsegpt_layer(torch.ones(2, 8), torch.zeros(8, 8), sparsity=0.5)
    assert (actual == 0).all() and int(pruned.sum()) == 8


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_singular_hessian_is_damped(dtype, pattern):
    W, H = problem(8, 64, tokens=2)  # rank 2
    W, H = W.to(dtype), (1e-8 * H).to(dtype)
    actual, pruned = sparsegpt_layer(W, H, sparsity=0.5, pattern=pattern)
    assert actual.isfinite().all() and int(pruned.sum()) == 256
    delta, zeroed = actual - W, W.masked_fill(pruned, 0.0) - W
    assert error(delta, H) < 0.2 * error(zeroed, H)


def error(delta, H):
    return float(((delta @ H) * delta).sum())


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_loses_less_than_magnitude_pruning(pattern):
    W, H = problem(32, 64)
    actual, _ = sparsegpt_layer(W, H, sparsity=0.5, pattern=pattern)
    groups = W.abs().view(-1, pattern[1] if pattern else 64)
    cheapest = groups.argsort(dim=1)[:, : groups.shape[1] // 2]
    magnitude = W.masked_fill(torch.zeros_like(groups).scatter_(1, cheapest, 1.0).bool().view_as(W), 0.0)
    assert error(actual - W, H) < error(magnitude - W, H)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_works_in_float32_on_narrower_weights(dtype):
    W, H = problem(4, 16)
    W = W.to(dtype)
    before = W.clone()
    actual, pruned = sparsegpt_layer(W, H.float(), sparsity=0.5, pattern=(2, 4))
    expected, mask = sparsegpt_layer(W.double(), H, sparsity=0.5, pattern=(2, 4))
    assert actual.dtype == torch.float32 and torch.equal(W, before)
    assert torch.equal(pruned, mask)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)


def test_arguments_are_left_as_they_were():
    W, H = problem(4, 16)
    H[3] = H[:, 3] = 0.0
    before = W.clone(), H.clone()
    sparsegpt_layer(W, H, sparsity=0.5)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sparsity": 1.1}, r"proj: sparsity must be in \[0, 1\], not 1.1"),
        ({"sparsity": float("nan")}, r"proj: sparsity must be in \[0, 1\], not nan"),
        ({"block": 0}, "proj: block must be at least 1, not 0"),
        ({"pattern": (2, 3)}, "proj: 2:3 needs a number of inputs divisible by 3, not 16"),
        ({"pattern": (4, 4)}, "proj: an N:M pattern needs 0 < N < M, not 4:4"),
        ({"pattern": (0, 4)}, "proj: an N:M pattern needs 0 < N < M, not 0:4"),
        ({"hessian": torch.eye(17)}, r"proj: the Hessian must be \[16, 16\], not \[17, 17\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"weight": torch.ones(4, 16), "hessian": torch.eye(16), "sparsity": 0.5} | change
    with pytest.raises(InputError, match=message):
        sparsegpt_layer(**arguments, name="proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["weight", "hessian"])
def test_nan_is_refused_by_name(which, value):
    arguments = {"weight": torch.ones(4, 16), "hessian": torch.eye(16)}
    arguments[which][2, 2] = value
    with pytest.raises(NumericalError, match=r"proj: the .* NaN"):
        sparsegpt_layer(**arguments, sparsity=0.5, name="proj")


def test_indefinite_hessian_is_named():
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 5.0
    with pytest.raises(NumericalError, match=r"proj: .* not positive definite"):
        sparsegpt_layer(torch.ones(2, 8), H, sparsity=0.5, name="proj")


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
    pattern = (config.pattern.n, config.pattern.m) if config.pattern.kind == "n:m" else None
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
    """What a pruning run must leave as it was."""
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
