"""Offloaded runs on a GPU: the same model, less memory, and what the plan said."""

import copy
import dataclasses
import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_surgeon import Calibration, PruneConfig, prune
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.offload import PinnedMemory, copies_in_main_memory
from llm_surgeon.planning.memory import Memory
from llm_surgeon.planning.plan import make_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}
TOKENS = torch.randint(0, 512, (8, 512), generator=torch.Generator().manual_seed(0))


def build(device):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, num_hidden_layers=4, max_position_embeddings=512, **SIZES)
    return LlamaForCausalLM(config).bfloat16().to(device)


@pytest.fixture
def no_collector():
    """Objects that only the garbage collector would free stay in memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("home, reconstruct", [("cuda", False), ("cpu", False), ("cpu", True)])
def test_an_offloaded_run_gives_nearly_the_same_model_in_less_memory(home, reconstruct):
    resident, offloaded = build("cuda"), build(home)
    options = {"structure": "rows-columns", "shots": 2, "reconstruct": reconstruct}
    expected = prune(resident, TOKENS, **options)
    torch.cuda.empty_cache()
    found = prune(offloaded, TOKENS, offload="cpu", curvature_layers=1, **options)
    assert all(parameter.device.type == home for parameter in offloaded.parameters())
    assert found.sparsity == pytest.approx(expected.sparsity, abs=1e-6)
    for ours, theirs in zip(found.shots, expected.shots, strict=True):
        assert ours.predicted_increase == pytest.approx(theirs.predicted_increase, rel=0.02)
        assert ours.loss_before == pytest.approx(theirs.loss_before, rel=2e-3)


@pytest.mark.parametrize(
    "structure, options",
    [
        ("2:4", {"update": "joint"}),
        ("rows-columns", {"batch_size": 2}),
        ("2:4", {"update": "joint", "checkpoint_activations": True}),
        ("2:4", {"update": "sequential"}),
        ("2:4", {"update": "sequential", "checkpoint_activations": True, "batch_size": 2}),
    ],
)
def test_the_plan_is_within_a_tenth_of_the_peak(structure, options, no_collector):
    model = build("cuda")
    prune(copy.deepcopy(model), TOKENS[:1], structure=structure, shots=1, **options)  # workspaces of libraries
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() - sum(parameter.nbytes for parameter in model.parameters())
    config = PruneConfig(structure=structure, shots=1, samples=8, seqlen=512, **options)
    plan = make_plan(model, find_decoder(model), config)
    peak = prune(model, TOKENS, config=config).peak_memory_bytes - before
    assert plan.memory_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("structure, shots", [("2:4", 1), ("unstructured", 2)])
@pytest.mark.parametrize("home, options", [("cuda", {}), ("cuda", {"offload": "cpu"}), ("cpu", {"offload": "cpu"})])
@pytest.mark.parametrize("wait", [True, False])
def test_a_sequential_update_gives_the_same_model_wherever_things_wait(
    home, options, wait, structure, shots, monkeypatch
):
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, 300:] = False
    data = Calibration(TOKENS, mask)
    # Offloaded runs take no gradient steps unless they are asked for.
    options = {"structure": structure, "shots": shots, "batch_size": 3, "gradient_steps": 0, **options}
    resident, model = build("cuda"), build(home)
    expected = prune(resident, data, update="sequential", **options | {"offload": "none"})
    monkeypatch.setattr(Memory, "states_wait", lambda *_: wait)
    found = prune(model, data, update="sequential", **options)
    assert all(parameter.device.type == home and not parameter.is_pinned() for parameter in model.parameters())
    assert [layer.removed for layer in found.layers] == [layer.removed for layer in expected.layers]
    for ours, theirs in zip(found.shots, expected.shots, strict=True):
        assert ours.predicted_increase == theirs.predicted_increase
    for ours, theirs in zip(find_decoder(model).linears, find_decoder(resident).linears, strict=True):
        assert torch.equal(ours.weight.cuda(), theirs.weight)


def test_hidden_states_wait_where_a_cap_leaves_no_room(no_collector):
    config = PruneConfig(update="sequential", samples=8, seqlen=512, batch_size=1, checkpoint_activations=True)
    model = build("cuda")
    memory = Memory(model, find_decoder(model), config)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated() - sum(parameter.nbytes for parameter in model.parameters())
    resident = memory.model_weights() + memory.masks() + memory.factors()
    # All but the states of half of the windows; and what the process holds besides.
    cap = int((resident + memory.update(1) - memory.states() / 2) / 0.92) + held
    config = dataclasses.replace(config, gpu_memory=cap)
    assert make_plan(model, find_decoder(model), config).states_wait
    report = prune(model, TOKENS, config=config)
    assert report.peak_memory_bytes <= cap and report.sparsity == 0.5


def test_a_cap_on_memory_holds_and_is_lifted(no_collector):
    torch.cuda.empty_cache()
    # What the process holds already counts against the cap: here a gigabyte, and whatever earlier tests have left.
    ballast = torch.zeros(10**9, dtype=torch.uint8, device="cuda")
    cap = torch.cuda.memory_reserved() + 1_500_000_000
    report = prune(build("cuda"), TOKENS, structure="rows-columns", shots=1, offload="cpu", gpu_memory=cap)
    assert ballast.nbytes < report.peak_memory_bytes <= cap
    assert torch.zeros(cap, dtype=torch.uint8, device="cuda").numel() == cap


def test_the_plan_leaves_room_for_what_the_process_holds_besides():
    model, room = build("cuda"), {}
    for held in (0, 10**9):
        ballast = torch.zeros(held, dtype=torch.uint8, device="cuda")
        config = PruneConfig(structure="rows-columns", shots=1, samples=8, seqlen=512, gpu_memory="3GB")
        room[held] = Memory(model, find_decoder(model), config).limit()
        del ballast
    assert room[0] - room[10**9] == pytest.approx(10**9, abs=2**21)


def test_pinned_memory_is_exactly_as_large_as_asked_for_and_unlocked_in_the_end():
    memory, tensors = PinnedMemory(), [torch.randn(n, device="cuda") for n in (1, 5000, 3 << 20)]
    locked = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    copies = [memory.copy(tensor) for tensor in tensors]
    torch.cuda.synchronize()
    assert all(copy.is_pinned() and torch.equal(copy, x.cpu()) for copy, x in zip(copies, tensors, strict=True))
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == locked  # none of it is PyTorch's
    memory.reuse()
    last = memory.copy(2.0 * tensors[2])
    assert last.data_ptr() == copies[2].data_ptr()
    memory.close()
    assert not any(copy.is_pinned() for copy in copies) and torch.equal(last, 2.0 * tensors[2].cpu())


def test_a_run_that_fails_leaves_offloaded_weights_as_they_were(monkeypatch):
    def fail(*_):
        raise KeyError

    for home in ("cuda", "cpu"):
        model = build(home)
        before = copy.deepcopy(model.state_dict())
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            patch.setattr("llm_surgeon.shots.run.mean_loss", fail)  # once all weights have been changed
            prune(model, TOKENS, structure="rows-columns", shots=1, offload="cpu")
        for name, tensor in model.state_dict().items():
            assert tensor.device.type == home and not tensor.is_pinned() and torch.equal(tensor, before[name])


def test_copies_in_main_memory_are_complete_and_leave_later_work_alone():
    sizes = [(3, 5), (0,), (1,), (9000, 8200), (257,)]  # none, a part, or several of the staging buffers
    tensors = [
        torch.randn(size, device="cuda").to(dtype) for size in sizes for dtype in (torch.bfloat16, torch.float64)
    ]
    tensors.append(torch.randn(300, 200, device="cuda").T)
    expected = [tensor.cpu() for tensor in tensors]
    copies = copies_in_main_memory(tensors)
    assert all(copy.device.type == "cpu" and torch.equal(copy, x) for copy, x in zip(copies, expected, strict=True))
    tensors[0].zero_()
    assert torch.equal(copies[0], expected[0])
