"""Decoding by fused passes generates the tokens of the model's own path."""

import pytest
import torch
import transformers

from llm_surgeon.config.decoding import Decoding
from llm_surgeon.inference import merge_packed_linears, pack_model
from llm_surgeon.inference.decoding import Decoder
from llm_surgeon.inference.fused_passes import FusedPasses
from llm_surgeon.inference.fusible import unfused_part
from llm_surgeon.inference.speed import measure_speed
from llm_surgeon.models.fused_pointwise import fused_pointwise
from tests.surgeon.packed_models import build_2_4, pretend_kernels
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

IDS = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FUSED = {"llama", "mistral", "qwen2", "qwen3", "gemma"}


@torch.no_grad()
def decode(model, decoding, new_tokens=12, **options):
    decoder = Decoder(model, IDS, new_tokens, decoding, **options)
    for _ in range(2):  # a second run starts afresh
        decoder.restart()
        decoder.run()
    return decoder


@torch.no_grad()
def continuation(model, new_tokens=12):
    """The most likely tokens, each by a pass over all tokens before it."""
    ids = IDS
    for _ in range(1 + new_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, IDS.shape[1] :]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_own_path(name):
    model = build(name, torch.float32)
    expected = continuation(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fused = decode(model, Decoding.FUSED)
    assert (fused.unfused is None) == (name in FUSED)
    assert torch.equal(fused.tokens, expected)
    assert torch.equal(decode(model, Decoding.EAGER).tokens, expected)
    with fused_pointwise(model):
        assert torch.equal(decode(model, Decoding.FUSED).tokens, expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_packed_models_without_kernels():
    dense, packed = build_2_4("llama", torch.float32), build_2_4("llama", torch.float32)
    pack_model(packed)
    assert torch.equal(decode(packed, Decoding.FUSED).tokens, decode(dense, Decoding.EAGER).tokens)


@pytest.mark.parametrize("merged", [False, True])
def test_four_products_a_block(merged, monkeypatch):
    launches = pretend_kernels(monkeypatch)
    dense, packed = build_2_4("llama", torch.float16), build_2_4("llama", torch.float16)
    pack_model(packed)
    if merged:
        merge_packed_linears(packed)
    assert torch.equal(decode(packed, Decoding.FUSED).tokens, decode(dense, Decoding.FUSED).tokens)
    decoder = Decoder(packed, IDS, 2, Decoding.FUSED)
    launches.clear()
    decoder.step()
    assert launches == 2 * [32 + 16 + 16, 32, 96, 32]  # q and k and v, o, gate and up, down


def test_tokens_are_drawn_as_likely_as_they_are():
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight[4:].zero_()
        model.lm_head.weight[:4] *= 20.0
        ids = IDS[:1].expand(4000, -1)
        torch.manual_seed(0)
        decoder = Decoder(model, ids, 1, Decoding.FUSED, temperature=2.0)
        likely = torch.softmax(model(IDS[:1]).logits[0, -1] / 2.0, dim=-1)
    found = torch.bincount(decoder.tokens[:, 0], minlength=VOCABULARY) / len(ids)
    assert (found - likely).abs().max() < 0.03
    assert torch.equal(decode(model, Decoding.FUSED, temperature=1e-6).tokens, decode(model, Decoding.EAGER).tokens)


def test_speed_of_fused_passes():
    speed = measure_speed(build("llama"), batch_size=2, prompt=8, new_tokens=4, repeats=1, decoding=Decoding.FUSED)
    assert speed.decoding is Decoding.FUSED and speed.decode_seconds > 0


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_fused_passes(name):
    """Prompt and steps against a pass over all tokens; transformers takes the norms in float32 even of float64."""
    model = build(name, torch.float64)
    if name not in FUSED:
        with pytest.raises(ValueError, match="no fused passes because of"):
            FusedPasses(model, 3, 9)
        return
    with torch.no_grad():
        expected = model(IDS).logits
    passes = FusedPasses(model, len(IDS), 9)
    found = [passes.prompt(IDS[:, :3])]
    found += [passes.step(IDS[:, n : n + 1], torch.tensor([n])) for n in range(3, IDS.shape[1])]
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:, 2:], rtol=0.0, atol=1e-5)


def scaled_residual(module, inputs, output):
    return 2.0 * output


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda m: m.model.layers[1].register_forward_hook(scaled_residual), "block 1"),
        (
            lambda m: m.model.layers[1].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.ones(4))),
            "block 1",
        ),
        (lambda m: setattr(m.model.layers[0], "forward", m.model.layers[0].forward), "block 0"),
        (lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.5), "block 1"),
        (lambda m: setattr(m.model.rotary_emb, "rope_type", "dynamic"), "rotary angles"),
        (lambda m: m.register_forward_hook(scaled_residual), "before and after"),
    ],
)
def test_what_keeps_a_model_from_fused_passes(change, part):
    model = build("llama")
    assert unfused_part(model, 9) is None
    change(model)
    assert part in unfused_part(model, 9)


def test_a_sliding_window_that_is_long_enough_is_none():
    model = build("mistral")
    window = model.config.sliding_window
    assert unfused_part(model, window) is None and unfused_part(model, window + 1) == "a sliding window"


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (transformers.GraniteConfig(residual_multiplier=0.5, **SMALL), "block 0"),
        (transformers.GraniteConfig(logits_scaling=2.0, **SMALL), "before and after"),
        (transformers.GraniteConfig(attention_multiplier=0.3, **SMALL), None),
        (transformers.SmolLM3Config(no_rope_layers=[1, 0], **SMALL), "block 1"),
        (transformers.SmolLM3Config(no_rope_layers=[1, 1], **SMALL), None),
    ],
)
def test_models_of_one_class_may_differ(config, part):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = unfused_part(model, 20)
    assert found is None if part is None else part in found
    assert torch.equal(decode(model, Decoding.FUSED).tokens, continuation(model))
