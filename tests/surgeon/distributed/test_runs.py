"""Runs of two and three processes leave what the same runs leave in one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tests.surgeon.distributed.runs import MORE_NAMES, NAMES, carry_out, launch, require_equal


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What became of all runs of so many ranks, which are started once."""

    @cache
    def results(count: int) -> dict[str, Any]:
        file = tmp_path_factory.mktemp("ranks") / "results.pt"
        ranks = launch(count, "tests.surgeon.distributed.runs", str(file), "cpu")
        told = [rank.communicate(timeout=300)[1] for rank in ranks]
        return torch.load(file) if file.exists() else {"told": told}

    return results


@cache
def alone(model: str, run: str) -> dict[str, Any]:
    return carry_out(model, run)


CASES = [(2, *names) for names in NAMES + MORE_NAMES] + [(3, *names) for names in NAMES]


@pytest.mark.parametrize(("count", "model", "run"), CASES)
def test_masks_are_the_same_and_weights_to_the_order_of_sums(
    shared: Callable[[int], dict[str, Any]], count: int, model: str, run: str
) -> None:
    results, name = shared(count), f"{model} {run}"
    assert name in results, results.get("told")
    found, expected = results[name], alone(model, run)
    require_equal(found, expected)
