"""Writers to the residual stream and the factors of what they add."""

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.writers import find_writers
from tests.surgeon.tiny_models import NAMES, build

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
_LLAMA_LIKE = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
KINDS = {
    "opt": ["self_attn.out_proj", "fc2"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "phi": ["self_attn.dense", "mlp.fc2"],
}


def names(*kinds, prefix="model.layers"):
    return [f"{prefix}.{depth}.{kind}" for depth in (0, 1) for kind in kinds]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_attention_and_feed_forward_add_their_outputs(name, dtype):
    model = build(name, dtype)
    decoder = find_decoder(model)
    found = find_writers(model, decoder)
    kinds = KINDS.get(name, ["self_attn.o_proj", "mlp.down_proj"])
    assert list(found) == [linear.name for linear in decoder.linears if linear.kind in kinds]
    assert len(found) == 4
    assert list(found.values()) == pytest.approx([1.0] * 4, rel=1e-5)


def test_a_model_scales_what_it_adds():
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**_LLAMA_LIKE, residual_multiplier=0.22)).eval()
    found = find_writers(model, find_decoder(model))
    assert list(found) == names("self_attn.o_proj", "mlp.down_proj")
    assert list(found.values()) == pytest.approx([0.22] * 4, rel=1e-5)


def test_a_model_adds_in_place_and_in_parallel():
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(**_SIZES, parallel_attn=True, bias=False)).eval()
    kinds = ("self_attention.dense", "mlp.dense_4h_to_h")
    found = find_writers(model, find_decoder(model))
    assert sorted(found) == sorted(names(*kinds, prefix="transformer.h"))
    assert list(found.values()) == pytest.approx([1.0] * 4, rel=1e-5)


@pytest.mark.parametrize("where", ["behind a writer", "behind the sum"])
def test_norms_on_the_way_leave_no_writer(where):
    torch.manual_seed(0)
    if where == "behind a writer":
        model = Gemma2ForCausalLM(Gemma2Config(**_LLAMA_LIKE))
    else:
        model = OPTForCausalLM(OPTConfig(**_SIZES, word_embed_proj_dim=32, ffn_dim=64, do_layer_norm_before=False))
    assert find_writers(model.eval(), find_decoder(model)) == {}
