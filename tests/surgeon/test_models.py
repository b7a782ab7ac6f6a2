from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import NumericalError, UnsupportedModelError
from llm_surgeon.models import check_causal, check_finite, find_decoder
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


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_names_the_parameter(kind: str, value: float) -> None:
    model = build("opt")
    decoder = find_decoder(model)
    check_finite(decoder)
    with torch.no_grad():
        getattr(model.model.decoder.layers[1].fc1, kind).view(-1)[3] = value
    with pytest.raises(NumericalError, match=rf"^model\.decoder\.layers\.1\.fc1\.{kind} holds NaN or infinity$"):
        check_finite(decoder)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class FirstTokenOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x[:, :1])


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


def layer(model: PreTrainedModel, depth: int = 0) -> nn.Module:
    return model.model.layers[depth]


def stray_matrix(model: PreTrainedModel) -> None:
    layer(model, 1).mlp.adapter = nn.Parameter(torch.zeros(2, 3))


def convolution(model: PreTrainedModel) -> None:
    layer(model).conv = nn.Conv1d(4, 4, 3, groups=4)


def unused_linear(model: PreTrainedModel) -> None:
    layer(model, 1).mlp.spare = nn.Linear(4, 4)


def shared_module(model: PreTrainedModel) -> None:
    layer(model, 1).mlp.up_proj = layer(model).mlp.up_proj


def shared_with_the_outside(model: PreTrainedModel) -> None:
    model.alias = layer(model).mlp.up_proj


def shared_block(model: PreTrainedModel) -> None:
    model.model.layers[1] = model.model.layers[0]


def tied_weight(model: PreTrainedModel) -> None:
    layer(model, 1).mlp.up_proj.weight = layer(model).mlp.up_proj.weight


def tied_storage(model: PreTrainedModel) -> None:
    layer(model, 1).mlp.up_proj.weight = nn.Parameter(layer(model).mlp.up_proj.weight.data)


def called_twice(model: PreTrainedModel) -> None:
    layer(model).self_attn.o_proj = Twice()


def one_token(model: PreTrainedModel) -> None:
    layer(model).self_attn.o_proj = FirstTokenOnly()


def returns_a_pair(model: PreTrainedModel) -> None:
    layer(model).mlp.down_proj = Pair(48, 32)


def integer_weight(model: PreTrainedModel) -> None:
    linear = layer(model).mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)


def float8_weight(model: PreTrainedModel) -> None:
    linear = layer(model).mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


def extra_parameter(model: PreTrainedModel) -> None:
    layer(model).mlp.up_proj.scale = nn.Parameter(torch.ones(48, 1))


def parametrized(model: PreTrainedModel) -> None:
    torch.nn.utils.parametrizations.weight_norm(layer(model).mlp.up_proj)


def meta_parameter(model: PreTrainedModel) -> None:
    model.lm_head.to("meta")


def quantized(model: PreTrainedModel) -> None:
    model.config.quantization_config = {"quant_method": "gptq"}


def encoder_decoder(model: PreTrainedModel) -> None:
    model.config.is_encoder_decoder = True


def no_blocks(model: PreTrainedModel) -> None:
    model.model.layers = nn.Sequential(*model.model.layers)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (stray_matrix, r"^model\.layers\.1\.mlp\.adapter \[2, 3\] belongs to a LlamaMLP, not to a linear layer"),
        (convolution, r"^model\.layers\.0\.conv\.weight \[4, 1, 3\] belongs to a Conv1d"),
        (unused_linear, r"^model\.layers\.1\.mlp\.spare does not run"),
        (shared_module, r"^model\.layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj are the same module"),
        (shared_with_the_outside, r"^model\.layers\.0\.mlp\.up_proj and alias are the same module"),
        (shared_block, r"^model\.layers\.0\.self_attn\.q_proj and model\.layers\.1\.self_attn\.q_proj are the same"),
        (tied_weight, r"^model\.layers\.0\.mlp\.up_proj\.weight and model\.layers\.1\.mlp\.up_proj\.weight are tied"),
        (tied_storage, r"^model\.layers\.0\.mlp\.up_proj\.weight and model\.layers\.1\.mlp\.up_proj\.weight are tied"),
        (called_twice, r"^model\.layers\.0\.self_attn\.o_proj\.inner runs more than once"),
        (one_token, r"^model\.layers\.0\.self_attn\.o_proj\.inner does not read one vector per token.* \[2, 1, 32\]"),
        (returns_a_pair, r"^model\.layers\.0\.mlp\.down_proj does not return one vector per token"),
        (integer_weight, r"^model\.layers\.0\.mlp\.up_proj\.weight is .*torch\.int8"),
        (float8_weight, r"^model\.layers\.0\.mlp\.up_proj\.weight is .*torch\.float8_e4m3fn"),
        (extra_parameter, r"^model\.layers\.0\.mlp\.up_proj has a parameter 'scale'"),
        (parametrized, r"^model\.layers\.0\.mlp\.up_proj\.parametrizations\.weight\.original0 "),
        (meta_parameter, r"^parameter lm_head\.weight is on the meta device"),
        (quantized, r"^LlamaForCausalLM is quantized"),
        (encoder_decoder, r"^LlamaForCausalLM is an encoder-decoder"),
        (no_blocks, r"^LlamaForCausalLM has no list of decoder blocks"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refusals_name_the_part(damage, message: str) -> None:
    model = build("llama")
    damage(model)
    with pytest.raises(UnsupportedModelError, match=message):
        find_decoder(model)


def test_fused_experts_are_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"^model\.layers\.0\.mlp\.experts\.\w+ is a stack of 4 matrices: fused"
    ):
        find_decoder(build("mixtral"))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^LlamaModel gives no logits"):
        find_decoder(build("llama").model)


@pytest.mark.parametrize("damage", [None, called_twice])
def test_the_model_is_left_as_it_was(damage) -> None:
    model = build("llama").train()
    layer(model).mlp.eval()
    if damage is not None:
        damage(model)
    flags = [module.training for module in model.modules()]
    assert len(set(flags)) == 2
    if damage is None:
        find_decoder(model)
    else:
        with pytest.raises(UnsupportedModelError):
            find_decoder(model)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks for module in model.modules())


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


def test_a_model_that_reads_ahead_is_refused() -> None:
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=1.0,
    )
    with pytest.raises(UnsupportedModelError, match=r"^BertLMHeadModel reads ahead: a later token changes"):
        find_decoder(BertLMHeadModel(config).eval())
    with pytest.raises(UnsupportedModelError, match="reads ahead"):
        check_causal(BertLMHeadModel(config).eval())
    config.is_decoder = True
    assert len(find_decoder(BertLMHeadModel(config).eval()).linears) == 6
