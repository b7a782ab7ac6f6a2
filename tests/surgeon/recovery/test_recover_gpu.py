"""Recovery on a GPU."""

import pytest
import torch

from llm_surgeon import prune
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.recovery.objective import distillation_loss
from llm_surgeon.recovery.recover import recover
from llm_surgeon.recovery.zeros import zero_masks
from tests.surgeon.half_zero import HELD_OUT, OPTIONS, WINDOWS, half_zero
from tests.surgeon.recovery.test_traces import some_model, traces
from tests.surgeon.tiny_models import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "full", "prune"])
def test_model_and_process_are_left_as_they_were(method, dtype):
    model = some_model().to("cuda", dtype)
    before, gpu_random = traces(model), torch.cuda.get_rng_state()
    if method == "prune":
        prune(model, WINDOWS[:8], structure="2:4", method="magnitude", lora_rank=2, lora_steps=2)
    else:
        report = recover(model, WINDOWS, HELD_OUT, method=method, **OPTIONS | {"learning_rate": 1e-2})
        assert report.loss_after < report.loss_before - 0.1
    after = traces(model)
    for name, value in before.items():
        assert after[name] == value, name
    assert torch.equal(torch.cuda.get_rng_state(), gpu_random)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "natural"},
        {"ema": 0.9},
        {"block_weight": 1.0, "label_weight": 0.1},
        {"trial_steps": 4},
        {"minutes": 0.5},
    ],
    ids=str,
)
def test_distillation_comes_closer_to_the_teacher(options, dtype):
    """With bfloat16 products and float32 weights, from windows in main memory; every zero stays one."""
    model, teacher = half_zero("llama").to("cuda", dtype), build("llama").to("cuda", dtype)
    masks = zero_masks(find_decoder(model))

    def distance():
        with torch.no_grad():
            return float(distillation_loss(*(m(HELD_OUT.cuda()).logits.flatten(0, 1) for m in (model, teacher)), 1.0))

    far = distance()
    settings = OPTIONS | {"method": "full", "learning_rate": 1e-2, "eval_every": OPTIONS["steps"]} | options
    report = recover(model, WINDOWS, HELD_OUT, teacher=teacher, **settings)
    assert distance() < 0.9 * far and report.steps == OPTIONS["steps"]
    assert all(torch.equal(module.weight == 0, mask) for module, mask in masks.items())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_windows_may_lie_on_the_gpu():
    model = half_zero("llama").cuda()
    report = recover(model, WINDOWS.cuda(), HELD_OUT.cuda(), method="full", **OPTIONS | {"learning_rate": 1e-2})
    assert report.loss_after < report.loss_before - 0.1


def test_the_divergence_is_that_of_the_cpu():
    student, teacher = torch.randn(2, 300, 5000, generator=torch.Generator().manual_seed(0)).unbind()
    found = []
    for device in ("cpu", "cuda"):
        z = student.to(device).requires_grad_()
        loss = distillation_loss(z, teacher.to(device), 2.0)
        found.append((loss.cpu().detach(), torch.autograd.grad(loss, z)[0].cpu()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-8)
