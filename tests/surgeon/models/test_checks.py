"""Requirements of a model to be pruned: each way of missing them is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models.checks import check_causal
from llm_surgeon.models.decoder import find_decoder
from tests.surgeon.tiny_models import build


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


def test_a_model_that_does_not_run_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=9, hidden_size=48, intermediate_size=8, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="does not run: its 6 attention heads do not divide into 4 key-val"):
        find_decoder(LlamaForCausalLM(config))
    model = build("llama")
    model.model.layers[0].mlp.down_proj = nn.Linear(9, 32)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM does not run: mat1 and mat2 shapes"):
        find_decoder(model)
