"""Packed models in memory and through transformers: the same outputs, dtypes, round trips, exports."""

import copy
import filecmp
import json

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llm_surgeon import InputError
from llm_surgeon.formats import packed_linear
from llm_surgeon.inference import PackedLinear, pack_model, to_torch_sparse, unpack_model
from surgeon_kernels import nm_select, pack_2_4
from surgeon_kernels.sparse24.linear_2_4 import prepare_2_4
from tests.surgeon.packed_models import IDS, build_2_4, continuation, logits, pretend_kernels
from tests.surgeon.tiny_models import NAMES, build


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.fixture
def packed_folder(tmp_path):
    def make(name, dtype=torch.float32):
        model = build_2_4(name, dtype)
        dense = copy.deepcopy(model)
        pack_model(model)
        model.save_pretrained(tmp_path / "packed")
        return dense, tmp_path / "packed"

    return make


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_round_trips_through_transformers(name, packed_folder, tmp_path):
    dense, folder = packed_folder(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "surgeon-2of4" and config["version"] == 1
    assert sorted(config["modules"]) == sorted(packed_layers(model))
    assert config["ignored"] == [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
    assert not model.training and not any(p.requires_grad for m in packed_layers(model).values() for p in [m.values])
    # Conv1D multiplies in another order than nn.Linear.
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-5 if name == "gpt2" else 0)
    assert continuation(model) == continuation(dense)
    assert continuation(model, cache_implementation="static") == continuation(dense)
    model.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert filecmp.cmp(folder / file, tmp_path / "again" / file, shallow=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_dequantize_gives_the_dense_model_back(name, packed_folder, tmp_path):
    dense, folder = packed_folder(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.dequantize()
    assert not packed_layers(model) and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    dense.save_pretrained(tmp_path / "original")
    for file in ("model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "dense" / file, tmp_path / "original" / file, shallow=False)


def test_the_trunk_alone_loads(packed_folder):
    dense, folder = packed_folder("llama")
    trunk = AutoModel.from_pretrained(folder)
    assert len(packed_layers(trunk)) == 14
    with torch.no_grad():
        assert torch.equal(trunk(IDS).last_hidden_state, dense.model(IDS).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, packed_folder):
    dense, folder = packed_folder("opt")
    expected = logits(copy.deepcopy(dense).to(dtype))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    cast = AutoModelForCausalLM.from_pretrained(folder)
    logits(cast)  # keeps a dense float32 weight, which must not outlive the cast
    for model in (loaded, cast.to(dtype)):
        assert {m.values.dtype for m in packed_layers(model).values()} == {dtype}
        assert {m.indices.dtype for m in packed_layers(model).values()} == {torch.uint8}
        assert torch.equal(logits(model), expected)


def test_unpacking_is_said_once(packed_folder, caplog, monkeypatch):
    packed_linear._say_unpacked.cache_clear()
    _, folder = packed_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits(model)
    logits(AutoModelForCausalLM.from_pretrained(folder))
    messages = [record.getMessage() for record in caplog.records if "unpacked" in record.getMessage()]
    assert len(messages) == 1 and messages[0].startswith("2:4 weights are unpacked to dense for float32 on cpu: ")


def test_weights_read_later_replace_the_unpacked_ones():
    first, second = (PackedLinear.from_dense(sparse_matrix(seed)) for seed in (0, 1))
    x = torch.ones(3, 8)
    assert not torch.equal(first(x), second(x))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


def sparse_matrix(seed):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    return weight.masked_fill(nm_select(weight.abs(), 2, 4), 0.0)


def test_a_layer_alone():
    weight = sparse_matrix(0)
    layer = PackedLinear.from_dense(weight, nn.Parameter(torch.arange(4.0)))
    x = torch.randn(2, 3, 8, requires_grad=True)
    assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias))
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 3, 8))
    assert torch.equal(layer.bias.grad, torch.full((4,), 6.0))
    assert torch.equal(layer.weight, weight)
    assert sorted(layer.state_dict()) == ["bias", "indices", "values"]
    assert "in_features=8, out_features=4, bias=True" in repr(layer)
    compiled = torch.compile(PackedLinear.from_dense(weight), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), nn.functional.linear(x, weight))
    with pytest.raises(ValueError, match="divisible by 4"):
        PackedLinear(6, 4)


