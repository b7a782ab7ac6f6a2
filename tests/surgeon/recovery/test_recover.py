import math

import pytest
import torch
import torch.nn.functional as F

from llm_surgeon import prune
from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.errors import InputError
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.recovery.lora import low_rank_corrections
from llm_surgeon.recovery.objective import distillation_loss
from llm_surgeon.recovery.recover import recover
from llm_surgeon.recovery.zeros import zero_masks
from llm_surgeon.structures.remove.rows_columns import compact
from tests.surgeon.half_zero import HELD_OUT, OPTIONS, WINDOWS, half_zero, weights
from tests.surgeon.tiny_models import VOCABULARY, build


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_lowers_the_loss_and_keeps_every_zero(name, method):
    model = half_zero(name)
    before, masks = weights(model), zero_masks(find_decoder(model))
    modules = [type(module) for module in model.modules()]
    report = recover(model, WINDOWS, HELD_OUT, method=method, learning_rate=1e-2, **OPTIONS)
    assert report.loss_after < report.loss_before - 0.1
    assert report.zeros == sum(int(mask.sum()) for mask in masks.values()) > 0
    for module, mask in masks.items():
        assert torch.equal(module.weight == 0, mask)
    assert [type(module) for module in model.modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    linears = {f"{linear.name}.weight" for linear in find_decoder(model).linears}
    assert moved == linears if method == "lora" else moved >= linears


def test_a_correction_is_absorbed_as_it_was_trained():
    """The corrected model's output is the absorbed model's, and the absorbed correction is masked and low-rank."""
    model = half_zero("llama")
    before = weights(model)
    decoder = find_decoder(model)
    with low_rank_corrections(model, decoder, rank=3, alpha=6.0, dropout=0.0) as corrected:
        for name, parameter in corrected.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        factors = {n: p.detach().clone() for n, p in corrected.named_parameters() if "lora_" in n}
        seen = corrected(WINDOWS[:2]).logits
    torch.testing.assert_close(model(WINDOWS[:2]).logits, seen, rtol=1e-4, atol=1e-4)
    linear = decoder.linears[3]
    A = next(p for n, p in factors.items() if linear.name in n and "lora_A" in n)
    B = next(p for n, p in factors.items() if linear.name in n and "lora_B" in n)
    old = before[f"{linear.name}.weight"]
    torch.testing.assert_close(linear.module.weight, old + 2.0 * (B @ A) * (old != 0))


def test_a_failed_training_leaves_the_model_uncorrected():
    model = half_zero("llama")
    before = weights(model)
    with pytest.raises(RuntimeError, match="stop"), low_rank_corrections(model, find_decoder(model), 2, 2.0, 0.0):
        raise RuntimeError("stop")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_distillation_comes_closer_to_the_teacher():
    model, teacher = half_zero("llama"), build("llama")
    before = weights(teacher)

    def distance():
        with torch.no_grad():
            return distillation_loss(model(HELD_OUT).logits.flatten(0, 1), teacher(HELD_OUT).logits.flatten(0, 1), 1.0)

    far = distance()
    options = OPTIONS | {"eval_every": OPTIONS["steps"]}  # a random teacher predicts the held-out tokens badly
    recover(model, WINDOWS, HELD_OUT, teacher=teacher, method="full", learning_rate=1e-2, **options)
    assert distance() < 0.8 * far
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_loss_is_the_divergence(temperature):
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64).unbind()
    p, q = (F.softmax(x / temperature, -1) for x in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(
        distillation_loss(student, teacher, temperature).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_the_best_state_is_kept_and_training_stops_early():
    model = half_zero("llama")
    options = OPTIONS | {"steps": 40, "eval_every": 2, "patience": 2, "warmup_steps": 0}
    report = recover(model, WINDOWS[:4], HELD_OUT, method="full", learning_rate=0.3, **options)
    held_out = [entry["eval_loss"] for entry in report.log if "eval_loss" in entry]
    assert len(held_out) < 20
    assert math.isclose(report.loss_after, min(held_out), rel_tol=1e-4)


def test_the_learning_rate_rises_and_falls_along_a_cosine():
    options = OPTIONS | {"steps": 20, "eval_every": 1, "warmup_steps": 4, "patience": 100}
    report = recover(half_zero("llama"), WINDOWS, HELD_OUT, learning_rate=1e-3, **options)
    rates = {int(entry["step"]): entry["learning_rate"] for entry in report.log if "learning_rate" in entry}
    assert sorted(rates) == list(range(1, 21))
    for step, rate in rates.items():  # of the step that was made
        done = step - 1
        share = done / 4 if done < 4 else 0.5 * (1 + math.cos(math.pi * (done - 4) / 16))
        assert rate == pytest.approx(1e-3 * share, abs=1e-9)


@pytest.mark.parametrize("structure", ["2:4", "unstructured", "groups"])
def test_every_structure_is_recovered(structure):
    """By distillation from the dense model, what prune() has just left."""
    model, dense = build("llama"), build("llama")
    prune(model, WINDOWS, structure=structure, shots=1, gradient_steps=0)
    zeros = [linear.module.weight == 0 for linear in find_decoder(model).linears]
    report = recover(model, WINDOWS, WINDOWS[:8], teacher=dense, method="full", learning_rate=1e-3, **OPTIONS)
    assert [entry["step"] for entry in report.log if "loss" in entry] == [4, 8, 12]
    losses = [entry["loss"] for entry in report.log if "loss" in entry]
    assert losses[-1] < losses[0]
    after = [linear.module.weight == 0 for linear in find_decoder(model).linears]
    assert all(map(torch.equal, after, zeros))
    assert report.zeros == sum(int(zero.sum()) for zero in zeros) and (report.zeros > 0) == (structure != "groups")


def test_refusals():
    model, frozen = build("llama"), build("llama").requires_grad_(False)
    with pytest.raises(InputError, match="frozen"):
        recover(frozen, WINDOWS, HELD_OUT)
    quantized = build("llama")
    quantized.is_quantized = True
    with pytest.raises(InputError, match="quantized"):
        recover(quantized, WINDOWS, HELD_OUT)
    with pytest.raises(InputError, match="unknown option 'stepz'"):
        recover(model, WINDOWS, HELD_OUT, stepz=3)
    with pytest.raises(InputError, match="batch_size 4 is not divisible by micro_batch_size 3"):
        recover(model, WINDOWS, HELD_OUT, batch_size=4, micro_batch_size=3)
    with pytest.raises(InputError, match="unknown preset"):
        RecoverConfig.from_mapping({"preset": "none"})
    small = build("llama")
    small.resize_token_embeddings(VOCABULARY - 8)
    with pytest.raises(InputError, match=f"teacher has a vocabulary of {VOCABULARY - 8}, the model of {VOCABULARY}"):
        recover(model, WINDOWS, HELD_OUT, teacher=small)


def test_preset_is_the_papers_and_gives_way_to_options():
    config = RecoverConfig.from_mapping({"preset": "llm-pruner"})
    assert (config.method, config.rank, config.alpha, config.dropout) == ("lora", 8, 16.0, 0.05)
    assert (config.learning_rate, config.batch_size, config.seqlen, config.warmup_steps) == (1e-4, 64, 256, 100)
    assert config.steps * config.batch_size == pytest.approx(2 * 49_600, rel=0.01)  # epochs of cleaned Alpaca
    config = RecoverConfig.from_mapping({"preset": "llm-pruner", "steps": 7, "warmup_steps": 1})
    assert (config.rank, config.alpha, config.learning_rate, config.steps) == (8, 16.0, 1e-4, 7)


def test_a_compact_model_is_not_trained():
    model = build("llama")
    prune(model, WINDOWS[:4], structure="rows-columns", sparsity=0.4, shots=1)
    compact(model)
    with pytest.raises(InputError, match="the model is compact: recover the checkpoint it was made from"):
        recover(model, WINDOWS, HELD_OUT)
