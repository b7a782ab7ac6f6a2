"""Traces that training must not leave: in the model, in its checkpoint, and in the process."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch

from llm_surgeon import prune, prune_checkpoint
from llm_surgeon.errors import InputError
from llm_surgeon.jobs.recover import recover_checkpoint
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.recovery import training
from llm_surgeon.recovery.recover import recover
from tests.surgeon.half_zero import HELD_OUT, OPTIONS, WINDOWS, half_zero, weights
from tests.surgeon.tiny_models import build


def traces(model):
    """Everything about a model but its weights, and the state of the process."""
    return {
        "use_cache": (model.config.use_cache, model.config.to_json_string(), model.generation_config.to_json_string()),
        "modules": [(name, type(m), sorted(vars(m)), m.training) for name, m in model.named_modules()],
        "hooks": [
            len(h) for m in model.modules() for k, h in vars(m).items() if k.endswith("_hooks") and h is not None
        ],
        "parameters": [(name, p.requires_grad, p.grad, p.dtype) for name, p in model.named_parameters()],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "environment": dict(os.environ),
        "random": (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


def some_model():
    model = half_zero("llama").train()
    model.model.layers[1].eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", ["lora", "full", "prune"])
def test_model_and_process_are_left_as_they_were(method, fails, monkeypatch):
    model = some_model()
    before, weights = traces(model), [linear.matrix().clone() for linear in find_decoder(model).linears]
    if fails:
        monkeypatch.setattr(training._Training, "_evaluate", lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))

    def run():
        if method == "prune":
            prune(model, WINDOWS[:8], structure="2:4", method="magnitude", lora_rank=2, lora_steps=2)
        else:
            recover(model, WINDOWS, HELD_OUT, method=method, **OPTIONS)

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            run()
    else:
        run()
        linears = find_decoder(model).linears
        assert not all(torch.equal(linear.matrix(), old) for linear, old in zip(linears, weights, strict=True))
    after = traces(model)
    for name, value in before.items():
        assert after[name] == value, name


@pytest.mark.parametrize("use_cache", [True, False])
def test_use_cache_of_checkpoints_is_what_it_was(folders, use_cache):
    source, out, data = folders
    config = json.loads((source / "config.json").read_text()) | {"use_cache": use_cache}
    (source / "config.json").write_text(json.dumps(config))
    pruned = out.with_name("lora")
    options = {"calibration": data, "samples": 4, "seqlen": 16, "device": "cpu", "method": "magnitude"}
    prune_checkpoint(source, pruned, **options, lora_rank=2, lora_steps=2)
    recover_checkpoint(pruned, out, data=data, device="cpu", seqlen=16, **OPTIONS)
    for folder in (pruned, out):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is use_cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_of_16_bits_are_corrected(name, dtype):
    model = half_zero(name).to(dtype)
    report = recover(model, WINDOWS, HELD_OUT, method="lora", **OPTIONS | {"learning_rate": 1e-2})
    assert report.loss_after < report.loss_before - 0.1
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model = build(name).to(dtype)
    report = prune(model, WINDOWS[:8], structure="2:4", method="magnitude", lora_rank=2, lora_steps=4)
    assert report.shots[0].correction_rank == 2 and report.sparsity == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_are_trained_in_float32_and_rounded_once(dtype):
    model, exact = half_zero("llama").to(dtype), half_zero("llama").to(dtype).float()
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    for each in (model, exact):
        report = recover(each, WINDOWS, HELD_OUT, method="full", learning_rate=1e-2, **OPTIONS)
        assert report.loss_after < report.loss_before - 0.1
    assert [parameter.data_ptr() for parameter in model.parameters()] == storage
    for parameter, wanted in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(parameter, wanted.to(dtype))


def test_ranks_that_no_layer_has_are_refused():
    with pytest.raises(InputError, match=r"^rank 100000 is more than the rank of every layer, at most 32$"):
        recover(build("llama"), WINDOWS, HELD_OUT, **OPTIONS | {"rank": 100_000})
    with pytest.raises(InputError, match=r"^lora_rank 33 is more than the rank of every layer, at most 32$"):
        prune(build("llama"), WINDOWS[:4], lora_rank=33)


def test_a_dense_model_is_trained_as_well():
    model = build("llama")
    report = recover(model, WINDOWS, HELD_OUT, method="full", learning_rate=1e-2, **OPTIONS)
    assert report.zeros == 0 and report.loss_after < report.loss_before - 0.1
    assert report.summary().endswith("no weight was or is zero")


def test_threads_that_train_give_what_each_gives_alone():
    def corrected(model):
        prune(model, WINDOWS[:8], structure="2:4", method="magnitude", lora_rank=2, lora_steps=3)
        return weights(model)

    def recovered(model):
        recover(model, WINDOWS, HELD_OUT, **OPTIONS | {"steps": 4})
        return weights(model)

    runs = [(corrected, "llama"), (recovered, "opt"), (corrected, "gpt2")]
    alone = [run(half_zero(name)) for run, name in runs]
    models = [half_zero(name) for _, name in runs]  # drawing their weights takes the process's random numbers
    with ThreadPoolExecutor(len(runs)) as threads:
        together = list(threads.map(lambda run, model: run(model), [run for run, _ in runs], models))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
