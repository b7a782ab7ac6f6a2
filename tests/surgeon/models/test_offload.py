"""Weights and curvature in main memory: the same results, and everything back in its place."""

import copy
import gc
import weakref

import pytest
import torch

from llm_surgeon import Calibration, InputError, PruneConfig, prune
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.offload import PinnedMemory, Prefetcher, copies_in_main_memory, offloaded, resident
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.planning.activations import measure_activations
from llm_surgeon.planning.memory import Memory
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_streamed_blocks_give_the_same_curvature_and_loss(name):
    model = build(name)
    decoder, data = find_decoder(model), Calibration(TOKENS)
    expected, loss = estimate_curvature(model, decoder, data, batch_size=2), mean_loss(model, data, 2)
    with offloaded(model, decoder, CPU):
        assert mean_loss(model, data, 2) == loss
        options = {"checkpoint_activations": True, "blocks_per_pass": 1, "store": PinnedMemory().store}
        found = estimate_curvature(model, decoder, data, batch_size=2, **options)
    assert found.loss == expected.loss
    for linear in decoder.linears:
        for ours, theirs in zip(found.factors(linear), expected.factors(linear), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_curvature_in_several_passes_is_the_same(blocks, fisher):
    model = build("qwen2")
    decoder, data = find_decoder(model), Calibration(TOKENS)
    whole = estimate_curvature(model, decoder, data, batch_size=4, fisher=fisher, seed=3)
    steps = []
    parts = estimate_curvature(
        model, decoder, data, batch_size=4, fisher=fisher, seed=3, blocks_per_pass=blocks,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    total = 2 * -(-2 // blocks)
    assert steps == [(i, total) for i in range(1, total + 1)]
    assert parts.loss == whole.loss
    for linear in decoder.linears:
        for ours, theirs in zip(parts.factors(linear), whole.factors(linear), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("structure", ["2:4", "unstructured", "rows-columns"])
@pytest.mark.parametrize("options", [{"offload": "cpu"}, {"curvature_layers": 1}])
def test_offloaded_runs_give_the_same_weights_and_report(structure, options):
    models = build("llama"), build("llama")
    reports = [
        prune(model, TOKENS, structure=structure, update="joint", shots=2, **extra)
        for model, extra in zip(models, ({}, options), strict=True)
    ]
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(reports[1].shots, reports[0].shots, strict=True):
        assert ours.predicted_increase == pytest.approx(theirs.predicted_increase, rel=1e-6)
        assert ours.loss_before == theirs.loss_before
    assert [layer.removed for layer in reports[0].layers] == [layer.removed for layer in reports[1].layers]


@pytest.mark.parametrize("structure, shots", [("2:4", 1), ("unstructured", 2)])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox", "gemma"])
def test_sequential_updates_give_the_same_weights_wherever_things_wait(name, structure, shots, monkeypatch):
    """Weights, factors, hidden states, inputs."""
    monkeypatch.setattr("llm_surgeon.planning.plan.copy_rate", lambda _: 1e9)
    data, models, reports = padded(), [], []
    everywhere = [(False, {}), (False, {"offload": "cpu"}), (True, {}), (True, {"offload": "cpu"})]
    everywhere += [(False, {"curvature_layers": 1}), (False, {"checkpoint_activations": True})]
    for wait, options in everywhere:
        monkeypatch.setattr(Memory, "states_wait", lambda *_, wait=wait: wait)
        model = build(name)
        options = {"structure": structure, "shots": shots, "batch_size": 4, **options}
        reports.append(prune(model, data, update="sequential", **options))
        models.append(model)
        assert not any("forward" in vars(module) for module in model.modules())
    for model, report in zip(models[1:], reports[1:], strict=True):
        for ours, theirs in zip(model.parameters(), models[0].parameters(), strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(report.shots, reports[0].shots, strict=True):
            assert ours.predicted_increase == pytest.approx(theirs.predicted_increase, rel=1e-6)
            assert ours.loss_before == theirs.loss_before and ours.sparsity == theirs.sparsity
        assert [layer.removed for layer in report.layers] == [layer.removed for layer in reports[0].layers]


@pytest.mark.parametrize("structure", ["groups", "layers", "rows-columns"])
def test_last_fits_give_the_same_weights_wherever_hidden_states_wait(structure, monkeypatch):
    monkeypatch.setattr("llm_surgeon.planning.plan.copy_rate", lambda _: 1e9)
    options = {"structure": structure, "sparsity": 0.4, "shots": 1, "reconstruct": True, "batch_size": 4}
    models = []
    for wait in (False, True):
        monkeypatch.setattr(Memory, "states_wait", lambda *_, wait=wait: wait)
        models.append(build("llama"))
        prune(models[-1], padded(), **options if structure != "layers" else {**options, "shots": None})
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)


def padded():
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, 10:] = False
    mask[4, :5] = False
    return Calibration(TOKENS, mask)


def test_weights_of_a_resident_block_are_written_to_where_they_lie():
    model = build("gpt2")
    decoder, data = find_decoder(model), Calibration(TOKENS)
    block, linear = decoder.blocks[1], decoder.linears[-1]
    new = 0.5 * linear.matrix()
    with resident(block, CPU):  # of a model that is where it is
        assert "forward" not in vars(block)
    with offloaded(model, decoder, CPU):
        before = mean_loss(model, data, 2)
        home = linear.weight.data_ptr()
        streamed = block.forward
        with resident(block, CPU):
            assert linear.weight.data_ptr() != home and block.forward is not streamed
            assert mean_loss(model, data, 2) == before
            linear.write(new)
            changed = mean_loss(model, data, 2)
        assert linear.weight.data_ptr() == home and block.forward is streamed
        assert torch.equal(linear.matrix(), new)
        assert mean_loss(model, data, 2) == changed != before
    assert torch.equal(linear.matrix(), new) and mean_loss(model, data, 2) == changed


def test_everything_is_back_in_its_place_even_after_a_failure():
    model = build("gpt2")
    decoder = find_decoder(model)
    parameters, before = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), offloaded(model, decoder, CPU):
        assert all("forward" in vars(block) for block in decoder.blocks)
        raise KeyError
    assert not any("forward" in vars(block) for block in decoder.blocks)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_run_that_fails_leaves_the_weights_of_main_memory_as_they_were():
    model = build("gpt2")
    decoder, linear = find_decoder(model), find_decoder(model).linears[0]
    before, pointer = linear.weight.clone(), linear.weight.data_ptr()
    with pytest.raises(KeyError), offloaded(model, decoder, CPU):
        linear.write(torch.zeros_like(linear.matrix()))
        raise KeyError
    assert torch.equal(linear.weight, before) and linear.weight.data_ptr() == pointer
    with offloaded(model, decoder, CPU):
        linear.write(torch.ones_like(linear.matrix()))
    assert torch.equal(linear.weight, torch.ones_like(before))


def test_pinned_memory_is_used_again_and_holds_copies_of_any_kind():
    memory = PinnedMemory()
    tensors = [torch.randn(40, 30).T, torch.ones(2, dtype=torch.bfloat16), torch.empty(0), torch.tensor(3.0)]
    copies = [memory.copy(tensor) for tensor in tensors]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(copies, tensors, strict=True))
    memory.reuse()
    again = memory.copy(torch.zeros(30, 40))
    assert again.data_ptr() == copies[0].data_ptr() and memory.copy(tensors[0]).data_ptr() != again.data_ptr()
    memory.close()
    assert not again.is_pinned() and torch.equal(again, torch.zeros(30, 40))


def test_memory_that_cannot_be_had_is_one_sentence():
    with pytest.raises(InputError, match=r"^1152922 TB more of main memory cannot be had: "):
        PinnedMemory().empty((1 << 60,), torch.uint8)


def test_copies_in_main_memory_are_no_views():
    tensors = [torch.randn(3, 4).T, torch.ones(2, dtype=torch.bfloat16), torch.empty(0)]
    copies = copies_in_main_memory(tensors)
    for ours, theirs in zip(copies, tensors, strict=True):
        assert torch.equal(ours, theirs) and (ours.data_ptr() != theirs.data_ptr() or ours.numel() == 0)
    assert copies_in_main_memory([]) == []


def test_a_prefetcher_gives_what_is_asked_for_whatever_it_began():
    prefetcher = Prefetcher(CPU)
    x, y = torch.ones(2), torch.zeros(3)
    prefetcher.start("x", [x])
    (copied,) = prefetcher.take("x", [x])
    assert torch.equal(copied, x) and copied.data_ptr() != x.data_ptr()
    prefetcher.start("x", [x])
    assert torch.equal(prefetcher.take("y", [y])[0], y)
    assert torch.equal(prefetcher.take("x", [x])[0], x)


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_methods_without_curvature_cannot_be_offloaded(method):
    with pytest.raises(InputError, match=f"offload has no meaning for method '{method}': choose "):
        PruneConfig(method=method, offload="cpu")
    with pytest.raises(InputError, match="unknown offload 'disk'"):
        PruneConfig(offload="disk")
    with pytest.raises(InputError, match="'lots' is no amount of memory"):
        PruneConfig(gpu_memory="lots")


def test_neither_measuring_nor_pruning_holds_on_to_the_model():
    gc.collect()
    gc.disable()  # what only the collector would find keeps a model's memory on a GPU
    try:
        model = build("llama")
        measure_activations(model, find_decoder(model), 32)
        prune(model, TOKENS, structure="rows-columns", shots=1, offload="cpu")
        parameters = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        gone = sum(parameter() is None for parameter in parameters)
    finally:
        gc.enable()
    assert gone == len(parameters)


def test_kept_activations_are_those_that_autograd_saves():
    model = build("llama")
    decoder = find_decoder(model)
    kept = measure_activations(model, decoder, 64)
    length, saved = 64, {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    held = []

    def pack(tensor):
        held.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(torch.arange(length)[None] % VOCABULARY).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    true = sum(size for pointer, size in saved.items() if pointer not in parameters)
    assert logits.requires_grad
    assert kept.everything * length == pytest.approx(true, rel=0.02)
    assert kept.inputs == 2 * 32 * 4
    assert kept.everything / 2 < kept.largest_block < kept.everything
