"""Tensors of batches that wait for their turn."""

import pytest
import torch

from llm_surgeon.models.batch_tensors import BatchTensors
from llm_surgeon.models.offload import PinnedMemory


@pytest.mark.parametrize("memory", [None, PinnedMemory()])
def test_every_batch_has_what_was_put_last(memory):
    kept = BatchTensors(torch.device("cpu"), memory)
    for batch in range(3):
        kept.put(batch, "x", torch.full((2, 2), float(batch)))
        kept.put(batch, "nested", {"parts": (torch.ones(3, dtype=torch.bfloat16), None, "text", torch.empty(0))})
    kept.put(1, "rare", torch.tensor(7.0))
    for batch, held in enumerate(kept.turns("x", "rare", "missing")):
        assert held.keys() == ({"x", "rare"} if batch == 1 else {"x"})
        assert torch.equal(held["x"], torch.full((2, 2), float(batch)))
        kept.put(batch, "x", held["x"] + 10.0)
    kept.drop(1, "rare")
    found = list(kept.turns("nested", "x", "rare"))
    assert [float(held["x"][0, 0]) for held in found] == [10.0, 11.0, 12.0]
    assert found[1].keys() == {"nested", "x"}
    assert torch.equal(found[2]["nested"]["parts"][0], torch.ones(3, dtype=torch.bfloat16))
    assert found[2]["nested"]["parts"][1:3] == (None, "text")
    kept.drop_all("nested")
    assert all(held.keys() == {"x"} for held in kept.turns("x", "nested"))


def test_main_memory_is_used_again():
    memory = PinnedMemory()
    kept = BatchTensors(torch.device("cpu"), memory)
    addresses = set()
    for number in range(5):
        for batch in range(2):
            kept.put(batch, "x", torch.full((4,), float(number)))
        addresses |= set(memory._used)
        assert [float(held["x"][0]) for held in kept.turns("x")] == [number, number]
    assert len(addresses) == 2


def test_values_are_where_they_were_without_main_memory():
    kept, x = BatchTensors(torch.device("cpu")), torch.ones(2)
    kept.put(0, "x", x)
    assert next(kept.turns("x"))["x"] is x
