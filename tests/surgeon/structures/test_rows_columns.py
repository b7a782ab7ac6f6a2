"""Zero rows and columns leave the matrices; what is computed stays."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_surgeon import prune
from llm_surgeon.formats.modeling_pruned import CompactLinear
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.structures.remove.rows_columns import compact
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", NAMES)
def test_compact_models_compute_the_same_with_fewer_weights_and_load_again(name, tmp_path):
    model = build(name)
    report = prune(model, TOKENS, structure="rows-columns", sparsity=0.4, shots=1)
    model.double()
    before = logits(model)
    found = compact(model, multiple=1)
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=1e-8)
    assert found.before == report.weights and found.after <= 0.75 * found.before
    left = sum(m.weight.numel() for m in model.modules() if isinstance(m, (CompactLinear, torch.nn.Linear)))
    assert found.linears == sum(isinstance(module, CompactLinear) for module in model.modules()) > 0
    assert left <= found.after + model.get_output_embeddings().weight.numel()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, trust_remote_code=True)
    torch.testing.assert_close(logits(loaded), before, rtol=0.0, atol=1e-5 if name == "gemma" else 1e-8)


def test_neurons_that_are_never_read_or_never_fire_are_removed():
    model = build("llama", torch.float64)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :8] = 0.0
        model.model.layers[0].mlp.gate_proj.weight[8:12] = 0.0
        model.model.layers[1].mlp.up_proj.weight[20:32] = 0.0
    before = logits(model)
    found = compact(model, multiple=4)
    assert (found.neurons, found.linears) == (24, 0)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.intermediate_size == 36
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_multiples_and_outputs_that_are_gone_read_a_zero_row(name):
    model = build(name)
    with torch.no_grad():
        for linear in find_decoder(model).linears:
            matrix = linear.matrix()
            matrix[1:10] = 0.0
            matrix[:, 3:20:2] = 0.0
            linear.write(matrix)
    model.double()
    before = logits(model)
    compact(model)
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=1e-8)
    linears = [module for module in model.modules() if isinstance(module, CompactLinear)]
    assert linears
    for linear in linears:
        rows, columns = linear.weight.shape
        assert rows % 8 == columns % 8 == 0 and len(linear.column_index) == columns
        gone = linear.row_index.bincount(minlength=rows) > 1
        assert int(gone.sum()) == (rows < linear.out_features) and not linear.weight[gone].any()


def test_a_neuron_that_fires_without_input_stays_while_it_is_read():
    model = build("opt", torch.float64)
    model.config.activation_function = "sigmoid"
    for layer in model.model.decoder.layers:
        layer.activation_fn = torch.nn.Sigmoid()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight[:32] = 0.0
            layer.fc1.bias[:32] = 0.0
            layer.fc2.weight[:, 40:48] = 0.0
    before = logits(model)
    found = compact(model)
    assert found.neurons == 16
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=1e-8)
