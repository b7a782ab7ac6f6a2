from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import NumericalError
from llm_surgeon.models.decoder import check_finite, find_decoder
from tests.surgeon.tiny_models import NAMES, build

LLAMA = [
    ("self_attn.q_proj", "self_attn.q_proj", (32, 32), False),
    ("self_attn.k_proj", "self_attn.q_proj", (16, 32), False),
    ("self_attn.v_proj", "self_attn.q_proj", (16, 32), False),
    ("self_attn.o_proj", "self_attn.o_proj", (32, 32), False),
    ("mlp.gate_proj", "mlp.gate_proj", (48, 32), False),
    ("mlp.up_proj", "mlp.gate_proj", (48, 32), False),
    ("mlp.down_proj", "mlp.down_proj", (32, 48), False),
]
QWEN2 = [(kind, group, size, bias or kind[-6:] in ("q_proj", "k_proj", "v_proj")) for kind, group, size, bias in LLAMA]
OPT = [
    ("self_attn.q_proj", "self_attn.q_proj", (32, 32), True),
    ("self_attn.k_proj", "self_attn.q_proj", (32, 32), True),
    ("self_attn.v_proj", "self_attn.q_proj", (32, 32), True),
    ("self_attn.out_proj", "self_attn.out_proj", (32, 32), True),
    ("fc1", "fc1", (64, 32), True),
    ("fc2", "fc2", (32, 64), True),
]
GPT_NEOX = [
    ("attention.query_key_value", "attention.query_key_value", (96, 32), True),
    ("attention.dense", "attention.dense", (32, 32), True),
    ("mlp.dense_h_to_4h", "mlp.dense_h_to_4h", (64, 32), True),
    ("mlp.dense_4h_to_h", "mlp.dense_4h_to_h", (32, 64), True),
]
GPT2 = [
    ("attn.c_attn", "attn.c_attn", (96, 32), True),
    ("attn.c_proj", "attn.c_proj", (32, 32), True),
    ("mlp.c_fc", "mlp.c_fc", (64, 32), True),
    ("mlp.c_proj", "mlp.c_proj", (32, 64), True),
]
PHI3 = [
    ("self_attn.qkv_proj", "self_attn.qkv_proj", (64, 32), False),
    ("self_attn.o_proj", "self_attn.o_proj", (32, 32), False),
    ("mlp.gate_up_proj", "mlp.gate_up_proj", (96, 32), False),
    ("mlp.down_proj", "mlp.down_proj", (32, 48), False),
]
PHI = [
    ("self_attn.q_proj", "self_attn.q_proj", (32, 32), True),
    ("self_attn.k_proj", "self_attn.q_proj", (32, 32), True),
    ("self_attn.v_proj", "self_attn.q_proj", (32, 32), True),
    ("self_attn.dense", "self_attn.dense", (32, 32), True),
    ("mlp.fc1", "self_attn.q_proj", (48, 32), True),
    ("mlp.fc2", "mlp.fc2", (32, 48), True),
]
EXPECTED = {
    "llama": ("model.layers", LLAMA),
    "mistral": ("model.layers", LLAMA),
    "qwen2": ("model.layers", QWEN2),
    "qwen3": ("model.layers", LLAMA),
    "gemma": ("model.layers", LLAMA),
    "opt": ("model.decoder.layers", OPT),
    "gpt_neox": ("gpt_neox.layers", GPT_NEOX),
    "phi3": ("model.layers", PHI3),
    "phi": ("model.layers", PHI),
    "gpt2": ("transformer.h", GPT2),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_order_groups_and_sizes(name: str) -> None:
    model = build(name)
    decoder = find_decoder(model)
    prefix, kinds = EXPECTED[name]
    assert decoder.blocks == list(model.get_submodule(prefix))
    found = [
        (linear.name, linear.depth, linear.kind, linear.input_group, linear.rows, linear.columns, linear.has_bias)
        for linear in decoder.linears
    ]
    assert found == [
        (f"{prefix}.{depth}.{kind}", depth, kind, f"{prefix}.{depth}.{group}", *size, bias)
        for depth in range(2)
        for kind, group, size, bias in kinds
    ]
    assert all(model.get_submodule(linear.name) is linear.module for linear in decoder.linears)


def test_an_input_changed_in_place_is_not_shared() -> None:
    model = build("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x.mul_(2.0)))
    groups = {linear.name: linear.input_group for linear in find_decoder(model).linears}
    assert groups["model.layers.0.mlp.up_proj"] == "model.layers.0.mlp.up_proj"
    assert groups["model.layers.1.mlp.up_proj"] == "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_matrix_computes_the_layer(name: str) -> None:
    for linear in find_decoder(build(name)).linears:
        x = torch.randn(5, linear.columns)
        inputs = torch.cat([x, torch.ones(5, 1)], dim=1) if linear.has_bias else x
        torch.testing.assert_close(inputs @ linear.matrix().T, linear.module(x))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_write_goes_back_into_the_same_parameters(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    before = copy.deepcopy(model.state_dict())
    parameters = {id(parameter) for parameter in model.parameters()}
    linears = find_decoder(model).linears
    for linear in linears:
        original = linear.matrix(torch.float64)
        linear.matrix(dtype).zero_()  # a copy: the model must not change
        linear.write(original * 2)
        assert torch.equal(linear.matrix(torch.float64), original * 2)  # doubling is exact in every dtype
        weight, bias = linear.module.weight, linear.module.bias
        expected = (
            original[:, : linear.columns].T if isinstance(linear.module, Conv1D) else original[:, : linear.columns]
        )
        assert weight.dtype == dtype and torch.equal(weight.double(), expected * 2)
        assert (bias is None) != linear.has_bias
        if bias is not None:
            assert torch.equal(bias.double(), original[:, -1] * 2)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    written = {f"{linear.name}.{kind}" for linear in linears for kind in ("weight", "bias")}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] * (2 if key in written else 1)), key


def test_write_has_no_negative_zeros_and_checks_the_shape() -> None:
    linear = find_decoder(build("qwen2", torch.bfloat16)).linears[0]
    linear.write(torch.full((32, 33), -0.0))
    assert not linear.module.weight.signbit().any() and not linear.module.bias.signbit().any()
    linear.write(torch.full((32, 33), -1e-45))  # rounds to zero
    assert not linear.module.weight.signbit().any()
    with pytest.raises(ValueError, match="q_proj"):
        linear.write(torch.zeros(1, 33))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.decoder.layers.1.fc1.weight",
        "model.decoder.layers.1.fc1.bias",
        "model.decoder.layers.0.final_layer_norm.weight",
        "model.decoder.embed_positions.weight",
        "model.decoder.embed_tokens.weight",
        "model.decoder.scale",
    ],
)
def test_check_finite_names_the_tensor(name: str, value: float) -> None:
    model = build("opt")
    model.model.decoder.register_buffer("scale", torch.ones(5))
    model.model.decoder.register_buffer("mask", torch.full((3, 3), float("-inf")), persistent=False)
    check_finite(model)
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    with torch.no_grad():
        tensor.view(-1)[3] = value
    with pytest.raises(NumericalError, match=rf"^{re.escape(name)} holds NaN or infinity$"):
        check_finite(model)


def test_embeddings_and_head_are_never_prunable() -> None:
    model = build("llama")
    assert isinstance(model.lm_head, nn.Linear)
    assert all(linear.module is not model.lm_head for linear in find_decoder(model).linears)


def test_of_several_lists_the_largest_is_taken() -> None:
    model = build("llama")
    model.heads = nn.ModuleList([nn.Linear(4, 4)])
    assert find_decoder(model).blocks == list(model.model.layers)


def test_the_probe_fits_a_tiny_vocabulary() -> None:
    model = build("llama")
    model.resize_token_embeddings(3)
    assert len(find_decoder(model).linears) == 14
