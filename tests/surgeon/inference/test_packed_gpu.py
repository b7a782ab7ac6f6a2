"""Packed models on CUDA: kernels, moves, CUDA graphs, torch.compile, two GPUs, torch.sparse."""

import copy
import filecmp

import pytest
import torch
from torch._dynamo.utils import counters
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT
from transformers import AutoModelForCausalLM, CompileConfig, StaticCache

from llm_surgeon.config.decoding import Decoding
from llm_surgeon.formats import packed_linear
from llm_surgeon.inference import (
    PackedLinear,
    merge_packed_linears,
    pack_model,
    to_torch_sparse,
    unpack_model,
    use_cusparselt,
)
from llm_surgeon.inference.decoding import Decoder
from llm_surgeon.inference.fused_passes import FusedPasses
from llm_surgeon.inference.speed import measure_speed, measure_speeds
from llm_surgeon.models.fused_pointwise import fused_pointwise
from surgeon_kernels.runtime import extension
from surgeon_kernels.sparse24.linear_2_4_tune import tune_2_4
from tests.surgeon.packed_models import IDS, build_2_4, continuation, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if not extension.available():
        pytest.skip("needs the CUDA extension")


@pytest.fixture(autouse=True)
def kernels_of_all_sizes_without_tuning(monkeypatch):
    monkeypatch.setenv("SURGEON_TUNE", "0")
    monkeypatch.setattr(packed_linear, "DENSE_BELOW", 0)


def layers(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def save_packed(folder, name, dtype):
    """The dense model; its packed form is in ``folder``."""
    dense = build_2_4(name, dtype)
    model = copy.deepcopy(dense)
    pack_model(model)
    model.save_pretrained(folder)
    return dense


def assert_as_good_as_dense(found, dense):
    """Against float64, at most twice the error of the dense model in the same dtype on the same device.

    ``found`` are the logits of all tokens, or of the last ones.
    """
    exact = logits(copy.deepcopy(dense).cpu().double()).to(found.device)
    own = (logits(dense.to(found.device)) - exact).norm() * (found.shape[1] / exact.shape[1]) ** 0.5
    assert (found - exact[:, -found.shape[1] :]).norm() <= 2 * own + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen2"])
def test_loaded_onto_a_gpu_the_layers_hold_fragments(name, dtype, tmp_path):
    dense = save_packed(tmp_path / "packed", name, dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="cuda")
    assert model.dtype == dtype and layers(model)
    assert all(layer.fragments is not None and layer.values is None for layer in layers(model))
    assert_as_good_as_dense(logits(model), dense)
    assert all(layer.kept_dense is None for layer in layers(model))
    model.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "packed" / file, tmp_path / "again" / file, shallow=False)


