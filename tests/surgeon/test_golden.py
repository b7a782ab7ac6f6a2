"""The same seeds give the same masks and weights as the rows on record, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.surgeon.golden import cases, hashes, label, machine, recorded


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def name(case: dict[str, Any]) -> str:
    return " ".join(filter(None, label(case).values()))


def test_every_case_has_a_name_of_its_own() -> None:
    names = [name(case) for case in cases()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", cases(), ids=name)
@pytest.mark.parametrize("model", ["llama", "opt"])
def test_a_run_leaves_what_is_on_record(model: str, case: dict[str, Any]) -> None:
    row = recorded(model, case)
    if row is None:
        pytest.skip(f"no row for {machine()}: other versions round sums in another order")
    assert hashes(model, case).items() <= row.items()
