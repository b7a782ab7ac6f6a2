"""Runs of two and three processes leave what the same runs leave in one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.surgeon.distributed.runs import MORE_NAMES, NAMES, carry_out, require_equal, start

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX's")


def test_masks_are_the_same_and_weights_to_the_order_of_sums(tmp_path: Path) -> None:
    """All at once: processes that import everything are what costs."""
    process = start("tests.surgeon.distributed.runs", str(tmp_path), "2", "3")
    alone = {f"{model} {run}": carry_out(model, run) for model, run in NAMES + MORE_NAMES}
    told = process.communicate(timeout=500)[1]
    files = {count: tmp_path / f"{count}.pt" for count in (2, 3)}
    assert all(file.exists() for file in files.values()), told[-4000:]
    wrong = []
    for count, file in files.items():
        results = torch.load(file)
        assert len(results) == len(NAMES) + len(MORE_NAMES) * (count == 2)
        for name, found in results.items():
            try:
                require_equal(found, alone[name])
            except AssertionError as error:
                wrong.append(f"{name} of {count}: {error}")
    assert not wrong, "\n".join(wrong)