def test_devices_and_dtypes_change(tmp_path):
    dense = save_packed(tmp_path, "opt", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    on_cpu = logits(model)
    first = logits(model.to("cuda"))
    assert all(layer.fragments is not None and layer.kept_dense is None for layer in layers(model))
    assert_as_good_as_dense(first, dense)
    assert_as_good_as_dense(logits(model.to(torch.float16)), copy.deepcopy(dense).half())
    assert_as_good_as_dense(logits(model.to(torch.float32)), copy.deepcopy(dense).float())
    assert all(layer.fragments is None for layer in layers(model))
    assert torch.equal(logits(model.to("cuda", torch.bfloat16)), first)
    assert torch.equal(logits(model.to("cpu")), on_cpu)
    assert torch.equal(logits(model.cuda().dequantize()), logits(dense.cuda()))


def test_small_weights_are_multiplied_dense(monkeypatch, tmp_path):
    monkeypatch.undo()
    dense = save_packed(tmp_path, "llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    assert all(layer.fragments is None and layer.kept_dense.is_cuda for layer in layers(model))
    assert torch.equal(logits(model), logits(dense.cuda()))


def test_a_size_is_tuned_once(monkeypatch, tmp_path):
    monkeypatch.delenv("SURGEON_TUNE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned = []
    monkeypatch.setattr(packed_linear, "tune_2_4", lambda weight, tokens: tuned.append(tune_2_4(weight, tokens)))
    weight = torch.randn(272, 640, device="cuda", dtype=torch.float16)
    weight.view(-1, 4)[:, 1::2] = 0
    layers = [PackedLinear.from_dense(weight) for _ in range(2)]
    assert [sorted(choices) for choices in tuned] == [[1, 2, 4, 8, 16, 32, 64]]
    for n in (1, 5, 16, 33):
        x = torch.randn(n, 640, device="cuda", dtype=torch.float16)
        for layer in layers:
            torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-2, atol=1e-1)


def test_less_memory_than_dense(tmp_path):
    layer = torch.nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
    layer.weight.data.view(-1, 4)[:, ::2] = 0
    packed = PackedLinear.from_dense(layer.weight)
    before = torch.cuda.memory_allocated()
    copied = copy.deepcopy(packed)
    assert torch.cuda.memory_allocated() - before == layer.weight.nbytes * 9 // 16
    assert torch.equal(copied.weight, layer.weight)


def test_generation_with_a_static_cache_and_a_cuda_graph(tmp_path):
    save_packed(tmp_path, "llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    expected = continuation(model)
    assert continuation(model, cache_implementation="static", disable_compile=True) == expected
    decoder = Decoder(model, IDS.cuda(), 7, Decoding.GRAPH)
    with torch.no_grad():
        for _ in range(2):
            decoder.restart()
            decoder.run()
            assert decoder.tokens.tolist() == [row[6:] for row in expected]


def test_a_step_with_a_static_cache_compiles_into_one_cuda_graph(tmp_path):
    dense = save_packed(tmp_path, "llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    torch.compiler.reset()
    counters.clear()
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    cache, ids = StaticCache(config=model.config, max_cache_len=8), IDS.cuda()
    with torch.no_grad():
        for _ in range(4):  # warmed up, recorded, replayed
            cache.reset()
            model(ids[:, :-1], past_key_values=cache)
            assert_as_good_as_dense(step(ids[:, -1:], past_key_values=cache).logits, dense)
    assert not counters["graph_break"] and counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == 1


def test_generation_compiled_by_transformers(tmp_path):
    save_packed(tmp_path, "llama", torch.float16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    options = {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)}
    assert continuation(model, **options) == continuation(model)


def test_generation_with_everything_fused(tmp_path):
    dense = save_packed(tmp_path, "llama", torch.float16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    expected = continuation(model)
    assert len(merge_packed_linears(model)) == 4
    with fused_pointwise(model):
        assert_as_good_as_dense(logits(model), dense)
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        with torch.no_grad():
            assert_as_good_as_dense(compiled(IDS.cuda()).logits, dense)
        assert continuation(model, cache_implementation="static") == expected


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "opt"])
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_fused_passes(name, form, tmp_path):
    """One graph a step; float16, in which the tiny model's most likely tokens stand apart from the others."""
    save_packed(tmp_path, name, torch.float16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    if form == "dense":
        unpack_model(model)
    expected = continuation(model)
    decoder = Decoder(model, IDS.cuda(), 7, Decoding.FUSED)
    assert (decoder.unfused is None) == (name != "opt")
    with torch.no_grad():
        for _ in range(3):
            decoder.restart()
            decoder.run()
            assert decoder.tokens.tolist() == [row[6:] for row in expected]


def test_logits_of_fused_passes_are_as_good_as_those_of_the_dense_model(tmp_path):
    dense = save_packed(tmp_path, "llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    ids, passes = IDS.cuda(), FusedPasses(model, len(IDS), 16)
    assert_as_good_as_dense(passes.prompt(ids), dense)
    passes.prompt(ids[:, :3])
    for position in range(3, ids.shape[1]):
        found = passes.step(ids[:, position : position + 1], torch.tensor([position], device="cuda"))
    assert_as_good_as_dense(found, dense)


def test_drawn_tokens_differ_from_replay_to_replay(tmp_path):
    save_packed(tmp_path, "llama", torch.float16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    decoder = Decoder(model, IDS.cuda(), 20, Decoding.FUSED, temperature=100.0)
    runs = []
    for _ in range(2):
        decoder.restart()
        decoder.run()
        runs.append(decoder.tokens.clone())
    assert not torch.equal(*runs) and all(len(set(row.tolist())) > 5 for row in runs[0])


def test_fused_layers(tmp_path):
    dense = save_packed(tmp_path, "llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    assert len(merge_packed_linears(model)) == 4
    assert_as_good_as_dense(logits(model), dense)
    decoder = Decoder(model, IDS.cuda(), 7, Decoding.GRAPH)
    with torch.no_grad():
        decoder.restart()
        decoder.run()
    assert decoder.tokens.tolist() == [row[6:] for row in continuation(model)]
    model.save_pretrained(tmp_path / "again")
    assert filecmp.cmp(tmp_path / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)


def test_cusparselt_for_long_prompts():
    weight = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    weight.view(-1, 4)[:, 1:3] = 0
    model = torch.nn.Sequential(PackedLinear.from_dense(weight))
    assert use_cusparselt(model) == ["0"] and model[0].compressed is not None
    for tokens in (1, 1500):
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        exact = x.double() @ weight.double().T
        assert (model(x) - exact).norm() <= 2 * (x @ weight.T - exact).norm()
    assert sorted(model.state_dict()) == ["0.indices", "0.values"] and torch.equal(model[0].weight, weight)
    assert model.to(torch.float16)[0].compressed is None


def test_two_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    save_packed(tmp_path, "llama", torch.bfloat16)
    one = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda:0")
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1}
    places |= {"model.rotary_emb": 1, "lm_head": 1}
    two = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    assert {layer.fragments.device.index for layer in layers(two)} == {0, 1}
    assert torch.equal(logits(two).cpu(), logits(one).cpu())
    assert continuation(two) == continuation(one)
    two.save_pretrained(tmp_path / "again")
    assert filecmp.cmp(tmp_path / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory={0: 40_000, 1: 10**9})
    assert continuation(auto) == continuation(one)


def test_layers_fetched_from_main_memory(tmp_path):
    dense = save_packed(tmp_path, "llama", torch.bfloat16)
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0}
    places |= {"model.rotary_emb": 0, "lm_head": 0}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    assert [layer.streamed for layer in layers(model)] == [False] * 7 + [True] * 7
    assert_as_good_as_dense(logits(model), dense)
    assert all(layer.kept_dense is None for layer in layers(model))


def test_torch_sparse():
    for name in ("llama", "opt", "gpt2"):
        dense = build_2_4(name, torch.bfloat16).cuda()
        packed, sparse = copy.deepcopy(dense), copy.deepcopy(dense)
        pack_model(packed)
        names = to_torch_sparse(sparse)
        assert to_torch_sparse(packed) == names and len(names) >= 8
        assert not layers(packed) and not hasattr(packed.config, "quantization_config")
        for model in (packed, sparse):
            assert isinstance(model.get_submodule(names[0]).weight, SparseSemiStructuredTensorCUSPARSELT)
            assert_as_good_as_dense(logits(model), dense)


@pytest.mark.parametrize("decoding", [Decoding.GRAPH, Decoding.FUSED, Decoding.COMPILED, Decoding.GENERATE])
def test_two_models_take_turns_and_have_a_peak_each(decoding, tmp_path):
    save_packed(tmp_path, "llama", torch.bfloat16)
    packed, dense = (AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda") for _ in range(2))
    unpack_model(dense)
    ballast = torch.zeros(10**9, dtype=torch.uint8, device="cuda")  # is no model's
    speeds = measure_speeds([dense, packed], batch_size=2, prompt=8, new_tokens=4, repeats=2, decoding=decoding)
    for speed in speeds:
        assert speed.decode_seconds > 0 and speed.weight_bytes < speed.peak_bytes < ballast.nbytes


@pytest.mark.parametrize("decoding", [Decoding.GRAPH, Decoding.COMPILED])
def test_speed(decoding, tmp_path):
    save_packed(tmp_path, "llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    speed = measure_speed(model, batch_size=2, prompt=8, new_tokens=4, repeats=1, decoding=decoding)
    assert speed.decoding is decoding and speed.peak_bytes > speed.weight_bytes and speed.decode_seconds > 0