def test_layers_that_are_not_2_4_and_shared_weights_stay_dense():
    model = build_2_4("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight = model.lm_head.weight
        weight.masked_fill_(nm_select(weight.abs(), 2, 4), 0.0)
        model.model.layers[1].mlp.up_proj.weight[3, 4:8] = 1.0
    expected, steps = logits(model), []
    config = pack_model(model, lambda *step: steps.append(step))
    assert sorted(config.ignored) == ["lm_head", "model.layers.1.mlp.up_proj"]
    assert [done for done, _, _ in steps] == list(range(13)) and {total for _, total, _ in steps} == {13}
    assert torch.equal(logits(model), expected)
    with pytest.raises(InputError, match="packed already"):
        pack_model(model)
    unpack_model(model)
    assert torch.equal(logits(model), expected) and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_dense_model_is_refused():
    model = build("llama")
    with pytest.raises(InputError, match=r"no 2:4 weight to pack.*surgeon prune"):
        pack_model(model)
    assert not packed_layers(model)


def test_torch_sparse_needs_cuda_and_half_precision():
    with pytest.raises(InputError, match=r"CUDA device: model\.layers\.0\.self_attn\.q_proj is torch\.float32 on cpu"):
        to_torch_sparse(build_2_4("llama"))


def test_kernels_keep_the_weight_in_their_own_order(packed_folder, tmp_path, monkeypatch):
    """As on CUDA: the layers hold fragments, and everything that leaves them is in the packed format."""
    pretend_kernels(monkeypatch)
    dense, folder = packed_folder("opt", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = packed_layers(model).values()
    assert all(m.fragments is not None and m.values is None and m.indices is None for m in layers)
    # Or torch.compile would check every part of every layer at each call, not only whether something was assigned.
    assert not any(isinstance(v, torch.dtype | torch.device | torch.Tensor) for m in layers for v in vars(m).values())
    assert all(m._parameters["fragments"] is m.fragments for m in layers)
    assert torch.equal(logits(model), logits(dense)) and torch.equal(logits(copy.deepcopy(model)), logits(dense))
    assert all(m.kept_dense is None for m in layers)
    model.save_pretrained(tmp_path / "again")
    assert filecmp.cmp(folder / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    assert torch.equal(logits(model), logits(dense))
    wide = copy.deepcopy(dense).float()
    assert torch.equal(logits(model.to(torch.float32)), logits(wide))
    assert all(m.fragments is None and m.values.dtype == torch.float32 for m in layers)
    assert torch.equal(logits(model.to(torch.bfloat16)), logits(dense)) and all(m.fragments is not None for m in layers)
    model.dequantize()
    assert torch.equal(logits(model), logits(dense))


def test_weights_below_a_size_are_kept_dense_where_there_is_a_kernel(packed_folder, tmp_path, monkeypatch, caplog):
    """Told by the number of elements; the packed form stays what leaves the layers."""
    pretend_kernels(monkeypatch)
    dense, folder = packed_folder("opt", torch.bfloat16)
    layers = packed_layers(AutoModelForCausalLM.from_pretrained(folder)).values()
    sizes = [layer.out_features * layer.in_features for layer in layers]
    assert len(set(sizes)) > 1
    monkeypatch.setattr(packed_linear, "DENSE_BELOW", max(sizes))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in packed_layers(model).values():
        small = layer.out_features * layer.in_features < max(sizes)
        assert (layer.fragments is None) == small == (layer.kept_dense is not None) == (layer.values is not None)
        if small:
            assert torch.equal(layer.kept_dense, layer.weight)
    assert torch.equal(logits(model), logits(dense)) and "unpacked" not in caplog.text
    model.save_pretrained(tmp_path / "again")
    assert filecmp.cmp(folder / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)
    assert torch.equal(logits(model.to(torch.float32)), logits(copy.deepcopy(dense).float()))


def test_a_million_elements_are_the_least_that_the_kernel_takes(monkeypatch):
    below = packed_linear.DENSE_BELOW
    pretend_kernels(monkeypatch)
    monkeypatch.setattr(packed_linear, "DENSE_BELOW", below)
    weight = torch.zeros(1024, 1024).bfloat16()
    assert PackedLinear.from_dense(weight).fragments is not None
    assert PackedLinear.from_dense(weight[:-1]).fragments is None


def test_every_size_is_tuned_once_and_never_with_cusparselt(monkeypatch):
    monkeypatch.delenv("SURGEON_TUNE", raising=False)
    tuned = []
    monkeypatch.setattr(packed_linear, "_tuned", set())
    monkeypatch.setattr(packed_linear, "tune_2_4", lambda weight, tokens: tuned.append(weight.rows))
    weights = [prepare_2_4(pack_2_4(torch.zeros(rows, 16).half())) for rows in (16, 32, 16)]
    packed_linear.tune_once(weights[0]._replace(compressed=torch.zeros(1)))
    for weight in weights:
        packed_linear.tune_once(weight)
    assert tuned == [16, 32]


def test_packed_weight_is_that_of_pack_2_4():
    weight = sparse_matrix(3)
    layer = PackedLinear.from_dense(weight)
    assert torch.equal(layer.values, pack_2_4(weight).values) and torch.equal(layer.indices, pack_2_4(weight).indices)
