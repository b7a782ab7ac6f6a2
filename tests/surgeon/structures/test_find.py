"""Coupled groups: found by probing every architecture, removed for good, loaded again."""

import copy
import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM

from llm_surgeon import NumericalError, UnsupportedModelError
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.structures.find.dimension import Dimension
from llm_surgeon.structures.find.dimensions import find_dimensions
from llm_surgeon.structures.remove.groups import remove_groups
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

IDS = torch.arange(24).view(2, 12) * 5 % VOCABULARY
GROUPED_QUERY = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
# Their classes derive the width of a head from the number of heads.
HEADS_NOT_IN_CONFIG = ("opt", "gpt_neox", "gpt2")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def choose(dimension: Dimension, *groups: int) -> torch.Tensor:
    removed = torch.zeros(dimension.groups, dimension.parts, dtype=torch.bool)
    removed[list(groups)] = True
    return removed


class Attentions(TorchFunctionMode):
    """Sizes of what attention is computed of."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:
            self.sizes += [tensor.numel() for tensor in args[:3]]
        return function(*args, **(kwargs or {}))


def test_sizes_are_tried_without_attention_of_no_heads():
    """Attention of no heads ends the process in some versions of PyTorch."""
    model = build("phi3")
    with Attentions() as attentions:
        assert find_dimensions(model, find_decoder(model))
    assert len(attentions.sizes) > 50 and min(attentions.sizes) > 0


def zero(removed):
    """Weights and biases of the removed parts set to zero, in place."""
    for dimension, parts in removed:
        matrix = dimension.consumer.matrix(torch.float64)
        matrix[:, : dimension.consumer.columns][:, dimension.removed_columns(parts)] = 0.0
        dimension.consumer.write(matrix)
        for producer, rows in dimension.removed_rows(parts):
            matrix = producer.matrix(torch.float64)
            matrix[rows] = 0.0
            producer.write(matrix)


def cut(name, chooser, dtype=torch.float64):
    """A model zeroed and narrowed by ``chooser(dimension)``, and the logits of the zeroed one."""
    model = build(name, dtype)
    decoder = find_decoder(model)
    removed = [(dimension, chooser(dimension)) for dimension in find_dimensions(model, decoder)]
    zero(removed)
    before = logits(model)
    remove_groups(model, decoder, removed)
    return model, decoder, before


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_neurons_and_heads_with_all_their_rows(name):
    model = build(name)
    decoder = find_decoder(model)
    dimensions = find_dimensions(model, decoder)
    assert [dimension.depth for dimension in dimensions] == [0, 0, 1, 1]
    heads, neurons = dimensions[:2]
    assert heads.is_heads and not neurons.is_heads
    assert (heads.groups, heads.parts) == ((2, 2) if name in GROUPED_QUERY else (4, 1))
    assert (neurons.groups, neurons.parts) == (neurons.consumer.columns, 1)
    for dimension in dimensions:
        assert dimension.columns.flatten().sort().values.tolist() == list(range(dimension.consumer.columns))
        for kind, rows in dimension.rows.items():
            assert rows.flatten().sort().values.tolist() == list(range(dimension.producers[kind].rows))
    everything = {kind for dimension in dimensions for kind in (dimension.kind, *dimension.producers)}
    assert everything == {linear.kind for linear in decoder.linears}
    weights = sum(linear.rows * linear.columns for linear in decoder.linears)
    assert sum(dimension.weights(dimension.groups, dimension.parts) for dimension in dimensions) == weights


def bind(dimension, model):
    """The same dimension of a copy of the model."""
    linears = {linear.name: linear for linear in find_decoder(model).linears}
    producers = {kind: linears[producer.name] for kind, producer in dimension.producers.items()}
    return dataclasses.replace(dimension, consumer=linears[dimension.consumer.name], producers=producers)


@pytest.mark.parametrize("name", NAMES)
def test_removing_any_group_equals_zeroing_it(name):
    """Every head of one block, and some neurons, each alone, in float64."""
    model = build(name, torch.float64)
    for dimension in find_dimensions(model, find_decoder(model))[:2]:
        for group in range(dimension.groups) if dimension.is_heads else (0, 7, dimension.groups - 1):
            own = copy.deepcopy(model)
            removed = [(bind(dimension, own), choose(dimension, group))]
            zero(removed)
            before = logits(own)
            remove_groups(own, find_decoder(own), removed)
            torch.testing.assert_close(logits(own), before, rtol=0.0, atol=1e-8)
            lost = dimension.weights(dimension.groups, dimension.parts)
            lost -= dimension.weights(dimension.groups - 1, dimension.parts)
            biases = sum(rows.shape[1] for kind, rows in dimension.rows.items() if dimension.producers[kind].has_bias)
            assert size(model) - size(own) == lost + biases


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", GROUPED_QUERY)
def test_one_query_head_of_every_group_can_go(name):
    def chooser(dimension):
        removed = choose(dimension)
        if dimension.is_heads:
            removed[0, 1] = removed[1, 0] = True
        return removed

    model, decoder, before = cut(name, chooser)
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=1e-8)
    outputs = next(linear for linear in decoder.linears if linear.kind == "self_attn.o_proj")
    assert (outputs.rows, outputs.columns) == (32, 16)


def even(dimension):
    return choose(dimension, 0, *(() if dimension.is_heads else range(1, 16)))


def uneven(dimension):
    if dimension.is_heads:
        return choose(dimension, *([1] if dimension.depth == 1 else []))
    return choose(dimension, *range(5 + 3 * dimension.depth))


LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
for folder, remote, ids in json.loads(sys.argv[1]):
    ids, options = torch.tensor(ids), dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    for step in range(2):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, dtype=torch.float64)
        cached, static = model.generate(ids, **options), model.generate(ids, cache_implementation="static", **options)
        plain = model.generate(ids, use_cache=False, **options)
        assert torch.equal(cached, plain) and torch.equal(static, plain)
        with torch.no_grad():
            torch.save(model(ids).logits, f"{folder}.{step}.pt")
        folder += "-again"
        model.save_pretrained(folder)
    print(type(model).__name__)
"""


