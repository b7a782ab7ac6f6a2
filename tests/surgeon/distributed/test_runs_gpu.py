"""Runs of two GPUs leave what the same runs leave on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.surgeon.distributed.runs import MORE_NAMES, NAMES, carry_out, launch, require_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_runs_of_two_gpus_are_those_of_one(tmp_path: Path) -> None:
    ranks = launch(2, "tests.surgeon.distributed.runs", str(tmp_path / "results.pt"), "cuda")
    told = [rank.communicate(timeout=500)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    results = torch.load(tmp_path / "results.pt")
    for model, run in NAMES + MORE_NAMES:
        require_equal(results[f"{model} {run}"], carry_out(model, run, device=torch.device("cuda")))
