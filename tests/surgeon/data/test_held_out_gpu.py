"""Held-out losses and latencies of runs on a GPU."""

import pytest
import torch

from llm_surgeon import Calibration, prune
from llm_surgeon.models.passes import mean_loss
from tests.surgeon.tiny_models import VOCABULARY, build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TOKENS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
APART = torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "home, options",
    [
        ("cuda", {"structure": "2:4"}),
        ("cuda", {"structure": "groups", "sparsity": 0.3}),
        ("cuda", {"structure": "layers", "sparsity": 0.5}),
        ("cuda", {"structure": "2:4", "offload": "cpu"}),
        ("cpu", {"structure": "2:4", "offload": "cpu"}),
    ],
)
def test_held_out_losses_are_those_of_the_dense_and_of_the_pruned_model(home, options):
    model = build("llama").to(home)
    before = mean_loss(model, Calibration(APART), 4)
    report = prune(model, TOKENS, held_out=APART, **options)
    assert all(parameter.device.type == home for parameter in model.parameters())
    assert report.held_out.loss_before == pytest.approx(before, rel=1e-3)
    assert report.held_out.loss_after == pytest.approx(mean_loss(model, Calibration(APART), 4), rel=1e-3)


def test_a_smaller_model_is_timed_beside_the_dense_one():
    model = build("llama").to("cuda")
    report = prune(model, TOKENS, structure="groups", sparsity=0.3, shots=1)
    for state in report.sizes.values():
        assert 0 < state["seconds_low"] <= state["seconds"] <= state["seconds_high"]
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert report.peak_memory_bytes > 0