def test_a_fresh_process_loads_generates_and_saves_again(tmp_path):
    cases = {"Llama": ("llama", even), "PrunedLlama": ("llama", uneven), "PrunedOPT": ("opt", uneven)}
    expected, jobs = {}, []
    for label, (name, chooser) in cases.items():
        model, _, expected[label] = cut(name, chooser)
        model.save_pretrained(tmp_path / label)
        jobs.append((str(tmp_path / label), label.startswith("Pruned"), IDS.tolist()))
    command = [sys.executable, "-c", LOAD, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [f"{label}ForCausalLM" for label in cases]
    for label, before in expected.items():
        suffixes = (".0.pt", "-again.1.pt")
        for suffix in suffixes:
            torch.testing.assert_close(torch.load(f"{tmp_path / label}{suffix}"), before, rtol=0.0, atol=1e-8)
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chooser", [even, uneven])
def test_every_architecture_loads_again(name, chooser, tmp_path):
    model, _, before = cut(name, chooser)
    stock = chooser is even and name not in HEADS_NOT_IN_CONFIG
    assert type(model).__name__.startswith("Pruned") != stock
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, trust_remote_code=not stock)
    assert type(loaded).__name__ == type(model).__name__
    # Gemma's scale of the embeddings is a float32 buffer.
    torch.testing.assert_close(logits(loaded), before, rtol=0.0, atol=1e-5 if name == "gemma" else 1e-8)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_a_model_can_be_narrowed_again():
    model, _, _ = cut("llama", uneven)
    decoder = find_decoder(model)
    dimensions = find_dimensions(model, decoder)
    assert [dimension.groups for dimension in dimensions] == [2, 43, 1, 40]
    removed = [(dimension, choose(dimension, *range(dimension.groups - 32))) for dimension in dimensions[1::2]]
    zero(removed)
    before = logits(model)
    remove_groups(model, decoder, removed)
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=1e-8)
    assert [config.intermediate_size for config in model.config.per_layer_config] == [32, 32]


class NormInside(nn.Module):
    """A feed-forward layer with a norm over its neurons: none can go alone."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.norm = nn.LayerNorm(mlp.down_proj.in_features)

    def forward(self, x):
        return self.down_proj(self.norm(self.gate_proj(x) * self.up_proj(x)))


class Constant(NormInside):
    """Half of the inputs of down_proj come from nowhere."""

    def forward(self, x):
        inner = self.gate_proj(x) * self.up_proj(x)
        return self.down_proj(torch.cat([inner[..., :24], torch.ones_like(inner[..., 24:])], dim=-1))


@pytest.mark.parametrize("mlp, words", [(NormInside, "cannot be removed"), (Constant, "does not come from")])
def test_what_cannot_be_explained_is_refused_by_name(mlp, words):
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = mlp(layer.mlp)
    with pytest.raises(UnsupportedModelError, match=rf"layers\.0\.mlp\.down_proj.*{words}"):
        find_dimensions(model, find_decoder(model))


def test_a_failed_cut_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr("llm_surgeon.structures.remove.groups._masked", lambda _: nullcontext())
    model = build("llama", torch.float64)
    decoder = find_decoder(model)
    before, names, config = logits(model), set(model.state_dict()), model.config.to_json_string()
    removed = [(dimension, uneven(dimension)) for dimension in find_dimensions(model, decoder)]
    with pytest.raises(NumericalError, match="differ"):
        remove_groups(model, decoder, removed)  # the weights are not zero, and not masked
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(model), before) and set(model.state_dict()) == names
    assert model.config.to_json_string() == config


def test_a_block_that_adds_in_place_to_what_a_linear_returns(tmp_path) -> None:
    config = FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = FalconForCausalLM(config).double().eval()
    decoder = find_decoder(model)
    heads, neurons = find_dimensions(model, decoder)
    assert (heads.groups, heads.parts, neurons.groups) == (1, 4, 128)
    removed = [(heads, torch.tensor([[True, False, False, False]])), (neurons, choose(neurons, 0, 7, 127))]
    zero(removed)
    before = logits(model)
    remove_groups(model, decoder, removed)
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=1e-8)
    model.save_pretrained(tmp_path)  # its configuration computes the width of a head, and would not be told
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, trust_remote_code=True)
    torch.testing.assert_close(logits(again), before, rtol=0.0, atol=1e-8)


def test_a_block_that_does_not_run_on_its_own_is_refused() -> None:
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    model = BloomForCausalLM(config).eval()
    with pytest.raises(UnsupportedModelError, match="a BloomBlock cannot be probed on its own: structured pruning"):
        find_dimensions(model, find_decoder(model))
