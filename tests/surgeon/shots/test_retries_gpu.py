"""Runs on a GPU go on offloaded where an update finds no memory, and with half the batch where a pass finds none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_surgeon import prune
from llm_surgeon.methods import sequential
from llm_surgeon.shots import run as shots_run
from tests.surgeon.shots.test_resume import HELD_OUT, TOKENS
from tests.surgeon.shots.test_retries import Failing, masks
from tests.surgeon.tiny_models import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("kept", [False, True])
def test_an_update_that_does_not_fit_goes_on_offloaded(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = build("llama").cuda(), build("llama").cuda()
    prune(plain, TOKENS, held_out=HELD_OUT)
    monkeypatch.setattr(sequential, "remove_and_compensate", Failing(9))
    report = prune(model, TOKENS, held_out=HELD_OUT, checkpoint=tmp_path / "states" if kept else None)
    assert report.config["offload"] == "cpu" and any("GPU memory ran out" in warning for warning in report.warnings)
    assert all(parameter.is_cuda for parameter in model.parameters())
    agreed = [(one == other).float().mean() for one, other in zip(masks(model), masks(plain), strict=True)]
    assert min(agreed) > 0.99


def test_capture_goes_on_with_half_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = build("llama").cuda(), build("llama").cuda()
    # In float32, as batches of other sizes are rounded to 16 bits otherwise.
    options = {"batch_size": 4, "compute_dtype": "float32", "update": "joint"}
    prune(plain, TOKENS, **options)
    estimate = shots_run.estimate_curvature

    def small(*arguments, batch_size, **options):
        if batch_size > 2:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")  # a real one
        return estimate(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(shots_run, "estimate_curvature", small)
    report = prune(model, TOKENS, **options)
    assert "GPU memory ran out in a pass over 4 windows at once: the run goes on with 2." in report.warnings
    agreed = [(one == other).float().mean() for one, other in zip(masks(model), masks(plain), strict=True)]
    assert min(agreed) > 0.99
