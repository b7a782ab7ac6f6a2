"""The plan of a run: its parts by hand, its layout by the memory there is, and its peak against the allocator's."""

import dataclasses
import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTForCausalLM

import llm_surgeon.planning.memory
import llm_surgeon.planning.plan
import llm_surgeon.planning.time
from llm_surgeon import InputError, PruneConfig, prune
from llm_surgeon.checkpoint import claimed_output
from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.jobs.prune import PruneJob
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.planning.activations import measure_training
from llm_surgeon.planning.memory import factor_sizes
from llm_surgeon.planning.plan import make_plan
from llm_surgeon.recovery.recover import recover
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.tiny_models import build

# Two blocks of a Llama of width 32: q 32x32, k and v 16x32, o 32x32, gate and up 48x32, down 32x48.
BLOCK = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
SHARED_INPUTS = [32, 32, 32, 48]
WEIGHTS = 2 * sum(R * C for R, C in BLOCK)
FACTORS = 4 * (sum(n**2 for n in SHARED_INPUTS) + sum(R**2 for R, _ in BLOCK))  # bytes, of one block
BLOCK_BYTES = 4 * (WEIGHTS // 2 + 2 * 32)  # with its two norms


def plan_of(name="llama", device="cpu", memory=10**12, link=1e300, monkeypatch=None, **options):
    model = build(name)
    decoder = find_decoder(model)
    update = {} if "method" in options else {"update": "joint"}
    config = PruneConfig(**{"samples": 8, "seqlen": 16, "gradient_steps": 0, **update, **options})
    if monkeypatch is not None:
        monkeypatch.setattr(llm_surgeon.planning.plan, "matmul_rate", lambda device, dtype: 2.0)
        monkeypatch.setattr(llm_surgeon.planning.plan, "copy_rate", lambda device: link)
        monkeypatch.setattr(llm_surgeon.planning.memory, "compute_device", lambda model, config: torch.device(device))
        monkeypatch.setattr(llm_surgeon.planning.memory, "available_memory", lambda device: memory)
    return model, make_plan(model, decoder, config)


def test_parts_of_a_plan_on_the_cpu(monkeypatch):
    model, plan = plan_of(batch_size=2, monkeypatch=monkeypatch)
    assert plan.weights_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert plan.masks_bytes == WEIGHTS and plan.snapshot_bytes == plan.dense_bytes == 4 * WEIGHTS
    assert plan_of(shots=1)[1].dense_bytes == 0
    assert plan.factors_bytes == 2 * FACTORS
    assert (plan.batch_size, plan.blocks_per_pass, plan.passes, plan.host_bytes) == (2, 2, 1, 0)
    assert sum(plan.by_kind().values()) == plan.memory_bytes + sum(
        sorted((plan.curvature_bytes, plan.selection_bytes, plan.update_bytes))[:2]
    )


def test_the_process_counts_on_the_cpu(monkeypatch):
    monkeypatch.setattr(llm_surgeon.planning.plan, "process_memory", lambda: 10**9)
    _, plan = plan_of()
    tensors = plan.weights_bytes + plan.additional_bytes
    assert plan.process_bytes == 10**9 - plan.weights_bytes + 2**27 + int(0.25 * plan.additional_bytes)
    assert plan.memory_bytes == tensors + plan.process_bytes
    assert plan.by_kind()["libraries and allocators"] == plan.process_bytes
    assert plan_of(device="cuda", monkeypatch=monkeypatch)[1].process_bytes == 0


def test_offloaded_parts_are_in_main_memory(monkeypatch):
    model, plan = plan_of(offload="cpu", curvature_layers=1, device="cuda", monkeypatch=monkeypatch)
    assert plan.factors_bytes == plan.masks_bytes == plan.dense_bytes == 0 and plan.checkpoint_activations
    assert (plan.blocks_per_pass, plan.passes) == (1, 2)
    everything = 4 * sum(p.numel() for p in model.parameters())
    assert plan.weights_bytes == everything  # two blocks in all: both may be on the device at once
    dense, masks = 4 * WEIGHTS, WEIGHTS
    assert plan.host_bytes == everything + dense + 2 * FACTORS + 2 * BLOCK_BYTES + masks
    _, alone = plan_of(curvature_layers=1, device="cuda", monkeypatch=monkeypatch)
    assert alone.factors_bytes == 0 and alone.masks_bytes == WEIGHTS
    assert alone.host_bytes == 4 * WEIGHTS + 2 * FACTORS


def test_as_many_windows_and_blocks_as_fit(monkeypatch):
    def plan(memory, **options):
        return plan_of(device="cuda", memory=memory, monkeypatch=monkeypatch, **options)[1]

    roomy = plan(10**12, seqlen=2048)
    assert roomy.batch_size == 8  # all of them
    assert plan(10**12, seqlen=2048, samples=100).batch_size == 65536 // 2048  # of a narrow model
    with monkeypatch.context() as patch:
        patch.setattr("llm_surgeon.planning.layout._GPU_NUMBERS", 1)
        assert plan(10**12, seqlen=2048).batch_size == 8192 // 2048
    assert plan(10**12, seqlen=2048, samples=3).batch_size == 3
    assert plan(0, seqlen=2048).batch_size == 1
    two = plan(10**12, seqlen=2048, batch_size=2)
    fixed = two.weights_bytes + two.masks_bytes + two.dense_bytes + two.factors_bytes
    assert plan(int((fixed + 2.01 * two.curvature_bytes) / 0.92), seqlen=2048).batch_size == 2
    assert plan(int((fixed + 1.99 * two.curvature_bytes) / 0.92), seqlen=2048).batch_size == 1
    offloaded = plan(10**12, offload="cpu", batch_size=1)
    assert offloaded.passes == 1
    enough = int((offloaded.weights_bytes + offloaded.curvature_bytes) / 0.92) + 2
    assert plan(enough, offload="cpu", batch_size=1).passes == 1
    assert plan(enough - FACTORS // 2, offload="cpu", batch_size=1).passes == 2
    assert plan(10**12, offload="cpu", batch_size=1, gpu_memory=enough - FACTORS // 2).passes == 2


def test_inverses_are_kept_where_they_fit_and_are_needed(monkeypatch):
    def plan(memory=10**12, **options):
        return plan_of(device="cuda", memory=memory, monkeypatch=monkeypatch, **options)[1]

    kept = plan()
    assert kept.inverses_bytes == kept.factors_bytes == 2 * FACTORS
    resident = kept.weights_bytes + kept.masks_bytes + kept.dense_bytes + kept.factors_bytes + kept.inverses_bytes
    needed = int((resident + max(kept.selection_bytes, kept.update_bytes)) / 0.92) + 2
    assert plan(needed).inverses_bytes == 2 * FACTORS and plan(needed - 4).inverses_bytes == 0
    assert plan(gpu_memory=needed - 4).inverses_bytes == 0
    assert kept.memory_bytes >= resident + max(kept.selection_bytes, kept.update_bytes)
    assert kept.seconds < plan(needed - 4).seconds
    for options in (
        {"structure": "rows-columns"},
        {"update": "none"},
        {"update": "sequential"},
        {"offload": "cpu"},
        {"method": "k-obd"},
    ):
        assert plan(**options).inverses_bytes == 0
    assert plan_of(monkeypatch=monkeypatch)[1].inverses_bytes == 0  # on a CPU


def test_a_sequential_update_keeps_hidden_states_and_inputs(monkeypatch):
    """Of every token two hidden states, in float32 what one lacks, and the inputs of a block's four stages."""

    def plan(device="cuda", memory=10**12, **options):
        options = {"update": "sequential", "batch_size": 8, **options}
        return plan_of(device=device, memory=memory, monkeypatch=monkeypatch, **options)[1]

    tokens = 8 * 16
    states = tokens * (32 * (4 + 4 + 4) + 2 * sum(SHARED_INPUTS))
    kept = plan(compute_dtype="bfloat16")
    assert not kept.states_wait and kept.factors_bytes == 2 * 4 * sum(R**2 for R, _ in BLOCK)
    assert plan(compute_dtype="float32").update_bytes >= kept.update_bytes + 2 * tokens * sum(SHARED_INPUTS)
    assert plan(structure="unstructured").factors_bytes == 2 * FACTORS
    resident = kept.weights_bytes + kept.masks_bytes + kept.factors_bytes
    needed = int((resident + kept.update_bytes) / 0.92) + 2
    assert not plan(memory=needed, compute_dtype="bfloat16").states_wait
    waiting = plan(memory=needed - 4, compute_dtype="bfloat16")
    assert waiting.states_wait and waiting.update_bytes == kept.update_bytes + states  # of two batches of all windows
    assert waiting.host_bytes == kept.host_bytes + states
    slow = plan(memory=needed - 4, compute_dtype="bfloat16", link=states * 1e-12)
    assert slow.seconds == pytest.approx(5 * 2 * 1e12, rel=0.1)
    assert not plan(device="cpu", memory=0).states_wait
    offloaded = plan(offload="cpu")
    assert not offloaded.states_wait and offloaded.weights_bytes == kept.weights_bytes
    assert plan(offload="cpu", memory=0).states_wait


def test_factor_sizes_count_shared_inputs_once_and_biases():
    decoder = find_decoder(build("opt"))
    gradients = [32, 32, 32, 32, 64, 32]
    assert factor_sizes(decoder, PruneConfig(update="joint")) == 2 * [[33, 33, 33, 65, *gradients]]
    assert factor_sizes(decoder, PruneConfig(update="sequential")) == 2 * [gradients]
    in_shots = PruneConfig(update="sequential", shots=2)
    assert factor_sizes(decoder, in_shots) == 2 * [[33, 33, 33, 65, *gradients]]
    assert factor_sizes(decoder, PruneConfig(method="l-obd")) == 2 * [[33, 33, 33, 65]]
    assert factor_sizes(decoder, PruneConfig(method="magnitude")) == [[], []]


def test_seconds_are_operations_over_rates(monkeypatch):
    for name in ("_PASS_EFFICIENCY", "_GRAM_EFFICIENCY", "_FACTORISATION_EFFICIENCY"):
        monkeypatch.setattr(llm_surgeon.planning.time, name, 1.0)
    tokens, P = 8 * 16, WEIGHTS + 64 * 32
    forward = 2 * P * tokens
    grams, cubes = 2 * FACTORS // 4, 2 * sum(n**3 for n in [*SHARED_INPUTS, *(R for R, _ in BLOCK)])
    products = 2 * sum(2 * R * C * (R + C) for R, C in BLOCK)
    _, plan = plan_of(shots=3, max_iterations=10, monkeypatch=monkeypatch)
    operations = 3 * (2 * forward + tokens * grams + 5 / 3 * cubes + (10 + 3 * 9 + 10 + 2) * products) + forward
    assert plan.seconds == pytest.approx(operations / 2.0)
    _, lines = plan_of(shots=3, structure="rows-columns", monkeypatch=monkeypatch)
    assert lines.seconds == pytest.approx(
        (3 * (2 * forward + tokens * grams + 2 / 3 * cubes + 3 * products) + forward) / 2.0
    )
    _, single = plan_of(shots=3, max_iterations=10, swaps=0, monkeypatch=monkeypatch)
    assert single.seconds == pytest.approx(plan.seconds - 3 * (10 + 3 * 9) * products / 2.0)
    _, stepped = plan_of(shots=3, max_iterations=10, gradient_steps=2, monkeypatch=monkeypatch)
    assert stepped.seconds == pytest.approx(plan.seconds + 3 * 2 * (27 / 8 * forward + (10 + 2) * products) / 2.0)
    assert stepped.update_bytes >= plan.update_bytes + 8 * WEIGHTS
    _, sequential = plan_of(update="sequential", max_iterations=10, monkeypatch=monkeypatch)
    # The pass for G, those of the sweep and the last one; A, X and, of what o and down lack, E.
    alone = [(32, 0), (32, 32), (32, 0), (48, 32)]
    sums = 2 * (sum(R**2 for R, _ in BLOCK) + sum(3 * C**2 + 2 * R * C for C, R in alone))
    inverses = 2 * (sum(R**3 for R, _ in BLOCK) + 3 * sum(n**3 for n in SHARED_INPUTS))
    sweep = 3.5 * forward + inverses + (10 + 3 * 9 + 10 + 2) * products
    operations = 2 * forward + tokens * sums + sweep + forward
    assert sequential.seconds == pytest.approx(operations / 2.0)
    # Steps after it: A, inverses of both factors for each of them, and what they take with the dense model as target.
    _, moved = plan_of(update="sequential", max_iterations=10, gradient_steps=2, monkeypatch=monkeypatch)
    again = forward + tokens * 2 * sum(n**2 for n in SHARED_INPUTS) + 2 * cubes
    steps = 2 * ((27 / 8 + 13 / 8) * forward + (10 + 2) * products)
    assert moved.seconds == pytest.approx((operations + again + steps) / 2.0)
    # Where logits come in chunks, that model runs once up to its head.
    options = {"max_iterations": 10, "gradient_steps": 2, "compute_dtype": "bfloat16"}
    _, once = plan_of(update="sequential", **options, monkeypatch=monkeypatch)
    head = 2 * 64 * 32 * tokens
    steps = forward - head + 2 * (27 / 8 * forward + 13 / 8 * head + (10 + 2) * products)
    assert once.seconds == pytest.approx((operations + again + steps) / 2.0)
    # Its hidden states are held from pass to pass; those of labels are none.
    _, labels = plan_of(update="sequential", gradient_target="labels", **options, monkeypatch=monkeypatch)
    assert once.update_bytes - labels.update_bytes == 2 * 32 * tokens
    # Some linears stay dense: costs of all, and of each a solution of its own.
    _, partly = plan_of(update="sequential", max_iterations=10, dense_fraction=0.3, monkeypatch=monkeypatch)
    of_a = tokens * 2 * sum(n**2 for n in SHARED_INPUTS)
    chosen = of_a + (2 / 3 + 1) * cubes + 10 * products
    assert partly.seconds == pytest.approx((operations + chosen) / 2.0)
    # Shots before the sweep are rough; it takes A from them, and costs.
    _, counted = plan_of(
        update="sequential", structure="unstructured", shots=3, max_iterations=10, monkeypatch=monkeypatch
    )
    shots = 3 * (2 * forward + tokens * grams) + 2 * (5 / 3 * cubes + (8 + 2) * products) + 2 / 3 * cubes
    more = 2 * tokens * sum(3 * C**2 + 2 * R * C for C, R in alone)
    assert counted.seconds == pytest.approx((shots + sweep + more + forward) / 2.0)
    operations = 3 * (2 * forward + tokens * grams + 5 / 3 * cubes + (10 + 3 * 9 + 10 + 2) * products) + forward
    model, config = build("llama"), PruneConfig(samples=8, seqlen=16, shots=3, max_iterations=10, update="joint")
    held_out = make_plan(model, find_decoder(model), config, held_out=4)
    assert held_out.seconds == pytest.approx((operations + 2 * 4 / 8 * forward) / 2.0)
    _, again = plan_of(shots=3, max_iterations=10, checkpoint_activations=True, monkeypatch=monkeypatch)
    assert again.seconds == pytest.approx((operations + 3 * forward) / 2.0)
    # Of two passes the second goes back through one block only, computing its activations again; weights of
    # both are streamed in every one of them, and once more for the final loss.
    pinned = (2 * (FACTORS + BLOCK_BYTES) + WEIGHTS) / 5e9
    offloaded = {"shots": 1, "max_iterations": 10, "offload": "cpu", "curvature_layers": 1, "device": "cuda"}
    _, fast = plan_of(**offloaded, monkeypatch=monkeypatch)
    _, slow = plan_of(**offloaded, link=BLOCK_BYTES / 1e9, monkeypatch=monkeypatch)
    assert slow.seconds - pinned == pytest.approx(4.5 * 2e9, rel=0.1)
    solver = (10 + 3 * 9 + 10 + 2 * 3) / 10.5 * products
    operations = (2 + 2 * 1.5 + 1) * forward + tokens * grams + 5 / 3 * cubes + solver
    assert fast.seconds == pytest.approx(operations / 2.0 + pinned + 2.5)
    # A last fit: its passes and moments, Cholesky factors of A, and a pass for gradients where they weigh tokens.
    lines = {"structure": "groups", "update": "joint", "token_weights": False}
    _, plain = plan_of(**lines, reconstruct=False, monkeypatch=monkeypatch)
    _, fitted = plan_of(**lines, reconstruct=True, monkeypatch=monkeypatch)
    _, weighed = plan_of(**lines | {"token_weights": None}, reconstruct=True, monkeypatch=monkeypatch)
    fits = 2 * sum(C**3 / 3 + 2 * 2 * R * C**2 for R, C in BLOCK)
    assert fitted.seconds == pytest.approx(plain.seconds + (3.5 * forward + more + fits) / 2.0)
    assert weighed.seconds == pytest.approx(fitted.seconds + 2 * forward / 2.0)
    _, magnitude = plan_of(method="magnitude", monkeypatch=monkeypatch)
    assert magnitude.seconds == pytest.approx(forward / 2.0)


def test_a_cap_that_the_run_would_exceed_is_refused_before_the_work(tmp_path):
    source, text = save_folder(tmp_path / "model", build("llama")), tmp_path / "text.txt"
    text.write_text("w2 w3 w4 w5 " * 40)
    job = PruneJob(source, PruneConfig(samples=2, seqlen=8), calibration=str(text))
    job.config = dataclasses.replace(job.config, gpu_memory="1kB")  # without a GPU the option itself is dropped
    with (
        claimed_output(tmp_path / "out", False) as output,
        pytest.raises(InputError, match="memory are needed on cpu and gpu_memory allows 1 kB"),
    ):
        job.run(output)
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_checkpoint_counts_what_is_held_out(tmp_path, monkeypatch):
    source, text = save_folder(tmp_path / "model", build("llama")), tmp_path / "text.txt"
    text.write_text("w2 w3 w4 w5 " * 400)
    monkeypatch.setattr(llm_surgeon.planning.plan, "matmul_rate", lambda *_: 2.0)
    job = PruneJob(source, PruneConfig(samples=2, seqlen=8, shots=1), calibration=str(text))
    assert len(job.windows.held_out.input_ids) == 16
    without = make_plan(job.model, job.decoder, job.config).seconds
    forward = 2 * (WEIGHTS + 64 * 32) * 16 / (2.0 * llm_surgeon.planning.time._PASS_EFFICIENCY)
    samples = 3 * 4 * (4 + 4 // 2) // 8  # four passes over three prompts of four tokens, which grow
    assert job.plan.seconds == pytest.approx(without + 2 * (16 + samples) / 2 * forward)


def test_the_written_dtype_decides_the_disk():
    model = build("llama")
    decoder, config = find_decoder(model), PruneConfig(samples=4, seqlen=16)
    written = [
        make_plan(model, decoder, config, saved_dtype=dtype).disk_bytes
        for dtype in (None, torch.float32, torch.bfloat16)
    ]
    parameters = sum(p.numel() for p in model.parameters())
    assert written[0] == written[1] == written[2] + 2 * parameters


def test_a_recovery_takes_its_turn_in_memory_and_its_minutes(monkeypatch):
    model, config = build("llama"), PruneConfig(samples=8, seqlen=16, method="magnitude")
    decoder, held = find_decoder(model), 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(llm_surgeon.planning.plan, "matmul_rate", lambda device, dtype: 2.0)
    available = {"bytes": 10**12}
    monkeypatch.setattr(llm_surgeon.planning.memory, "available_memory", lambda device: available["bytes"])

    def plan(**options):
        recovery = RecoverConfig(**{"method": "full", "minutes": 2.0, "seqlen": 16, **options})
        return make_plan(model, decoder, config, recovery=recovery)

    without, roomy = make_plan(model, decoder, config), plan()
    assert (without.recovery_bytes, without.recovery_windows) == (0, 0)
    assert roomy.seconds == pytest.approx(without.seconds + 120.0)
    assert roomy.disk_bytes == 2 * without.disk_bytes
    assert roomy.additional_bytes == max(roomy.recovery_bytes, without.additional_bytes) == roomy.recovery_bytes
    assert roomy.by_kind()["or, beside the weights alone, recovery"] == roomy.recovery_bytes
    assert roomy.recovery_windows == 32  # those of a step
    few = plan(batch_size=1)
    assert few.recovery_bytes < roomy.recovery_bytes
    # Beside a batch: two moments, the best state, the teacher, and the gradients of the batches before it.
    available["bytes"] = int((held + roomy.recovery_bytes) / 0.92) + 2 - held
    assert plan().recovery_windows == 32
    available["bytes"] -= 4
    less = plan()
    assert less.recovery_windows == 16 and less.recovery_bytes < roomy.recovery_bytes
    available["bytes"] = 0
    assert plan().recovery_windows == 1 and plan(micro_batch_size=8).recovery_windows == 8


def peak_bytes(work):
    """The most bytes that ``work`` has allocated at once, by torch's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "rows-columns"},
        {"structure": "rows-columns", "checkpoint_activations": True, "batch_size": 2},
        {"structure": "2:4", "batch_size": 1, "max_iterations": 4},
        {"structure": "2:4", "batch_size": 1, "update": "sequential"},
        {"structure": "2:4", "batch_size": 4, "update": "sequential", "checkpoint_activations": True},
        {"structure": "2:4", "batch_size": 2, "update": "sequential", "samples": 24},  # hidden states count most
        {"structure": "2:4", "batch_size": 4, "update": "sequential", "gradient_steps": 1},
        {"structure": "2:4", "batch_size": 2, "update": "sequential", "gradient_steps": 1, "samples": 24},
    ],
)
def test_the_plan_is_within_a_tenth_of_the_peak(options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=3, **sizes))
    config = PruneConfig(**{"shots": 1, "samples": 4, "seqlen": 256, "gradient_steps": 0, **options})
    plan = make_plan(model, find_decoder(model), config)
    ids = torch.randint(0, 256, (config.samples, 256))
    # The copies to restore are made by a thread of their own, which the profiler does not see.
    peak = plan.weights_bytes + plan.snapshot_bytes + peak_bytes(lambda: prune(model, ids, config=config))
    assert plan.memory_bytes - plan.process_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, OPTForCausalLM])
@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "micro_batch_size": 1}, {"batch_size": 1}, {"ema": 0.9}])
def test_the_plan_of_a_recovery_is_within_a_tenth_of_its_peak(kind, options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 256}
    own = {"intermediate_size": 352} if kind is LlamaForCausalLM else {"ffn_dim": 352, "word_embed_proj_dim": 128}
    model, teacher = (kind(kind.config_class(**sizes, **own)) for _ in range(2))
    config = RecoverConfig(**{"method": "full", "seqlen": 256, "batch_size": 4, "steps": 3, "eval_every": 2, **options})
    pruning = PruneConfig(method="magnitude", samples=1, seqlen=256)
    plan = make_plan(model, find_decoder(model), pruning, recovery=config)
    windows = torch.randint(0, 256, (8, 256))
    weights = sum(p.nbytes for p in model.parameters())
    peak = weights + peak_bytes(lambda: recover(model, windows, windows[:2], teacher=teacher, config=config))
    assert plan.recovery_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_model_of_16_bits_is_measured_as_its_float32_masters_train(name):
    masters, halves = build(name), build(name).to(torch.bfloat16)
    before = torch.get_rng_state()
    kept = [measure_training(m, find_decoder(m), 64, torch.bfloat16) for m in (masters, halves)]
    assert kept[1] == pytest.approx(kept[0], rel=0.02)
    assert kept[0] < measure_training(masters, find_decoder(masters), 64, None)
    assert torch.equal(torch.get_rng_state(), before) and halves.training == build(name).training
