"""Recovery on a GPU."""

import pytest
import torch

from llm_surgeon import prune
from llm_surgeon.recovery.recover import recover
from tests.surgeon.half_zero import HELD_OUT, OPTIONS, WINDOWS
from tests.surgeon.recovery.test_traces import some_model, traces

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
