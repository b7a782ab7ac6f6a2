"""Packed layers that read one input, computed by one launch."""

import copy
import filecmp

import pytest
import torch
from torch import nn

from llm_surgeon.formats import packed_linear
from llm_surgeon.inference import (
    MergedPackedLinear,
    PackedLinear,
    merge_packed_linears,
    merged_linears,
    pack_model,
    unpack_model,
    use_cusparselt,
)
from llm_surgeon.inference.pack import packed_linears
from tests.surgeon.packed_models import IDS, build_2_4, continuation, logits, pretend_kernels

BLOCK = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]


@pytest.fixture
def launches(monkeypatch):
    return pretend_kernels(monkeypatch)


def packed_model(name, dtype=torch.bfloat16):
    dense = build_2_4(name, dtype)
    model = copy.deepcopy(dense)
    pack_model(model)
    return dense, model


def test_one_launch_for_each_input(launches):
    dense, model = packed_model("llama")
    expected = [[f"model.layers.{i}.{name}" for name in group] for i in range(2) for group in BLOCK]
    assert merge_packed_linears(model) == expected
    launches.clear()
    assert torch.equal(logits(model), logits(dense))
    assert launches == 2 * [32 + 16 + 16, 32, 96, 32]  # q and k and v, o, gate and up, down
    assert continuation(model) == continuation(dense)
    assert merged_linears._waiting.entry is None
    assert merge_packed_linears(model) == []  # they are already


def test_weights_are_held_once_and_saved_as_before(launches, tmp_path):
    dense, model = packed_model("llama")
    model.save_pretrained(tmp_path / "before")
    before = sum(p.nbytes for p in model.parameters())
    merge_packed_linears(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == before
    model.save_pretrained(tmp_path / "after")
    for file in ("model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "before" / file, tmp_path / "after" / file, shallow=False)
    assert torch.equal(logits(copy.deepcopy(model)), logits(dense))
    unpack_model(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_model_that_is_moved_falls_apart(launches):
    dense, model = packed_model("llama")
    merge_packed_linears(model)
    model.to(torch.float32)
    assert torch.equal(logits(model), logits(copy.deepcopy(dense).float()))
    model.to(torch.bfloat16)
    launches.clear()
    assert torch.equal(logits(model), logits(dense)) and len(launches) == 14
    assert len(merge_packed_linears(model)) == 4
    model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(dense))
    assert not any(m.group for m in model.modules() if isinstance(m, MergedPackedLinear))


def test_layers_called_out_of_turn_compute_their_own(launches):
    _, model = packed_model("llama")
    merge_packed_linears(model)
    q, k, v = (model.get_submodule(f"model.layers.0.{name}") for name in BLOCK[0])
    x, other = torch.randn(2, 1, 3, 32, dtype=torch.bfloat16).unbind()
    for order, inputs, rows in (
        ((k, q, v), (x, x, x), [16, 64]),
        ((q, k, v), (x, other, x), [64, 16]),
        ((q, q, k), (x, other, x), [64, 64, 16]),
    ):
        launches.clear()
        for layer, one in zip(order, inputs, strict=True):
            assert torch.equal(layer(one), nn.functional.linear(one, layer.weight))
        assert launches == rows
    q(x)
    x += 1
    assert torch.equal(k(x), nn.functional.linear(x, k.weight))
    with torch.inference_mode():
        inferred = torch.randn(3, 32, dtype=torch.bfloat16)
        for layer in (q, k, v):
            assert torch.equal(layer(inferred), nn.functional.linear(inferred, layer.weight))


def test_long_prompts_fill_the_device_layer_by_layer(launches, monkeypatch):
    dense, model = packed_model("llama")
    merge_packed_linears(model)
    monkeypatch.setattr(merged_linears, "_ALONE_FROM", IDS.numel())
    q = model.model.layers[0].self_attn.q_proj
    for tokens, rows in ((IDS.numel() - 1, [64]), (IDS.numel(), [32])):
        x = torch.randn(tokens, 32, dtype=torch.bfloat16)
        launches.clear()
        assert torch.equal(q(x), nn.functional.linear(x, q.weight)) and launches == rows
    merged_linears._waiting.entry = None
    launches.clear()
    assert torch.equal(logits(model), logits(dense))
    assert launches == 2 * [32, 16, 16, 32, 48, 48, 32]


@pytest.mark.parametrize("compress_first", [True, False])
def test_cusparselt_has_no_part_in_a_groups_launch(launches, monkeypatch, compress_first):
    dense, model = packed_model("llama")
    taken = []
    linear, prepare = merged_linears.linear_2_4, packed_linear.prepare_2_4
    marker = torch.zeros(1)
    monkeypatch.setattr(
        packed_linear, "prepare_2_4", lambda packed, cusparselt=False: prepare(packed)._replace(compressed=marker)
    )
    monkeypatch.setattr(
        merged_linears, "linear_2_4", lambda x, w: taken.append(w.compressed is not None) or linear(x, w)
    )
    for step in (use_cusparselt, merge_packed_linears)[:: 1 if compress_first else -1]:
        assert len(step(model)) == (14 if step is use_cusparselt else 4)
    assert torch.equal(logits(model), logits(dense))
    assert taken == 4 * [False] and all(m.compressed is not None for _, m in packed_linears(model))
    monkeypatch.setattr(merged_linears, "_ALONE_FROM", 1)
    logits(model)
    assert taken == 4 * [False] + 10 * [True]


def test_compiled_into_one_graph_with_one_launch(launches):
    dense, model = packed_model("llama")
    merge_packed_linears(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        launches.clear()
        assert torch.equal(compiled(IDS).logits, logits(dense))
    assert launches == 2 * [64, 32, 96, 32] and merged_linears._waiting.entry is None


def test_what_stays_alone(launches):
    _, model = packed_model("opt")  # its layers have biases
    assert merge_packed_linears(model) == []
    _, model = packed_model("llama", torch.float32)  # no kernel
    assert merge_packed_linears(model) == [] and not any(isinstance(m, MergedPackedLinear) for m in model.modules())
    _, model = packed_model("qwen2")  # biases in q, k and v
    assert merge_packed_linears(model) == [[f"model.layers.{i}.{name}" for name in BLOCK[1]] for i in range(2)]
    assert all(type(m) is PackedLinear for n, m in model.named_modules() if n.endswith("q_proj"))


def test_cusparselt_is_for_layers_that_have_a_kernel(launches):
    _, model = packed_model("qwen2")
    alone = {name for name, m in model.named_modules() if isinstance(m, PackedLinear) and m.bias is None}
    assert set(use_cusparselt(model)) == alone and len(alone) == 8
    _, model = packed_model("qwen2", torch.float32)
    assert use_cusparselt(model) == []
