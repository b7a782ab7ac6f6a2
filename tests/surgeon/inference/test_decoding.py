"""Decoding by fused steps generates the tokens of the model's own path."""

import pytest
import torch

from llm_surgeon.config.decoding import Decoding
from llm_surgeon.inference import merge_packed_linears, pack_model
from llm_surgeon.inference.decoding import Decoder
from llm_surgeon.inference.speed import measure_speed
from llm_surgeon.models.fused_pointwise import fused_pointwise
from tests.surgeon.packed_models import build_2_4, pretend_kernels
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

IDS = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
FUSED = {"llama", "mistral", "qwen2", "gemma"}


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


def test_speed_of_fused_steps():
    speed = measure_speed(build("llama"), batch_size=2, prompt=8, new_tokens=4, repeats=1, decoding=Decoding.FUSED)
    assert speed.decoding is Decoding.FUSED and speed.decode_seconds > 0
