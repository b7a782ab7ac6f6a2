"""Zero rows and columns leave the matrices; what is computed stays."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_surgeon import InputError, prune
from llm_surgeon.checkpoint import load_model
from llm_surgeon.formats.modeling_pruned import CompactLinear
from llm_surgeon.jobs.compact import compact_checkpoint
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.footprint import model_size
from llm_surgeon.recovery.recover import recover
from llm_surgeon.report.schema import PruneReport
from llm_surgeon.structures.remove.rows_columns import compact
from tests.surgeon.checkpoints import save_folder
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


def test_checkpoints_are_compacted_and_dense_ones_refused(tmp_path):
    model = build("llama")
    save_folder(tmp_path / "dense", model)
    with pytest.raises(InputError, match="no zero rows or columns"):
        compact_checkpoint(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = prune(model, TOKENS, structure="rows-columns", sparsity=0.4, shots=1)
    save_folder(tmp_path / "zeros", model)
    (tmp_path / "zeros" / "surgeon_report.json").write_text(report.to_json())
    (tmp_path / "zeros" / "README.md").write_text("# T\n\n## How it is stored\n\nas zeros\n")  # not true any more
    found = compact_checkpoint(tmp_path / "zeros", tmp_path / "out")
    sentence = f"{found.after:,} of {found.before:,} weights of its linear layers are left"
    again = PruneReport.read(tmp_path / "out" / "surgeon_report.json")
    assert len(again.history) == 1 and sentence in again.history[0]
    assert sentence in (tmp_path / "out" / "report.html").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert sentence in card and "as zeros" not in card and "trust_remote_code=True" in card
    assert {"seconds_low", "seconds", "seconds_high"} < set(found.sizes["before"]) == set(found.sizes["after"])
    for name, ours in (("before", tmp_path / "zeros"), ("after", tmp_path / "out")):
        parameters = sum(parameter.numel() for parameter in load_model(ours)[0].parameters())
        assert found.sizes[name]["parameters"] == parameters
    with pytest.raises(InputError, match="is compact already"):
        compact_checkpoint(tmp_path / "out", tmp_path / "again")
    loaded, _, _ = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert model_size(loaded, TOKENS)["macs"] == found.sizes["after"]["macs"] < found.sizes["before"]["macs"]
    with pytest.raises(InputError, match="the model is compact: recover"):
        recover(loaded, TOKENS, TOKENS[:2])
    assert found.after < found.before == sum(x.rows * x.columns for x in find_decoder(model).linears)
