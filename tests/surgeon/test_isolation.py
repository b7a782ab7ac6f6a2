"""A run computes the same, bit for bit, whatever its process is set to, and leaves all of that as it was."""

from __future__ import annotations

import contextlib
import os
import random
import threading

import numpy
import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

import llm_surgeon.isolation
from llm_surgeon import Calibration, perplexity, prune
from llm_surgeon.isolation import isolated
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.recovery.recover import recover
from tests.surgeon.tiny_models import VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
RUNS = [
    *(("2:4", {"method": method, "shots": 1}) for method in ("surgeon", "sparsegpt", "wanda", "magnitude")),
    *(("unstructured", {"method": method, "shots": 1}) for method in ("l-obd", "k-obd")),
    ("2:4", {"shots": 1, "kron_rank": 2}),
    ("2:4", {"shots": 1, "gradient_steps": 1}),
    ("2:4", {"shots": 1, "lora_rank": 1, "lora_steps": 1}),
    ("rows-columns", {"sparsity": 0.2, "shots": 1}),
    ("groups", {"sparsity": 0.3, "shots": 1}),
    ("groups", {"sparsity": 0.3, "shots": 1, "importance": "taylor1"}),
    ("layers", {"sparsity": 0.5}),
    ("width", {"sparsity": 0.25, "shots": 1}),  # last, for GPT-2 does not run at other widths
]
TWO_FOUR, GROUPS = RUNS[0], RUNS[10]


def with_dropout(name):
    """OPT or GPT-2 with their usual dropout and, for the width, a head of its own."""
    options = {"vocab_size": VOCABULARY, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
    if name == "opt":
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
        config = transformers.OPTConfig(
            **sizes, num_attention_heads=4, max_position_embeddings=64, dropout=0.1, attention_dropout=0.1, **options
        )
    else:
        config = transformers.GPT2Config(n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64, **options)
        assert config.resid_pdrop == config.attn_pdrop == config.embd_pdrop == 0.1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def pruned(model, run, tokens=TOKENS):
    structure, options = run
    prune(model, tokens, structure=structure, **options)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(x, y):
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize(
    "name, run",
    [(name, run) for name in ("opt", "gpt2") for run in RUNS if (name, run[0]) != ("gpt2", "width")],
    ids=str,
)
def test_dropout_of_a_model_in_training_mode_changes_nothing(name, run):
    training, evaluated = with_dropout(name).train(), with_dropout(name).eval()
    training.get_output_embeddings().eval()
    assert same(pruned(training, run), pruned(evaluated, run))
    flags = {name: module.training for name, module in training.named_modules()}
    assert not flags.pop("lm_head") and all(flags.values())
    assert not any(module.training for module in evaluated.modules())


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


SETTINGS = {
    "autocast": autocast,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


@pytest.mark.parametrize(
    "setting, run",
    [
        *((setting, TWO_FOUR) for setting in SETTINGS),
        *((setting, GROUPS) for setting in ("autocast", "inference mode")),
    ],
    ids=str,
)
def test_settings_outside_change_nothing(setting, run):
    model = build("llama")
    expected = pruned(build("llama"), run)
    with SETTINGS[setting]():
        tokens = TOKENS.clone() if setting != "default device" else TOKENS  # an inference tensor in inference mode
        prune(model, tokens, structure=run[0], **run[1])
    assert same(model.state_dict(), expected)


@pytest.mark.parametrize("setting", ["autocast", "inference mode", "default float64"])
def test_perplexity_and_recovery_are_those_without_settings(setting, tmp_path):
    model, plain = build("llama"), build("llama")
    ways = {"steps": 2, "batch_size": 2, "eval_every": 2, "warmup_steps": 0, "rank": 2}
    expected = perplexity(plain, TOKENS)
    recover(plain, TOKENS, TOKENS[:2], **ways)
    with SETTINGS[setting]():
        assert perplexity(model, TOKENS) == expected
        recover(model, TOKENS, TOKENS[:2], **ways)
    assert same(model.state_dict(), plain.state_dict())


def test_autocast_outside_does_not_keep_weights_from_before():
    model = build("llama").requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(TOKENS)  # its weights are cast, and kept so
        prune(model, TOKENS, structure="2:4", method="magnitude")
        now = model(TOKENS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(now, model(TOKENS).logits)


def state_of_the_process():
    backends = torch.backends
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": numpy.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": (torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
        "cudnn": (backends.cudnn.deterministic, backends.cudnn.benchmark),
        "gradients": torch.is_grad_enabled(),
        "anomalies": torch.is_anomaly_enabled(),
        "verbosity": (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()),
        "rotary": modeling_llama.apply_rotary_pos_emb,
        "initialisers": [nn.init.normal_, nn.init.zeros_, nn.init.kaiming_uniform_],
    }


@pytest.mark.parametrize("run", [TWO_FOUR, RUNS[8], GROUPS, *RUNS[-2:]], ids=str)
def test_random_states_and_settings_of_the_process_are_kept(run):
    before = state_of_the_process()
    model = build("llama")
    assert state_of_the_process() == before
    pruned(model, run)
    assert state_of_the_process() == before
    with contextlib.suppress(KeyboardInterrupt), isolated():
        torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
        raise KeyboardInterrupt
    assert state_of_the_process() == before


def test_threads_prune_one_after_the_other():
    """Different models of one class, a part of which is replaced for all of them, and a correction that is trained."""
    runs = [("2:4", {"shots": 1}), ("2:4", {"shots": 1, "lora_rank": 1, "lora_steps": 1}), GROUPS]
    models = [build("llama", seed=seed) for seed in range(len(runs))]
    expected = [pruned(build("llama", seed=seed), run) for seed, run in enumerate(runs)]
    rotary = modeling_llama.apply_rotary_pos_emb
    found: dict[int, dict] = {}
    begin = threading.Barrier(len(runs))

    def work(index):
        begin.wait()
        found[index] = pruned(models[index], runs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[index], expected[index]) for index in range(len(runs)))
    assert modeling_llama.apply_rotary_pos_emb is rotary
    torch.manual_seed(0)
    first = transformers.LlamaForCausalLM(models[0].config).state_dict()
    torch.manual_seed(0)
    assert same(first, transformers.LlamaForCausalLM(models[0].config).state_dict())


def test_a_run_inside_a_run_does_not_wait_for_itself():
    model = build("llama")
    with isolated():
        prune(model, TOKENS, method="magnitude")
    assert mean_loss(model, Calibration(TOKENS), 4) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_thread_of_its_parent():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with isolated():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if llm_surgeon.isolation._lock.acquire(timeout=5) else 1)
    _, status = os.waitpid(child, 0)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
