"""What is said of a rank that does not answer, and of this one's own errors."""

from __future__ import annotations

import pytest
import torch

from llm_surgeon.distributed.group import _heard
from llm_surgeon.errors import RankError


def test_a_rank_that_does_not_answer_is_told_of_with_the_reason() -> None:
    with pytest.raises(RankError, match=r"has ended, and the run with it \(Connection closed by peer\)$"), _heard():
        raise RuntimeError("Connection closed by peer\nException raised from ...")


@pytest.mark.parametrize("name", ["OutOfMemoryError", "AcceleratorError"])
def test_an_error_of_this_ranks_own_device_stays_what_it_is(name: str) -> None:
    if not hasattr(torch, name):
        pytest.skip(f"this PyTorch has no {name}")
    error = getattr(torch, name)
    with pytest.raises(error, match=r"^CUDA error$"), _heard():
        raise error("CUDA error")
