"""Gradient steps on a CUDA device, in bfloat16 passes of a float32 model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_surgeon import prune
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.methods.step_objective import StepObjective
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.dense_weights import DenseWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=100)


def windows(count: int, seed: int = 0) -> torch.Tensor:
    """Sequences that count."""
    start = torch.randint(100, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(40)) % 100


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(CONFIG).float().eval().cuda()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10.0)
    return built


@pytest.mark.parametrize("target", ["dense", "labels"])
def test_bfloat16_passes_have_nearly_the_same_gradients(target):
    pruned = model()
    decoder, data = find_decoder(pruned), Calibration(windows(12))
    dense = DenseWeights(decoder) if target == "dense" else None
    for linear in decoder.linears:
        linear.write(1.2 * linear.matrix())
    exact, rounded = (StepObjective(pruned, decoder, 6, dense=dense, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert rounded.mean(data) == pytest.approx(exact.mean(data), rel=0.05)
    expected = exact.gradients(data)
    for name, gradient in rounded.gradients(data).items():
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - expected[name]).norm() < 0.2 * expected[name].norm(), name


@pytest.mark.parametrize("compute_dtype", ["auto", "float32"])
def test_steps_after_a_sequential_update_lower_the_divergence(compute_dtype):
    pruned = model()
    decoder = find_decoder(pruned)
    dense, others = DenseWeights(decoder), Calibration(windows(12, seed=3))
    prune(pruned, windows(64), structure="2:4", update="sequential", gradient_steps=0)
    before = StepObjective(pruned, decoder, 12, dense=dense).mean(others)
    stepped = model()
    decoder = find_decoder(stepped)
    dense = DenseWeights(decoder)
    options = {"update": "sequential", "gradient_steps": 2, "compute_dtype": compute_dtype}
    report = prune(stepped, windows(64), structure="2:4", step_windows=windows(8, seed=2), **options)
    steps = report.shots[0].gradient_steps
    assert steps[0].length > 0.0 and steps[-1].loss_after < steps[0].loss_before
    assert StepObjective(stepped, decoder, 12, dense=dense).mean(others) < before
    for linear in decoder.linears:
        assert bool(((linear.weight == 0.0).unflatten(1, (-1, 4)).sum(dim=2) == 2).all())
